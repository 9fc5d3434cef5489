"""An index to search: which pictures look most like this one.

Any number of readers, beside at most one writer (`update.py`). A reader holds no lock between two calls; each search
sees one state of the catalogue and follows the index as it grows or is rebuilt. Nothing is written: an index on a
read-only disk can be searched.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.preprocess import read_pixels
from mimco_deploy.serving.ann import Searcher
from mimco_deploy.serving.catalog import Catalog, Counts, Problem
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.generations import POINTER_FILE, Generation, check_encoder, current_generation
from mimco_deploy.serving.tuning import Tuning, open_searcher, tuning_of
from mimco_deploy.serving.vectors import read_vectors
from mimco_deploy.stopwatch import Stopwatch


@dataclass(frozen=True)
class Hit:
    """One file that a search found."""

    path: Path
    """Absolute. It was there at the last update."""
    score: float
    """Cosine in [−1, 1], higher is better."""
    content: str
    """SHA-256 of the file, hexadecimal: copies share it."""


@dataclass(frozen=True)
class _State:
    """What a search needs, valid for one revision of one generation."""

    generation: Generation
    revision: int
    searcher: Searcher


@dataclass(frozen=True)
class _Connection:
    """An open catalogue, and the pointer that led to it."""

    pointer: tuple[int, int]
    generation: Generation
    catalog: Catalog


class ImageIndex:
    """An index, open for searching. Make one with `ImageIndex.open`. Safe to use from several threads.

    Use as a context manager or `close` it; it may be used again afterwards.

    Args:
        path: the index folder.
        fingerprint: of the encoder that made it.
        embedding_dim: D.
    """

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
        with index._reading() as (generation, catalog):
            index._refreshed(generation, catalog)
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

    def tuning(self) -> Tuning:
        """How the index is searched, exactly or not, and how good that is."""
        with self._reading() as (_, catalog):
            return tuning_of(catalog)

    def search(self, embedding: npt.NDArray[np.float32], k: int) -> list[Hit]:
        """Find the files that look most like one picture.

        Args:
            embedding: [D], L2-normalised, of the encoder that made the index.
            k: at least 1.

        Returns:
            Up to k hits, best first; copies of one content are hits of their own with the same score.

        Raises:
            IndexStoreError: the index is empty or broken.
            EncoderMismatchError: the index was rebuilt by another encoder since it was opened.
        """
        if embedding.ndim != 1:
            raise ValueError(f"embedding of shape {embedding.shape}, expected [{self.embedding_dim}]")
        return self.search_many(embedding[np.newaxis], k)[0]

    def search_many(self, embeddings: npt.NDArray[np.float32], k: int) -> list[list[Hit]]:
        """Search for several pictures at once.

        Args:
            embeddings: [Q, D], L2-normalised.
            k: at least 1.

        Returns:
            Q lists, each as `search` gives it.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim or not np.isfinite(embeddings).all():
            raise ValueError(f"embeddings of shape {embeddings.shape}, expected [Q, {self.embedding_dim}], all finite")
        if k < 1:
            raise ValueError(f"k = {k}, expected at least 1")
        with self._reading() as (generation, catalog):
            state = self._refreshed(generation, catalog)
            if not state.searcher.count:
                raise IndexStoreError(f"the index in {self.path} holds no picture", command="mimco index DIR")
            scores, rows = state.searcher.search(embeddings, k)
            return [_hits(catalog, *found, k) for found in zip(scores, rows, strict=True)]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[tuple[Generation, Catalog]]:
        connection = self._connection()
        try:
            with connection.catalog.snapshot():
                check_encoder(self.path, connection.catalog.fingerprint, self.fingerprint)
                yield connection.generation, connection.catalog
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

    def _refreshed(self, generation: Generation, catalog: Catalog) -> _State:
        revision = catalog.revision()
        with self._opening:
            state = self._state
            if state is None or (state.generation, state.revision) != (generation, revision):
                vectors = read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())
                state = self._state = _State(generation, revision, open_searcher(generation, catalog, vectors))
        return state


def search_image(index: ImageIndex, encoder: Encoder, path: Path, k: int, watch: Stopwatch | None = None) -> list[Hit]:
    """Find the files that look most like a picture on disk, which need not be indexed.

    Args:
        index: where to look.
        encoder: the one that made the index.
        path: the query image.
        k: at least 1.
        watch: told when the picture is decoded, embedded and searched for.

    Returns:
        Up to k hits, best first. An indexed query image finds itself, with a score of 1 but for rounding.

    Raises:
        ImageError: the query is not a picture.
        EncoderMismatchError: another encoder made the index.
        IndexStoreError: the index is empty or broken.
    """
    check_encoder(index.path, index.fingerprint, encoder.spec.fingerprint)
    spec = encoder.spec
    pixels = read_pixels(path, spec.image_size_px, spec.crop_share, spec.interpolation)
    watch = watch or Stopwatch()
    watch.lap("decode")
    embedding = encoder.embed(pixels[np.newaxis])[0]
    watch.lap("embed")
    hits = index.search(embedding, k)
    watch.lap("search")
    return hits


def _connect(path: Path) -> _Connection:
    pointer, generation = _pointer(path), current_generation(path)
    try:
        return _Connection(pointer, generation, Catalog(generation.catalog))
    except IndexStoreError:
        newer = current_generation(path)
        if newer == generation:
            raise
        return _connect(path)  # a rebuild finished while we opened the old one


def _pointer(path: Path) -> tuple[int, int]:
    """What changes when another generation takes over: its file is replaced."""
    try:
        status = (path / POINTER_FILE).stat()
    except OSError:
        return (0, 0)  # opening says it better
    return (status.st_ino, status.st_mtime_ns)


def _close_all(connections: list[_Connection]) -> None:
    while connections:
        connections.pop().catalog.close()


def _hits(catalog: Catalog, scores: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], k: int) -> list[Hit]:
    hits: list[Hit] = []
    found = catalog.files_of(rows.tolist())
    for score, row in zip(
        scores.clip(-1.0, 1.0).tolist(), rows.tolist(), strict=True
    ):  # rounding may step over the ends
        content, paths = found[row]
        hits += [Hit(path, score, content) for path in paths]
        if len(hits) >= k:
            break
    return hits[:k]
