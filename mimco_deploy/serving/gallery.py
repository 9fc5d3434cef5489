"""All of an index at once: every file with its embedding. For what looks at the whole collection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.catalog import Catalog, Listed
from mimco_deploy.serving.generations import Generation
from mimco_deploy.serving.inspect import read_current
from mimco_deploy.serving.vectors import read_vectors


@dataclass(frozen=True)
class Gallery:
    """One state of an index."""

    fingerprint: str
    """Of the encoder."""
    files: list[Listed]
    """By root and path; copies share a row."""
    vectors: npt.NDArray[np.float32]
    """[N, D], mapped: the embedding of a file is `vectors[file.row]`. Some rows may belong to no file."""


def read_gallery(index: Path) -> Gallery:
    """Read an index.

    Raises:
        IndexStoreError: there is none, it is broken, or holds no picture.
    """
    return read_current(index, lambda generation: _read(index, generation))


def _read(index: Path, generation: Generation) -> Gallery:
    with Catalog(generation.catalog) as catalog, catalog.snapshot():
        files = list(catalog.listing())
        if not files:
            raise IndexStoreError(f"the index in {index} holds no picture", command="mimco index DIR")
        vectors = read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())
        return Gallery(catalog.fingerprint, files, vectors)
