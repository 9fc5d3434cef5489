"""How unusual a score is: how many pictures of the index would be this alike by chance.

A cosine means something else for each encoder and each query: some pictures are like everything. So a query is compared
with a reference sample of the index, which gives the mean and the spread of its scores with pictures that are, nearly
all, unrelated; a score is then z = (score − mean) / spread. How often z is reached by chance is known from the index
itself, whose own pictures are asked the same. Beyond what the sample has seen, the tail is continued exponentially,
which for the lighter tails that cosines have errs towards "by chance".

    expected by chance = (pictures searched) · P(z or more);   confidence = 1 / (1 + expected by chance)

The confidence is that of one true match standing against so many chance ones. It is no probability that a person would
agree; it says whether the score stands out at all.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.catalog import Catalog

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]

_SETTING = "background"
_SAMPLE = 512
_MIN_ROWS = 40
"""Fewer pictures say nothing about chance."""
_GROWTH = 1.25
_DEAD = 0.25
"""Share of the reference whose pictures are gone, from which on it says little of those that are left."""
_SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
"""Of the sampled scores that reach the stored z; beyond the last, the tail is continued."""
_LOG_SHARES = np.log(_SHARES)
_TRIMMED = 0.02
"""Of a query's highest reference scores, which may be true matches."""
_MIN_SPREAD = 1e-4
_MIN_TAIL = 0.05
"""Of one spread: embeddings that hardly differ have a tail of rounding errors."""
_WORDS = ((0.99, "clear"), (0.8, "likely"), (0.5, "unsure"))
_ROUNDING = 1e-5
SAME = 1 - _ROUNDING
"""Scores from here on are those of one picture with itself, up to rounding."""
_SEED = 2209


@dataclass(frozen=True)
class Background:
    """What chance looks like in one index."""

    rows: int
    """Rows there were."""
    reference: list[int]
    """Rows that queries are compared with."""
    z: list[float]
    """Reached by `_SHARES` of the sampled scores, rising."""
    tail: float
    """Mean excess over the last of them."""

    def expected_by_chance(self, references: Vectors, queries: Vectors, scores: Vectors, count: int) -> Floats:
        """How many of the pictures searched would score this or more by chance.

        Args:
            references: [R, D], the embeddings of `reference`.
            queries: [Q, D].
            scores: [Q, K], cosines with pictures that were found.
            count: pictures that were searched.

        Returns:
            [Q, K], from 0 to `count`.
        """
        # No product of matrices: the threads of NumPy's would stay on the cores that FAISS needs for the next search.
        usual = np.vecdot(references, queries[:, np.newaxis])  # [Q, R]
        z = _standard(usual, scores - _ROUNDING)
        shares = np.exp(np.interp(z, self.z, _LOG_SHARES))
        shares *= np.exp(np.minimum((self.z[-1] - z) / self.tail, 0.0))  # beyond the last
        shares[z < self.z[0]] = 1.0
        same = scores >= SAME
        if same.any():
            # The same picture needs no tail: chance makes one only where other pictures of the sample are the same too.
            others = np.maximum((usual >= SAME).sum(axis=1, keepdims=True) - 1, 0) / max(usual.shape[1], 1)  # [Q, 1]
            shares = np.where(same, np.minimum(shares, others), shares)
        return np.asarray(count * shares)


def counted(expected: float) -> str:
    """So many pictures, expected by chance, in words."""
    return "1 picture" if round(expected) == 1 else f"{expected:,.0f} pictures"


def in_words(confidence: float | None) -> str:
    """A confidence in a word: `clear` from 0.99 on, `likely` from 0.8, `unsure` from 0.5, else `chance`."""
    if confidence is None:
        return ""
    return next((word for least, word in _WORDS if confidence >= least), "chance")


def background_of(catalog: Catalog) -> Background | None:
    """The background as recorded, None where there are too few pictures. Inside a snapshot."""
    return catalog.parsed(_SETTING, Background)


def references_of(background: Background | None, vectors: Vectors) -> Vectors:
    """[R, D], the embeddings that queries are compared with.

    Raises:
        IndexStoreError: the background names rows that there are none of.
    """
    try:
        return np.ascontiguousarray(vectors[background.reference if background else []])
    except (IndexError, TypeError, ValueError) as error:
        raise IndexStoreError(
            "the background of the index names rows that it has not", command="mimco index repair"
        ) from error


def keep_background(catalog: Catalog, vectors: Vectors, dead: npt.NDArray[np.int64]) -> None:
    """Measure the background where there is none yet or the index is another; drop it where too few pictures are left.

    Outside of any transaction.
    """
    with catalog.snapshot():
        now = background_of(catalog)
    if len(vectors) - len(dead) < _MIN_ROWS:
        if now is not None:
            with catalog.transaction():
                catalog.set_setting(_SETTING, None)
        return
    if now is not None and len(vectors) < _GROWTH * now.rows and np.isin(now.reference, dead).mean() < _DEAD:
        return
    measured = _measure(vectors, dead)
    with catalog.transaction():
        catalog.set_setting(_SETTING, json.dumps(asdict(measured)))


def _measure(vectors: Vectors, dead: npt.NDArray[np.int64]) -> Background:
    live = np.setdiff1d(np.arange(len(vectors)), dead, assume_unique=True)
    chosen = np.random.default_rng(_SEED).permutation(live)[: 2 * _SAMPLE]
    reference, asking = np.sort(chosen[::2]), np.sort(chosen[1::2])
    scores = vectors[asking] @ vectors[reference].T  # [A, R], no row is in both
    z = np.sort(_standard(scores, scores), axis=None)
    marks = np.quantile(z, 1 - np.array(_SHARES))
    excess = z[z > marks[-1]] - marks[-1]
    return Background(
        rows=len(vectors),
        reference=reference.tolist(),
        z=marks.tolist(),
        tail=float(max(excess.mean() if len(excess) else 0.0, _MIN_TAIL)),
    )


def _standard(references: Vectors, scores: Vectors) -> Floats:
    """Scores [Q, K] in units of the spread of each query's scores with the references [Q, R]."""
    kept = max(1, references.shape[1] - round(_TRIMMED * references.shape[1]))
    usual = np.partition(references, kept - 1, axis=1)[:, :kept].astype(np.float64)
    mean = usual.sum(axis=1, keepdims=True) / kept
    usual -= mean
    spread = np.sqrt(np.vecdot(usual, usual)[:, np.newaxis] / kept)
    return np.asarray((scores - mean) / np.maximum(spread, _MIN_SPREAD))
