"""The append-only store of embeddings: `vectors.f32`.

    offset  size      content
    0       8         magic, the ASCII bytes "MIMCOVEC"
    8       4         format version, uint32 little-endian: 1
    12      4         D, length of an embedding, uint32 little-endian
    16      4·D each  rows 0, 1, 2, …: float32 little-endian

How many rows count is the catalogue's to say. What lies past that number was being written when a crash came, and the
next writer cuts it off. Rows are never changed, so a reader's memory map stays valid while a writer appends.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from mimco_deploy.atomic import write_bytes
from mimco_deploy.errors import IndexStoreError

MAGIC = b"MIMCOVEC"
FORMAT_VERSION = 1
_HEADER = struct.Struct("<8sII")
_ITEM = np.dtype("<f4")


def create_vectors(path: Path, dim: int) -> None:
    """Write a store with no rows.

    Args:
        path: file to make; one that is there is replaced.
        dim: D, length of an embedding.
    """
    write_bytes(path, _HEADER.pack(MAGIC, FORMAT_VERSION, dim))


def crc32s(embeddings: npt.NDArray[np.float32]) -> list[int]:
    """CRC-32 of the bytes of each row, as they lie in the store.

    Args:
        embeddings: [B, D].
    """
    return [zlib.crc32(row) for row in np.ascontiguousarray(embeddings, _ITEM)]


def read_vectors(path: Path, dim: int, count: int) -> npt.NDArray[np.float32]:
    """Map the first `count` rows, read-only.

    Args:
        path: the store.
        dim: D the catalogue states.
        count: rows the catalogue counts.

    Returns:
        [count, D]; nothing is read until it is used.

    Raises:
        IndexStoreError: not such a file, another D, or fewer rows than counted.
    """
    _check(path, dim, count)
    if count == 0:
        return np.empty((0, dim), np.float32)  # a map of nothing is an error
    # As a plain array: a row of a `memmap` costs several times as much to take.
    return np.asarray(np.memmap(path, dtype=_ITEM, mode="r", offset=_HEADER.size, shape=(count, dim)))


def salvage_vectors(path: Path, dim: int) -> npt.NDArray[np.float32]:
    """Map all whole rows of a store, whatever its header says; none where it is missing.

    Args:
        path: the store.
        dim: D the catalogue states.

    Returns:
        [N, D]; which of the rows are sound, checksums tell.
    """
    size = path.stat().st_size if path.is_file() else 0
    count = max(0, size - _HEADER.size) // (dim * _ITEM.itemsize)
    if count == 0:
        return np.empty((0, dim), np.float32)
    return np.memmap(path, dtype=_ITEM, mode="r", offset=_HEADER.size, shape=(count, dim))


class VectorWriter:
    """Appends rows. Use as a context manager; one writer at a time.

    Args:
        path: the store.
        dim: D the catalogue states.
        count: rows the catalogue counts; what lies past them is cut off.

    Raises:
        IndexStoreError: not such a file, another D, or fewer rows than counted.
    """

    def __init__(self, path: Path, dim: int, count: int) -> None:
        _check(path, dim, count)
        self._path = path
        self._dim = dim
        self.count = count
        self._file = os.open(path, os.O_RDWR)
        os.ftruncate(self._file, self._end())

    def append(self, embeddings: npt.NDArray[np.float32]) -> int:
        """Write rows and force them to the disk: only then may the catalogue count them.

        Args:
            embeddings: [B, D].

        Returns:
            Row number of the first.

        Raises:
            IndexStoreError: the disk is full or refuses. The store then holds what it held before.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self._dim:
            raise ValueError(f"embeddings of shape {embeddings.shape}, expected [B, {self._dim}]")
        first = self.count
        try:
            os.lseek(self._file, self._end(), os.SEEK_SET)
            left = memoryview(np.ascontiguousarray(embeddings, _ITEM).tobytes())
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            raise IndexStoreError(
                f"{self._path} cannot be written ({error.strerror})",
                expected="room on the disk",
                command="mimco index",
            ) from error
        self.count += len(embeddings)
        return first

    def _end(self) -> int:
        return _HEADER.size + self.count * self._dim * _ITEM.itemsize

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> VectorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(path: Path, dim: int, count: int) -> None:
    again = "mimco index repair"
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise IndexStoreError(f"{path} cannot be read ({error.strerror})", command=again) from error
    if len(head) < _HEADER.size or head[: len(MAGIC)] != MAGIC:
        raise IndexStoreError(f"{path} is not a store of embeddings", command=again)
    _, version, stated = _HEADER.unpack(head)
    if version != FORMAT_VERSION:
        raise IndexStoreError(f"{path} has format version {version}", expected=f"{FORMAT_VERSION}, or a newer mimco")
    if stated != dim:
        raise IndexStoreError(f"{path} holds embeddings of {stated} numbers", expected=str(dim), command=again)
    rows = (size - _HEADER.size) // (dim * _ITEM.itemsize)
    if rows < count:
        raise IndexStoreError(
            f"{path} holds {rows} embeddings", expected=f"the {count} that are counted", command=again
        )
