"""Exports that are broken, or made to do harm: each is one line, makes no index and leaves an old one as it was."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.inspect import verify
from mimco_deploy.serving.interchange import import_index
from mimco_deploy.serving.update import update_index
from tests.helpers import DIM, CountingEncoder, Embeddings, gallery
from tests.unit.serving.exports import HEADER, lines_of, listing, unit, write_npy


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
    update_index(tmp_path / "old", [tmp_path / "mine"], CountingEncoder())
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
def test_a_parquet_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    source = write_parquet(tmp_path / "hand.parquet", {}, json.dumps(HEADER).encode())
    source.write_bytes(source.read_bytes()[:kept])
    check_that_it_is_refused(tmp_path, source)


def test_a_zip_is_no_parquet(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.parquet", "w") as file:
        file.writestr("a", "b")
    check_that_it_is_refused(tmp_path, tmp_path / "a.parquet")
