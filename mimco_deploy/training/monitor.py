"""What a run says while it goes: numbers for the log, and the alarms that stop it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from mimco_deploy.errors import TrainingError

COLLAPSED = 1e-2
"""Feature spread below which embeddings no longer tell images apart. bf16 alone rounds equal features to 3e-3 to 5e-3;
untrained encoders were seen at 3e-2 and more, trained ones at 0.3."""
EQUAL = 1e-4
"""Features that differ by rounding alone, in fp32."""
LOG_FILE = "log.jsonl"


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """How far features are from all being the same.

    Args:
        features: [B, D], not normalised.

    Returns:
        Scalar: √D times the mean over channels of the standard deviation of the L2-normalised features. 0 is collapse,
        1 is even on the sphere.

    Source: SimSiam (arXiv 2011.10566), section 4.1.
    """
    normalised = F.normalize(features.float(), dim=1)
    return normalised.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])


def collapse_limit(first: float) -> float:
    """The spread below which features have collapsed, for a run whose first step had the spread `first`.

    Untrained encoders tell dark pictures with little on them apart by less than `COLLAPSED`, and learn to all the same.
    """
    return max(EQUAL, min(COLLAPSED, first / 4))


def first_spread(folder: Path) -> float:
    """The feature spread of a run's first step, by its log. NaN where that tells none: then the usual limit holds."""
    try:
        with (folder / LOG_FILE).open(encoding="utf-8") as file:
            row = json.loads(file.readline())
        return float(row["feature_spread"]) if row["step"] == 0 else math.nan
    except (OSError, ValueError, KeyError, TypeError):
        return math.nan


def check_alive(step: int, row: Mapping[str, float], limit: float = COLLAPSED) -> None:
    """Stop a run that can no longer learn.

    Args:
        step: counted from 0.
        row: what is logged of it.
        limit: of `collapse_limit`.

    Raises:
        TrainingError: a logged value is NaN or infinite, or the features collapsed; names the step.
    """
    for name, value in row.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"step {step + 1}: {name} is {value}",
                expected="a finite number; a lower optim.base_lr or a longer optim.warmup_epochs often helps",
                step=step,
            )
    if row.get("feature_spread", 1.0) < limit:  # methods that predict pixels have no embedding to collapse
        raise TrainingError(
            f"step {step + 1}: features collapsed, spread {row['feature_spread']:.2e}",
            expected=f"at least {limit:.0e}; a lower optim.base_lr or a larger run.global_batch_size often helps",
            step=step,
        )


def check_finite(step: int, method: nn.Module) -> None:
    """Stop a run whose weights are no numbers, which a finite loss does not rule out: its gradient may be none.

    Raises:
        TrainingError: a parameter holds NaN or infinity; names the step and the parameter.
    """
    for name, parameter in method.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingError(
                f"step {step + 1}: {name} holds NaN or infinity",
                expected="finite weights; a lower optim.base_lr or a longer optim.warmup_epochs often helps",
                step=step,
            )


class RunLog:
    """JSON lines and TensorBoard events of one run.

    Args:
        folder: of the run.
        first_step: rows of later steps, left by an interrupted run, are dropped from the JSON lines.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / LOG_FILE
        kept = []
        if self._path.exists() and first_step:
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) < first_step]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._events = SummaryWriter(str(folder), purge_step=first_step or None)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append one row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both."""
        self._events.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf  # a line that a crash cut short
