"""How far two sets of embeddings of the same pictures agree: what every proof of an encoder is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import Tolerance

Embeddings = npt.NDArray[np.float32]

K = 10
MIN_PICTURES = 2 * K + 1
"""With fewer, ten neighbours are most of what there is."""
_NORM_ERROR = 0.01
"""Of unit vectors; bfloat16 keeps 0.004."""
_TIE = 1e-6
"""Scores nearer than this are equal: float32 keeps 6e-8 of each of several hundred terms."""


@dataclass(frozen=True)
class Agreement:
    """Found embeddings against reference ones."""

    pictures: int
    max_abs: float
    """Largest difference of any component."""
    min_cosine: float
    """Least cosine of an embedding with its reference, whatever their norms."""
    overlap: float | None
    """Share of the ten nearest neighbours by the reference that the found ten hold, mean over pictures; None with
    fewer than `MIN_PICTURES`."""
    recall: float | None
    """Share of pictures whose nearest neighbour by the reference is among the found ten; None likewise."""
    norm_error: float = 0.0
    """Largest distance of a found norm from 1."""

    def breaches(self, tolerance: Tolerance) -> list[str]:
        """What is outside a tolerance, in words; NaN always is."""
        found = []
        if not self.max_abs <= tolerance.max_abs:
            found.append(f"differs by {self.max_abs:.2e} (at most {tolerance.max_abs:.0e})")
        if not self.min_cosine >= tolerance.min_cosine:
            found.append(f"cosine {self.min_cosine:.6f} (at least {tolerance.min_cosine})")
        if not self.norm_error <= _NORM_ERROR:
            found.append(f"norms are off by {self.norm_error:.3f}")
        if self.overlap is not None and not self.overlap >= tolerance.min_overlap:
            found.append(f"top-{K} overlap {self.overlap:.3f} (at least {tolerance.min_overlap})")
        return found


def compare(found: Embeddings, reference: Embeddings) -> Agreement:
    """Compare row by row, and by neighbours.

    Args:
        found: [B, D], L2-normalised, as is `reference`.
        reference: [B, D].

    Returns:
        The agreement. A neighbour counts as kept where its reference score is as high as that of the tenth: of equal
        ones any will do.
    """
    pictures = len(reference)
    max_abs = float(np.max(np.abs(found - reference)))
    norms = np.linalg.norm(found, axis=1)  # [B]
    norm_error = float(np.max(np.abs(norms - 1.0)))
    lengths = np.maximum(norms * np.linalg.norm(reference, axis=1), 1e-12)
    cosine = float(np.min(np.sum(found * reference, axis=1) / lengths))
    if pictures < MIN_PICTURES or not np.isfinite(found).all():
        return Agreement(pictures, max_abs, cosine, None, None, norm_error)
    truth, scores = reference @ reference.T, found @ found.T
    for matrix in (truth, scores):
        np.fill_diagonal(matrix, -2.0)  # nobody is a neighbour of itself
    tenth = np.partition(truth, -K, axis=1)[:, -K] - _TIE
    picked = np.argpartition(-scores, K, axis=1)[:, :K]  # [B, K]
    picked_truth = np.take_along_axis(truth, picked, axis=1)
    overlap = float(np.mean(picked_truth >= tenth[:, None]))
    recall = float(np.mean(picked_truth.max(axis=1) >= truth.max(axis=1) - _TIE))
    return Agreement(pictures, max_abs, cosine, overlap, recall, norm_error)
