"""An index written anew from what it holds, nothing embedded again: without what is dead, or without what is damaged.

Both write the next generation beside the current one and switch to it, so a crash leaves the index as it was. What
another encoder embedded anew, when it was cut short, waits on to be finished.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.generations import (
    Generation,
    current_generation,
    move_rebuild,
    newest_generation,
    promote,
    stage_generation,
    switch_to,
    writer_lock,
)
from mimco_deploy.serving.inspect import ROWS_AT_ONCE, damaged_rows, verify
from mimco_deploy.serving.salvage import Salvage
from mimco_deploy.serving.tuning import keep_tuned
from mimco_deploy.serving.vectors import VectorWriter, create_vectors, salvage_vectors

logger = logging.getLogger(__name__)

_AGAIN = "mimco index reindex DIR"


@dataclass(frozen=True, kw_only=True)
class RewriteReport:
    """What a rewrite did."""

    generation: int
    files: int
    """That a search can return."""
    lost_files: int
    """Whose embedding or record was damaged: the next update embeds them again."""
    dropped_embeddings: int
    """Dead or damaged."""
    bytes_before: int
    bytes_after: int


def compact(index: Path) -> RewriteReport:
    """Drop embeddings that no file names any more.

    Args:
        index: the index folder.

    Raises:
        IndexStoreError: there is none, it is not whole, another process writes, or the disk is full.
    """
    current_generation(index)  # before the lock makes a folder where there is no index
    with writer_lock(index):
        if wrong := verify(index):
            raise IndexStoreError(f"{index}: {'; '.join(wrong)}", command="mimco index repair")
        old = current_generation(index)
        with Catalog(old.catalog) as catalog, catalog.snapshot():
            keep = np.ones(catalog.row_count(), np.bool_)
            keep[catalog.dead_rows()] = False
        return _rewrite(index, old, keep)


def repair(index: Path) -> RewriteReport:
    """Keep all that is sound: embeddings whose checksum holds, and the files that name them.

    A lost pointer, a cut-off or changed store of embeddings, a catalogue with damaged pages and a damaged approximation
    are mended. Folders stay recorded, so the next update finds and embeds again what was lost.

    Args:
        index: the index folder.

    Raises:
        IndexStoreError: nothing of it can be read, another process writes, or the disk is full.
    """
    if not index.is_dir():
        raise IndexStoreError(f"no index in {index}", command="mimco index DIR")
    with writer_lock(index):
        old = newest_generation(index)
        if old is None:
            raise IndexStoreError(f"{index} holds no readable catalogue", expected="an index", command=_AGAIN)
        with Salvage(old.catalog) as salvage:
            stated: dict[int, int] = {}
            for row, crc in salvage.crc32s():
                stated.setdefault(row, crc)
            vectors = salvage_vectors(old.vectors, salvage.embedding_dim)
        there = {row: crc for row, crc in stated.items() if 0 <= row < len(vectors)}
        keep = np.zeros(max(len(vectors), len(stated)), np.bool_)  # rows are counted without a gap
        keep[list(there)] = True
        keep[list(damaged_rows(vectors, there.items()))] = False
        return _rewrite(index, old, keep)


def _rewrite(index: Path, old: Generation, keep: npt.NDArray[np.bool_]) -> RewriteReport:
    try:
        return _written_anew(index, old, keep)
    except OSError as error:
        raise IndexStoreError(
            f"the index in {index} cannot be written ({error.strerror or error})",
            expected="room on the disk and the right to write",
        ) from error


def _written_anew(index: Path, old: Generation, keep: npt.NDArray[np.bool_]) -> RewriteReport:
    new_rows = np.where(keep, np.cumsum(keep) - 1, -1)  # [N]
    before = _size(old)
    staged = stage_generation(index)
    with Salvage(old.catalog) as salvage:
        dim = salvage.embedding_dim
        vectors = salvage_vectors(old.vectors, dim)
        create_vectors(staged.vectors, dim)
        with VectorWriter(staged.vectors, dim, 0) as writer:
            for rows in _portions(np.flatnonzero(keep)):
                writer.append(vectors[rows])
        lost = salvage.copy_to(staged.catalog, new_rows)
    new = promote(index, staged)
    with Catalog(new.catalog) as catalog:
        keep_tuned(new, catalog, anew=True)
        with catalog.snapshot():
            counts = catalog.counts()
    move_rebuild(index, old, new)
    switch_to(index, new)
    return RewriteReport(
        generation=new.number,
        files=counts.files,
        lost_files=lost,
        dropped_embeddings=int((~keep).sum()),
        bytes_before=before,
        bytes_after=_size(new),
    )


def _portions(rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


def _size(generation: Generation) -> int:
    return sum(path.stat().st_size for path in generation.path.iterdir() if path.is_file())
