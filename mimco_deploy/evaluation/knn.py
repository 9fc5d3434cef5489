"""Weighted k-nearest-neighbour classification, by DINO's rule (arXiv 2104.14294, section 4.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


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
    k = min(k, len(gallery))
    classes = int(labels.max()) + 1
    predicted = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), 1024):  # bounds the [Q, N] matrix
        cosines = queries[start : start + 1024] @ gallery.T
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1).astype(np.float64) / temperature)
        votes = np.zeros((len(cosines), classes))
        np.add.at(votes, (np.arange(len(cosines))[:, None], labels[nearest]), weights)
        predicted[start : start + 1024] = votes.argmax(axis=1)
    return predicted


def knn_accuracy(
    gallery: Floats, labels: Labels, queries: Floats, truth: Labels, *, k: int = 20, temperature: float = 0.07
) -> tuple[float, float]:
    """Top-1 accuracy of `knn_predict`, in [0, 1], and its standard error over the queries."""
    right = knn_predict(gallery, labels, queries, k=k, temperature=temperature) == truth
    return float(right.mean()), float(np.sqrt(right.mean() * (1 - right.mean()) / len(right)))
