"""What embeddings tell without labels: over how many directions they spread, how evenly, and whose neighbours agree.

None of these is quality by itself: random weights have high uniformity, and a collapsed encoder perfect alignment. They
are to be read together, beside copy detection.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.measures import Measure, mean_of, statistic_of
from mimco_deploy.evaluation.pictures import counted
from mimco_deploy.evaluation.retrieval import BLOCK_SCORES

Embeddings = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

MAX_PICTURES = 2000
"""Of which uniformity looks at all pairs: 32 MiB."""
_EPSILON = 1e-7
"""RankMe's, so that no direction has an entropy of log 0."""


def spread(embeddings: Embeddings) -> list[Measure]:
    """Effective rank and uniformity.

    Args:
        embeddings: [N, D], L2-normalised; beyond `MAX_PICTURES` only so many, evenly taken, are looked at.

    Returns:
        Effective rank: exp of the entropy of the singular values' shares, from 1 to min(N, D); higher uses more of the
        space. Uniformity: log of the mean of
        exp(−2·distance²) over all pairs, 0 for equal embeddings and near −4 for ones that are spread over the sphere;
        lower is more even.

    Raises:
        EvaluationError: fewer than two pictures.

    Source: RankMe (arXiv 2210.02885), equation 1; Wang and Isola (arXiv 2005.10242), equation 2 with t = 2.
    """
    if len(embeddings) < 2:
        raise EvaluationError("one picture alone spreads over nothing", expected="two or more")
    chosen = np.linspace(0, len(embeddings) - 1, min(len(embeddings), MAX_PICTURES)).astype(np.int64)
    rows = embeddings[chosen].astype(np.float64)
    kernel = np.exp(-2.0 * np.maximum(2.0 - 2.0 * rows @ rows.T, 0.0))  # |a − b|² = 2 − 2 cos
    np.fill_diagonal(kernel, 0.0)

    def rank(counts: Floats) -> float:
        # singular values of the rows repeated so often are the roots of the eigenvalues of the weighted D × D product;
        # so many rows have no more of them, and what rounding leaves of the others would count as well
        known = min(int(np.count_nonzero(counts)), rows.shape[1])
        values = np.sqrt(np.maximum(np.linalg.eigvalsh((rows * counts[:, None]).T @ rows)[-known:], 0.0))
        shares = values / values.sum() + _EPSILON
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def uniformity(counts: Floats) -> float:
        pairs = counts.sum() ** 2 - (counts**2).sum()
        return float(np.log(counts @ kernel @ counts / pairs))

    return [
        statistic_of("spread", "effective rank", len(rows), rank),
        statistic_of("spread", "uniformity", len(rows), uniformity),
    ]


def alignment(originals: Embeddings, edited: Embeddings, edit: str) -> Measure:
    """Mean squared distance between a picture and an edited copy of it; lower is closer, 0 is equal.

    Args:
        originals: [N, D], L2-normalised.
        edited: [N, D], of the same pictures.
        edit: its name.

    Source: Wang and Isola (arXiv 2005.10242), equation 1 with α = 2.
    """
    distances = 2.0 - 2.0 * np.einsum("nd,nd->n", originals.astype(np.float64), edited.astype(np.float64))
    return mean_of("alignment", edit, distances)


NEIGHBOURS = 10
"""That two encoders are compared by."""


def check_enough(count: int, k: int = NEIGHBOURS) -> None:
    """Refuse so few pictures that every encoder has the same k nearest.

    Raises:
        EvaluationError: there are k + 1 or fewer.
    """
    if count <= k + 1:
        raise EvaluationError(f"{counted(count, 'picture')} to compare the {k} nearest of", expected=f"{k + 2} or more")


def neighbour_agreement(first: Embeddings, second: Embeddings, k: int = NEIGHBOURS) -> Measure:
    """Share of each picture's k nearest others by one encoder that are among its k nearest by the other.

    Args:
        first: [N, D], L2-normalised.
        second: [N, E], of the same pictures by another encoder.
        k: neighbours.

    Returns:
        In [0, 1]; k / (N − 1) is what two encoders share by chance.

    Raises:
        EvaluationError: k or fewer other pictures, of which every encoder has the same nearest.
    """
    check_enough(len(first), k)
    ours, theirs = _nearest(first, k), _nearest(second, k)
    shared = [len(np.intersect1d(a, b, assume_unique=True)) / k for a, b in zip(ours, theirs, strict=True)]
    return mean_of("agreement", f"shared of {k} neighbours", shared)


def _nearest(embeddings: Embeddings, k: int) -> npt.NDArray[np.int64]:
    """[N, k], the nearest others of each row, in no order."""
    nearest = np.empty((len(embeddings), k), np.int64)
    rows_at_once = max(1, BLOCK_SCORES // len(embeddings))
    for start in range(0, len(embeddings), rows_at_once):
        cosines = embeddings[start : start + rows_at_once] @ embeddings.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        nearest[start : start + len(rows)] = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    return nearest
