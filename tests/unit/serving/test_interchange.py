"""An index that leaves as files and comes back: the same hits, nothing read or embedded again, no damage let in."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mimco_deploy.errors import EncoderMismatchError, IndexStoreError, MissingExtraError
from mimco_deploy.images import Facts
from mimco_deploy.serving import interchange
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.generations import current_generation
from mimco_deploy.serving.index import Hit, ImageIndex
from mimco_deploy.serving.inspect import verify
from mimco_deploy.serving.interchange import export_index, import_index
from mimco_deploy.serving.scan import Stamp
from mimco_deploy.serving.update import UpdateReport, update_index
from tests.helpers import DIM, CountingEncoder, Embeddings, gallery, noise, save

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


@pytest.fixture
def exported(place: Place, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an export, to be broken."""

    def export(ending: str) -> Path:
        target = tmp_path / f"out{ending}"
        export_index(place.index, target)
        return target

    return export


def hits(index: Path) -> list[list[Hit]]:
    return ImageIndex.open(index).search_many(QUERIES, 50)


def listing(index: Path) -> list[tuple[str, str, Stamp, bytes, Facts]]:
    """All that is known of each file, but for its row."""
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        return [(file.root, file.path, file.stamp, file.sha256, file.facts) for file in sorted(catalog.listing())]


def lines_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.jsonl")


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
    for name in [f".{target.name}.0123456789abcdef.tmp", f".{lines_of(target).name}.0123456789abcdef.tmp", *others]:
        (tmp_path / name).touch()
    export_index(place.index, target)
    assert names(tmp_path) == sorted([*others, target.name, *([lines_of(target).name] if ending == ".npy" else [])])


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


# ---------------------------------------------------------------------- sources that are broken


def unit(count: int, dim: int = DIM) -> Embeddings:
    raw = np.random.default_rng(0).standard_normal((count, dim))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


HEADER = {"format_version": 1, "fingerprint": "f" * 64, "embedding_dim": DIM}


def write_npy(path: Path, records: list[tuple[str, str]], changed: dict[str, Any] | None = None, **header: Any) -> Path:
    """Write an export by hand; `changed` goes into its second record."""
    np.save(path, unit(len(records)))
    lines: list[Any] = [{**HEADER, **header}]
    for number, (root, name) in enumerate(records):
        record = {"root": root, "path": name, "sha256": f"{number:064x}", "size": 5, "mtime_ns": 7}
        lines.append({**record, **(changed or {})} if number == 1 else record)
    lines_of(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_parquet(path: Path, changed: dict[str, Any], metadata: bytes | None) -> Path:
    """The same as Parquet."""
    columns: dict[str, Any] = {
        "path": ["a.png", "b.png"],
        "root": ["/photos", "/photos"],
        "sha256": ["0" * 64, "1" * 64],
        "size": [5, 5],
        "mtime_ns": [7, 7],
        "embedding": unit(2).tolist(),
    }
    table = pa.table({key: value for key, value in {**columns, **changed}.items() if value is not None})
    pa.parquet.write_table(table.replace_schema_metadata(None if metadata is None else {b"mimco": metadata}), path)
    return path


def check_that_it_is_refused(tmp_path: Path, source: Path, message: str | None = None) -> None:
    """One line, no new index, and nothing in an old one."""
    gallery(tmp_path / "mine", 2)
    update(tmp_path / "old", CountingEncoder(), tmp_path / "mine")
    before = listing(tmp_path / "old")
    for index in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(IndexStoreError, match=message) as caught:
            import_index(index, source)
        assert source.name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    assert listing(tmp_path / "old") == before
    assert verify(tmp_path / "old") == []
    assert not (tmp_path / "new").exists()


RECORDS = [("/photos", "a.png"), ("/photos", "b.png"), ("/photos", "sub/c.png")]


def test_a_text_that_stands_once_and_in_every_row_is_not_spread(tmp_path: Path) -> None:
    """42 KB of Parquet that became an 800 MB catalogue."""
    count = 3000
    columns = {
        "path": [f"{number}.png" for number in range(count)],
        "root": ["/photos"] * count,
        "sha256": [f"{number:064x}" for number in range(count)],
        "size": [5] * count,
        "mtime_ns": [7] * count,
        "camera": ["c" * 100_000] * count,
        "embedding": pa.array(unit(count).tolist(), pa.list_(pa.float32(), DIM)),
    }
    table = pa.table(columns).replace_schema_metadata({b"mimco": json.dumps(HEADER).encode()})
    pa.parquet.write_table(table, tmp_path / "long.parquet")
    check_that_it_is_refused(tmp_path, tmp_path / "long.parquet", "camera of 100,000 bytes")


@pytest.mark.parametrize("header", [b"{'descr': (", b"{" * 200, b"'" * 40, b"(" * 5000])
def test_a_header_of_numpy_that_is_none_is_one_line(tmp_path: Path, header: bytes) -> None:
    source = write_npy(tmp_path / "bad.npy", RECORDS)
    padded = header.ljust(len(header) + 64 - (len(header) + 10) % 64 - 1) + b"\n"
    source.write_bytes(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded)
    check_that_it_is_refused(tmp_path, source)


def test_an_export_by_hand_is_taken_in(tmp_path: Path) -> None:
    assert import_index(tmp_path / "npy", write_npy(tmp_path / "hand.npy", RECORDS)) == 3
    source = write_parquet(tmp_path / "hand.parquet", {}, json.dumps(HEADER).encode())
    assert import_index(tmp_path / "parquet", source) == 2
    files = [Path("/photos/a.png"), Path("/photos/b.png")]
    assert ImageIndex.open(tmp_path / "parquet").files() == files
    assert ImageIndex.open(tmp_path / "npy").files() == [*files, Path("/photos/sub/c.png")]


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "../a.png"},
        {"path": "a\0.png"},
        {"root": "/photos\0"},
        {"path": "a" * 9000},
        {"camera": "c" * 300},
        {"size": -1},
        {"path": "sub/../../a.png"},
        {"path": "/etc/a.png"},
        {"path": ""},
        {"path": "."},
        {"path": None, "root": "photos"},
        {"root": "photos"},
        {"root": ""},
        {"root": "/photos/../etc"},
        {"sha256": "0" * 63},
        {"sha256": "0" * 62},
        {"sha256": "g" * 64},
        {"sha256": ""},
        {"sha256": None},
        {"size": "many"},
        {"size": None},
        {"size": 2**80},
        {"width_px": 2**63},
        {"mtime_ns": float("inf")},
        {"mtime_ns": [1]},
    ],
)
def test_a_record_that_cannot_be_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    check_that_it_is_refused(tmp_path, write_npy(tmp_path / "hand.npy", RECORDS, changed))


@pytest.mark.parametrize("key", ["root", "path", "sha256", "size", "mtime_ns"])
def test_a_record_that_lacks_something_is_refused(tmp_path: Path, key: str) -> None:
    source = write_npy(tmp_path / "hand.npy", RECORDS)
    lines = [json.loads(line) for line in lines_of(source).read_text().splitlines()]
    del lines[2][key]
    lines_of(source).write_text("".join(json.dumps(line) + "\n" for line in lines))
    check_that_it_is_refused(tmp_path, source, key)


@pytest.mark.parametrize(
    "header",
    [
        {"format_version": 2},
        {"format_version": "1"},
        {"embedding_dim": DIM + 1},
        {"embedding_dim": -1},
        {"embedding_dim": 0},
        {"embedding_dim": 2**40},
        {"embedding_dim": "wide"},
        {"embedding_dim": None},
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    check_that_it_is_refused(tmp_path, write_npy(tmp_path / "hand.npy", RECORDS, **header))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "cannot be read"),
        (["{}"], "format_version"),
        (["[]"], "cannot be read"),
        (["3"], "cannot be read"),
        (["no JSON"], "cannot be read"),
        (["[" * 50_000], "cannot be read"),
        (["caf\u00e9"], "ascii"),
        ([json.dumps(HEADER)], "cannot be read"),
        ([json.dumps(HEADER), "null", "null", "null"], "cannot be read"),
        ([json.dumps(HEADER), "x" * 200_000], "cannot be read"),
    ],
)
def test_lines_that_are_none_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    source = write_npy(tmp_path / "hand.npy", RECORDS)
    lines_of(source).write_text("".join(line + "\n" for line in lines))
    check_that_it_is_refused(tmp_path, source, message)


@pytest.mark.parametrize("more", [-3, -2, -1, 1, 2])
def test_more_or_fewer_lines_than_embeddings_are_refused(tmp_path: Path, more: int) -> None:
    source = write_npy(tmp_path / "hand.npy", RECORDS)
    lines = lines_of(source).read_text().splitlines(keepends=True)
    lines_of(source).write_text("".join(lines[:more] if more < 0 else lines + lines[-1:] * more))
    if more < 0:
        check_that_it_is_refused(tmp_path, source)
        return
    # What came before is whole, and is kept.
    with pytest.raises(IndexStoreError, match="more lines than its 3 embeddings"):
        import_index(tmp_path / "new", source)
    assert verify(tmp_path / "new") == []


def test_lines_that_are_missing_are_told(tmp_path: Path) -> None:
    source = write_npy(tmp_path / "hand.npy", RECORDS)
    lines_of(source).unlink()
    check_that_it_is_refused(tmp_path, source, "No such file")
    source.unlink()
    check_that_it_is_refused(tmp_path, source, "No such file")


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, embeddings=unit(3))
    return file.getvalue()


class Trap:
    """Leaves a file where somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, (str(self.path),))


def with_number(value: float) -> Embeddings:
    embeddings = unit(3)
    embeddings[1, 4] = value
    return embeddings


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no array", id="text"),
        pytest.param(npy(unit(3))[:-1], id="cut by a byte"),
        pytest.param(npy(unit(3))[:100], id="cut in its header"),
        pytest.param(npy(unit(3, DIM + 1)), id="other D"),
        pytest.param(npy(unit(3).astype(np.float64)), id="float64"),
        pytest.param(npy(unit(3).astype(">f4")), id="big-endian"),
        pytest.param(npy(unit(3)[0]), id="one dimension"),
        pytest.param(npy(unit(3)[np.newaxis]), id="three dimensions"),
        pytest.param(npy(np.float32(1)), id="a number"),
        pytest.param(npy(np.zeros((3, DIM), np.float32)), id="zeros"),
        pytest.param(npy(unit(3) * np.float32(1.01)), id="too long"),
        pytest.param(npy(with_number(np.nan)), id="nan"),
        pytest.param(npy(with_number(np.inf)), id="inf"),
        pytest.param(npz(), id="npz"),
        pytest.param(b"PK\x03\x04 and no more", id="broken zip"),
    ],
)
def test_embeddings_that_are_none_are_refused(tmp_path: Path, content: bytes) -> None:
    source = write_npy(tmp_path / "hand.npy", RECORDS)
    source.write_bytes(content)
    check_that_it_is_refused(tmp_path, source)


@pytest.mark.parametrize("shape", ["(4611686018427387904, 16)", "(1180591620717411303424, 1)", "(-1, 16)"])
def test_a_shape_that_cannot_be_is_refused(tmp_path: Path, shape: str) -> None:
    source = write_npy(tmp_path / "hand.npy", RECORDS)
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    source.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(1000))
    with np.errstate(over="ignore"):
        check_that_it_is_refused(tmp_path, source)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    source = write_npy(tmp_path / "hand.npy", RECORDS)
    trap = Trap(tmp_path / "sprung")
    for content in (npy(np.array([trap, trap, trap], object)), pickle.dumps(trap)):
        source.write_bytes(content)
        check_that_it_is_refused(tmp_path, source)
        assert not trap.path.exists()
    np.load(io.BytesIO(npy(np.array([trap], object))), allow_pickle=True)
    assert trap.path.exists(), "the trap works"


@pytest.mark.parametrize(
    ("changed", "metadata"),
    [
        ({}, None),
        ({}, b"no JSON"),
        ({}, b"[]"),
        ({}, json.dumps({**HEADER, "format_version": 3}).encode()),
        ({}, json.dumps({**HEADER, "embedding_dim": DIM + 1}).encode()),
        ({"embedding": None}, json.dumps(HEADER).encode()),
        ({"path": None}, json.dumps(HEADER).encode()),
        ({"embedding": [1.0, 2.0]}, json.dumps(HEADER).encode()),
        ({"embedding": ["a", "b"]}, json.dumps(HEADER).encode()),
        ({"embedding": [[1.0], [0.5, 0.5]]}, json.dumps(HEADER).encode()),
        ({"embedding": [unit(1)[0].tolist(), None]}, json.dumps(HEADER).encode()),
        ({"embedding": [unit(1)[0].tolist(), [float("nan")] * DIM]}, json.dumps(HEADER).encode()),
        ({"path": ["a.png", "../b.png"]}, json.dumps(HEADER).encode()),
        ({"path": ["a.png", "/b.png"]}, json.dumps(HEADER).encode()),
        ({"path_bytes": [None, b"../b.png"]}, json.dumps(HEADER).encode()),
        ({"sha256": ["0" * 64, None]}, json.dumps(HEADER).encode()),
        ({"size": [1, None]}, json.dumps(HEADER).encode()),
    ],
)
def test_a_parquet_that_does_not_fit_is_refused(
    tmp_path: Path, changed: dict[str, Any], metadata: bytes | None
) -> None:
    check_that_it_is_refused(tmp_path, write_parquet(tmp_path / "hand.parquet", changed, metadata))


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -9, -200])
def test_a_parquet_that_was_cut_off_is_refused(exported: Callable[[str], Path], tmp_path: Path, kept: int) -> None:
    source = exported(".parquet")
    source.write_bytes(source.read_bytes()[:kept])
    check_that_it_is_refused(tmp_path, source)


def test_a_zip_is_no_parquet(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.parquet", "w") as file:
        file.writestr("a", "b")
    check_that_it_is_refused(tmp_path, tmp_path / "a.parquet")


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
