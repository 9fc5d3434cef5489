"""The map: places, thinning, what the page holds, and that it holds nothing that it should not."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mimco_deploy.cli import main
from mimco_deploy.errors import IndexStoreError, MissingExtraError
from mimco_deploy.images import Facts
from mimco_deploy.serving import map as map_module
from mimco_deploy.serving import map_page
from mimco_deploy.serving.catalog import Listed
from mimco_deploy.serving.map import lay_out, thin, write_map
from mimco_deploy.serving.map_page import MAX_GROUPS, build_page, draw_thumbnails, group_folders
from mimco_deploy.serving.scan import Stamp
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery, save

Vectors = npt.NDArray[np.float32]
HOSTILE = "</script><!--<script>alert(1)<img src=x onerror=alert(2)>&amp;\u2028'\"\\.png".replace("/", "∕")


class Page(HTMLParser):
    """Tags with their attributes, and the text in each."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.open = False
        self.tags: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(content.decode("utf-8", "strict"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), []))
        self.open = True

    def handle_data(self, data: str) -> None:
        if self.open:
            self.tags[-1][2].append(data)

    def handle_endtag(self, _: str) -> None:
        self.open = False

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.tags if name == tag]

    def data(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.texts("script")[0])
        return document

    def policy(self) -> str:
        return next(a["content"] or "" for _, a, _ in self.tags if a.get("http-equiv") == "Content-Security-Policy")


def decoded(text: str, kind: str) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), kind)


def listed(path: str, root: str = "/photos", row: int = 0, taken: str | None = None, mtime_ns: int = 10**18) -> Listed:
    return Listed(root, path, Stamp(1, mtime_ns), row, bytes(32), Facts(taken=taken))


def page_of(points: list[list[Listed]], places: Vectors | None = None) -> Page:
    places = np.full((len(points), 2), 0.5, np.float32) if places is None else places
    return Page(build_page(points, places, draw_thumbnails(points, range(len(points))), "pca"))


def unit(count: int, dim: int = 12, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)) * np.linspace(3, 0.2, dim)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def indexed(folder: Path, count: int = 6) -> Path:
    gallery(folder / "images", count)
    update_index(folder / "index", [folder / "images"], CountingEncoder())
    return folder / "index"


def mapped(folder: Path, index: Path, thumbnails: int = 2000) -> Page:
    write_map(folder / "map.html", index, "pca", thumbnails)
    return Page((folder / "map.html").read_bytes())


# ---------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(("count", "dim"), [(200, 12), (3, 12), (40, 2), (20_000, 6)])
def test_pca_is_that_of_a_singular_value_decomposition(count: int, dim: int) -> None:
    vectors = unit(count, dim)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes = np.array([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes])
    true = centred @ axes.T
    low, high = true.min(axis=0), true.max(axis=0)
    true = (true - (low + high) / 2) / (high - low).max() + 0.5
    places = lay_out(vectors, "pca")
    assert places.dtype == np.float32
    assert places.shape == (count, 2)
    np.testing.assert_allclose(places, true, atol=1e-4)


def test_a_layout_is_the_same_each_time_and_takes_rows_in_their_order() -> None:
    vectors = unit(60)
    rows = np.random.default_rng(1).permutation(60)[:40]
    places = lay_out(vectors, "pca", rows)
    assert np.array_equal(places, lay_out(vectors, "pca", rows))
    np.testing.assert_allclose(places, lay_out(vectors[rows], "pca"), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("dim", [1, 2, 16])
def test_equal_embeddings_lie_in_the_middle(count: int, dim: int) -> None:
    vectors = np.repeat(unit(1, dim), count, axis=0)
    assert np.array_equal(lay_out(vectors, "pca"), np.full((count, 2), 0.5, np.float32))


def test_two_pictures_lie_at_the_ends_of_one_line() -> None:
    places = lay_out(unit(2), "pca")
    np.testing.assert_allclose(np.sort(places[:, 0]), [0, 1], atol=1e-6)
    np.testing.assert_allclose(places[:, 1], 0.5, atol=1e-5)


def test_nothing_is_laid_out_as_nothing() -> None:
    assert lay_out(np.empty((0, 4), np.float32), "pca").shape == (0, 2)


class Reducer:
    """What stands in for umap.UMAP."""

    asked: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        Reducer.asked = options

    def fit_transform(self, vectors: Vectors) -> Vectors:
        places = np.arange(2 * len(vectors), dtype=np.float32).reshape(-1, 2)
        places[0] = np.nan
        return places


@pytest.fixture
def pretended_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("umap")
    module.UMAP = Reducer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: module)


@pytest.mark.usefixtures("pretended_umap")
def test_auto_takes_umap_where_it_is_installed_with_a_seed(tmp_path: Path) -> None:
    places = lay_out(unit(20))
    assert Reducer.asked["random_state"] == 0
    assert Reducer.asked["metric"] == "cosine"
    assert places[0].tolist() == [0.5, 0.5]  # it had no neighbours
    np.testing.assert_allclose(places[1], [0, 0], atol=1e-6)
    np.testing.assert_allclose(places[-1], [1, 1], atol=1e-6)
    assert write_map(tmp_path / "map.html", indexed(tmp_path, 16)).method == "umap"


@pytest.mark.usefixtures("pretended_umap")
def test_auto_takes_pca_for_too_many_and_for_too_few(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    few = unit(15)
    assert np.array_equal(lay_out(few), lay_out(few, "pca"))
    assert not caplog.records
    assert np.array_equal(lay_out(few, "umap"), lay_out(few, "pca"))
    assert "15 pictures are too few for UMAP" in caplog.text
    monkeypatch.setattr(map_module, "MAX_AUTO_UMAP", 30)
    many = unit(31)
    assert np.array_equal(lay_out(many), lay_out(many, "pca"))
    assert not np.array_equal(lay_out(many, "umap"), lay_out(many, "pca"))


def test_umap_that_is_not_there_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r"umap-learn .*mimco-deploy\[map\]"):
        lay_out(unit(20), "umap")


def test_auto_takes_pca_where_umap_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    vectors = unit(20)
    assert np.array_equal(lay_out(vectors), lay_out(vectors, "pca"))
    assert "laid out by PCA" in caplog.text


def test_umap_itself_keeps_clusters_together() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    kinds = np.repeat(np.eye(3, 16, dtype=np.float32), 20, axis=0) + 0.02 * unit(60, 16)
    places = lay_out(kinds, "umap")
    assert np.array_equal(places, lay_out(kinds, "umap"))
    centres = places.reshape(3, 20, 2).mean(axis=1)
    nearest = np.linalg.norm(places[:, np.newaxis] - centres, axis=2).argmin(axis=1)
    assert np.array_equal(nearest, np.repeat(np.arange(3), 20))


# ---------------------------------------------------------------------------------------------------- thinning


def test_every_region_has_some_of_the_chosen_however_dense_another_is() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(0.3, 0.005, (20_000, 2))
    places = np.concatenate([dense, rng.random((3000, 2))]).clip(0, 1).astype(np.float32)
    chosen = thin(places, 400)
    assert len(set(chosen.tolist())) == 400
    for side in (2, 4, 8, 16):  # 16 × 16 cells are fewer than 400
        cells = (places * side).astype(int).clip(0, side - 1)
        assert {*map(tuple, cells.tolist())} == {*map(tuple, cells[chosen].tolist())}
    assert (np.abs(places[chosen] - 0.3).max(axis=1) < 0.02).mean() < 0.2


def test_any_first_part_of_the_chosen_covers_the_plane() -> None:
    places = np.random.default_rng(0).random((5000, 2)).astype(np.float32)
    first = places[thin(places, 2000)[:64]]
    assert len({*map(tuple, (first * 8).astype(int).tolist())}) == 64
    assert np.array_equal(thin(places, 2000)[:64], thin(places, 64))


@pytest.mark.parametrize("count", [0, 1, 7, 10, 50])
def test_as_many_are_chosen_as_there_are_and_may_be(count: int) -> None:
    equal = np.full((10, 2), 0.5, np.float32)
    for places in (equal, np.random.default_rng(0).random((10, 2)).astype(np.float32), np.eye(2, dtype=np.float32)):
        chosen = thin(places, count)
        assert len(set(chosen.tolist())) == len(chosen) == min(count, len(places))


def test_the_rest_of_a_level_is_spread_too() -> None:
    places = np.random.default_rng(0).random((5000, 2)).astype(np.float32)
    chosen = places[thin(places, 160)]  # 64 of the fourth level, and 96 of the 192 new ones of the fifth
    halves = (chosen[:, 0] < 0.5).sum(), (chosen[:, 1] < 0.5).sum()
    assert all(68 <= half <= 92 for half in halves)


# ---------------------------------------------------------------------------------------------------- thumbnails


def test_a_thumbnail_is_upright_small_and_found_by_its_number(tmp_path: Path) -> None:
    paths = gallery(tmp_path, 70)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 200), "red").save(tmp_path / "turned.jpg", exif=exif)
    names = ["turned.jpg", *(path.name for path in paths)]
    points = [[listed(name, str(tmp_path))] for name in names]
    told: list[tuple[int, int]] = []
    drawn = draw_thumbnails(points, range(71), lambda done, total: told.append((done, total)))
    assert told == [(done, 71) for done in range(1, 72)]
    assert drawn.points == list(range(71))
    assert (drawn.cell_px, drawn.sizes[0], drawn.sizes[1]) == (128, (64, 128), (32, 32))
    sheets = [Image.open(io.BytesIO(sheet)) for sheet in drawn.sheets]
    assert [sheet.size for sheet in sheets] == [(1024, 1024), (1024, 128)]
    red = np.asarray(sheets[0])[:128, :64]
    assert np.abs(red.astype(int) - [255, 0, 0]).max() < 8
    for number in (1, 8, 63, 64, 70):  # number 64 is the first of the second sheet
        sheet, cell = np.asarray(sheets[number // 64]), number % 64
        top, left = cell // 8 * 128, cell % 8 * 128
        with Image.open(paths[number - 1]) as original:
            difference = sheet[top : top + 32, left : left + 32].astype(float) - np.asarray(original)
        assert np.abs(difference).mean() < 25


def test_many_thumbnails_are_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_page, "_FEW", 2)
    save(tmp_path / "a.png", 1)
    drawn = draw_thumbnails([[listed("a.png", str(tmp_path))]] * 3, range(3))
    assert drawn.cell_px == 64


def test_what_cannot_be_read_is_a_dot_with_the_reason(tmp_path: Path) -> None:
    index = indexed(tmp_path, 4)
    (tmp_path / "images/0001.png").unlink()
    (tmp_path / "images/0002.png").write_bytes(b"no picture")
    report = write_map(tmp_path / "map.html", index, "pca")
    assert (report.points, report.thumbnails, report.unreadable) == (4, 2, 2)
    data = Page((tmp_path / "map.html").read_bytes()).data()
    by_name = {data["names"][int(point)]: reason for point, reason in data["problems"].items()}
    assert by_name == {"0001.png": "no longer there", "0002.png": "unsupported"}
    assert len(decoded(data["places"], "<u2")) == 8


def test_a_copy_that_is_still_there_gives_the_thumbnail(tmp_path: Path) -> None:
    save(tmp_path / "b.png", 1)
    drawn = draw_thumbnails([[listed("gone.png", str(tmp_path)), listed("b.png", str(tmp_path))]], [0])
    assert (drawn.points, drawn.problems) == ([0], {})


# ---------------------------------------------------------------------------------------------------- the page


def test_the_arrays_in_the_page_are_the_positions_and_the_paths(tmp_path: Path) -> None:
    index = indexed(tmp_path, 20)
    save(tmp_path / "images/below/copy.png", 3)
    update_index(index, [tmp_path / "images"], CountingEncoder())
    report = write_map(tmp_path / "map.html", index, "pca", 5)
    assert (report.points, report.files, report.thumbnails, report.method) == (20, 21, 5, "pca")
    assert report.bytes == (tmp_path / "map.html").stat().st_size
    data = Page((tmp_path / "map.html").read_bytes()).data()

    at = decoded(data["places"], "<u2").reshape(-1, 2) / 65535
    order = [int(name[:4]) for name in data["names"]]
    pictures = np.stack([np.asarray(Image.open(tmp_path / f"images/{number:04d}.png")) for number in order])
    np.testing.assert_allclose(at, lay_out(CountingEncoder().embed(pictures), "pca"), atol=1e-4)

    folders = [Path(data["roots"][root]) / below for root, below, _ in data["folders"]]
    firsts = [
        folders[number] / name for number, name in zip(decoded(data["folderOf"], "<u4"), data["names"], strict=True)
    ]
    copies = [folders[folder] / name for _, folder, name in data["copies"]]
    assert sorted([*firsts, *copies]) == sorted((tmp_path / "images").rglob("*.png"))
    assert [order[point] for point, _, _ in data["copies"]] == [3]
    assert len(data["roots"]) == 1

    thumbs = decoded(data["thumbs"], "<u4")
    assert np.array_equal(thumbs, thin(lay_out(CountingEncoder().embed(pictures), "pca"), 5))
    assert decoded(data["sizes"], "u1").tolist() == [32] * 10


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = mapped(tmp_path, indexed(tmp_path))
    text = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|\bimport\(|fetch\(|XMLHttpRequest|WebSocket|innerHTML|eval\(", text)
    assert {name for name, _, _ in page.tags}.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})
    assert all("src" not in a and "style" not in a and not any(k.startswith("on") for k in a) for _, a, _ in page.tags)
    assert re.findall(r"\.src = (\S+)", text) == ['"data:image/jpeg;base64,"']


def test_the_policy_lets_the_own_script_and_style_run_and_nothing_else(tmp_path: Path) -> None:
    page = mapped(tmp_path, indexed(tmp_path))
    assert "unsafe" not in page.policy()
    assert page.policy().startswith("default-src 'none'; img-src data:;")
    for tag, text in (("script", page.texts("script")[1]), ("style", page.texts("style")[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.policy()
    scripts = [attributes.get("type") for name, attributes, _ in page.tags if name == "script"]
    assert scripts == ["application/json", None]


@pytest.mark.parametrize("name", [HOSTILE, "<!--.png", "]]>.png", "日本 ü\n.png", "%41#?.png"])
def test_names_come_through_as_they_are_and_end_no_element(tmp_path: Path, name: str) -> None:
    save(tmp_path / "images" / name, 1)
    save(tmp_path / "images" / f"d{name}" / "a.png", 2)
    save(tmp_path / "images" / f"d{name}" / f"copy {name}", 1)
    update_index(tmp_path / "index", [tmp_path / "images"], CountingEncoder())
    page = mapped(tmp_path, tmp_path / "index")
    data = page.data()
    assert name in data["names"] or any(copy == name for _, _, copy in data["copies"])
    assert f"d{name}" in [below for _, below, _ in data["folders"]]
    assert len(page.texts("script")) == 2
    assert page.texts("script")[0].count("<") == 0


def test_the_end_of_a_script_in_a_path_does_not_end_it() -> None:
    page = page_of([[listed("a</script><script>alert(1)//b.png", "/photos</SCRIPT ><!--")]])
    assert len(page.texts("script")) == 2
    assert page.data()["names"] == ["b.png"]
    assert page.data()["roots"] == ["/photos</SCRIPT ><!--"]


def test_a_name_that_is_not_utf8_is_shown_and_its_link_leads_to_it(tmp_path: Path) -> None:
    save(tmp_path / "images" / os.fsdecode(b"caf\xe9.png"), 1)
    update_index(tmp_path / "index", [tmp_path / "images"], CountingEncoder())
    data = mapped(tmp_path, tmp_path / "index").data()
    assert data["names"] == ["caf�.png"]
    assert data["links"] == {"0": (tmp_path / "images/caf").as_uri() + "%E9.png"}
    assert page_of([[listed("fine.png")]]).data()["links"] == {}


def test_the_date_is_the_cameras_where_it_says_one() -> None:
    camera, broken = listed("a.png", taken="2024-05-31T18:30:00"), listed("b.png", taken="yesterday")
    strange = listed("c.png", mtime_ns=-(2**63))
    data = page_of([[camera], [broken], [strange]]).data()
    dates = decoded(data["dates"], "<u4")
    assert np.datetime64("1970-01-01T00:00") + int(dates[0]) == np.datetime64("2024-05-31T18:30")
    assert abs(int(dates[1]) - 10**9 // 60) <= 24 * 60  # by the clock of this machine
    assert dates[2] == 0
    assert decoded(data["taken"], "u1").tolist() == [1, 0, 0]


def test_a_map_says_nothing_of_when_it_was_made(tmp_path: Path) -> None:
    index = indexed(tmp_path)
    assert [write_map(tmp_path / name, index, "pca").points for name in ("a.html", "b.html")] == [6, 6]
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


# ---------------------------------------------------------------------------------------------------- folders


def groups_of(counts: dict[str, int]) -> tuple[list[tuple[str, int]], dict[str, int]]:
    folders = [("/photos", below) for below in counts]
    groups, group_of = group_folders(folders, [n for n, count in enumerate(counts.values()) for _ in range(count)])
    return [(group["name"], group["count"]) for group in groups], dict(zip(counts, group_of, strict=True))


def test_one_folder_is_one_group() -> None:
    assert groups_of({"": 3}) == ([("photos", 3)], {"": 0})
    assert groups_of({"2024/05": 3}) == ([("05", 3)], {"2024/05": 0})


def test_the_largest_group_is_split_as_long_as_there_are_colours() -> None:
    groups, group_of = groups_of({"cats": 1, "2024/01": 5, "2024/02": 6, "2024": 2})
    assert groups == [("2024/02", 6), ("2024/01", 5), ("2024", 2), ("cats", 1)]
    assert group_of == {"2024/02": 0, "2024/01": 1, "2024": 2, "cats": 3}
    months = {f"2024/{month:02d}": 10 for month in range(1, 13)}
    assert groups_of({"cats": 1, **months})[0] == [("2024", 120), ("cats", 1)]


def test_folders_beyond_the_colours_share_the_last() -> None:
    groups, group_of = groups_of({f"f{number:02d}": 20 - number for number in range(12)})
    assert [name for name, _ in groups] == [*(f"f{number:02d}" for number in range(8)), "4 other folders"]
    assert groups[-1] == ("4 other folders", 12 + 11 + 10 + 9)
    assert [group_of[f"f{number:02d}"] for number in range(12)] == [*range(8), *[MAX_GROUPS] * 4]


def test_roots_far_apart_are_groups() -> None:
    groups, group_of = group_folders([("/home/me/photos", ""), ("/mnt/disk", "a")], [0, 1, 1])
    assert [group["name"] for group in groups] == ["mnt", "home"] or [group["count"] for group in groups] == [2, 1]
    assert group_of == [1, 0]


# ---------------------------------------------------------------------------------------------------- command line


def mimco(workspace: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), "map", *map(str, arguments)])


def test_the_command_writes_map_html_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = mimco(tmp_path, "--method", "pca")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("map.html: 6 pictures, 6 of them with thumbnails, by PCA, 0.")
    assert b"6 pictures" in (tmp_path / "map.html").read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_command_prints_json_and_counts_what_it_could_not_read(tmp_path: Path) -> None:
    indexed(tmp_path)
    result = mimco(tmp_path, tmp_path / "out" / "m.html", "--method", "pca", "--thumbnails", "2", "--json")
    report = json.loads(result.stdout)
    assert report == {
        "path": str(tmp_path / "out/m.html"),
        "method": "pca",
        "points": 6,
        "files": 6,
        "thumbnails": 2,
        "unreadable": 0,
        "bytes": (tmp_path / "out/m.html").stat().st_size,
    }
    shutil.rmtree(tmp_path / "images")
    result = mimco(tmp_path, tmp_path / "m.html", "--method", "pca")
    assert result.exit_code == 0
    assert result.stderr == "6 could not be read and are dots; the page says why\n"


def test_without_an_index_the_command_says_so(tmp_path: Path) -> None:
    result = mimco(tmp_path, tmp_path / "m.html")
    assert result.exit_code == 1
    assert "run: mimco index" in result.stderr
    assert not (tmp_path / "m.html").exists()
    with pytest.raises(IndexStoreError):
        write_map(tmp_path / "m.html", tmp_path / "index")
