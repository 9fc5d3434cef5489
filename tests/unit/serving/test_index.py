from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimco_deploy.errors import BundleError, EncoderMismatchError, ImageError, IndexStoreError
from mimco_deploy.images import MAX_BYTES
from mimco_deploy.serving import update
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.generations import current_generation
from mimco_deploy.serving.guarded import NEVER_OPENED, DecodePool, RefusedError
from mimco_deploy.serving.index import Hit, ImageIndex
from mimco_deploy.serving.query import search_image
from mimco_deploy.serving.rewrite import repair
from mimco_deploy.serving.roots import forget_roots
from mimco_deploy.serving.scan import Scan, scan_root
from mimco_deploy.serving.update import Progress, UpdateReport, update_index
from tests.helpers import CountingEncoder, Embeddings, Images, gallery, golden_images, save, tiny_bundle


class Place:
    """A folder of pictures, an index and the encoder between them."""

    def __init__(self, folder: Path) -> None:
        self.photos = folder / "my photos"
        self.photos.mkdir()
        self.index = folder / "index"
        self.encoder = CountingEncoder()

    def update(self, *roots: Path, rebuild: bool = False) -> UpdateReport:
        return update_index(self.index, roots, self.encoder, batch_size=4, rebuild=rebuild)

    def search(self, query: Path, k: int = 5) -> list[Hit]:
        return search_image(ImageIndex.open(self.index), self.encoder, query, k)

    def files(self) -> list[Path]:
        return ImageIndex.open(self.index).files()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# ---------------------------------------------------------------------- searching


def test_every_picture_finds_itself_first(place: Place) -> None:
    paths = gallery(place.photos, 10)
    report = place.update(place.photos)
    assert (report.added, report.embedded, report.reused, report.counts.files) == (10, 10, 0, 10)
    for path in paths:
        hits = place.search(path, k=3)
        assert hits[0].path == path
        assert hits[0].score == pytest.approx(1, abs=1e-6)
        assert len(hits) == 3
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_the_bundled_encoder_finds_what_the_numpy_one_finds(place: Place, tmp_path: Path) -> None:
    paths = gallery(place.photos, 6)
    encoder = load_encoder(tiny_bundle(tmp_path / "encoder"))
    update_index(place.index, [place.photos], encoder)
    index = ImageIndex.open(place.index, encoder.spec.fingerprint)
    for path in paths:
        assert [hit.path for hit in search_image(index, encoder, path, 6)] == [
            hit.path for hit in place.search(path, 6)
        ]


def test_many_queries_at_once_give_what_each_gives_alone(place: Place) -> None:
    gallery(place.photos, 9)
    place.update(place.photos)
    index = ImageIndex.open(place.index)
    queries = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    assert index.search_many(queries, 4) == [index.search(query, 4) for query in queries]


def test_more_hits_than_files_are_not_invented(place: Place) -> None:
    paths = gallery(place.photos, 3)
    place.update(place.photos)
    assert sorted(hit.path for hit in place.search(paths[0], k=100)) == paths


@pytest.mark.parametrize(
    ("embedding", "k"),
    [
        (np.zeros(15, np.float32), 1),
        (np.zeros((1, 16), np.float32), 1),
        (np.full(16, np.nan, np.float32), 1),
        (np.zeros(16, np.float32), 0),
    ],
)
def test_a_query_that_cannot_be_asked_is_refused(place: Place, embedding: Embeddings, k: int) -> None:
    gallery(place.photos, 1)
    place.update(place.photos)
    with pytest.raises(ValueError, match="expected"):
        ImageIndex.open(place.index).search(embedding, k)


def test_a_query_that_is_no_picture_is_refused(place: Place, tmp_path: Path) -> None:
    gallery(place.photos, 1)
    place.update(place.photos)
    with pytest.raises(ImageError, match="does not exist"):
        place.search(tmp_path / "nowhere.jpg")


def test_no_index_names_the_command_that_makes_one(place: Place) -> None:
    with pytest.raises(IndexStoreError, match=r"no index in .*; run: mimco index DIR"):
        ImageIndex.open(place.index)
    with pytest.raises(IndexStoreError, match="run: mimco index DIR"):
        place.update()
    assert not place.index.exists()


def test_an_empty_index_says_so(place: Place) -> None:
    place.update(place.photos)
    query = save(place.photos.parent / "query.png", 1)
    with pytest.raises(IndexStoreError, match="holds no picture; run: mimco index DIR"):
        place.search(query)


def test_an_open_index_follows_what_is_added(place: Place) -> None:
    gallery(place.photos, 2)
    place.update(place.photos)
    index = ImageIndex.open(place.index)
    assert index.counts().files == 2
    new = save(place.photos / "new.png", 77)
    place.update()
    assert search_image(index, place.encoder, new, 1)[0].path == new


def test_one_index_answers_several_threads(place: Place) -> None:
    paths = gallery(place.photos, 8)
    place.update(place.photos)
    index = ImageIndex.open(place.index)
    wrong: list[Path] = []

    def ask(path: Path) -> None:
        wrong.extend([path] if search_image(index, place.encoder, path, 1)[0].path != path else [])

    threads = [threading.Thread(target=ask, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------- keeping up


def test_a_second_update_embeds_nothing(place: Place) -> None:
    gallery(place.photos, 6)
    place.update(place.photos)
    for roots in ([place.photos], []):
        report = place.update(*roots)
        assert (report.added, report.changed, report.removed, report.unchanged, report.embedded) == (0, 0, 0, 6, 0)
    assert place.encoder.pictures == 6


def test_only_new_and_changed_pictures_are_embedded(place: Place) -> None:
    paths = gallery(place.photos, 6)
    place.update(place.photos)
    save(paths[2], 100)
    new = save(place.photos / "new.png", 101)
    report = place.update(place.photos)
    assert (report.added, report.changed, report.unchanged, report.embedded) == (1, 1, 5, 2)
    assert place.search(paths[2])[0].path == paths[2]
    assert place.search(new)[0].path == new
    old = save(place.photos.parent / "old.png", 2)
    assert place.search(old)[0].score < 0.999, "the picture that was replaced is no hit any more"


def test_a_removed_picture_is_no_hit_and_comes_back_without_being_embedded(place: Place) -> None:
    paths = gallery(place.photos, 4)
    place.update(place.photos)
    aside = place.photos.parent / "aside.png"
    paths[1].rename(aside)
    report = place.update()
    assert (report.removed, report.counts.files, report.counts.dead) == (1, 3, 1)
    assert paths[1] not in [hit.path for hit in place.search(aside, k=10)]
    assert len(place.search(aside, k=2)) == 2, "the embedding without a file takes nobody's place"
    aside.rename(paths[1])
    report = place.update()
    assert (report.added, report.embedded, report.reused, report.counts.dead) == (1, 0, 1, 0)
    assert place.search(paths[1])[0].path == paths[1]


def test_copies_moves_and_renames_are_not_embedded_again(place: Place) -> None:
    paths = gallery(place.photos, 5)
    place.update(place.photos)
    (place.photos / "sub").mkdir()
    paths[0].rename(place.photos / "sub" / "moved.png")
    paths[1].rename(place.photos / "renamed.png")
    shutil.copy(paths[2], place.photos / "copy.png")
    os.utime(paths[3])
    report = place.update()
    assert (report.added, report.changed, report.removed, report.embedded, report.reused) == (3, 1, 2, 0, 4)
    assert place.encoder.pictures == 5
    assert place.search(place.photos / "renamed.png")[0].path == place.photos / "renamed.png"


def test_copies_are_hits_of_their_own_with_the_same_score(place: Place) -> None:
    first, *_ = gallery(place.photos, 3)
    copies = [Path(shutil.copy(first, place.photos / f"copy{number}.png")) for number in range(3)]
    report = place.update(place.photos)
    assert (report.added, report.embedded, report.reused) == (6, 3, 3)
    hits = place.search(first, k=4)
    assert [hit.path for hit in hits] == sorted([first, *copies])
    assert len({(hit.score, hit.content) for hit in hits}) == 1
    assert len(place.search(first, k=2)) == 2


def test_batches_are_full_and_committed_one_by_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery(place.photos, 10)
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(update, "COMMIT_EVERY_S", 0.0)

    def look(progress: Progress) -> None:
        seen.append((progress.done, progress.total, ImageIndex.open(place.index).counts().files))
        assert progress.images_per_s > 0
        assert 0 <= progress.waiting <= 1

    update_index(place.index, [place.photos], place.encoder, batch_size=4, on_progress=look)
    assert place.encoder.batches == [4, 4, 2]
    assert seen == [(4, 10, 4), (8, 10, 8), (10, 10, 10)]


def test_a_content_that_comes_in_several_batches_is_embedded_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "COMMIT_EVERY_S", 0.0)
    paths = gallery(place.photos, 8)
    copies = [shutil.copyfile(paths[0], place.photos / f"copy-{number}.png") for number in range(4)]
    report = place.update(place.photos)  # the original comes in the first batch, the copies in the third
    assert (report.added, report.embedded) == (12, 8)
    assert {hit.path for hit in place.search(paths[0]) if hit.score > 0.999} == {paths[0], *copies}


def test_a_file_whose_name_is_not_utf8_is_found(place: Place) -> None:
    path = save(place.photos / os.fsdecode(b"caf\xe9.png"), 1)
    bad = place.photos / os.fsdecode(b"bad\xff.png")
    bad.write_bytes(b"no picture")
    report = place.update(place.photos)
    assert place.search(path)[0].path == path
    assert [problem.path for problem in report.problems] == [bad]
    assert place.update().unchanged == 1


# ---------------------------------------------------------------------- pictures that are none


def test_a_bad_picture_is_recorded_and_the_rest_goes_on(place: Place) -> None:
    paths = gallery(place.photos, 5)
    (place.photos / "empty.png").touch()
    (place.photos / "cut.png").write_bytes(paths[0].read_bytes()[:60])
    report = place.update(place.photos)
    assert report.counts.files == 5
    assert [(problem.path.name, problem.problem) for problem in report.problems] == [
        ("cut.png", "truncated"),
        ("empty.png", "empty"),
    ]
    assert ImageIndex.open(place.index).problems() == list(report.problems)


def test_a_bad_picture_is_read_again_only_when_it_changes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = place.photos / "bad.png"
    bad.write_bytes(b"not a picture")
    place.update(place.photos)
    with monkeypatch.context() as patch:
        patch.setattr(DecodePool, "read", lambda *_: pytest.fail("it was read again"))
        assert len(place.update().problems) == 1
    save(bad, 3)
    report = place.update()
    assert (report.added, report.problems) == (1, ())
    assert place.search(bad)[0].path == bad


def test_a_picture_that_goes_bad_is_no_hit_any_more(place: Place) -> None:
    paths = gallery(place.photos, 3)
    place.update(place.photos)
    paths[1].write_bytes(b"overwritten")
    report = place.update()
    assert [problem.path for problem in report.problems] == [paths[1]]
    assert (report.added, report.changed, report.removed, report.unchanged) == (0, 0, 1, 2)
    assert place.files() == [paths[0], paths[2]]
    paths[1].unlink()
    assert place.update().problems == ()


def test_a_picture_that_could_not_be_opened_is_always_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = gallery(place.photos, 1)
    found = f"{path} cannot be read (Permission denied)"

    def closed(*_: object) -> Any:
        raise RefusedError("unreadable", found, NEVER_OPENED)

    with monkeypatch.context() as patch:
        patch.setattr(DecodePool, "read", closed)
        (problem,) = place.update(place.photos).problems
    assert (problem.problem, problem.found) == ("unreadable", found)
    assert place.update().problems == ()
    assert place.files() == [path]


def test_a_file_over_the_size_limit_is_not_read(place: Place) -> None:
    with (place.photos / "large.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: it takes no room
    (problem,) = place.update(place.photos).problems
    assert problem.problem == "too_large"
    assert f"more than {MAX_BYTES:,}" in problem.found


def test_a_file_that_vanishes_after_the_walk_is_dropped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = gallery(place.photos, 4)
    place.update(place.photos)
    save(paths[1], 50)
    fresh = save(place.photos / "fresh.png", 51)

    def walk(root: Path) -> Scan:
        found = scan_root(root)
        paths[1].unlink()
        fresh.unlink()
        return found

    monkeypatch.setattr("mimco_deploy.serving.update.scan_root", walk)
    report = place.update()
    assert (report.added, report.changed, report.removed, report.problems) == (0, 0, 1, ())
    assert place.files() == [paths[0], paths[2], paths[3]]


def test_a_file_that_changes_after_the_walk_is_recorded_as_it_was_read(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = gallery(place.photos, 1)

    def walk(root: Path) -> Scan:
        found = scan_root(root)
        save(path, 60)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("mimco_deploy.serving.update.scan_root", walk)
        place.update(place.photos)
    assert place.search(path)[0].score == pytest.approx(1, abs=1e-6)
    assert place.update().unchanged == 1


# ---------------------------------------------------------------------- folders


def test_a_folder_inside_an_indexed_one_updates_that_one(place: Place) -> None:
    gallery(place.photos, 2)
    save(place.photos / "sub" / "a.png", 10)
    place.update(place.photos)
    new = save(place.photos / "sub" / "b.png", 11)
    report = place.update(place.photos / "sub")
    assert (report.added, report.unchanged) == (1, 3)
    assert ImageIndex.open(place.index).roots() == [place.photos]
    assert place.files().count(new) == 1


def test_a_folder_that_encloses_indexed_ones_takes_them_over(place: Place) -> None:
    gallery(place.photos / "a", 3)
    gallery(place.photos / "b" / "c", 3, first=3)
    (place.photos / "b" / "c" / "bad.png").touch()
    place.update(place.photos / "a", place.photos / "b" / "c")
    top = save(place.photos / "top.png", 20)
    report = place.update(place.photos)
    assert (report.added, report.removed, report.unchanged, report.embedded) == (1, 0, 6, 1)
    assert ImageIndex.open(place.index).roots() == [place.photos]
    files = place.files()
    assert len(files) == len(set(files)) == 7
    assert top in files
    assert len(report.problems) == 1


def test_folders_given_together_may_overlap(place: Place) -> None:
    gallery(place.photos / "a", 3)
    place.update(place.photos / "a", place.photos, place.photos)
    assert ImageIndex.open(place.index).roots() == [place.photos]
    assert len(place.files()) == 3


def test_a_hidden_folder_may_be_indexed_by_name_beside_the_one_around_it(place: Place) -> None:
    hidden = save(place.photos / ".hidden" / "a.png", 1)
    seen = save(place.photos / "b.png", 2)
    place.update(place.photos / ".hidden")
    place.update(place.photos)
    assert place.files() == sorted([hidden, seen])
    assert place.update().unchanged == 2


def test_a_link_to_an_indexed_folder_is_that_folder(place: Place, tmp_path: Path) -> None:
    gallery(place.photos, 2)
    place.update(place.photos)
    (tmp_path / "link").symlink_to(place.photos, target_is_directory=True)
    assert place.update(tmp_path / "link").unchanged == 2
    assert ImageIndex.open(place.index).roots() == [place.photos]


def test_an_emptied_folder_drops_its_files_and_takes_them_back_without_the_encoder(
    place: Place, tmp_path: Path
) -> None:
    paths = gallery(place.photos, 3)
    place.update(place.photos)
    place.photos.rename(tmp_path / "unmounted")
    place.photos.mkdir()
    assert (place.update().removed, place.files()) == (3, [])
    place.photos.rmdir()
    (tmp_path / "unmounted").rename(place.photos)
    report = place.update()
    assert (report.added, report.embedded, place.files()) == (3, 0, sorted(paths))


def test_a_folder_that_is_away_keeps_its_files_and_is_reported(place: Place, tmp_path: Path) -> None:
    paths = gallery(place.photos, 3)
    other = save(tmp_path / "other" / "a.png", 9)
    place.update(place.photos, other.parent)
    place.photos.rename(tmp_path / "unplugged")
    report = place.update()
    assert [(item.path, item.kept) for item in report.unreachable] == [(place.photos, 3)]
    assert (report.removed, report.unchanged, report.counts.files) == (0, 1, 4)
    assert place.files() == sorted([*paths, other])
    with pytest.raises(IndexStoreError, match=rf"lose its 3 files; .*run: mimco index forget '{place.photos}'$"):
        place.update(rebuild=True)
    assert place.files() == sorted([*paths, other])


def test_a_forgotten_folder_is_gone_whether_or_not_it_exists(place: Place, tmp_path: Path) -> None:
    gallery(place.photos, 3)
    other = save(tmp_path / "other" / "a.png", 9)
    place.update(place.photos, other.parent)
    shutil.rmtree(place.photos)
    assert forget_roots(place.index, [place.photos]) == 3
    assert place.files() == [other]
    with pytest.raises(IndexStoreError, match=r"is not an indexed folder; expected one of: .*other"):
        forget_roots(place.index, [place.photos])


@pytest.mark.parametrize("name", ["nowhere", "file.png"])
def test_what_is_no_folder_is_refused_before_anything_is_made(place: Place, name: str) -> None:
    save(place.photos / "file.png", 1)
    with pytest.raises(IndexStoreError, match="expected a folder of pictures"):
        place.update(place.photos / name)
    assert not place.index.exists()


# ---------------------------------------------------------------------- encoders


def test_another_encoder_is_refused_with_both_fingerprints(place: Place) -> None:
    (path,) = gallery(place.photos, 1)
    place.update(place.photos)
    place.encoder = CountingEncoder(seed=1, fingerprint="0123456789ab" * 5)
    message = "made by encoder ffffffffffff; expected 0123456789ab, .*run: mimco index reindex"
    with pytest.raises(EncoderMismatchError, match=message):
        place.update()
    with pytest.raises(EncoderMismatchError, match=message):
        place.search(path)
    with pytest.raises(EncoderMismatchError, match=message):
        ImageIndex.open(place.index, place.encoder.spec.fingerprint)
    assert place.encoder.pictures == 0


def test_an_encoder_that_gives_no_numbers_leaves_the_index_as_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery(place.photos, 4)
    place.update(place.photos)
    gallery(place.photos, 2, first=10)

    def broken(images: Images) -> Embeddings:
        return np.full((len(images), 16), np.nan, np.float32)

    monkeypatch.setattr(place.encoder, "embed", broken)
    with pytest.raises(BundleError, match="not finite"):
        place.update()
    assert len(place.files()) == 4


def test_a_picture_that_is_turned_by_its_exif_is_found_by_the_turned_one(place: Place, tmp_path: Path) -> None:
    path = save(place.photos / "upright.png", 5)
    gallery(place.photos, 3, first=20)
    place.update(place.photos)
    with Image.open(path) as picture:
        sideways = picture.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        sideways.save(tmp_path / "sideways.png", exif=exif)
    hit = place.search(tmp_path / "sideways.png")[0]
    assert hit.path == path
    assert hit.score == pytest.approx(1, abs=1e-6)


OUTSIDE = '{"rows": 1, "reference": [9999999], "z": [], "tail": 1}'


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("embedding_dim", value) for value in ("abc", "", "0", "-3", "1e9")),
        ("revision", "abc"),
        *(
            ("background", value)
            for value in ("[]", "{", "{}", "[" * 5000, '{"rows": 1, "reference": [9999999], "z": [], "tail": 1}')
        ),
        *(("neighbours", value) for value in ("{}", "3", "null")),
    ],
)
def test_settings_that_say_nothing_are_one_line(tmp_path: Path, key: str, value: str) -> None:
    gallery(tmp_path / "images", 4)
    update_index(tmp_path / "index", [tmp_path / "images"], CountingEncoder())
    catalog = sqlite3.connect(next((tmp_path / "index").glob("0*/catalog.sqlite")))
    with catalog:
        catalog.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, value))
    catalog.close()
    with pytest.raises(IndexStoreError) as caught:
        ImageIndex.open(tmp_path / "index").search(CountingEncoder().embed(golden_images(1))[0], 1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "pointer", ['{"format_version": 1, "generation": 1e999}', "[" * 100_000, '{"format_version": 1}']
)
def test_a_pointer_that_says_nothing_is_one_line(tmp_path: Path, pointer: str) -> None:
    gallery(tmp_path / "images", 1)
    update_index(tmp_path / "index", [tmp_path / "images"], CountingEncoder())
    (tmp_path / "index/index.json").write_text(pointer, encoding="utf-8")
    with pytest.raises(IndexStoreError, match="cannot be read"):
        ImageIndex.open(tmp_path / "index")


def test_repair_drops_what_it_cannot_read_of_the_settings(tmp_path: Path) -> None:
    gallery(tmp_path / "images", 3)
    update_index(tmp_path / "index", [tmp_path / "images"], CountingEncoder())
    catalog = sqlite3.connect(next((tmp_path / "index").glob("0*/catalog.sqlite")))
    with catalog:
        catalog.execute("INSERT OR REPLACE INTO settings VALUES ('made_by', '[1]')")
    catalog.close()
    with Catalog(current_generation(tmp_path / "index").catalog) as broken, pytest.raises(IndexStoreError):
        broken.made_by()
    repair(tmp_path / "index")
    update_index(tmp_path / "index", [tmp_path / "images"], CountingEncoder())
    assert ImageIndex.open(tmp_path / "index").picture_count() == 3
