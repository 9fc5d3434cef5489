"""What an index holds, and whether it is whole. Reads only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.images import shown_name
from mimco_deploy.serving.background import background_of, references_of
from mimco_deploy.serving.catalog import Catalog, Counts
from mimco_deploy.serving.generations import Generation, current_generation, has_index
from mimco_deploy.serving.scan import can_be_walked
from mimco_deploy.serving.tuning import Budget, Tuning, budget_of, damage, tuning_of
from mimco_deploy.serving.vectors import crc32s as crc32s_of
from mimco_deploy.serving.vectors import read_vectors

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROWS_AT_ONCE = 65_536
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
    """On disk: catalogue, embeddings and what was made to search them fast."""
    roots: tuple[RootStatus, ...]
    search: Tuning
    budget: Budget
    made_by: dict[str, str]
    """What embedded last: `provider`, `precision`, `encoder` (path of the bundle); empty where nothing was yet."""


def read_current(index: Path, read: Callable[[Generation], T]) -> T:
    """Read the current generation; once more where a rewrite has put another in its place, and removed it, meanwhile.

    Args:
        index: the index folder.
        read: may be called several times.

    Returns:
        What `read` returns.

    Raises:
        IndexStoreError: there is no index, or `read` raised it of a generation that is still the current one.
    """
    while True:
        generation = current_generation(index)
        try:
            return read(generation)
        except (IndexStoreError, FileNotFoundError):
            if current_generation(index) == generation:
                raise


def status_of(index: Path) -> IndexStatus:
    """Look at an index.

    Raises:
        IndexStoreError: there is none, or it is broken.
    """
    return read_current(index, lambda generation: _status(index, generation))


def _status(index: Path, generation: Generation) -> IndexStatus:
    with Catalog(generation.catalog) as catalog, catalog.snapshot():
        roots = tuple(
            RootStatus(root.path, can_be_walked(root.path), *catalog.counts_below(root)) for root in catalog.roots()
        )
        size = sum(path.stat().st_size for path in generation.path.iterdir() if path.is_file())
        return IndexStatus(
            index,
            catalog.fingerprint,
            catalog.embedding_dim,
            generation.number,
            catalog.counts(),
            size,
            roots,
            tuning_of(catalog),
            budget_of(catalog),
            catalog.made_by(),
        )


def recorded_encoder(index: Path) -> Path | None:
    """The bundle that an index was made with, where that is not the workspace's own; told of where it is gone."""
    if not has_index(index):
        return None
    recorded = read_current(index, _made_by).get("encoder")
    if recorded is None:
        return None
    if Path(recorded).exists():
        return Path(recorded)
    logger.warning(
        "%s, with which the index was made, is gone; if it lies elsewhere: mimco index --encoder PATH",
        shown_name(recorded),
    )
    return None


def _made_by(generation: Generation) -> dict[str, str]:
    with Catalog(generation.catalog) as catalog, catalog.snapshot():
        return catalog.made_by()


def fingerprint_of(index: Path) -> str | None:
    """Fingerprint of the encoder that made an index; None where there is none, or it cannot be read."""
    try:
        return read_current(index, _fingerprint)
    except IndexStoreError:
        return None


def _fingerprint(generation: Generation) -> str:
    with Catalog(generation.catalog) as catalog:
        return catalog.fingerprint


def verify(index: Path) -> list[str]:
    """Read all of an index and say what is wrong with it; an empty list where nothing is.

    The catalogue is checked by SQLite itself, with what one table says of another; every embedding that counts must
    be there, have the checksum it was stored with, and be of length 1; the approximation must be as it was written.
    An index that is updated meanwhile is looked at as it was at the beginning.

    Raises:
        IndexStoreError: there is none, or too little of it to look at.
    """
    while True:
        generation = current_generation(index)
        wrong = read_current(index, _wrong)
        if not wrong or current_generation(index) == generation:
            return wrong  # else it was removed under our eyes


def _wrong(generation: Generation) -> list[str]:
    with Catalog(generation.catalog, private=True) as catalog, catalog.snapshot():
        wrong = [f"catalogue: {finding}" for finding in catalog.check()]
        if wrong:
            return wrong
        try:
            vectors = read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())
            references_of(background_of(catalog), vectors)
        except IndexStoreError as error:
            return [error.found]
        bad = list(damaged_rows(vectors, catalog.crc32s()))
        if bad:
            listed = ", ".join(map(str, bad[:_LISTED])) + (", …" if len(bad) > _LISTED else "")
            files = sum(len(paths) for _, paths in catalog.files_of(bad).values())
            wrong.append(f"{len(bad)} embeddings are damaged (rows {listed}), {files} of them of files")
    if damaged := _damage(generation):
        wrong.append(damaged)
    return wrong


def _damage(generation: Generation) -> str:
    """What is wrong with the approximation; with the new one where an update builds another meanwhile."""
    while True:
        with Catalog(generation.catalog) as catalog, catalog.snapshot():
            tuning = tuning_of(catalog)
        try:
            found = damage(generation, tuning)
        except FileNotFoundError:
            continue  # it went just now
        with Catalog(generation.catalog) as catalog, catalog.snapshot():
            if not found or tuning_of(catalog) == tuning:
                return found


def damaged_rows(vectors: npt.NDArray[np.float32], crc32s: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Rows that are not what was stored, or no embeddings.

    Args:
        vectors: [N, D].
        crc32s: row, below N, and the checksum of its bytes.
    """
    rest = iter(crc32s)
    while portion := list(islice(rest, ROWS_AT_ONCE)):
        rows = np.array([row for row, _ in portion])
        embeddings = vectors[rows]
        lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)  # NaN and infinite numbers make it so too
        sound = np.abs(lengths - 1) < _NORM
        sound &= np.array(crc32s_of(embeddings)) == np.array([crc for _, crc in portion])
        yield from rows[~sound].tolist()
