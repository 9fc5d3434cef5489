"""What a run will take, before it runs: memory, speed, hours, disk; and the micro-batch that fits.

Two small steps are measured with random weights and noise in place of pictures; nothing is trained or written. One
comes before them, for what is made once and stays: the optimiser's state, and on a GPU the libraries' own buffers. On
a GPU memory is the allocator's peak; by a simulation over ViT and Swin it comes out up to a tenth too high. On a CPU it
is what a step keeps for its backward pass; steps of ViT-S with 32 images were seen to take 1.2 to 1.8 times that, so
half of the free memory is left alone. Data loading is not measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.sources import find_pictures
from mimco_deploy.training.checkpoint import Checkpoint
from mimco_deploy.training.classifier import FineTuned, LinearProbe, build_classifier
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.data import MakeViews, Views, fewest_parts
from mimco_deploy.training.distributed import world_size
from mimco_deploy.training.finetune_config import FinetuneConfig, LinearConfig
from mimco_deploy.training.labelled import number_classes, with_label
from mimco_deploy.training.stages import build_stage1, build_stage2, fit_stage, start_encoder, teacher_of
from mimco_deploy.training.step import Stepper
from mimco_deploy.training.supervised import LabelledStepper, fit_run, make_views, mixes
from mimco_deploy.training.supervised_checkpoint import SavedRun

Config = Stage1Config | Stage2Config | FinetuneConfig | LinearConfig
ConfigT = TypeVar("ConfigT", Stage1Config, Stage2Config, FinetuneConfig, LinearConfig)

logger = logging.getLogger(__name__)

PROBES = {"cpu": ((2, 6),), "cuda": ((8, 32), (2, 8))}
"""Images in the two steps that are measured; fewer where those do not fit."""
PATIENCE_S = 5.0
"""How long, by the rate of the small steps, the step may take that tells the rate of large ones."""
MAY_FILL = {"cpu": 0.5, "cuda": 0.85}
"""Share of the free memory that a step may fill by this reckoning. Our choice."""
MIB = 2**20
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take on this machine."""

    encoder_parameters: int
    """Of the backbone that is exported."""
    trained_parameters: int
    """Heads included."""
    pictures: int
    """In the corpus."""
    steps: int
    """Optimiser steps of the run, of a resumed one those that are left."""
    micro_batch: int
    """Images that a process computes at once."""
    accumulate: int
    """Micro-batches in a step."""
    grad_checkpointing: bool
    """Whether activations are computed again."""
    fixed_mib: float
    """Weights, gradients, optimiser's state, and what does not grow with the batch."""
    image_mib: float
    """What each image of a micro-batch adds."""
    step_mib: float
    """Both, for the micro-batch."""
    available_mib: float
    """Free memory of the device."""
    largest_micro_batch: int
    """Most images at once that fit."""
    images_per_s: float
    """Of all processes, without loading; uncompiled, so a lower bound on a GPU."""
    hours: float
    """Of training."""
    disk_mib: float
    """Two checkpoints: one is written beside the other."""


def plan_run(config: Config, resume: Checkpoint | SavedRun | None = None) -> Plan:
    """Find the pictures, build the method and measure it; nothing is trained or written.

    What it costs to measure a run with labels after each epoch is not in it.

    Args:
        config: of the run.
        resume: where it goes on from; what is done is not planned again.

    Raises:
        MimcoError: there are no pictures, or the method cannot be built.
    """
    found = find_pictures(config.data.sources)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.run.seed)
    method: nn.Module
    views: MakeViews
    if isinstance(config, FinetuneConfig | LinearConfig):
        classes, _, _ = number_classes(found, find_pictures(config.val))
        config = fit_run(config, len(found))
        assert not isinstance(resume, Checkpoint)
        method, views = build_classifier(config, len(classes), resume), make_views(config)
        done = resume.progress.step if resume else 0
    else:
        assert not isinstance(resume, SavedRun)
        if isinstance(config, Stage1Config):
            config = fit_stage(config, len(found))
            method, views = build_stage1(config)
        else:
            config = fit_stage(config, len(found))
            method, views = build_stage2(config, teacher_of(config, resume))
        start_encoder(method, config.start_from, resume)
        done = resume.step if resume else 0
    return make_plan(config, method.to(device), views, len(found), done)


def fit_to_memory(config: ConfigT) -> ConfigT:
    """The run in as few micro-batches as the device's free memory takes, with activations computed again if need be.

    Raises:
        MimcoError: as `plan_run`; or not even two images fit.
    """
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, grad_checkpointing=True))
    try:
        plan = plan_run(config)
        fits = config.run.grad_checkpointing or plan.largest_micro_batch >= plan.micro_batch * plan.accumulate
    except DoesNotFitError:
        if config.run.grad_checkpointing:
            raise
        fits = False
    if not fits:
        config, plan = again, plan_run(again)
    batch = config.run.global_batch_size
    accumulate = fit_accumulation(plan, batch, at_once=2 if mixes(config) else 1)
    if accumulate > 1 and isinstance(config, Stage1Config | Stage2Config):
        logger.warning(
            "%d micro-batches of %d: contrastive losses see the negatives of one of them only",
            *(accumulate, batch // accumulate),
        )
    return dataclasses.replace(config, run=dataclasses.replace(config.run, accumulate=accumulate))


class DoesNotFitError(ConfigError):
    """Not even the smallest step that is measured fits."""


@dataclass(frozen=True)
class _Probe:
    images: int
    most: int
    """Most bytes of tensors alive, beside weights and the optimiser's state."""
    seconds: float


def make_plan(config: Config, method: nn.Module, make_views: MakeViews, pictures: int, done: int = 0) -> Plan:
    """Measure two small steps of a method, and reckon.

    Args:
        config: of the run.
        method: on its device; its weights are changed.
        make_views: of the method.
        pictures: in the corpus.
        done: steps that a resumed run has behind it.

    Raises:
        ConfigError: there are fewer pictures than a batch; `DoesNotFitError`: see there.
    """
    run = config.run
    if pictures < run.global_batch_size:
        raise ConfigError(f"{pictures} pictures", expected=f"at least a batch of {run.global_batch_size}")
    steps = max(0, pictures // run.global_batch_size * run.epochs - done)
    once = dataclasses.replace(config, run=dataclasses.replace(run, accumulate=1, compile="off"))
    stepper: Stepper | LabelledStepper
    if isinstance(once, FinetuneConfig | LinearConfig):
        assert isinstance(method, FineTuned | LinearProbe)
        stepper = LabelledStepper(method, once, steps_per_epoch=10**6)
    else:
        stepper = Stepper(method, once, steps_per_epoch=10**6)
    small, large = _measure(stepper, make_views)
    image = max(1.0, (large.most - small.most) / (large.images - small.images))
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    weights = sum(value.numel() * value.element_size() for value in method.state_dict().values())
    moments = 2 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
    fixed = weights + moments + max(0.0, small.most - small.images * image)
    micro = run.global_batch_size // (run.accumulate * world_size())
    available = free_memory(stepper.device)
    largest = max(0, int((MAY_FILL[stepper.device.type] * available - fixed) // image))
    encoder = method.encoder
    assert isinstance(encoder, nn.Module)
    exported = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    usual = min(micro, largest // 2, int(PATIENCE_S * large.images / large.seconds))
    usual = usual // 2 * 2  # even: pictures may be mixed in pairs
    if usual > large.images:  # small steps leave a device idle, and the optimiser's part in them is large
        # Where somebody else took the memory meanwhile, the small step's rate stands.
        with contextlib.suppress(torch.OutOfMemoryError):
            large = _probe(stepper, _noise(make_views, usual))
    rate = large.images * world_size() / large.seconds
    return Plan(
        encoder_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        pictures=pictures,
        steps=steps,
        micro_batch=micro,
        accumulate=run.accumulate,
        grad_checkpointing=run.grad_checkpointing,
        fixed_mib=fixed / MIB,
        image_mib=image / MIB,
        step_mib=(fixed + micro * image) / MIB,
        available_mib=available / MIB,
        largest_micro_batch=largest,
        images_per_s=rate,
        hours=steps * run.global_batch_size / rate / 3600,
        disk_mib=2 * (weights + moments + exported) / MIB,
    )


def fit_accumulation(plan: Plan, global_batch_size: int, at_once: int = 1) -> int:
    """The fewest micro-batches into which a batch divides so that each fits.

    Args:
        plan: of the run.
        global_batch_size: over all processes.
        at_once: images that stay together.

    Raises:
        ConfigError: not even two images fit at once.
    """
    share = global_batch_size // world_size()
    accumulate = fewest_parts(share // at_once, plan.largest_micro_batch // at_once)
    if share // accumulate >= 2 and plan.largest_micro_batch >= 2:
        return accumulate
    raise ConfigError(
        f"{plan.available_mib:.0f} MiB of memory are free; two images need {plan.fixed_mib + 2 * plan.image_mib:.0f}",
        expected="more memory, or a smaller backbone",
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a run in this process may take on a device; what the process holds by now is given back before."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return int(min(_free_of_machine(), _free_of_group()))


def _free_of_machine() -> int:
    try:
        told = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        told = None
    if told is not None:
        return int(told[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # other systems do not tell what is free


def _free_of_group() -> float:
    """What the container's limit leaves; infinity without one. Files that were read fill memory too, and give way."""
    try:
        most, now = (int((_GROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such file, or `max`
        return math.inf
    try:
        told = re.search(r"^inactive_file (\d+)$", (_GROUP / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        told = None
    return max(0, most - now + (int(told[1]) if told else 0))


def _measure(stepper: Stepper | LabelledStepper, make_views: MakeViews) -> tuple[_Probe, _Probe]:
    """Two steps of different size, after one for what is made once."""
    for few, more in PROBES[stepper.device.type]:
        with contextlib.suppress(torch.OutOfMemoryError):
            views = _noise(make_views, few)
            stepper.take(0, lambda views=views: views)  # type: ignore[misc]  # bound now
            return _probe(stepper, views), _probe(stepper, _noise(make_views, more))
        stepper.optimizer.zero_grad()  # now that no traceback holds the activations
        torch.cuda.empty_cache()
    raise DoesNotFitError(
        f"not even a step of {more} images fits into the {free_memory(stepper.device) / MIB:.0f} MiB that are free",
        expected="more memory, --set run.grad_checkpointing=true or a smaller backbone",
    )


def _noise(make_views: MakeViews, count: int) -> Views:
    """Views of noise, stacked."""
    picture = with_label(Image.effect_noise((256, 256), 64).convert("RGB"), 0)
    return tuple(torch.stack(column) for column in zip(*(make_views(picture) for _ in range(count)), strict=True))


def _probe(stepper: Stepper | LabelledStepper, views: Views) -> _Probe:
    """Bytes that a step needs beside weights and optimiser, and the time of the step after it."""
    most = _most_on_gpu(stepper, views) if stepper.device.type == "cuda" else _kept_on_cpu(stepper, views)
    _wait(stepper.device)
    start = time.perf_counter()
    stepper.take(1, lambda: views)
    _wait(stepper.device)
    return _Probe(len(views[0]), most, time.perf_counter() - start)


def _most_on_gpu(stepper: Stepper | LabelledStepper, views: Views) -> int:
    """The allocator's peak."""
    before = torch.cuda.memory_allocated(stepper.device)
    torch.cuda.reset_peak_memory_stats(stepper.device)
    stepper.take(0, lambda: views)
    return torch.cuda.max_memory_allocated(stepper.device) - before


def _kept_on_cpu(stepper: Stepper | LabelledStepper, views: Views) -> int:
    """What the step keeps for its backward pass, each storage once, and the gradients: a CPU counts nothing for us."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        stepper.take(0, lambda: views)
    gradients = sum(p.numel() * p.element_size() for p in stepper.method.parameters() if p.requires_grad)
    return gradients + sum(kept.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
