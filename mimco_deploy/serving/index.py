"""An index to search: which pictures look most like this one.

Any number of readers, beside at most one writer (`update.py`). A reader holds no lock between two calls; each search
sees one state of the catalogue and follows the index as it grows or is rebuilt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.images import read_image
from mimco_deploy.preprocess import preprocess
from mimco_deploy.serving.ann import search_exact
from mimco_deploy.serving.catalog import Catalog, Counts, Problem
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.generations import Generation, check_encoder, current_generation
from mimco_deploy.serving.vectors import read_vectors


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
    vectors: npt.NDArray[np.float32]
    """[N, D], mapped"""
    live: npt.NDArray[np.bool_]
    """[N]"""


class ImageIndex:
    """An index, open for searching. Make one with `ImageIndex.open`. Safe to use from several threads.

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
        with _open_catalog(path) as (_, catalog):
            if fingerprint is not None:
                check_encoder(path, catalog, fingerprint)
            index = cls(path, catalog.fingerprint, catalog.embedding_dim)
        with index._reading() as (generation, catalog):
            index._refreshed(generation, catalog)
        return index

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
            if not state.live.any():
                raise IndexStoreError(f"the index in {self.path} holds no picture", command="mimco index DIR")
            scores, rows = search_exact(state.vectors, state.live, embeddings, k)
            return [_hits(catalog, *found, k) for found in zip(scores, rows, strict=True)]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[tuple[Generation, Catalog]]:
        with _open_catalog(self.path) as (generation, catalog):
            check_encoder(self.path, catalog, self.fingerprint)
            yield generation, catalog

    def _refreshed(self, generation: Generation, catalog: Catalog) -> _State:
        revision, state = catalog.revision(), self._state
        if state is None or (state.generation, state.revision) != (generation, revision):
            vectors = read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())
            state = self._state = _State(generation, revision, vectors, catalog.live_rows())
        return state


def search_image(index: ImageIndex, encoder: Encoder, path: Path, k: int) -> list[Hit]:
    """Find the files that look most like a picture on disk, which need not be indexed.

    Args:
        index: where to look.
        encoder: the one that made the index.
        path: the query image.
        k: at least 1.

    Returns:
        Up to k hits, best first. An indexed query image finds itself, with a score of 1 but for rounding.

    Raises:
        ImageError: the query is not a picture.
        EncoderMismatchError: another encoder made the index.
        IndexStoreError: the index is empty or broken.
    """
    with _open_catalog(index.path) as (_, catalog):
        check_encoder(index.path, catalog, encoder.spec.fingerprint)
    spec = encoder.spec
    pixels = preprocess(read_image(path), spec.image_size_px, spec.crop_share, spec.interpolation)
    return index.search(encoder.embed(pixels[np.newaxis])[0], k)


@contextlib.contextmanager
def _open_catalog(path: Path) -> Iterator[tuple[Generation, Catalog]]:
    generation = current_generation(path)
    try:
        catalog = Catalog(generation.catalog)
    except IndexStoreError:
        newer = current_generation(path)
        if newer == generation:
            raise
        generation, catalog = newer, Catalog(newer.catalog)  # a rebuild finished while we opened the old one
    with catalog, catalog.snapshot():
        yield generation, catalog


def _hits(catalog: Catalog, scores: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], k: int) -> list[Hit]:
    hits: list[Hit] = []
    for score, row in zip(scores, rows, strict=True):
        content, paths = catalog.files_of(int(row))
        cosine = float(min(max(score, -1.0), 1.0))  # rounding may step over the ends
        hits += [Hit(path, cosine, content) for path in paths]
        if len(hits) >= k:
            break
    return hits[:k]
