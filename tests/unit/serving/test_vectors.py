from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.vectors import VectorWriter, create_vectors, read_vectors

DIM = 5


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "vectors.f32"
    create_vectors(path, DIM)
    return path


def rows(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def test_the_bytes_are_those_of_the_format(store: Path) -> None:
    with VectorWriter(store, DIM, 0) as writer:
        writer.append(rows(2))
    assert store.read_bytes() == b"MIMCOVEC" + struct.pack("<II", 1, DIM) + rows(2).astype("<f4").tobytes()


def test_rows_are_numbered_in_the_order_they_came(store: Path) -> None:
    with VectorWriter(store, DIM, 0) as writer:
        assert writer.append(rows(3, seed=1)) == 0
        assert writer.append(rows(2, seed=2)) == 3
    with VectorWriter(store, DIM, 5) as writer:
        assert writer.append(rows(1, seed=3)) == 5
    np.testing.assert_array_equal(
        read_vectors(store, DIM, 6), np.concatenate([rows(3, seed=1), rows(2, seed=2), rows(1, seed=3)])
    )


def test_reading_maps_the_file_read_only(store: Path) -> None:
    with VectorWriter(store, DIM, 0) as writer:
        writer.append(rows(3))
    mapped = read_vectors(store, DIM, 2)
    assert isinstance(mapped.base, np.memmap)
    assert mapped.shape == (2, DIM)
    assert not mapped.flags.writeable
    assert read_vectors(store, DIM, 0).shape == (0, DIM)


@pytest.mark.parametrize("torn_bytes", [1, 4 * DIM - 1, 4 * DIM, 4 * DIM + 7])
def test_what_lies_past_the_count_is_cut_off(store: Path, torn_bytes: int) -> None:
    with VectorWriter(store, DIM, 0) as writer:
        writer.append(rows(2))
    with store.open("ab") as file:
        file.write(b"\xff" * torn_bytes)
    with VectorWriter(store, DIM, 2) as writer:
        assert store.stat().st_size == 16 + 2 * 4 * DIM
        writer.append(rows(1, seed=9))
    np.testing.assert_array_equal(read_vectors(store, DIM, 3)[2:], rows(1, seed=9))


def test_a_file_shorter_than_the_count_is_refused_naming_both(store: Path) -> None:
    with VectorWriter(store, DIM, 0) as writer:
        writer.append(rows(3))
    os.truncate(store, store.stat().st_size - 1)
    with pytest.raises(IndexStoreError, match="holds 2 embeddings; expected the 3 that are counted"):
        read_vectors(store, DIM, 3)
    with pytest.raises(IndexStoreError, match="holds 2 embeddings; expected the 3 that are counted"):
        VectorWriter(store, DIM, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a store of embeddings"),
        (b"MIMCOVEC", "not a store of embeddings"),
        (b"PK\x03\x04" + bytes(60), "not a store of embeddings"),
        (b"MIMCOVEC" + struct.pack("<II", 2, DIM), "format version 2; expected 1"),
        (b"MIMCOVEC" + struct.pack("<II", 1, DIM + 1), "embeddings of 6 numbers; expected 5"),
    ],
)
def test_another_file_is_refused(store: Path, content: bytes, message: str) -> None:
    store.write_bytes(content)
    with pytest.raises(IndexStoreError, match=message):
        read_vectors(store, DIM, 0)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="No such file"):
        read_vectors(tmp_path / "vectors.f32", DIM, 0)


def test_a_failed_write_leaves_the_rows_that_were_there(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VectorWriter(store, DIM, 0) as writer:
        writer.append(rows(2))
        real = os.write

        def half(file: int, content: memoryview) -> int:
            if len(content) <= 4 * DIM:
                raise OSError(28, "No space left on device")
            return real(file, content[: len(content) // 2])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(IndexStoreError, match="No space left on device"):
            writer.append(rows(4, seed=1))
        monkeypatch.undo()
        assert writer.append(rows(1, seed=2)) == 2
    np.testing.assert_array_equal(read_vectors(store, DIM, 3), np.concatenate([rows(2), rows(1, seed=2)]))


def test_embeddings_of_another_length_are_refused(store: Path) -> None:
    with VectorWriter(store, DIM, 0) as writer, pytest.raises(ValueError, match=r"expected \[B, 5\]"):
        writer.append(np.zeros((2, DIM + 1), np.float32))
