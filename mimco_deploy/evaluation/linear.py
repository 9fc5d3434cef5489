"""A linear probe on embeddings: how much of the classes a linear classifier can read off them.

Needs scikit-learn. The grid and the solver are those of DINOv2's logistic regression (arXiv 2304.07193, appendix B.3);
what is chosen from the grid is chosen on a part of the training pictures, so that the reported number is of pictures
that nothing was chosen on.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import EvaluationError, MimcoError, MissingExtraError
from mimco_deploy.evaluation.pictures import counted

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

GRID = tuple(float(c) for c in np.logspace(-6, 5, 45)[::4])
"""C, the inverse of the penalty: every fourth of DINOv2's 45 values from 1e-6 to 1e5. Our choice, for time: the
accuracy changes little between neighbours of that grid."""
HELD_OUT = 0.1
"""Share of the training pictures on which C is chosen. Our choice."""
MAX_CHOOSING = 20_000
"""Training pictures at most while C is chosen. Our choice, for time; the last fit is on all."""
PATIENCE = 2
"""Values of C in a row, all worse than the best, after which weaker penalties are not tried: they take longest. Not
before one was better than the first."""
MAX_ITERATIONS = 1000
"""DINOv2's."""
_SEED = 0


@dataclass(frozen=True)
class Probed:
    """Of one linear probe."""

    right: npt.NDArray[np.float64]
    """[Q], 1 where the query's class was given."""
    chosen_c: float
    tried: dict[float, float]
    """Accuracy of each C on the held-out part, of those that were tried."""


def probe(gallery: Floats, labels: Labels, queries: Floats, truth: Labels) -> Probed:
    """Fit on the gallery, report on the queries, once.

    Args:
        gallery: [N, D].
        labels: [N], classes.
        queries: [Q, D].
        truth: [Q].

    Raises:
        EvaluationError: fewer than two classes, or a class with a single picture, so none to choose on.
        MissingExtraError: scikit-learn is not installed.
    """
    if (reason := obstacle_to_probing(labels.tolist())) is not None:
        raise reason
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    classes = len(np.unique(labels))
    # Embeddings have length 1 and differ in a few directions only: unscaled, no penalty fits all of them.
    scaler = StandardScaler().fit(gallery)
    scaled, asked = scaler.transform(gallery), scaler.transform(queries)
    kept = np.arange(len(labels))
    held_out = max(round(HELD_OUT * len(kept)), classes)
    fitting, choosing = train_test_split(kept, test_size=held_out, stratify=labels, random_state=_SEED)
    fitting = fitting[:MAX_CHOOSING]
    tried: dict[float, float] = {}
    classifier = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)  # each C starts from the one before
    for c in GRID:
        _fit(classifier.set_params(C=c), scaled[fitting], labels[fitting])
        tried[c] = float((classifier.predict(scaled[choosing]) == labels[choosing]).mean())
        best, last = max(tried.values()), list(tried.values())[-PATIENCE:]
        if best > max(tried[GRID[0]], *last):  # the strongest penalties may all say the largest class
            break
    chosen = max(tried, key=lambda c: (tried[c], -c))  # of equal ones the stronger penalty
    classifier = LogisticRegression(C=chosen, max_iter=MAX_ITERATIONS)
    _fit(classifier, scaled, labels)
    return Probed((classifier.predict(asked) == truth).astype(np.float64), chosen, tried)


def obstacle_to_probing(labels: Sequence[object]) -> MimcoError | None:
    """Why a probe cannot be trained on pictures of these classes, if it cannot."""
    sizes = Counter(labels).values()
    if len(sizes) < 2 or min(sizes) < 2:
        return EvaluationError(
            f"a linear probe on {counted(len(sizes), 'class', 'classes')}, "
            f"the smallest with {counted(min(sizes, default=0), 'picture')}",
            expected="two classes or more, with two pictures or more each",
        )
    if importlib.util.find_spec("sklearn") is None:
        return MissingExtraError("scikit-learn is not installed", command='pip install "mimco-deploy[eval]"')
    return None


def _fit(classifier: object, features: Floats, labels: Labels) -> None:
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with hardly any penalty there is no optimum to reach
        classifier.fit(features, labels)  # type: ignore[attr-defined]
