"""The whole collection as a plane: pictures that look alike lie close together, and all of it is one HTML page.

Two ways to lay it out. PCA needs NumPy alone, always gives the same, and keeps distances between far things honest;
UMAP (McInnes, Healy and Melville, 2018, arXiv:1802.03426), from the package umap-learn, keeps neighbours together
better and takes minutes where PCA takes seconds. Copies of one content are one point.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mimco_deploy.atomic import write_bytes
from mimco_deploy.errors import MissingExtraError
from mimco_deploy.html_page import place_of_page
from mimco_deploy.serving.catalog import Listed
from mimco_deploy.serving.gallery import Gallery, read_gallery
from mimco_deploy.serving.map_page import build_page, draw_thumbnails

logger = logging.getLogger(__name__)

Method = Literal["auto", "pca", "umap"]
Used = Literal["pca", "umap"]

MAX_AUTO_UMAP = 20_000
"""Our choice: up to here UMAP takes about a minute."""
MIN_UMAP = 16
"""Our choice: one more than the neighbours that UMAP looks at. Below, PCA says as much."""
THUMBNAILS = 2000
_NEIGHBOURS, _MIN_DISTANCE, _SEED = 15, 0.1, 0
"""UMAP's own defaults, and a seed, so that the same index gives the same map."""
_ROWS = 8192
_SPREAD = 1e-6
"""Points closer together than this are equal but for the rounding of float32; embeddings have length 1."""
_LEVELS = 16
"""Of the grid that thins: its finest cells are the steps of the positions in the page."""


@dataclass(frozen=True)
class MapReport:
    """What was drawn."""

    method: Used
    """What laid it out."""
    points: int
    """Different contents."""
    files: int
    thumbnails: int
    unreadable: int
    """Pictures that were to have a thumbnail and could not be read; they are dots."""
    bytes: int
    """Size of the page."""


def lay_out(
    vectors: npt.NDArray[np.float32], method: Method = "auto", rows: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float32]:
    """Place embeddings on a plane.

    Args:
        vectors: [M, D], L2-normalised; may be mapped.
        method: `auto` is UMAP where umap-learn is installed and `MIN_UMAP` ≤ N ≤ `MAX_AUTO_UMAP`, else PCA.
        rows: [N], which of them to place, and in which order; all where None.

    Returns:
        [N, 2] in [0, 1], one scale for both axes, the centre of what is there in the middle. The same for the same
        arguments on the same machine.

    Raises:
        MissingExtraError: UMAP was asked for and cannot be imported.
    """
    return _lay_out(vectors, method, np.arange(len(vectors)) if rows is None else rows)[0]


def write_map(
    path: Path,
    index: Path,
    method: Method = "auto",
    thumbnails: int = THUMBNAILS,
    tell: Callable[[int, int], None] | None = None,
) -> MapReport:
    """Write a map of an index as one HTML page that needs nothing beside it.

    Args:
        path: file to write, replaced whole.
        index: the index folder.
        method: as for `lay_out`.
        thumbnails: most pictures that are shown as such, ≥ 0; they are spread over the plane. The others are dots.
        tell: called with the thumbnails done and all that are to be.

    Raises:
        IndexStoreError: there is no index, it is broken, or holds no picture.
        MissingExtraError: UMAP was asked for and cannot be imported.
    """
    gallery = read_gallery(index)
    points = _points(gallery)
    places, used = _lay_out(gallery.vectors, method, _rows_of(points))
    chosen = thin(places, thumbnails)
    drawn = draw_thumbnails(points, chosen.tolist(), tell)
    page = build_page(points, places, drawn, used)
    write_bytes(place_of_page(path), page)
    return MapReport(used, len(points), len(gallery.files), len(drawn.points), len(drawn.problems), len(page))


def place_contents(gallery: Gallery, method: Method = "auto") -> tuple[list[bytes], npt.NDArray[np.float32], Used]:
    """Place every content of an index on a plane.

    Args:
        gallery: of the index.
        method: as for `lay_out`.

    Returns:
        SHA-256 of each, [N, 2] as `lay_out` places them, and what laid them out.
    """
    points = _points(gallery)
    places, used = _lay_out(gallery.vectors, method, _rows_of(points))
    return [files[0].sha256 for files in points], places, used


def thin(places: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Choose points that cover the plane evenly, however dense it is in parts.

    A grid of one cell, then of four, of sixteen and so on: each cell that has points and none chosen so far gives the
    one nearest to its middle. So any first part of what comes out covers the plane as well.

    Args:
        places: [N, 2] in [0, 1].
        count: most to choose.

    Returns:
        [min(N, count)] numbers of points, coarse to fine.
    """
    chosen = np.empty(0, np.int64)
    left = np.arange(len(places))
    for level in range(_LEVELS + 1):
        if not len(left) or len(chosen) >= count:
            break
        candidates = _one_a_cell(places, left, chosen, level)
        room = count - len(chosen)
        if len(candidates) > room:  # they stand in the order of a curve through all cells
            candidates = candidates[np.linspace(0, len(candidates) - 1, room).round().astype(np.int64)]
        chosen = np.concatenate([chosen, candidates])
        left = np.setdiff1d(left, candidates, assume_unique=True)
    return np.concatenate([chosen, left])[:count]  # what is left lies exactly on others


def _one_a_cell(
    places: npt.NDArray[np.float32], left: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64], level: int
) -> npt.NDArray[np.int64]:
    """Of each cell of 2^level × 2^level without a chosen point, the point of `left` that is nearest to its middle."""
    side = 2**level
    cells = np.minimum((places * side).astype(np.int64), side - 1)
    curve = _interleaved(cells)
    off = ((places * side - cells - 0.5) ** 2).sum(axis=1)
    free = left[~np.isin(curve[left], curve[chosen])]
    free = free[np.lexsort((free, off[free], curve[free]))]
    return free[np.unique(curve[free], return_index=True)[1]]


def _interleaved(cells: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # Morton's order: the bits of both coordinates in turns, so that neighbours on the curve are near on the plane.
    curve = np.zeros(len(cells), np.int64)
    for bit in range(_LEVELS + 1):
        for axis in (0, 1):
            curve |= ((cells[:, axis] >> bit) & 1) << (2 * bit + axis)
    return curve


def _rows_of(points: list[list[Listed]]) -> npt.NDArray[np.int64]:
    return np.array([files[0].row for files in points], np.int64)


def _points(gallery: Gallery) -> list[list[Listed]]:
    """The files of each content, contents by row: their embeddings are then read in order."""
    files: dict[int, list[Listed]] = {}
    for file in gallery.files:
        files.setdefault(file.row, []).append(file)
    return [files[row] for row in sorted(files)]


# ---------------------------------------------------------------------------------------------------- layout


def _lay_out(
    vectors: npt.NDArray[np.float32], method: Method, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], Used]:
    umap = _umap_for(method, len(rows))
    return (_pca(vectors, rows), "pca") if umap is None else (_umap(umap, vectors, rows), "umap")


def _umap_for(method: Method, count: int) -> Any | None:
    """The module umap where it is to lay out so many points, else None."""
    if method == "pca" or (method == "auto" and (count > MAX_AUTO_UMAP or importlib.util.find_spec("umap") is None)):
        return None
    if count < MIN_UMAP:
        if method == "umap":
            logger.warning("%d pictures are too few for UMAP, which takes %d: laid out by PCA", count, MIN_UMAP)
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import umap
    except ImportError as error:  # numba, which it needs, refuses a NumPy that is too new
        if method == "umap":
            found = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
            raise MissingExtraError(
                f"the package umap-learn {found}", command='pip install "mimco-deploy[map]", or --method pca'
            ) from error
        logger.warning("umap-learn cannot be imported (%s): laid out by PCA", error)
        return None
    return umap


def _umap(umap: Any, vectors: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own parts that are deprecated
        reducer = umap.UMAP(
            n_neighbors=_NEIGHBOURS, min_dist=_MIN_DISTANCE, metric="cosine", random_state=_SEED, n_jobs=1
        )
        return _unit_square(np.asarray(reducer.fit_transform(vectors[rows]), np.float64))


def _pca(vectors: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Onto the two eigenvectors of the covariance with the largest eigenvalues; the largest entry of each is positive.

    Rows come in portions, so that memory does not grow with them.
    """
    dim = vectors.shape[1]
    mean = np.zeros(dim)
    for part in _parts(vectors, rows):
        mean += part.sum(axis=0, dtype=np.float64) / len(rows)
    covariance = np.zeros((dim, dim))
    for part in _parts(vectors, rows):
        centred = part - mean.astype(np.float32)
        covariance += centred.T @ centred
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :2]  # [D, 2]; D may be 1
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[np.newaxis], axis=0) < 0, -1, 1)
    places = np.zeros((len(rows), 2))
    start = 0
    for part in _parts(vectors, rows):
        places[start : start + len(part), : axes.shape[1]] = (part - mean) @ axes
        start += len(part)
    return _unit_square(places)


def _parts(vectors: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
    for start in range(0, len(rows), _ROWS):
        yield vectors[rows[start : start + _ROWS]]


def _unit_square(places: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Move and scale, both axes alike, into [0, 1]; what is equal but for rounding comes to lie in the middle."""
    if not len(places):
        return np.empty((0, 2), np.float32)
    finite = np.isfinite(places).all(axis=1)  # UMAP gives NaN to what has no neighbour
    known = places[finite] if finite.any() else np.zeros((1, 2))
    low, high = known.min(axis=0), known.max(axis=0)
    spread = float((high - low).max())
    if spread < _SPREAD:
        return np.full(places.shape, 0.5, np.float32)
    square = (places - (low + high) / 2) / spread + 0.5
    square[~finite] = 0.5
    return np.asarray(square.clip(0, 1), np.float32)
