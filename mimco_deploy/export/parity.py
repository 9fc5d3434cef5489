"""Torch against the artefact, through the encoder class that serves it in production."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import MAX_ABS_FP32, Golden
from mimco_deploy.errors import ParityError
from mimco_deploy.serving.encoders import Encoder

BATCH_SIZES = (1, 2, 5)


@dataclass(frozen=True)
class BatchParity:
    """How far the artefact is from torch at one batch size."""

    batch_size: int
    max_abs: float
    """Largest absolute difference of any component."""
    min_cosine: float
    """Smallest cosine of an embedding with its reference."""
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """The proof that goes into `parity.json`."""

    provider: str
    """What ran the artefact."""
    max_abs_allowed: float
    pictures: int
    batches: tuple[BatchParity, ...]

    @property
    def passed(self) -> bool:
        """Whether every batch size is within the tolerance."""
        return all(batch.passed for batch in self.batches)

    @property
    def max_abs(self) -> float:
        """The worst difference of all."""
        return max(batch.max_abs for batch in self.batches)

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps({**asdict(self), "passed": self.passed}, indent=2) + "\n", encoding="utf-8")


def check_parity(encoder: Encoder, golden: Golden) -> ParityReport:
    """Embed the golden pictures at several batch sizes and compare with the references.

    Raises:
        ParityError: a difference is above the tolerance; names the batch size and both numbers.
    """
    batches = tuple(_compare(size, _embed_in_batches(encoder, golden.images, size), golden) for size in BATCH_SIZES)
    report = ParityReport(encoder.provider, MAX_ABS_FP32, len(golden.images), batches)
    for batch in batches:
        if not batch.passed:
            raise ParityError(
                f"the exported graph differs from torch by {batch.max_abs:.2e} at batch {batch.batch_size} "
                f"(least cosine {batch.min_cosine:.6f}, {encoder.provider})",
                expected=f"at most {MAX_ABS_FP32:.0e}",
            )
    return report


def _embed_in_batches(encoder: Encoder, images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    return np.concatenate([encoder.embed(images[start : start + size]) for start in range(0, len(images), size)])


def _compare(size: int, found: npt.NDArray[np.float32], golden: Golden) -> BatchParity:
    max_abs = float(np.abs(found - golden.embeddings).max())
    cosine = float((found * golden.embeddings).sum(axis=1).min())
    return BatchParity(size, max_abs, cosine, passed=max_abs <= MAX_ABS_FP32)  # NaN compares False: not passed
