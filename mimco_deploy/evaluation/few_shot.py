"""Few-shot classification on embeddings: the class whose few examples have the nearest mean."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.pictures import counted

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

SHOTS = (1, 5)
TRIES = 10
_SEED = 0


def few_shot(
    gallery: Floats, labels: Labels, queries: Floats, truth: Labels, shots: int, tries: int = TRIES
) -> npt.NDArray[np.float64]:
    """Which queries are right, over several draws of examples.

    Args:
        gallery: [N, D], L2-normalised.
        labels: [N], classes from 0.
        queries: [Q, D], L2-normalised.
        truth: [Q].
        shots: examples of each class, drawn anew for each try; all of a class where it has fewer.
        tries: draws.

    Returns:
        [tries, Q], 1 where the mean of the true class was nearest, else 0.

    Raises:
        EvaluationError: fewer than two classes.

    Source: Prototypical Networks (arXiv 1703.05175), equations 1 and 2, with cosine for the distance.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise EvaluationError(
            f"few-shot classification with {counted(len(classes), 'class', 'classes')}", expected="two or more"
        )
    rng = np.random.default_rng(_SEED)
    members = [np.flatnonzero(labels == label) for label in classes]
    right = np.zeros((tries, len(queries)))
    for draw in range(tries):
        means = np.stack([gallery[rng.permutation(rows)[:shots]].mean(axis=0) for rows in members])
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        right[draw] = classes[(queries @ means.T).argmax(axis=1)] == truth
    return right
