"""Nearest neighbours by inner product. The only file that touches FAISS.

FAISS proposes; what it returns is scored again from the stored embeddings, each pair by itself. So a score depends on
the two embeddings only, not on how many queries were asked at once, where a row lies or how an approximation rounds it,
and equal embeddings tie exactly.

An approximation is an inverted file over the first rows of the store: each row lies in the list of its nearest
centroid, as 8-bit numbers or as a product code, and a search reads the lists nearest to the query, which a graph over
the centroids finds where they are many. Rows that came since are scanned. Dead rows are passed over by a selection
while searching; FAISS is never asked to remove anything.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError

# Candidates fetched beyond k, so that the true k are among them although FAISS sums in float32 ...
_SPARE = 16
# ... or rounds to 8 bits: of 2,000 queries among a million, more found nothing more.
_SPARE_OF_8_BITS = 8
# Product codes are coarse: this many candidates for each hit, then the stored embeddings decide.
_PER_HIT_OF_CODES = 10
# Two float32 sums of the same unit-length embeddings differ by less: 384 terms give 1e-6.
_ROUNDING = 1e-5
MAX_APPROXIMATE_K = 100
"""More hits than this are searched exactly: how many lists to read was tuned for few."""
_MIN_APPROXIMATE_SHARE = 0.25
"""Fewer rows than this share are scanned: passing over the others costs a bit each."""
_TRAINING_ROWS_PER_LIST = 48
_MIN_TRAINING_ROWS = 10_000
"""For the codes, where there are few lists."""
_GRAPH_EFFORT = 200
"""Centroids looked at when one is linked into their graph (FAISS: 40): a search in it then misses fewer."""
_ADDED_AT_ONCE = 2**16
_TRAINING_ROWS_PER_CELL = 32
_CELL_ROUNDS = 8
_SEED = 2209

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Approximation:
    """One approximate index on the disk, and how to search it."""

    file: Path
    kind: str
    """FAISS factory string, such as `IVF4096,SQ8`."""
    rows: int
    """The first rows of the store, which it covers."""
    nprobe: int
    """Lists to read."""


class Selection:
    """Which rows may be returned, in the form that FAISS takes.

    Args:
        mask: [N], True where a row may be returned.
    """

    def __init__(self, mask: npt.NDArray[np.bool_]) -> None:
        self.count = int(mask.sum())
        self._bits = np.packbits(mask, bitorder="little")  # FAISS keeps the address: it must live as long
        self.faiss: Any = faiss.IDSelectorBitmap(len(mask), faiss.swig_ptr(self._bits))


class Searcher:
    """Finds rows of one state of a store. Safe to use from several threads.

    Args:
        vectors: [N, D], unit length; a memory map is read in place.
        dead: rows that are never returned, rising.
        approximation: to search with; exact where None.

    Raises:
        IndexStoreError: the approximation cannot be opened, or is of other embeddings.
    """

    def __init__(self, vectors: Vectors, dead: Rows | None = None, approximation: Approximation | None = None) -> None:
        # No copy: but a memory map answers each look at its rows slowly, and FAISS is given bare addresses.
        self._vectors = np.ascontiguousarray(vectors, np.float32)
        self._live = _selection(len(vectors), dead)
        self.count = len(vectors) if self._live is None else self._live.count
        self._ivf: Any = None
        if approximation is not None:
            self._ivf = _open(approximation, vectors)
            self._ivf.nprobe = approximation.nprobe
            self._set_effort(approximation.nprobe)
            self._per_hit, self._spare = (
                (1, _SPARE_OF_8_BITS) if approximation.kind.endswith(",SQ8") else (_PER_HIT_OF_CODES, _SPARE)
            )
            self._covered = approximation.rows
            tail_dead = None if dead is None else dead[dead >= self._covered] - self._covered
            self._tail = Searcher(vectors[self._covered :], tail_dead)

    def within(self, rows: Rows) -> Searcher:
        """The same that returns some rows only.

        Args:
            rows: live ones, rising.
        """
        mask = np.zeros(len(self._vectors), np.bool_)
        mask[rows] = True
        found = copy.copy(self)
        found._live = Selection(mask)
        found.count = found._live.count
        if self._ivf is not None:
            share = found.count / max(len(self._vectors), 1)
            if share < _MIN_APPROXIMATE_SHARE:
                found._ivf = None
            else:
                found._set_effort(math.ceil(self._nprobe / share))  # the nearest that count lie that much farther
                found._tail = self._tail.within(rows[rows >= self._covered] - self._covered)
        return found

    def search(self, queries: Vectors, k: int) -> tuple[Scores, Rows]:
        """Find the k rows of highest inner product with each query.

        Args:
            queries: [Q, D], unit length.
            k: at least 1; fewer come back where fewer rows are live.

        Returns:
            Scores [Q, k'] falling, and their rows [Q, k'], k' = min(k, live rows); equal scores by rising row.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        k = min(k, self.count)
        if self._ivf is None or k > MAX_APPROXIMATE_K or k == 0:
            return _search_exact(self._vectors, self._live, queries, k)
        fetched = min(self._covered, k * self._per_hit + self._spare)
        try:
            proposed: Rows = self._ivf.search(queries, fetched, params=self._parameters)[1]  # [Q, fetched], −1: none
        except RuntimeError as error:  # of a damaged file
            reason = str(error).splitlines()[0][-100:]
            raise IndexStoreError(
                f"the approximate index cannot be searched ({reason})", command="mimco index tune"
            ) from error
        if self._tail.count:
            proposed = np.concatenate([proposed, self._tail.search(queries, k)[1] + self._covered], axis=1)
        usable = proposed.view(np.uint64) < len(self._vectors)  # not −1, nor what a damaged file says
        if np.count_nonzero(usable) == usable.size:
            scores, rows = _scored_again(self._vectors, queries, proposed)
            if not np.count_nonzero(rows[:, 1:] == rows[:, :-1]):  # of a damaged file too
                return scores[:, :k], rows[:, :k]
        best = [self._best(*one, k) for one in zip(queries, proposed, usable, strict=True)]
        return np.stack([scores for scores, _ in best]), np.stack([rows for _, rows in best])

    def _best(self, query: Vectors, proposed: Rows, usable: npt.NDArray[np.bool_], k: int) -> tuple[Scores, Rows]:
        """The k best of what was proposed for one query; of all rows, where too few were."""
        candidates = np.unique(proposed[usable])
        if len(candidates) < k:
            scores, rows = _search_exact(self._vectors, self._live, query[np.newaxis], k)
        else:
            scores, rows = _scored_again(self._vectors, query[np.newaxis], candidates[np.newaxis])
        return scores[0, :k], rows[0, :k]

    def _set_effort(self, nprobe: int) -> None:
        self._nprobe = nprobe
        self._parameters: Any = None
        if self._live is None:
            return  # the index itself knows it: parameters of their own cost a search a tenth
        self._parameters = faiss.SearchParametersIVF()
        self._parameters.nprobe = nprobe
        self._parameters.sel = self._live.faiss


def _search_exact(vectors: Vectors, live: Selection | None, queries: Vectors, k: int) -> tuple[Scores, Rows]:
    """As `Searcher.search`, by looking at all rows."""
    count = len(vectors) if live is None else live.count
    k = min(k, count)
    if k == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    fetched = min(count, k + _SPARE)
    while True:
        scores, rows = _scored_again(vectors, queries, _scan(vectors, live, queries, fetched))
        # Where the last candidate ties with the k-th, a tied row of lower number may be missing: look further.
        if fetched == count or bool(np.all(scores[:, k - 1] - scores[:, -1] > _ROUNDING)):
            return scores[:, :k], rows[:, :k]
        fetched = min(count, 4 * fetched)


def build(path: Path, kind: str, vectors: Vectors) -> None:
    """Train an approximate index on embeddings, fill it with them and write it.

    Args:
        path: file to make; synced.
        kind: FAISS factory string of an inverted file.
        vectors: [N, D], read in portions.

    Raises:
        OSError: it cannot be written.
    """
    index: Any = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    graph: Any = faiss.downcast_index(index.quantizer)
    if isinstance(graph, faiss.IndexHNSW):
        graph.hnsw.efConstruction = _GRAPH_EFFORT
    index.cp.seed = _SEED
    index.cp.niter = 10
    index.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
    index.cp.min_points_per_centroid = 1  # fewer are no reason to write to stderr
    wanted = min(len(vectors), max(_TRAINING_ROWS_PER_LIST * index.nlist, _MIN_TRAINING_ROWS))
    chosen = np.sort(np.random.default_rng(_SEED).choice(len(vectors), wanted, replace=False))
    index.train(np.ascontiguousarray(vectors[chosen]))
    _fill_and_write(index, vectors, path)


def extend(old: Path, new: Path, vectors: Vectors) -> None:
    """Write an approximate index with the rows added that the store has beyond it; what was trained stays.

    Args:
        old: made by `build`.
        new: file to make; synced.
        vectors: [N, D], the first of them those of `old`.

    Raises:
        OSError: `old` cannot be read or `new` not written.
    """
    try:
        index: Any = faiss.read_index(os.fspath(old))
    except RuntimeError as error:
        raise _refused(error, old, "read") from error
    if index.d != vectors.shape[1] or index.ntotal > len(vectors):
        raise OSError(None, f"{old.name} holds {index.ntotal} embeddings of {index.d} numbers", os.fspath(old))
    _fill_and_write(index, vectors, new)


def _fill_and_write(index: Any, vectors: Vectors, path: Path) -> None:
    for start in range(index.ntotal, len(vectors), _ADDED_AT_ONCE):
        index.add(np.ascontiguousarray(vectors[start : start + _ADDED_AT_ONCE]))
    try:
        faiss.write_index(index, os.fspath(path))
    except RuntimeError as error:
        raise _refused(error, path, "write") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _refused(error: RuntimeError, path: Path, verb: str) -> OSError:
    return OSError(None, f"FAISS cannot {verb} it: {str(error).splitlines()[0][-100:]}", os.fspath(path))


def _selection(count: int, dead: Rows | None) -> Selection | None:
    if dead is None or len(dead) == 0:
        return None
    mask = np.ones(count, np.bool_)
    mask[dead] = False
    return Selection(mask)


def _open(approximation: Approximation, vectors: Vectors) -> Any:
    again = "mimco index tune"
    try:
        index: Any = faiss.read_index(os.fspath(approximation.file), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0][-100:]
        raise IndexStoreError(f"{approximation.file} cannot be opened ({reason})", command=again) from error
    found = (index.ntotal, index.d)
    if found != (approximation.rows, vectors.shape[1]) or len(vectors) < approximation.rows:
        raise IndexStoreError(
            f"{approximation.file} holds {found[0]} embeddings of {found[1]} numbers",
            expected=f"{approximation.rows} of {vectors.shape[1]}",
            command=again,
        )
    return index


def _scan(vectors: Vectors, live: Selection | None, queries: Vectors, k: int) -> Rows:
    if live is None:
        return np.asarray(faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1], np.int64)  # [Q, k]
    # `faiss.knn` takes no selection; what it wraps does.
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    faiss.knn_inner_product(
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        vectors.shape[1],
        len(queries),
        len(vectors),
        k,
        faiss.swig_ptr(scores),
        faiss.swig_ptr(rows),
        live.faiss,
    )
    return rows


def _scored_again(vectors: Vectors, queries: Vectors, candidates: Rows) -> tuple[Scores, Rows]:
    """Scores [Q, K] falling, and the rows of `candidates` [Q, K] that they are of; equal scores by rising row."""
    count, each = candidates.shape
    scores, candidates = np.empty((count, each), np.float32), np.ascontiguousarray(candidates)
    # Each sum by itself: of a product of matrices, the order of a row's sum depends on how many rows there are.
    faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]  # its stubs have not all of FAISS
        faiss.swig_ptr(scores),
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        faiss.swig_ptr(candidates),
        vectors.shape[1],
        count,
        each,
    )
    order = np.lexsort((candidates, -scores))
    if count > 1:
        order += each * np.arange(count)[:, np.newaxis]  # `take_along_axis` is thrice as slow
    return scores.take(order), candidates.take(order)


class Cells:
    """The space of embeddings cut into cells: a row lies in the cell of its nearest centroid.

    Args:
        vectors: [N, D], unit length.
        rows: what the cells are fitted to; a part of them is looked at.
        count: of cells; as many as rows at most.
    """

    def __init__(self, vectors: Vectors, rows: Rows, count: int) -> None:
        self._vectors = vectors
        self.count = min(count, len(rows))
        wanted = min(len(rows), _TRAINING_ROWS_PER_CELL * self.count)
        chosen = np.sort(np.random.default_rng(_SEED).choice(rows, wanted, replace=False))
        fitted: Any = faiss.Kmeans(
            vectors.shape[1],
            self.count,
            niter=_CELL_ROUNDS,
            seed=_SEED,
            spherical=True,
            min_points_per_centroid=1,  # fewer are no reason to write to stderr
            max_points_per_centroid=_TRAINING_ROWS_PER_CELL,
        )
        fitted.train(np.ascontiguousarray(vectors[chosen], np.float32))
        self._centroids: Vectors = fitted.centroids

    def nearest(self, rows: Rows, count: int) -> npt.NDArray[np.int32]:
        """The cells whose centroids lie nearest to rows.

        Args:
            rows: of the embeddings.
            count: of cells for each; all of them at most.

        Returns:
            [len(rows), count], nearest first.
        """
        found = np.empty((len(rows), min(count, self.count)), np.int32)
        for start in range(0, len(rows), _ADDED_AT_ONCE):
            part = np.ascontiguousarray(self._vectors[rows[start : start + _ADDED_AT_ONCE]], np.float32)
            found[start : start + len(part)] = faiss.knn(
                part, self._centroids, found.shape[1], metric=faiss.METRIC_INNER_PRODUCT
            )[1]
        return found
