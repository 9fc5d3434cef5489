"""An index that leaves as files and comes back: the same hits, nothing read or embedded again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mimco_deploy.errors import EncoderMismatchError, IndexStoreError, MissingExtraError
from mimco_deploy.serving import interchange
from mimco_deploy.serving.generations import current_generation
from mimco_deploy.serving.index import Hit, ImageIndex
from mimco_deploy.serving.inspect import verify
from mimco_deploy.serving.interchange import export_index, import_index
from mimco_deploy.serving.update import UpdateReport, update_index
from tests.helpers import DIM, CountingEncoder, Embeddings, gallery, noise, save
from tests.unit.serving.exports import lines_of, listing, write_npy

ODD_NAMES = ["caf\udce9.png", "new\nline.png", 'quote".png', "it's.png", "😀.png", "back\\slash.png", "tab\t,;.png"]
ODD_FOLDER = "f\udcfflder ü"
QUERIES: Embeddings = CountingEncoder().embed(np.stack([np.asarray(noise(seed)) for seed in (0, 4, 21, 33, 999)]))
both_formats = pytest.mark.parametrize("ending", [".npy", ".parquet"])


class Place:
    """Two indexed folders of pictures with odd names, copies and one file that is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "index"
        self.photos = folder / "photos"
        gallery(self.photos, 8)
        for number, name in enumerate(ODD_NAMES):
            save(self.photos / "odd" / name, 20 + number)
        save(folder / ODD_FOLDER / ODD_FOLDER / "a.png", 33)
        for number in range(3):
            shutil.copy(self.photos / "0003.png", self.photos / f"copy{number}.png")
        (self.photos / "bad.jpg").write_bytes(b"\xff\xd8")
        self.files = 8 + len(ODD_NAMES) + 1 + 3
        self.contents = self.files - 3
        update_index(self.index, [self.photos, folder / ODD_FOLDER], CountingEncoder())

    def exported(self, ending: str) -> Path:
        target = self.folder / f"out{ending}"
        assert export_index(self.index, target) == self.files
        return target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Read only."""
    return Place(tmp_path_factory.mktemp("place"))


def hits(index: Path) -> list[list[Hit]]:
    return ImageIndex.open(index).search_many(QUERIES, 50)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def update(index: Path, encoder: CountingEncoder, *roots: Path) -> UpdateReport:
    return update_index(index, roots, encoder)


# ---------------------------------------------------------------------- there and back


@both_formats
def test_what_comes_back_is_what_left(place: Place, tmp_path: Path, ending: str) -> None:
    target = place.exported(ending)
    assert import_index(tmp_path / "new", target) == place.files
    assert hits(tmp_path / "new") == hits(place.index)
    assert listing(tmp_path / "new") == listing(place.index)
    assert ImageIndex.open(tmp_path / "new").roots() == ImageIndex.open(place.index).roots()
    counts = ImageIndex.open(tmp_path / "new").counts()
    assert (counts.files, counts.contents, counts.dead) == (place.files, place.contents, 0)
    assert verify(tmp_path / "new") == []


@both_formats
def test_after_an_import_nothing_is_read_or_embedded(place: Place, tmp_path: Path, ending: str) -> None:
    import_index(tmp_path / "new", place.exported(ending))
    encoder = CountingEncoder()
    report = update(tmp_path / "new", encoder)
    assert (report.unchanged, report.added, report.changed, report.removed) == (place.files, 0, 0, 0)
    assert (report.embedded, encoder.pictures) == (0, 0)
    assert [problem.path.name for problem in report.problems] == ["bad.jpg"]


@both_formats
def test_an_export_of_an_import_is_the_export(place: Place, tmp_path: Path, ending: str) -> None:
    first, second = place.exported(ending), tmp_path / f"second{ending}"
    import_index(tmp_path / "new", first)
    export_index(tmp_path / "new", second)
    assert second.read_bytes() == first.read_bytes()
    if ending == ".npy":
        assert lines_of(second).read_bytes() == lines_of(first).read_bytes()


@both_formats
def test_an_import_twice_changes_nothing(place: Place, tmp_path: Path, ending: str) -> None:
    target = place.exported(ending)
    for _ in range(2):
        import_index(tmp_path / "new", target)
        assert listing(tmp_path / "new") == listing(place.index)
        assert current_generation(tmp_path / "new").vectors.stat().st_size == 16 + place.contents * 4 * DIM


@both_formats
@pytest.mark.parametrize("portion", [1, 4, 7])
def test_portions_do_not_show(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, portion: int
) -> None:
    whole = place.exported(ending)
    monkeypatch.setattr(interchange, "_ROWS", portion)
    parts = tmp_path / f"parts{ending}"
    export_index(place.index, parts)
    if ending == ".npy":
        assert parts.read_bytes() == whole.read_bytes()
        assert lines_of(parts).read_bytes() == lines_of(whole).read_bytes()
    import_index(tmp_path / "new", parts)
    assert listing(tmp_path / "new") == listing(place.index)
    assert hits(tmp_path / "new") == hits(place.index)


@both_formats
def test_an_empty_index_comes_back_empty(tmp_path: Path, ending: str) -> None:
    (tmp_path / "photos").mkdir()
    update(tmp_path / "index", CountingEncoder(), tmp_path / "photos")
    assert export_index(tmp_path / "index", tmp_path / f"out{ending}") == 0
    assert import_index(tmp_path / "new", tmp_path / f"out{ending}") == 0
    assert ImageIndex.open(tmp_path / "new").files() == []
    assert verify(tmp_path / "new") == []


@both_formats
def test_what_no_file_names_any_more_does_not_leave(tmp_path: Path, ending: str) -> None:
    paths = gallery(tmp_path / "photos", 4)
    update(tmp_path / "index", CountingEncoder(), tmp_path / "photos")
    paths[0].unlink()
    update(tmp_path / "index", CountingEncoder())
    assert export_index(tmp_path / "index", tmp_path / f"out{ending}") == 3
    import_index(tmp_path / "new", tmp_path / f"out{ending}")
    assert ImageIndex.open(tmp_path / "new").files() == paths[1:]


@both_formats
def test_what_changed_since_the_export_is_noticed(tmp_path: Path, ending: str) -> None:
    paths = gallery(tmp_path / "photos", 4)
    update(tmp_path / "index", CountingEncoder(), tmp_path / "photos")
    export_index(tmp_path / "index", tmp_path / f"out{ending}")
    save(paths[1], 70)
    paths[2].unlink()
    import_index(tmp_path / "new", tmp_path / f"out{ending}")
    report = update(tmp_path / "new", CountingEncoder())
    assert (report.changed, report.removed, report.unchanged, report.embedded) == (1, 1, 2, 1)


# ---------------------------------------------------------------------- into an index that is there


@both_formats
def test_an_import_joins_an_index_of_the_same_encoder(place: Place, tmp_path: Path, ending: str) -> None:
    mine = gallery(tmp_path / "mine", 5)
    theirs = save(tmp_path / "mine" / "same content.png", 33)
    update(tmp_path / "index", CountingEncoder(), tmp_path / "mine")
    before = listing(tmp_path / "index")
    import_index(tmp_path / "index", place.exported(ending))
    assert listing(tmp_path / "index") == sorted([*before, *listing(place.index)], key=lambda file: file[:2])
    counts = ImageIndex.open(tmp_path / "index").counts()
    # Five of mine and the odd one are the first pictures of theirs, and one in their other folder.
    assert (counts.files, counts.contents) == (place.files + 6, place.contents)
    encoder = CountingEncoder()
    assert update(tmp_path / "index", encoder).unchanged == place.files + 6
    assert encoder.pictures == 0
    assert {mine[0], place.photos / "0000.png"} == {hit.path for hit in hits(tmp_path / "index")[0][:2]}
    assert theirs in [hit.path for hit in hits(tmp_path / "index")[3][:2]]
    assert verify(tmp_path / "index") == []


@both_formats
def test_an_import_below_an_indexed_folder_belongs_to_it(tmp_path: Path, ending: str) -> None:
    outer = tmp_path / "photos"
    inner = gallery(outer / "inner" / "most", 3)
    update(tmp_path / "part", CountingEncoder(), outer / "inner" / "most")
    export_index(tmp_path / "part", tmp_path / f"part{ending}")
    others = gallery(outer, 3, first=10)
    shutil.rmtree(outer / "inner")
    update(tmp_path / "index", CountingEncoder(), outer)
    import_index(tmp_path / "index", tmp_path / f"part{ending}")
    assert ImageIndex.open(tmp_path / "index").roots() == [outer]
    assert ImageIndex.open(tmp_path / "index").files() == sorted([*inner, *others])


@both_formats
def test_an_import_of_an_enclosing_folder_takes_over(tmp_path: Path, ending: str) -> None:
    outer = tmp_path / "photos"
    paths = gallery(outer, 3) + gallery(outer / "inner", 3, first=10)
    update(tmp_path / "all", CountingEncoder(), outer)
    export_index(tmp_path / "all", tmp_path / f"all{ending}")
    update(tmp_path / "index", CountingEncoder(), outer / "inner")
    import_index(tmp_path / "index", tmp_path / f"all{ending}")
    assert ImageIndex.open(tmp_path / "index").roots() == [outer]
    assert ImageIndex.open(tmp_path / "index").files() == sorted(paths)
    assert update(tmp_path / "index", CountingEncoder()).unchanged == 6


def test_folders_that_enclose_each_other_in_one_source_become_one(tmp_path: Path) -> None:
    records = [("/photos/inner", "a.png"), ("/photos", "b.png"), ("/photos/inner", "c.png")]
    source = write_npy(tmp_path / "hand.npy", records)
    assert import_index(tmp_path / "index", source) == 3
    assert ImageIndex.open(tmp_path / "index").roots() == [Path("/photos")]
    files = [Path("/photos/b.png"), Path("/photos/inner/a.png"), Path("/photos/inner/c.png")]
    assert ImageIndex.open(tmp_path / "index").files() == files


@both_formats
def test_an_import_of_another_encoder_is_refused(place: Place, tmp_path: Path, ending: str) -> None:
    gallery(tmp_path / "mine", 3)
    update(tmp_path / "index", CountingEncoder(1, "1" * 64), tmp_path / "mine")
    before = listing(tmp_path / "index")
    with pytest.raises(EncoderMismatchError, match="made by encoder 111111111111; expected ffffffffffff"):
        import_index(tmp_path / "index", place.exported(ending))
    assert listing(tmp_path / "index") == before


@both_formats
def test_what_an_import_says_of_a_file_counts_over_what_was_there(tmp_path: Path, ending: str) -> None:
    paths = gallery(tmp_path / "photos", 3)
    update(tmp_path / "index", CountingEncoder(), tmp_path / "photos")
    export_index(tmp_path / "index", tmp_path / f"old{ending}")
    old = listing(tmp_path / "index")
    save(paths[0], 50)
    paths[1].write_bytes(b"no picture")
    update(tmp_path / "index", CountingEncoder())
    assert len(ImageIndex.open(tmp_path / "index").problems()) == 1
    import_index(tmp_path / "index", tmp_path / f"old{ending}")
    assert listing(tmp_path / "index") == old
    assert ImageIndex.open(tmp_path / "index").problems() == []
    report = update(tmp_path / "index", CountingEncoder())
    assert (report.unchanged, report.changed, report.embedded, len(report.problems)) == (1, 1, 0, 1)


# ---------------------------------------------------------------------- read by others


def test_the_npy_is_read_by_numpy_alone(place: Place) -> None:
    target = place.exported(".npy")
    embeddings = np.load(target)
    assert (embeddings.shape, embeddings.dtype) == ((place.files, DIM), np.float32)
    header, *records = [json.loads(line) for line in lines_of(target).read_text("ascii").splitlines()]
    assert header == {"format_version": 1, "fingerprint": "f" * 64, "embedding_dim": DIM}
    assert len(records) == place.files
    for record, embedding in zip(records, embeddings, strict=True):
        path = Path(record["root"]) / record["path"]
        (best,) = ImageIndex.open(place.index).search_many(embedding[np.newaxis], 6)
        assert path in [hit.path for hit in best if hit.score > 0.999999]
        assert {hit.content for hit in best if hit.path == path} == {record["sha256"]}
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (record["size"], record["mtime_ns"])


def test_the_parquet_is_read_by_pyarrow_alone(place: Place) -> None:
    table = pa.parquet.read_table(place.exported(".parquet"))
    assert table.num_rows == place.files
    assert {"path", "root", "sha256", "size", "mtime_ns", "embedding"} <= set(table.column_names)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), DIM)
    document = json.loads(table.schema.metadata[b"mimco"])
    assert document == {"format_version": 1, "fingerprint": "f" * 64, "embedding_dim": DIM}
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), np.load(place.exported(".npy")))
    records = [json.loads(line) for line in lines_of(place.exported(".npy")).read_text().splitlines()[1:]]
    for column in ("sha256", "size", "mtime_ns"):
        assert table[column].to_pylist() == [record[column] for record in records]
    shown = [os.fsencode(record["path"]).decode(errors="replace") for record in records]
    assert table["path"].to_pylist() == shown
    assert "odd/caf\ufffd.png" in shown
    odd = [path for path, content in zip(shown, table["path_bytes"].to_pylist(), strict=True) if content is not None]
    assert {"odd/caf\ufffd.png", "odd/new\nline.png"} <= set(odd)
    assert "0000.png" not in odd


# ---------------------------------------------------------------------- exports that fail


@pytest.mark.parametrize("name", ["out", "out.csv", "out.npy.gz", "OUT.NPY"])
def test_another_ending_is_refused_with_those_that_are_known(place: Place, tmp_path: Path, name: str) -> None:
    for change in (export_index, import_index):
        with pytest.raises(IndexStoreError, match=r"ends in .*; expected \.parquet or \.npy"):
            change(place.index, tmp_path / name)
    assert names(tmp_path) == []


@both_formats
def test_no_index_leaves_no_file(tmp_path: Path, ending: str) -> None:
    with pytest.raises(IndexStoreError, match="no index in"):
        export_index(tmp_path / "index", tmp_path / f"out{ending}")
    assert names(tmp_path) == []


@both_formats
@pytest.mark.parametrize("step", ["_portions", "sync_file"])
@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_the_old_one(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, step: str, there: bool
) -> None:
    target = tmp_path / f"out{ending}"
    if there:
        target.write_bytes(b"the old one")
        lines_of(target).write_bytes(b"its lines")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    real: Any = getattr(interchange, step)

    def fail(*arguments: Any) -> Any:
        if step == "sync_file":
            raise OSError(28, "No space left on device")
        yielded = iter(real(*arguments))
        return (next(yielded) if number == 0 else 1 // 0 for number in range(2))

    monkeypatch.setattr(interchange, step, fail)
    with pytest.raises((IndexStoreError, ZeroDivisionError)):
        export_index(place.index, target)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@both_formats
def test_what_a_killed_export_left_is_removed_by_the_next(place: Place, tmp_path: Path, ending: str) -> None:
    target, others = tmp_path / f"out[{ending}", [f".out{ending}.0123456789abcdef.tmp", f"out[{ending}.tmp"]
    written = [target.name, *([lines_of(target).name] if ending == ".npy" else [])]
    for name in [*(f".{name}.0123456789abcdef.tmp" for name in written), *others]:
        (tmp_path / name).touch()
    export_index(place.index, target)
    assert names(tmp_path) == sorted([*others, *written])


@both_formats
def test_names_are_the_same_in_a_locale_without_utf8(tmp_path: Path, ending: str) -> None:
    def run(step: str, index: Path, file: Path) -> None:
        code = f"""from pathlib import Path; from mimco_deploy.serving.interchange import {step}_index as step
step(Path({os.fspath(index)!r}), Path({os.fspath(file)!r}))"""
        environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
        subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], env=environment, check=True)

    for name in ("caf\u00e9.png", "caf\udce9.png"):
        save(tmp_path / "photos" / name, 1)
    update(tmp_path / "index", CountingEncoder(), tmp_path / "photos")
    here, there = tmp_path / f"here{ending}", tmp_path / f"there{ending}"
    export_index(tmp_path / "index", here)
    run("export", tmp_path / "index", there)
    import_index(tmp_path / "from there", there)
    run("import", tmp_path / "in there", here)
    assert listing(tmp_path / "from there") == listing(tmp_path / "in there") == listing(tmp_path / "index")
    assert there.read_bytes() == here.read_bytes()
    if ending == ".npy":
        assert lines_of(there).read_text() == lines_of(here).read_text()


@both_formats
def test_a_folder_that_is_not_there_is_named_as_it_was_given(place: Place, tmp_path: Path, ending: str) -> None:
    with pytest.raises(IndexStoreError) as refused:
        export_index(place.index, tmp_path / f"nowhere/out{ending}")
    assert str(refused.value) == f"no folder {tmp_path}/nowhere; expected one that exists, to write into"


@both_formats
def test_an_export_replaces_an_old_one(place: Place, tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"out{ending}"
    target.write_bytes(b"the old one")
    export_index(place.index, target)
    import_index(tmp_path / "new", target)
    assert listing(tmp_path / "new") == listing(place.index)


@pytest.mark.parametrize("change", [export_index, import_index])
def test_parquet_without_pyarrow_says_what_to_install(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, Path], int]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mimco-deploy\[parquet\]"'):
        change(place.index if change is export_index else tmp_path / "new", tmp_path / "out.parquet")
    assert names(tmp_path) == []


@both_formats
def test_what_came_before_a_broken_portion_stays_and_is_whole(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(interchange, "_ROWS", 4)
    target = place.exported(ending)
    check, seen = interchange._check, list[int]()

    def third_is_broken(records: list[Any], *rest: Any) -> None:
        seen.append(len(records))
        if len(seen) == 3:
            raise ValueError("broken")
        check(records, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(interchange, "_check", third_is_broken)
        with pytest.raises(IndexStoreError, match=r"cannot be read \(broken\)"):
            import_index(tmp_path / "new", target)
    assert len(ImageIndex.open(tmp_path / "new").files()) == 8
    assert verify(tmp_path / "new") == []
    import_index(tmp_path / "new", target)
    assert listing(tmp_path / "new") == listing(place.index)
