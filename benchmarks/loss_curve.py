"""Does a fast step learn what a plain one learns? The same run, step by step, in each way that a step can be taken.

    python benchmarks/loss_curve.py --data tiny/train-00.tar --data tiny/train-01.tar

Pictures, their order, views, masks and first weights are the same for all. The plain step is that of `train_step.py`:
fp32, nothing compiled, one kernel a parameter. Beside it: the step that mimco takes by default here, bf16, compiled,
with activations computed again, and with the batch in four parts, which is another loss where other pictures of the
batch are negatives. Losses are averaged over windows of steps; each way is told by its largest and its last difference
to the plain step's windows. Two yardsticks: the plain step with another seed, and with first weights that were changed
by a ten-millionth, which shows how far rounding alone leads. Prints one JSON line a method.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
from pathlib import Path

import timm
import torch

from benchmarks.train_step import Config, PlainStepper, build, real, settings_for
from mimco_deploy.training.presets import PRESETS, STAGE1_METHODS, STAGE2_METHODS
from mimco_deploy.training.settings import apply_settings
from mimco_deploy.training.step import Stepper

PLAIN = "plain"
OTHER_SEED = "plain, another seed"
PERTURBED = "plain, first weights changed by 1e-7"
WAYS: dict[str, list[str]] = {
    PLAIN: [],
    OTHER_SEED: ["run.seed=1"],
    PERTURBED: [],
    "default": [],
    "bf16": ["run.precision=bf16"],
    "compiled": ["run.compile=on"],
    "activations computed again": ["run.grad_checkpointing=true"],
    "batch in four parts": ["run.accumulate=4"],
}


def train(config: Config, steps: int, way: str) -> list[float]:
    """The loss of each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method, make_views = build(config, device)
    if way == PERTURBED:
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))
    stepper = (PlainStepper if way in (PLAIN, OTHER_SEED, PERTURBED) else Stepper)(method, config, steps)
    batches = real(config, make_views, steps)
    losses = [stepper.take(step, lambda: next(batches))["loss"] for step in range(steps)]
    return [float(loss) for loss in losses]


def windows(losses: list[float], length: int) -> list[float]:
    """Means of so many steps each."""
    return [statistics.mean(losses[start : start + length]) for start in range(0, len(losses), length)]


def compare(config: Config, steps: int, window: int) -> dict[str, object]:
    """All ways of one method."""
    curves: dict[str, list[float]] = {}
    for name, changes in WAYS.items():
        curves[name] = windows(train(apply_settings(config, changes), steps, name), window)
    differences = {
        name: [abs(a - b) for a, b in zip(curve, curves[PLAIN], strict=True)]
        for name, curve in curves.items()
        if name != PLAIN
    }
    return {
        "largest_difference": {name: round(max(found), 5) for name, found in differences.items()},
        "last_difference": {name: round(found[-1], 5) for name, found in differences.items()},
        "curves": {name: [round(loss, 4) for loss in curve] for name, curve in curves.items()},
    }


def main() -> None:
    """Parse, train, print a line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", type=Path, required=True, help="pictures; repeatable")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="vit_tiny_debug")
    parser.add_argument(
        "--method", nargs="+", default=["mocov3", "mimco", "simmim"], choices=[*STAGE1_METHODS, *STAGE2_METHODS]
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], help="any setting")
    arguments = parser.parse_args()
    sources = ",".join(map(str, arguments.data))
    for name in arguments.method:
        changes = [f"data.sources={sources}", "run.epochs=1", *arguments.set]
        config = settings_for(PRESETS[arguments.preset](), name, arguments.batch, changes)
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_epochs=0.1))
        found = compare(config, arguments.steps, arguments.window)
        cuda = torch.cuda.is_available()
        machine = {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        }
        about = {"benchmark": "loss_curve", "method": name, "preset": arguments.preset, "batch": arguments.batch}
        print(json.dumps({**about, "steps": arguments.steps, **found, "set": changes, **machine}), flush=True)


if __name__ == "__main__":
    main()
