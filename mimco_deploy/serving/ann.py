"""Nearest neighbours by inner product. The only file that touches FAISS.

FAISS scans; what it returns is scored again in float64. So a score depends on the two embeddings only, not on how many
queries were asked at once or where a row lies, and equal embeddings tie exactly.
"""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

# Candidates fetched beyond k, so that the true k are among them although FAISS sums in float32.
_SPARE = 16
# Two float32 sums of the same unit-length embeddings differ by less: 384 terms give 1e-6.
_ROUNDING = 1e-5

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


def search_exact(
    vectors: npt.NDArray[np.float32], live: npt.NDArray[np.bool_] | None, queries: npt.NDArray[np.float32], k: int
) -> tuple[Scores, Rows]:
    """Find the k rows of highest inner product with each query, by looking at all.

    Args:
        vectors: [N, D], unit length; a memory map is read in place.
        live: [N], rows that may be returned; all where None.
        queries: [Q, D], unit length.
        k: at least 1; fewer come back where fewer are live.

    Returns:
        Scores [Q, k'] falling, and their rows [Q, k'], k' = min(k, live rows); equal scores by rising row.
    """
    count = len(vectors) if live is None else int(live.sum())
    k = min(k, count)
    if k == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    if live is not None and count == len(vectors):
        live = None
    fetched = min(count, k + _SPARE)
    while True:
        scores, rows = _scored_again(vectors, queries, _scan(vectors, live, queries, fetched))
        # Where the last candidate ties with the k-th, a tied row of lower number may be missing: look further.
        if fetched == count or bool(np.all(scores[:, k - 1] - scores[:, -1] > _ROUNDING)):
            return scores[:, :k], rows[:, :k]
        fetched = min(count, 4 * fetched)


def _scan(
    vectors: npt.NDArray[np.float32], live: npt.NDArray[np.bool_] | None, queries: npt.NDArray[np.float32], k: int
) -> Rows:
    queries = np.ascontiguousarray(queries, np.float32)
    vectors = np.ascontiguousarray(vectors, np.float32)  # no copy of a little-endian map
    if live is None:
        return np.asarray(faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1], np.int64)  # [Q, k]
    # `faiss.knn` takes no selection; what it wraps does.
    bits = np.packbits(live, bitorder="little")
    selection = faiss.IDSelectorBitmap(len(vectors), faiss.swig_ptr(bits))
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
        selection,
    )
    return rows


def _scored_again(
    vectors: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], candidates: Rows
) -> tuple[Scores, Rows]:
    scores, rows = np.empty(candidates.shape, np.float32), np.empty_like(candidates)
    for number, (query, found) in enumerate(zip(queries, candidates, strict=True)):
        exact = (vectors[found].astype(np.float64) * query).sum(axis=1).astype(np.float32)  # [k]
        order = np.lexsort((found, -exact))
        scores[number], rows[number] = exact[order], found[order]
    return scores, rows
