"""Revisited Oxford's and Paris's rules (arXiv 1803.11285): what is right, what is junk, and what that gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.ground_truth import GroundTruth
from mimco_deploy.evaluation.retrieval import Labels, Numbers, average_precision, mean_of_known


@dataclass(frozen=True, kw_only=True, eq=False)
class Protocol:
    """One protocol's numbers. A query without positives has NaN, and is left out of the means."""

    ks: tuple[int, ...]
    average_precision: Numbers
    """[Q], in [0, 1], trapezoidal."""
    precision: Numbers
    """[Q, K], in [0, 1]: positives among the first min(k, position of the last positive), as a share of those."""

    @property
    def without_positives(self) -> int:
        """Queries that the means leave out."""
        return int(np.isnan(self.average_precision).sum())

    @property
    def mean_average_precision(self) -> float:
        """MAP, in [0, 1]; NaN where no query has positives."""
        return float(mean_of_known(self.average_precision))

    @property
    def mean_precision(self) -> dict[int, float]:
        """The mean of P@k by k, in [0, 1]."""
        return dict(zip(self.ks, mean_of_known(self.precision).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Revisited:
    """The three protocols."""

    easy: Protocol
    """Positives: easy. Junk: junk and hard."""
    medium: Protocol
    """Positives: easy and hard. Junk: junk."""
    hard: Protocol
    """Positives: hard. Junk: junk and easy."""


def evaluate_revisited(
    ranks: npt.NDArray[np.integer[Any]] | npt.NDArray[np.floating[Any]],
    truth: GroundTruth,
    ks: Sequence[int] = (1, 5, 10),
) -> Revisited:
    """The metrics of the three protocols, by the official rules.

    Args:
        ranks: [Q, n] whole numbers: gallery numbers, the best first, n ≤ N where rankings are cut off. Or [Q, N] scores
            (floating), higher is better; of equal ones the lower gallery number comes first.
        truth: what is right.
        ks: for mP@k, each at least 1.

    Raises:
        EvaluationError: shapes or numbers that do not fit the ground truth, a score that is NaN, a k below 1, or a
            ranking cut off before the first positive.

    Source: arXiv 1803.11285, section 5, and its `compute_map`: AP divides by all positives, also those that a ranking
    cut off does not hold, and junk is taken out before positions are counted.
    """
    if any(k < 1 for k in ks):
        raise EvaluationError(f"k = {min(ks)}", expected="1 or more")
    ranked = _ranked(ranks, truth)
    easy, hard, junk = truth.easy, truth.hard, truth.junk
    return Revisited(
        easy=_protocol("easy", ranked, truth, easy, _joined(junk, hard), ks),
        medium=_protocol("medium", ranked, truth, _joined(easy, hard), junk, ks),
        hard=_protocol("hard", ranked, truth, hard, _joined(junk, easy), ks),
    )


def _ranked(ranks: npt.NDArray[Any], truth: GroundTruth) -> Labels:
    """[Q, n] gallery numbers, the best first."""
    queries, pictures = len(truth.queries), len(truth.gallery)
    scored = np.issubdtype(ranks.dtype, np.floating)
    if ranks.ndim != 2 or len(ranks) != queries or ranks.shape[1] > pictures or (scored and ranks.shape[1] != pictures):
        raise EvaluationError(
            f"a ranking of shape {list(ranks.shape)}",
            expected=f"[{queries}, {pictures}], or fewer columns of gallery numbers",
        )
    if scored:
        if np.isnan(ranks).any():
            raise EvaluationError("a score is NaN", expected="an encoder that gives numbers")
        return np.argsort(-ranks, axis=1, kind="stable")
    if not np.issubdtype(ranks.dtype, np.integer):
        raise EvaluationError(f"a ranking of type {ranks.dtype}", expected="gallery numbers, or scores")
    in_order = np.sort(ranks, axis=1)
    if in_order.size and (in_order.min() < 0 or in_order.max() >= pictures):
        raise EvaluationError("a ranking names a picture that is not in the gallery", expected=f"0 to {pictures - 1}")
    if (in_order[:, 1:] == in_order[:, :-1]).any():
        raise EvaluationError("a ranking names a picture twice", expected="each at most once")
    return ranks.astype(np.int64)


def _joined(first: Sequence[Labels], second: Sequence[Labels]) -> list[Labels]:
    return [np.concatenate(both) for both in zip(first, second, strict=True)]


def _protocol(
    name: str,
    ranked: Labels,
    truth: GroundTruth,
    positives: Sequence[Labels],
    junk: Sequence[Labels],
    ks: Sequence[int],
) -> Protocol:
    areas = np.full(len(ranked), np.nan)
    precision = np.full((len(ranked), len(ks)), np.nan)
    for query, ranking in enumerate(ranked):
        if not len(positives[query]):
            continue
        found = np.flatnonzero(np.isin(ranking, positives[query]))
        if not len(found):
            raise EvaluationError(
                f"the {len(ranking)} best hits of query {truth.queries[query]} hold none of its "
                f"{len(positives[query])} positives in protocol {name}, so P@k is not defined",
                expected="a longer ranking",
            )
        positions = found - np.searchsorted(np.flatnonzero(np.isin(ranking, junk[query])), found)
        areas[query] = average_precision(positions, len(positives[query]), trapezoidal=True)
        depths = [min(k, int(positions[-1]) + 1) for k in ks]
        precision[query] = [np.searchsorted(positions, depth) / depth for depth in depths]
    return Protocol(ks=tuple(ks), average_precision=areas, precision=precision)
