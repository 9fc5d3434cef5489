"""What an index holds, and whether it is whole. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.catalog import Catalog, Counts
from mimco_deploy.serving.generations import current_generation
from mimco_deploy.serving.vectors import read_vectors

_ROWS = 65_536
"""Embeddings looked at together: 100 MB at 384 numbers."""
_NORM = 1e-3
"""How far the length of a sound embedding may be from 1; int8 and half types included."""
_LISTED = 5


@dataclass(frozen=True)
class RootStatus:
    """One indexed folder."""

    path: Path
    reachable: bool
    files: int
    problems: int


@dataclass(frozen=True)
class IndexStatus:
    """What an index holds."""

    path: Path
    fingerprint: str
    """Of the encoder that made it."""
    embedding_dim: int
    generation: int
    """Grows with each rebuild."""
    counts: Counts
    bytes: int
    """On disk, catalogue and embeddings."""
    roots: tuple[RootStatus, ...]


def status_of(index: Path) -> IndexStatus:
    """Look at an index.

    Raises:
        IndexStoreError: there is none, or it is broken.
    """
    generation = current_generation(index)
    with Catalog(generation.catalog) as catalog, catalog.snapshot():
        roots = tuple(
            RootStatus(root.path, root.path.is_dir(), len(catalog.file_stamps(root)), len(catalog.problem_stamps(root)))
            for root in catalog.roots()
        )
        size = sum(path.stat().st_size for path in generation.path.iterdir() if path.is_file())
        return IndexStatus(
            index, catalog.fingerprint, catalog.embedding_dim, generation.number, catalog.counts(), size, roots
        )


def verify(index: Path) -> list[str]:
    """Read all of an index and say what is wrong with it; an empty list where nothing is.

    The catalogue is checked by SQLite itself, with what one table says of another; every embedding that counts must
    be there, of finite numbers and of length 1. An embedding that was changed into another of length 1 is not found.

    Raises:
        IndexStoreError: there is none, or too little of it to look at.
    """
    generation = current_generation(index)
    with Catalog(generation.catalog) as catalog, catalog.snapshot():
        wrong = [f"catalogue: {finding}" for finding in catalog.check()]
        count, dim, live = catalog.row_count(), catalog.embedding_dim, catalog.live_rows()
    try:
        vectors = read_vectors(generation.vectors, dim, count)
    except IndexStoreError as error:
        return [*wrong, error.found]
    bad = [row for start in range(0, count, _ROWS) for row in _unsound(vectors[start : start + _ROWS], start)]
    if bad:
        listed = ", ".join(map(str, bad[:_LISTED])) + (", …" if len(bad) > _LISTED else "")
        files = int(live[bad].sum())
        wrong.append(f"{len(bad)} embeddings are damaged (rows {listed}), {files} of them of files")
    return wrong


def _unsound(vectors: np.ndarray[tuple[int, ...], np.dtype[np.float32]], first: int) -> Iterator[int]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)  # NaN and infinite numbers make it so too
    yield from (first + int(row) for row in np.flatnonzero(~(np.abs(lengths - 1) < _NORM)))
