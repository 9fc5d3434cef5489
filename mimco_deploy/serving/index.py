"""An index to search: which pictures look most like this one.

Any number of readers, beside at most one writer (`update.py`). A reader holds no lock between two calls; each search
sees one state of the catalogue and follows the index as it grows or is rebuilt. Nothing is written: an index on a
read-only disk can be searched.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.ann import Searcher
from mimco_deploy.serving.background import Background, background_of, references_of
from mimco_deploy.serving.catalog import Catalog, Counts, Listed, Problem
from mimco_deploy.serving.filters import LIMIT_S, Filter, FilteredFiles
from mimco_deploy.serving.generations import POINTER_FILE, Generation, check_encoder
from mimco_deploy.serving.inspect import read_current
from mimco_deploy.serving.tuning import Tuning, open_searcher, tuning_of
from mimco_deploy.serving.vectors import read_vectors

P = ParamSpec("P")
T = TypeVar("T")

_REMEMBERED = 16
_AT_ONCE = 1024
"""Queries: their scores with the references of the background take 6 MiB."""


@dataclass(frozen=True)
class Hit:
    """One file that a search found."""

    path: Path
    """Absolute. It was there at the last update."""
    score: float
    """Cosine in [−1, 1], higher is better."""
    content: str
    """SHA-256 of the file, hexadecimal: copies share it."""
    expected_by_chance: float | None = None
    """How many of the pictures searched would score this or more by chance; None where there are too few to tell."""
    confidence: float | None = None
    """1 / (1 + expected by chance), in (0, 1]: whether the score stands out; see `background.py`."""


def least_by_chance(hits: Sequence[Hit]) -> float | None:
    """Of the hit that stands out most, which need not be the first where they are reranked; None where not known."""
    return min((hit.expected_by_chance for hit in hits if hit.expected_by_chance is not None), default=None)


@dataclass(frozen=True)
class _State:
    """What a search needs, valid for one revision of what one pointer led to."""

    pointer: tuple[int, int]
    revision: int
    searcher: Searcher
    background: Background | None
    references: npt.NDArray[np.float32]
    """[R, D], embeddings that the background is measured with"""
    filtered: dict[tuple[Filter, object], Searcher] = field(default_factory=dict)
    """The last conditions that were asked for, each with the state of its table"""


def _of_the_newest(method: Callable[Concatenate[ImageIndex, P], T]) -> Callable[Concatenate[ImageIndex, P], T]:
    """Call once more where a rewrite removed the embeddings meanwhile. A catalogue that is open can be read on.

    As `read_current`, but a look at the pointer's date costs a search less than reading it.
    """

    @functools.wraps(method)
    def call(self: ImageIndex, /, *args: P.args, **kwargs: P.kwargs) -> T:
        while True:
            pointer = _pointer(self.path)
            try:
                return method(self, *args, **kwargs)
            except (IndexStoreError, FileNotFoundError):
                if _pointer(self.path) == pointer:
                    raise

    return call


@dataclass
class _Connection:
    """An open catalogue, and the pointer that led to it."""

    pointer: tuple[int, int]
    generation: Generation
    catalog: Catalog
    filters: FilteredFiles | None = None


class ImageIndex:
    """An index, open for searching. Make one with `ImageIndex.open`. Safe to use from several threads.

    Use as a context manager or `close` it; it may be used again afterwards.

    Args:
        path: the index folder.
        fingerprint: of the encoder that made it.
        embedding_dim: D.
    """

    condition_limit_s = LIMIT_S
    """For one condition; may be set."""

    def __init__(self, path: Path, fingerprint: str, embedding_dim: int) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.embedding_dim = embedding_dim
        self._state: _State | None = None
        # Opening a catalogue takes longer than many a search, so connections wait here between two calls. Taken and put
        # back as one step of the interpreter, they need no lock; `_opening` keeps two threads from opening one index.
        self._idle: list[_Connection] = []
        self._opening = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)

    @classmethod
    def open(cls, path: Path, fingerprint: str | None = None) -> ImageIndex:
        """Open an index.

        Args:
            path: the index folder, `index/` of a workspace.
            fingerprint: of the encoder at hand; None where nothing will be searched with one.

        Raises:
            IndexStoreError: there is no index, or it is broken.
            EncoderMismatchError: another encoder made it.
        """
        connection = _connect(path)
        catalog = connection.catalog
        index = cls(path, catalog.fingerprint, catalog.embedding_dim)
        index._idle.append(connection)
        if fingerprint is not None:
            check_encoder(path, index.fingerprint, fingerprint)
        index.picture_count()  # opens all that a search needs
        return index

    def close(self) -> None:
        """Close the files that are open between two searches."""
        _close_all(self._idle)
        self._state = None

    def __enter__(self) -> ImageIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def counts(self) -> Counts:
        """How much the index holds."""
        with self._reading() as (_, catalog):
            return catalog.counts()

    @_of_the_newest
    def picture_count(self) -> int:
        """Different pictures that a search looks through."""
        with self._connected(None) as connection:
            return self._refreshed(connection).searcher.count

    def roots(self) -> list[Path]:
        """The indexed folders, absolute, sorted."""
        with self._reading() as (_, catalog):
            return [root.path for root in catalog.roots()]

    def files(self) -> list[Path]:
        """Every file that a search can return, absolute, sorted."""
        with self._reading() as (_, catalog):
            return catalog.files()

    def problems(self) -> list[Problem]:
        """Every file that could not be indexed, sorted by path."""
        with self._reading() as (_, catalog):
            return catalog.problems()

    def state(self) -> tuple[int, int, tuple[int, int]]:
        """Number of the generation, its revision, and what differs where an index was deleted and made anew.

        Together they change whenever what a search sees does.
        """
        with self._connected(None) as connection:
            return connection.generation.number, connection.catalog.revision(), connection.pointer

    def files_with(self, content: str) -> list[Listed]:
        """The files of one content, sorted.

        Args:
            content: SHA-256, hexadecimal.
        """
        with self._reading() as (_, catalog):
            return catalog.files_with(bytes.fromhex(content))

    def content_of(self, path: Path) -> str | None:
        """SHA-256, hexadecimal, of an indexed file as it was indexed; None where it is not listed."""
        with self._reading() as (_, catalog):
            row = catalog.row_of_file(_full(path))
            return None if row is None else catalog.files_of([row])[row][0]

    @_of_the_newest
    def embedding_of_content(self, content: str) -> npt.NDArray[np.float32] | None:
        """The stored embedding [D] of a content that some file has; None where none does."""
        with self._reading() as (generation, catalog):
            files = catalog.files_with(bytes.fromhex(content))
            return None if not files else _embedding(generation, catalog, files[0].row)

    def page(self, condition: Filter | None, after: tuple[bytes, bytes], limit: int) -> list[Listed]:
        """Some of the files for which a condition holds, by folder and path; see `FilteredFiles.page`.

        Raises:
            ConfigError: the condition cannot be used.
        """
        condition = condition or Filter()
        with self._connected(condition) as connection:
            assert connection.filters is not None
            return connection.filters.page(condition, after, limit)

    def tuning(self) -> Tuning:
        """How the index is searched, exactly or not, and how good that is."""
        with self._reading() as (_, catalog):
            return tuning_of(catalog)

    @_of_the_newest
    def embedding_of(self, path: Path) -> npt.NDArray[np.float32] | None:
        """The stored embedding of an indexed file, which need not exist any more; None where it is not listed.

        Args:
            path: absolute, or relative to the current folder.
        """
        with self._reading() as (generation, catalog):
            row = catalog.row_of_file(_full(path))
            if row is None:
                return None
            return _embedding(generation, catalog, row)

    def search(
        self, embedding: npt.NDArray[np.float32], k: int, condition: Filter | None = None, *, min_score: float = -1.0
    ) -> list[Hit]:
        """Find the files that look most like one picture.

        Args:
            embedding: [D], L2-normalised, of the encoder that made the index.
            k: at least 1.
            condition: which files may be hits; all where None.
            min_score: least score of a hit.

        Returns:
            Up to k hits, best first; copies of one content are hits of their own with the same score.

        Raises:
            IndexStoreError: the index is empty or broken.
            EncoderMismatchError: the index was rebuilt by another encoder since it was opened.
            ConfigError: the condition cannot be used.
        """
        if embedding.ndim != 1:
            raise ValueError(f"embedding of shape {embedding.shape}, expected [{self.embedding_dim}]")
        return self.search_many(embedding[np.newaxis], k, condition, min_score=min_score)[0]

    @_of_the_newest
    def search_many(
        self, embeddings: npt.NDArray[np.float32], k: int, condition: Filter | None = None, *, min_score: float = -1.0
    ) -> list[list[Hit]]:
        """Search for several pictures at once.

        Args:
            embeddings: [Q, D], L2-normalised.
            k: at least 1.
            condition: as for `search`.
            min_score: as for `search`.

        Returns:
            Q lists, each as `search` gives it.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim or not np.isfinite(embeddings).all():
            raise ValueError(f"embeddings of shape {embeddings.shape}, expected [Q, {self.embedding_dim}], all finite")
        if k < 1:
            raise ValueError(f"k = {k}, expected at least 1")
        condition = condition or None
        with self._connected(condition) as connection:
            state = self._refreshed(connection)
            if not state.searcher.count:
                raise IndexStoreError(f"the index in {self.path} holds no picture", command="mimco index DIR")
            searcher = state.searcher if condition is None else _within(state, connection, condition)
            results: list[list[Hit]] = []
            for start in range(0, len(embeddings), _AT_ONCE):
                queries = embeddings[start : start + _AT_ONCE]
                scores, rows = searcher.search(queries, k)
                chances = _chances(state, queries, scores, searcher.count)
                enough = np.count_nonzero(scores >= min_score, axis=1)  # they fall
                found = _Found([row[:end] for row, end in zip(rows.tolist(), enough, strict=True)], scores, chances)
                results += _list_hits(found, k, connection, condition)
            return results

    @contextlib.contextmanager
    def _reading(self) -> Iterator[tuple[Generation, Catalog]]:
        with self._connected(None) as connection:
            yield connection.generation, connection.catalog

    @contextlib.contextmanager
    def _connected(self, condition: Filter | None) -> Iterator[_Connection]:
        """One state of the index, and what is needed to run a condition on it."""
        connection = self._connection()
        try:
            if condition is not None:
                if connection.filters is None:
                    connection.filters = FilteredFiles(connection.catalog.connection, self.condition_limit_s)
                connection.filters.prepare(condition)
            with connection.catalog.snapshot():
                check_encoder(self.path, connection.catalog.fingerprint, self.fingerprint)
                yield connection
        except BaseException:
            connection.catalog.close()
            raise
        self._idle.append(connection)

    def _connection(self) -> _Connection:
        pointer = _pointer(self.path)
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return _connect(self.path)
            if connection.pointer == pointer:
                return connection
            connection.catalog.close()

    def _refreshed(self, connection: _Connection) -> _State:
        generation, catalog = connection.generation, connection.catalog
        revision = catalog.revision()
        with self._opening:
            state = self._state
            # Not by the generation: an index that was deleted and made anew counts from 1 again.
            if state is None or (state.pointer, state.revision) != (connection.pointer, revision):
                vectors = read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())
                background = background_of(catalog)
                references = references_of(background, vectors)
                searcher = open_searcher(generation, catalog, vectors)
                state = self._state = _State(connection.pointer, revision, searcher, background, references)
        return state


def _full(path: Path) -> Path:
    """Absolute, its folder without links; a link itself is what was indexed. Loops of links lead nowhere."""
    return Path(os.path.realpath(path.parent)) / path.name


def _embedding(generation: Generation, catalog: Catalog, row: int) -> npt.NDArray[np.float32]:
    return np.array(read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())[row])


def _connect(path: Path) -> _Connection:
    pointer = _pointer(path)  # before the generation: one that is too old is noticed, one that is too new is not
    return read_current(path, lambda generation: _Connection(pointer, generation, Catalog(generation.catalog)))


def _pointer(path: Path) -> tuple[int, int]:
    """What changes when another generation, or another index, takes over: its file is replaced."""
    try:
        status = (path / POINTER_FILE).stat()
    except OSError:
        return (0, 0)  # opening says it better
    return (status.st_ino, status.st_mtime_ns)


def _close_all(connections: list[_Connection]) -> None:
    while connections:
        connections.pop().catalog.close()


def _within(state: _State, connection: _Connection, condition: Filter) -> Searcher:
    """What to search with under a condition; the last few are remembered as long as the index stays as it is."""
    assert connection.filters is not None
    key = (condition, None if condition.table is None else connection.filters.table)
    found = state.filtered.get(key)
    if found is None:
        found = state.searcher.within(connection.filters.rows(condition))
        if len(state.filtered) >= _REMEMBERED:
            state.filtered.clear()
        state.filtered[key] = found
    return found


@dataclass(frozen=True)
class _Found:
    """What a search found for each of Q queries."""

    rows: list[list[int]]
    """Best first, K at most."""
    scores: npt.NDArray[np.float32]
    """[Q, K], falling; of more than the rows where some score too little."""
    chances: list[list[float]] | None
    """[Q, K], how many of the pictures searched would score that by chance; None where that is not known."""


def _chances(
    state: _State, queries: npt.NDArray[np.float32], scores: npt.NDArray[np.float32], searched: int
) -> list[list[float]] | None:
    if state.background is None:
        return None
    chances: list[list[float]] = state.background.expected_by_chance(
        state.references, queries, scores, searched
    ).tolist()
    return chances


def _list_hits(found: _Found, k: int, connection: _Connection, condition: Filter | None) -> list[list[Hit]]:
    """The files behind rows, at most k for each query."""
    files = connection.catalog.files_of({row for rows in found.rows for row in rows})
    results: list[list[Hit]] = []
    # Rounding may step over the ends of the cosine.
    for number, (rows, scores) in enumerate(zip(found.rows, found.scores.clip(-1.0, 1.0).tolist(), strict=True)):
        chances = repeat(None) if found.chances is None else found.chances[number]
        allowed = None
        if condition is not None and rows:
            assert connection.filters is not None
            allowed = connection.filters.files(condition, rows)
        hits: list[Hit] = []
        for row, score, chance in zip(rows, scores, chances, strict=False):
            content, paths = files[row]
            confidence = None if chance is None else 1 / (1 + chance)
            hits += [
                Hit(path, score, content, chance, confidence)
                for path in paths
                if allowed is None or (row, path) in allowed
            ]
            if len(hits) >= k:
                break
        results.append(hits[:k])
    return results
