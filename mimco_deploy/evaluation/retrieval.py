"""Retrieval over labelled pictures: average precision, recall@k and precision@k, a number for each query.

A hit is relevant where it has the query's label. Scores are cosines. Of hits that score the same, the relevant ones
come last: an encoder that cannot tell pictures apart gets nothing for the order of the gallery, which often is that of
the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import EvaluationError

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

BLOCK_SCORES = 2**22
"""Scores in a block, one query's at least: 16 MiB, and once more in order; 64 MiB where one block follows another."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What each query found. One without a relevant picture in the gallery has NaN, and is left out of the means."""

    ks: tuple[int, ...]
    average_precision: Numbers
    """[Q], in [0, 1]; the plain one, not interpolated."""
    recall: Numbers
    """[Q, K], for each k: 1 where one of the first k hits is relevant, else 0."""
    precision: Numbers
    """[Q, K], for each k: the share of relevant ones among the first k hits, in [0, 1]; out of k also where the gallery
    is smaller."""

    @property
    def without_relevant(self) -> int:
        """Queries that the means leave out."""
        return int(np.isnan(self.average_precision).sum())

    @property
    def mean_average_precision(self) -> float:
        """MAP, in [0, 1]; NaN where no query has a relevant picture."""
        return float(mean_of_known(self.average_precision))

    @property
    def mean_recall(self) -> dict[int, float]:
        """Recall@k by k, in [0, 1]."""
        return dict(zip(self.ks, mean_of_known(self.recall).tolist(), strict=True))

    @property
    def mean_precision(self) -> dict[int, float]:
        """Precision@k by k, in [0, 1]."""
        return dict(zip(self.ks, mean_of_known(self.precision).tolist(), strict=True))


def average_precision(positions: npt.ArrayLike, positives: int, *, trapezoidal: bool) -> float:
    """The area under the curve of precision over recall, of one query.

    Args:
        positions: where relevant pictures were found, from 0, ascending.
        positives: relevant pictures there are, found or not; at least as many as positions.
        trapezoidal: revisited Oxford's and Paris's rule (`evaluation/revisited.py`): at each relevant picture the mean
            of the precisions without it and with it, where that of no hits is 1. Otherwise the plain one (`retrieval`
            and `retrieval_among`): the precision with it.

    Returns:
        In [0, 1]; NaN where there are no positives.

    Source: arXiv 1803.11285, section 5, and its `compute_ap`; the plain one as in Manning et al., Introduction to
    Information Retrieval (2008), section 8.4.
    """
    if positives == 0:
        return float("nan")
    places = np.asarray(positions, np.float64)
    found = np.arange(len(places))  # relevant ones before each
    heights = (found + 1) / (places + 1)
    if trapezoidal:
        before = np.divide(found, places, out=np.ones(len(places)), where=places > 0)
        heights = (heights + before) / 2
    return float(heights.sum() / positives)


def retrieval(
    queries: Floats, query_labels: Labels, gallery: Floats, gallery_labels: Labels, ks: Sequence[int] = (1, 5, 10)
) -> Retrieval:
    """Searches the gallery for each query; as in In-Shop, where queries and gallery are disjoint.

    Args:
        queries: [Q, D], L2-normalised.
        query_labels: [Q].
        gallery: [N, D], L2-normalised.
        gallery_labels: [N].
        ks: for recall@k and precision@k, each at least 1.

    Raises:
        EvaluationError: an embedding that is not finite, as many labels as not pictures, or a k below 1.
    """
    _check(queries, query_labels, ks)
    _check(gallery, gallery_labels, ks)
    return _retrieval(queries, query_labels, gallery, gallery_labels, ks, among=False)


def retrieval_among(embeddings: Floats, labels: Labels, ks: Sequence[int] = (1, 2, 4, 8)) -> Retrieval:
    """Every picture is a query against all others; the rule of CUB-200-2011, Cars and Stanford Online Products.

    A picture is kept from finding itself by its number, not by dropping the first hit: a copy of it may come first.

    Args:
        embeddings: [N, D], L2-normalised.
        labels: [N].
        ks: for recall@k and precision@k, each at least 1.

    Raises:
        EvaluationError: an embedding that is not finite, as many labels as not pictures, or a k below 1.

    Source: Oh Song et al., arXiv 1511.06452, section 6.
    """
    _check(embeddings, labels, ks)
    return _retrieval(embeddings, labels, embeddings, labels, ks, among=True)


def mean_of_known(values: Numbers) -> Numbers:
    """The mean over the queries, [Q, ...] → [...], without those that are NaN; NaN where all are."""
    known = values[~np.isnan(values).any(axis=tuple(range(1, values.ndim)))]
    return np.asarray(known.mean(axis=0) if len(known) else np.full(values.shape[1:], np.nan), np.float64)


def _retrieval(
    queries: Floats, query_labels: Labels, gallery: Floats, gallery_labels: Labels, ks: Sequence[int], *, among: bool
) -> Retrieval:
    precision_of = np.full(len(queries), np.nan)
    recall, precision = (np.full((len(queries), len(ks)), np.nan) for _ in range(2))
    by_label = np.argsort(gallery_labels, kind="stable")
    sorted_labels = gallery_labels[by_label]
    first, last = (np.searchsorted(sorted_labels, query_labels, side=side) for side in ("left", "right"))
    for query, distances in _blocks(queries, gallery, among=among):
        relevant = by_label[first[query] : last[query]]
        if among:
            relevant = relevant[relevant != query]
        if not len(relevant):
            continue
        positions = _positions(*distances, relevant)
        precision_of[query] = average_precision(positions, len(positions), trapezoidal=False)
        for column, k in enumerate(ks):
            found = np.searchsorted(positions, k)
            recall[query, column] = found > 0
            precision[query, column] = found / k
    return Retrieval(ks=tuple(ks), average_precision=precision_of, recall=recall, precision=precision)


def _blocks(queries: Floats, gallery: Floats, *, among: bool) -> Iterator[tuple[int, tuple[Floats, Floats]]]:
    """Each query's number and its negated scores, [N], as they are and in order."""
    rows = max(1, BLOCK_SCORES // max(1, len(gallery)))
    for start in range(0, len(queries), rows):
        negated = queries[start : start + rows] @ gallery.T  # [rows, N]
        np.negative(negated, out=negated)  # sorting ascends
        numbers = np.arange(start, start + len(negated))
        if among:
            negated[np.arange(len(negated)), numbers] = np.inf
        ordered = np.sort(negated, axis=1)
        yield from zip(numbers.tolist(), zip(negated, ordered, strict=True), strict=True)


def _positions(negated: Floats, ordered: Floats, relevant: Labels) -> Labels:
    """Where the relevant pictures are among all hits, from 0, ascending."""
    scores = np.sort(negated[relevant])
    equal_after = np.searchsorted(scores, scores, side="right") - np.arange(len(scores))  # itself counted
    return np.asarray(np.searchsorted(ordered, scores, side="right") - equal_after, np.int64)


def _check(embeddings: Floats, labels: Labels, ks: Sequence[int]) -> None:
    if len(embeddings) != len(labels):
        raise EvaluationError(f"{len(labels)} labels for {len(embeddings)} pictures", expected="one each")
    if not np.isfinite(embeddings).all():
        raise EvaluationError("an embedding is not finite", expected="an encoder that gives numbers")
    if any(k < 1 for k in ks):
        raise EvaluationError(f"k = {min(ks)}", expected="1 or more")
