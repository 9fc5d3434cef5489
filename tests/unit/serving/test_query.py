from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimco_deploy.errors import BundleError, ConfigError, ImageError
from mimco_deploy.serving import Filter, ImageIndex, Part, search_image, update_index
from mimco_deploy.serving.background import background_of, in_words
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.generations import current_generation
from mimco_deploy.serving.query import query_embedding, query_pixels
from mimco_deploy.serving.why import explain
from tests.helpers import SIDE, CountingEncoder, Embeddings, Images, gallery, noise, save, tiny_spec
from tests.unit.serving.place import COUNT


@pytest.fixture
def index(workspace: Path) -> ImageIndex:
    return ImageIndex.open(workspace / "index")


def picture(seed: int) -> Images:
    return np.asarray(noise(seed))


# ---------------------------------------------------------------------- what is searched with


def test_bytes_are_searched_like_the_file(index: ImageIndex, workspace: Path) -> None:
    path = workspace / "photos/0007.png"
    assert search_image(index, CountingEncoder(), [Part(path.read_bytes())], 5) == search_image(
        index, CountingEncoder(), path, 5
    )


@pytest.mark.parametrize("crop", [(32, 0, 32, 32), (0.5, 0.0, 0.5, 1.0)])
def test_a_crop_is_searched_in_pixels_and_in_shares(
    index: ImageIndex, tmp_path: Path, crop: tuple[float, float, float, float]
) -> None:
    both = Image.new("RGB", (64, 32))
    both.paste(noise(3), (0, 0))
    both.paste(noise(9), (32, 0))
    both.save(tmp_path / "both.png")
    (hit,) = search_image(index, CountingEncoder(), [Part(tmp_path / "both.png", crop=crop)], 1)
    assert hit.path.name == "0009.png"
    assert hit.score > 0.9999


@pytest.mark.parametrize("crop", [(64, 0, 5, 5), (0, 0, 0, 5), (0.999, 0.999, 0.0, 0.0)])
def test_a_crop_of_nothing_is_refused(tmp_path: Path, crop: tuple[float, float, float, float]) -> None:
    path = save(tmp_path / "a.png", 0)
    with pytest.raises(ConfigError, match="holds nothing of 32 × 32 pixels"):
        query_pixels(Part(path, crop=crop), tiny_spec())


def test_a_crop_that_reaches_over_the_edge_is_cut_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 0)
    assert np.array_equal(
        query_pixels(Part(path, crop=(16, 16, 100, 100)), tiny_spec()),
        query_pixels(Part(path, crop=(16, 16, 16, 16)), tiny_spec()),
    )


def test_several_pictures_are_one_weighted_sum(index: ImageIndex, workspace: Path) -> None:
    encoder = CountingEncoder()
    parts = [Part(workspace / "photos/0001.png"), Part(workspace / "photos/0002.png", 2.0)]
    parts.append(Part(workspace / "photos/0003.png", -0.5))
    embeddings = encoder.embed(np.stack([picture(seed) for seed in (1, 2, 3)])).astype(np.float64)
    expected = embeddings[0] + 2 * embeddings[1] - 0.5 * embeddings[2]
    found = query_embedding(index, encoder, parts)
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-6)
    assert encoder.batches[-1] == 3, "all of them in one step"
    with pytest.raises(ConfigError, match="cancel each other"):
        query_embedding(index, encoder, [parts[0], Part(workspace / "photos/0001.png", -1.0)])
    for weight in (3e19, -1e39, 100.5, float("nan")):
        with pytest.raises(ConfigError, match="has the weight"):
            query_embedding(index, encoder, [parts[0], Part(workspace / "photos/0002.png", weight)])


def test_a_file_that_is_gone_is_taken_from_the_index(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "photos", tmp_path / "photos")
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    (tmp_path / "photos/0004.png").unlink()
    encoder = CountingEncoder()
    with ImageIndex.open(tmp_path / "index") as index:
        hits = search_image(index, encoder, tmp_path / "photos/0004.png", 3)
        assert hits[0].path == tmp_path / "photos/0004.png"
        assert encoder.batches == [], "nothing was embedded"
        with pytest.raises(ImageError, match="does not exist"):
            search_image(index, encoder, tmp_path / "photos/none.png", 3)
        with pytest.raises(ImageError, match="does not exist"):  # a part of what is gone is gone
            search_image(index, encoder, [Part(tmp_path / "photos/0004.png", crop=(0, 0, 1, 1))], 3)


def test_hits_below_a_score_are_left_out(index: ImageIndex, workspace: Path) -> None:
    every = search_image(index, CountingEncoder(), workspace / "photos/0000.png", COUNT)
    least = every[9].score
    kept = search_image(index, CountingEncoder(), workspace / "photos/0000.png", COUNT, min_score=least)
    assert kept == every[:10]


def test_queries_asked_together_are_answered_as_if_alone(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimco_deploy.serving.index._AT_ONCE", 3)
    queries = CountingEncoder().embed(np.stack([picture(seed) for seed in (0, 500, 1, 501, 2, 502, 3)]))
    least = index.search(queries[1], 4)[-1].score
    found = index.search_many(queries, 10, min_score=least)
    assert found == [[hit for hit in index.search(query, 10) if hit.score >= least] for query in queries]
    assert len(found[1]) == 4
    assert len({len(hits) for hits in found}) > 1, "or every query has as many that score enough"


# ---------------------------------------------------------------------- how unusual a score is


def test_a_picture_of_the_index_stands_out_and_a_new_one_does_not(index: ImageIndex) -> None:
    encoder = CountingEncoder()
    own = [index.search(encoder.embed(picture(seed)[np.newaxis])[0], 1)[0] for seed in range(20)]
    assert all(hit.confidence is not None and hit.confidence > 0.99 for hit in own)
    strange = [index.search(encoder.embed(picture(1000 + seed)[np.newaxis])[0], 1)[0] for seed in range(40)]
    assert np.median([hit.expected_by_chance or 0 for hit in strange]) >= 0.5, "as many as chance would give"
    for hit in own + strange:
        assert hit.expected_by_chance is not None
        assert 0 <= hit.expected_by_chance <= COUNT
        assert hit.confidence == 1 / (1 + hit.expected_by_chance)


def test_what_is_expected_falls_as_scores_rise(index: ImageIndex) -> None:
    hits = index.search(CountingEncoder().embed(picture(500)[np.newaxis])[0], COUNT)
    expected = [hit.expected_by_chance or 0.0 for hit in hits]
    assert expected == sorted(expected)
    assert expected[-1] == COUNT


def test_what_is_expected_counts_the_pictures_that_were_searched(index: ImageIndex) -> None:
    query = CountingEncoder().embed(picture(500)[np.newaxis])[0]
    (whole,) = [hit for hit in index.search(query, COUNT) if hit.path.name == "0005.png"]
    (part,) = index.search(query, 5, Filter("name = '0005.png'"))
    assert part.score == whole.score
    assert part.expected_by_chance == pytest.approx((whole.expected_by_chance or 0) / COUNT)


def test_few_pictures_say_nothing_about_chance(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 5)
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    with ImageIndex.open(tmp_path / "index") as index:
        (hit,) = index.search(CountingEncoder().embed(picture(0)[np.newaxis])[0], 1)
    assert hit.expected_by_chance is hit.confidence is None
    assert in_words(hit.confidence) == ""


def test_an_encoder_that_sees_no_difference_is_never_confident(tmp_path: Path) -> None:
    class Blind(CountingEncoder):
        def embed(self, images: Images) -> Embeddings:
            return np.tile(super().embed(picture(0)[np.newaxis]), (len(images), 1))

    gallery(tmp_path / "photos", 50)
    update_index(tmp_path / "index", [tmp_path / "photos"], Blind())
    with ImageIndex.open(tmp_path / "index") as index:
        hits = index.search(Blind().embed(picture(3)[np.newaxis])[0], 5)
    assert all(hit.confidence is not None and hit.confidence < 0.1 for hit in hits)


def test_the_background_is_measured_again_when_the_index_has_grown(tmp_path: Path) -> None:
    def rows() -> int:
        with Catalog(current_generation(tmp_path / "index").catalog) as catalog, catalog.snapshot():
            return int(json.loads(catalog.setting("background") or "{}").get("rows", 0))

    seen = []
    for count in (30, 50, 55, 70):
        gallery(tmp_path / "photos", count)
        update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
        seen.append(rows())
    assert seen == [0, 50, 50, 70]
    for path in sorted((tmp_path / "photos").iterdir())[39:]:
        path.unlink()
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    assert rows() == 0, "too few are left to tell"


def test_the_background_is_measured_again_when_its_pictures_are_gone(tmp_path: Path) -> None:
    index, photos = tmp_path / "index", tmp_path / "photos"
    gallery(photos, 100)
    update_index(index, [photos], CountingEncoder())
    for number in range(55):
        (photos / f"{number:04d}.png").unlink()
    update_index(index, [], CountingEncoder())
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        background = background_of(catalog)
        assert background is not None
        assert not np.isin(background.reference, catalog.dead_rows()).any()


@pytest.mark.parametrize(
    ("confidence", "word"), [(1.0, "clear"), (0.99, "clear"), (0.9, "likely"), (0.5, "unsure"), (0.49, "chance")]
)
def test_a_confidence_has_a_word(confidence: float, word: str) -> None:
    assert in_words(confidence) == word


# ---------------------------------------------------------------------- why


class PatchEncoder(CountingEncoder):
    """Patch tokens are the mean colours of a grid of 4 × 4."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = tiny_spec()
        object.__setattr__(self.spec, "patch_grid", 4)

    def embed_with_patches(self, images: Images) -> tuple[Embeddings, Embeddings]:
        cell = SIDE // 4
        cells = images.reshape(len(images), 4, cell, 4, cell, 3).mean(axis=(2, 4)) - 127.5
        return self.embed(images), cells.reshape(len(images), 16, 3).astype(np.float32)


def with_square(folder: Path, name: str, at: tuple[int, int]) -> Path:
    canvas = Image.new("RGB", (SIDE, SIDE), (0, 255, 0))
    canvas.paste((255, 0, 0), (*at, at[0] + 8, at[1] + 8))
    canvas.save(folder / name)
    return folder / name


def test_the_parts_that_are_alike_are_the_warm_ones(tmp_path: Path) -> None:
    query = with_square(tmp_path, "query.png", (0, 0))
    blue = Image.new("RGB", (SIDE, SIDE), (0, 0, 255))
    blue.paste((255, 0, 0), (16, 24, 24, 32))
    blue.save(tmp_path / "hit.png")
    (reason,) = explain(PatchEncoder(), Part(query), [tmp_path / "hit.png"])
    assert reason is not None
    assert reason.query_heat.argmax() == 0
    assert reason.hit_heat.argmax() == 3 * 4 + 2, "row 3, column 2"
    assert reason.query_heat.max() == pytest.approx(1.0, abs=1e-4)
    assert -1 <= reason.score <= 1


def test_a_picture_is_wholly_like_itself_and_a_hit_that_is_gone_has_no_reason(tmp_path: Path) -> None:
    query = with_square(tmp_path, "query.png", (8, 8))
    same, gone = explain(PatchEncoder(), Part(query), [query, tmp_path / "gone.png"])
    assert same is not None
    assert same.score == pytest.approx(1.0, abs=1e-4)
    assert gone is None
    assert explain(PatchEncoder(), Part(tmp_path / "gone.png"), [query]) == [None]
    with pytest.raises(BundleError, match="run: mimco export --format onnx --with-patches"):
        explain(CountingEncoder(), Part(query), [query])


def test_reranking_orders_by_parts_and_keeps_the_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    query = with_square(tmp_path, "query.png", (0, 0))
    for number in range(9):
        save(photos / f"{number}.png", number)
    moved = with_square(photos, "moved.png", (24, 24))
    encoder = PatchEncoder()
    update_index(tmp_path / "index", [photos], encoder)
    with ImageIndex.open(tmp_path / "index") as index:
        plain = search_image(index, encoder, query, 10)
        ordered = search_image(index, encoder, query, 10, rerank=True)
        query.rename(photos / "query.png")
        update_index(tmp_path / "index", [photos], encoder)
        (photos / "query.png").unlink()
        before = search_image(index, encoder, photos / "query.png", 10)
        assert search_image(index, encoder, photos / "query.png", 10, rerank=True) == before
    assert "cannot be read any more: its hits are not reranked" in caplog.text
    assert ordered[0].path == moved
    assert sorted(ordered, key=lambda hit: -hit.score) == plain


def test_least_confidence_goes_before_reranking(tmp_path: Path) -> None:
    photos = [save(tmp_path / f"photos/{number:03d}.png", number) for number in range(60)]
    encoder = PatchEncoder()
    update_index(tmp_path / "index", [tmp_path / "photos"], encoder)
    with ImageIndex.open(tmp_path / "index") as index:
        plain = search_image(index, encoder, photos[3], 9, min_confidence=0.6)
        assert 0 < len(plain) < 9
        ordered = search_image(index, encoder, photos[3], 3, min_confidence=0.6, rerank=True)
    assert len(ordered) == min(3, len(plain))
    assert {hit.path for hit in ordered} <= {hit.path for hit in plain}
