"""Weighted k-nearest-neighbour classification, by DINO's rule (arXiv 2104.14294, section 4.1).

Of pictures that are equally near, the one with the lower gallery number is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_BLOCK = 2**22
"""Cells of the largest matrix: 16 MiB of cosines, and six times that while they are put in order."""


@dataclass(frozen=True, kw_only=True)
class KnnAccuracy:
    """Which queries k neighbours classify rightly."""

    right: npt.NDArray[np.bool_]
    """[Q], the class that weighs most is the query's."""
    right_of_5: npt.NDArray[np.bool_]
    """[Q], the query's class is among the five that weigh most, and has a neighbour."""

    @property
    def top1(self) -> float:
        """In [0, 1]."""
        return float(self.right.mean())

    @property
    def top5(self) -> float:
        """In [0, 1]."""
        return float(self.right_of_5.mean())


def knn_predict(gallery: Floats, labels: Labels, queries: Floats, *, k: int = 20, temperature: float = 0.07) -> Labels:
    """The class whose neighbours weigh most, for each query.

    Args:
        gallery: [N, D], L2-normalised.
        labels: [N], classes from 0.
        queries: [Q, D], L2-normalised.
        k: neighbours that vote; all of them where N < k.
        temperature: a neighbour of cosine c votes exp(c / temperature).

    Returns:
        [Q]. Of classes that weigh the same, the lower number.
    """
    classes = int(labels.max()) + 1
    predicted = np.empty(len(queries), np.int64)
    for rows, cosines, nearest in _neighbours(gallery, queries, k, classes):
        predicted[rows] = _votes(cosines, labels[nearest], classes, temperature).argmax(axis=1)
    return predicted


def knn_accuracy(
    gallery: Floats, labels: Labels, queries: Floats, truth: Labels, *, k: int = 20, temperature: float = 0.07
) -> tuple[float, float]:
    """Top-1 accuracy of `knn_predict`, in [0, 1], and its standard error over the queries."""
    right = knn_predict(gallery, labels, queries, k=k, temperature=temperature) == truth
    return float(right.mean()), float(np.sqrt(right.mean() * (1 - right.mean()) / len(right)))


def knn_accuracies(
    gallery: Floats,
    labels: Labels,
    queries: Floats,
    truth: Labels,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, KnnAccuracy]:
    """Top-1 and top-5 for several k, from one search.

    A class without a neighbour is never among the five. DINO's script fills up the five with such classes, in an order
    that nothing fixes, so its top-5 can be higher.

    Args:
        gallery: [N, D], L2-normalised.
        labels: [N], classes from 0.
        queries: [Q, D], L2-normalised.
        truth: [Q], classes from 0; one that the gallery does not have is never right.
        ks: neighbours that vote, each at least 1; all of them where N < k.
        temperature: a neighbour of cosine c votes exp(c / temperature).

    Returns:
        k → what each query came to, in the order of ks. Of classes that weigh the same, the lower number comes first.
    """
    classes = int(max(labels.max(), truth.max())) + 1
    places = np.empty((len(ks), len(queries)), np.int64)
    for rows, cosines, nearest in _neighbours(gallery, queries, max(ks), classes):
        for place, k in zip(places, ks, strict=True):
            votes = _votes(cosines[:, :k], labels[nearest[:, :k]], classes, temperature)
            place[rows] = _place(votes, truth[rows])
    return {k: KnnAccuracy(right=place < 1, right_of_5=place < 5) for k, place in zip(ks, places, strict=True)}


def neighbour_confusion(
    gallery: Floats, labels: Labels, queries: Floats, truth: Labels, classes: int, k: int = 20, *, among: bool = False
) -> npt.NDArray[np.float64]:
    """Which classes the k nearest of a class's pictures have; each neighbour counts the same.

    Args:
        gallery: [N, D], L2-normalised.
        labels: [N], classes from 0.
        queries: [Q, D], L2-normalised.
        truth: [Q], classes from 0.
        classes: C, how many there are; one may have no picture on either side.
        k: neighbours; all of them where N < k.
        among: whether the queries are the gallery, of which none is a neighbour of itself; k is then below N.

    Returns:
        [C, C], rows are the queries' classes, columns the neighbours'. Shares, which sum to 1 over a row; NaN in rows
        of classes without queries.
    """
    counts = np.zeros((classes, classes))
    for rows, _, nearest in _neighbours(gallery, queries, k, classes, among=among):
        np.add.at(counts, (truth[rows, None], labels[nearest]), 1)
    totals = counts.sum(axis=1, keepdims=True)
    shares: npt.NDArray[np.float64] = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    return shares


def _neighbours(
    gallery: Floats, queries: Floats, k: int, classes: int, *, among: bool = False
) -> Iterator[tuple[slice, Floats, Labels]]:
    """The k nearest in blocks of queries: rows, cosines [B, k], gallery numbers [B, k], the nearest first."""
    k = min(k, len(gallery))
    block = min(1024, max(1, _BLOCK // max(len(gallery), classes)))
    for start in range(0, len(queries), block):
        cosines = queries[start : start + block] @ gallery.T  # [B, N]
        if among:
            own = np.arange(len(cosines))
            cosines[own, start + own] = -np.inf
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        least = np.take_along_axis(cosines, nearest, axis=1).min(axis=1, keepdims=True)
        # Partitioning takes any of those that are as near as the last; which, must not depend on the machine.
        tied = np.flatnonzero((cosines >= least).sum(axis=1) > k)
        nearest[tied] = np.argsort(-cosines[tied], axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(cosines, nearest, axis=1)
        order = np.lexsort((nearest, -values), axis=1)
        rows = slice(start, start + len(cosines))
        yield rows, np.take_along_axis(values, order, axis=1), np.take_along_axis(nearest, order, axis=1)


def _votes(cosines: Floats, labels: Labels, classes: int, temperature: float) -> npt.NDArray[np.float64]:
    """What each class weighs, [B, classes], in units of the nearest one's vote; −1 without a neighbour.

    In those units no temperature overflows.

    Args:
        cosines: [B, k], the nearest first.
        labels: [B, k], of the neighbours.
        classes: how many.
        temperature: of the votes.
    """
    exact = cosines.astype(np.float64)
    weights = np.exp((exact - exact[:, :1]) / temperature)
    rows = np.arange(len(cosines))[:, None]
    votes = np.full((len(cosines), classes), -1.0)
    votes[rows, labels] = 0
    np.add.at(votes, (rows, labels), weights)
    return votes


def _place(votes: npt.NDArray[np.float64], truth: Labels) -> Labels:
    """Classes that come before the true one, [B]; all of them, and 5 at least, where that has no neighbour."""
    theirs = np.take_along_axis(votes, truth[:, None], axis=1)
    before = (votes > theirs) | ((votes == theirs) & (np.arange(votes.shape[1]) < truth[:, None]))
    place: Labels = np.where(theirs[:, 0] < 0, max(5, votes.shape[1]), before.sum(axis=1))
    return place
