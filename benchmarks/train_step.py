"""How fast is a training step? Images/s, time, FLOPs and memory of each method, against a plain step of the same model.

    python benchmarks/train_step.py --preset vit_small --batch 256 --reference
    python benchmarks/train_step.py --preset vit_tiny_debug --method mimco --data ./photos

Prints one JSON line a method. Data is synthetic unless `--data` names pictures, which then go through the real loader.
With `--reference` the same method is also timed as a plain step: fp32, nothing compiled, AdamW and the momentum update
one parameter after the other; both in turns, and the ratio of the medians is printed. The floor is the step's matrix
FLOPs (counted by torch) at the peak that a large matrix product reaches on this device in the same precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mimco_deploy.training import momentum
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.data import StepSampler, Views, load_batches
from mimco_deploy.training.presets import (
    PRESETS,
    STAGE1_METHODS,
    STAGE2_METHODS,
    Recipe,
    with_stage1_method,
    with_stage2_method,
)
from mimco_deploy.training.settings import apply_settings
from mimco_deploy.training.stages import build_stage1, build_stage2
from mimco_deploy.training.step import Stepper, uses_bf16

Config = Stage1Config | Stage2Config


def settings_for(recipe: Recipe, method: str, batch: int, changes: list[str]) -> Config:
    """The preset's run by one method, with a batch of its own and nothing to warm up for."""
    config: Config = (
        with_stage1_method(recipe.stage1, method) if method in STAGE1_METHODS else with_stage2_method(recipe, method)
    )
    fixed = [f"run.global_batch_size={batch}", "run.accumulate=1", "optim.warmup_epochs=0"]
    return apply_settings(config, [*fixed, *changes])


def build(config: Config, device: torch.device) -> tuple[nn.Module, Callable[[Image.Image], Views]]:
    """The method with random weights, and its views; a teacher of the student's own shape."""
    torch.manual_seed(config.run.seed)
    if isinstance(config, Stage1Config):
        method, make_views = build_stage1(config)
    else:
        method, make_views = build_stage2(config, (Backbone(config.backbone), "cls"))
    return method.to(device), make_views


class PlainStepper(Stepper):
    """The obvious step: fp32, not compiled, one kernel a parameter."""

    def __init__(self, method: nn.Module, config: Config, steps_per_epoch: int) -> None:
        run = dataclasses.replace(config.run, precision="fp32", compile="off")
        super().__init__(method, dataclasses.replace(config, run=run), steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["fused"] = False
            group["foreach"] = False
        for part in method.modules():
            if isinstance(part, Attention):
                part.fused_attn = True  # type: ignore[misc]

    def take(self, step: int, next_views: Callable[[], Views]) -> dict[str, Tensor]:
        """As its base, with a momentum update in a loop."""
        fast = torch._foreach_lerp_
        momentum.torch._foreach_lerp_ = _lerp_in_a_loop  # type: ignore[attr-defined]
        try:
            return super().take(step, next_views)
        finally:
            momentum.torch._foreach_lerp_ = fast  # type: ignore[attr-defined]


def _lerp_in_a_loop(old: list[Tensor], new: list[Tensor], weight: float) -> None:
    for a, b in zip(old, new, strict=True):
        a.lerp_(b, weight)


def synthetic(make_views: Callable[[Image.Image], Views], batch: int) -> Views:
    """One batch of views of noise, pinned where there is a GPU."""
    picture = Image.effect_noise((256, 256), 64).convert("RGB")
    columns = zip(*(make_views(picture) for _ in range(batch)), strict=True)
    views = tuple(torch.stack(column) for column in columns)
    return tuple(view.pin_memory() for view in views) if torch.cuda.is_available() else views


def real(config: Config, make_views: Callable[[Image.Image], Views], steps: int) -> Iterator[Views]:
    """Batches of the corpus, through the loader that trains."""
    corpus = load_corpus(config.data)
    epochs = 1 + steps * config.run.global_batch_size // len(corpus)
    sampler = StepSampler(len(corpus), dataclasses.replace(config.run, epochs=epochs))
    for views, _ in load_batches(corpus, make_views, sampler, config.run.seed, config.data.workers):
        yield views


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Timer:
    """Takes a stepper's steps and times them in blocks."""

    def __init__(self, stepper: Stepper, batches: Iterator[Views]) -> None:
        self.stepper, self._batches, self._step = stepper, batches, 0
        self.step_s: list[float] = []
        self._waited = self._elapsed = 0.0

    def run(self, steps: int, *, count: bool = True) -> None:
        """Take steps; those of the warm-up do not count."""
        waited = 0.0

        def next_views() -> Views:
            nonlocal waited
            start = time.perf_counter()
            views = next(self._batches)
            waited += time.perf_counter() - start
            return views

        wait(self.stepper.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.stepper.take(self._step % self.stepper.total_steps, next_views)
            self._step += 1
        wait(self.stepper.device)
        elapsed = time.perf_counter() - start
        if count:
            self.step_s.append(elapsed / steps)
            self._waited += waited
            self._elapsed += elapsed

    @property
    def waiting(self) -> float:
        """Share of the time that went into waiting for data."""
        return self._waited / self._elapsed


def count_flops(stepper: Stepper, views: Views) -> int:
    """FLOPs of matrix products, convolutions and attention in one step, forward and backward."""
    counter = FlopCounterMode(display=False)
    with counter:
        stepper.take(0, lambda: views)
    return int(counter.get_total_flops())


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what the device gives, not what its data sheet says."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    rates = []
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        rates.append(2.0 * side**3 / (time.perf_counter() - start))
    return max(rates[2:])


def measure(config: Config, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """One method: its numbers, and the plain step's if asked for."""
    batch, steps = config.run.global_batch_size, arguments.steps
    method, make_views = build(config, device)
    views = synthetic(make_views, batch)

    def endless() -> Iterator[Views]:
        while True:
            yield views

    flops = count_flops(Stepper(build(config, device)[0], dataclasses.replace(config, run=off(config)), 10**6), views)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rounds = arguments.rounds
    batches = real(config, make_views, steps * (rounds + 1)) if arguments.data else endless()
    ours = Timer(Stepper(method, config, 10**6), batches)
    ours.run(max(3, steps // 2), count=False)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    plain = Timer(PlainStepper(build(config, device)[0], config, 10**6), endless()) if arguments.reference else None
    if plain is not None:
        plain.run(2, count=False)
    for _ in range(rounds):
        ours.run(steps)
        if plain is not None:
            plain.run(max(1, steps // 2))

    if arguments.profile:
        write_profile(arguments.profile / f"{config.method.name}.txt", ours)
    bf16 = uses_bf16(config.run, Backbone(config.backbone).width, device)
    peak = measured_peak(device, torch.bfloat16 if bf16 else torch.float32)
    step_s = statistics.median(ours.step_s)
    row: dict[str, Any] = {
        "benchmark": "train_step",
        "method": config.method.name,
        "batch": batch,
        "images_per_s": round(batch / step_s, 1),
        "step_ms": round(1e3 * step_s, 2),
        "step_ms_spread": [round(1e3 * f(ours.step_s), 2) for f in (min, max)],
        "waiting": round(ours.waiting, 4),
        "gflop_per_image": round(flops / batch / 1e9, 3),
        "precision": "bf16" if bf16 else "fp32",
        "measured_peak_tflops": round(peak / 1e12, 3),
        "mfu": round(flops / step_s / peak, 4),
        "peak_memory_mib": memory and round(memory),
        "data": [str(path) for path in arguments.data] or "synthetic",
    }
    if plain is not None:
        reference = statistics.median(plain.step_s)
        row |= {"reference_step_ms": round(1e3 * reference, 2), "times_reference": round(reference / step_s, 3)}
    return row


def write_profile(path: Path, timer: Timer, steps: int = 3) -> None:
    """Where a few steps go, operator by operator, as torch's profiler tells it."""
    cuda = timer.stepper.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        timer.run(steps, count=False)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{steps} steps\n{table}\n", encoding="utf-8")


def off(config: Config) -> Any:
    """The run without compilation, in which FLOPs can be counted; what is computed again is no work of the model."""
    return dataclasses.replace(config.run, compile="off", precision="fp32", grad_checkpointing=False)


def main() -> None:
    """Parse, measure, print a line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="vit_tiny_debug")
    parser.add_argument("--method", nargs="+", default=["mocov3", "mimco"], choices=[*STAGE1_METHODS, *STAGE2_METHODS])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", action="store_true", help="time a plain step as well, in turns")
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="pictures instead of synthetic data")
    parser.add_argument("--profile", type=Path, help="folder for a profile of each method as text")
    parser.add_argument("--set", action="append", default=[], help="any setting, such as run.compile=on")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    changes = [*arguments.set]
    if arguments.data:
        changes.append(f"data.sources={','.join(map(str, arguments.data))}")
    for method in arguments.method:
        config = settings_for(PRESETS[arguments.preset](), method, arguments.batch, changes)
        row = measure(config, device, arguments)
        machine = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
        versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
        print(
            json.dumps({**row, "preset": arguments.preset, "set": changes, **machine, "versions": versions}), flush=True
        )


if __name__ == "__main__":
    main()
