"""Schedules as functions of the step: nothing to save, nothing to resume wrongly."""

from __future__ import annotations

import math

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.config import OptimConfig


def momentum_at(progress: float, start: float) -> float:
    """EMA momentum of the momentum encoder.

    Args:
        progress: share of the run done, in [0, 1].
        start: momentum at progress 0.

    Returns:
        1 − (1 − start) · (1 + cos(π · progress)) / 2: `start` at first, 1 at the end.

    Source: MoCo v3, section 3.
    """
    return 1.0 - 0.5 * (1.0 + math.cos(math.pi * progress)) * (1.0 - start)


def check_warmup(config: OptimConfig, epochs: int) -> None:
    """Refuse a warm-up that leaves nothing of the run.

    Raises:
        ConfigError: it is as long as the run, or longer.
    """
    if config.warmup_epochs >= epochs:
        raise ConfigError(f"optim.warmup_epochs {config.warmup_epochs}", expected=f"less than run.epochs, {epochs}")


def lr_schedule(
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    *,
    steps_per_epoch: int,
    epochs: int,
    global_batch_size: int,
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to the minimum; `step_update(step)` sets the rate of that step.

    The cosine starts where the warm-up ends, or with `config.cosine_from_start` at step 0. All rates scale with the
    batch, per 256 images.

    Raises:
        ConfigError: the warm-up leaves nothing of the run.
    """
    check_warmup(config, epochs)
    scale = global_batch_size / 256
    warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), epochs * steps_per_epoch - 1)
    for group in optimizer.param_groups:
        group["lr"] = config.base_lr * scale
        group.pop("initial_lr", None)  # a resumed optimiser carries the one of its first start
    return CosineLRScheduler(
        optimizer,
        t_initial=epochs * steps_per_epoch - (0 if config.cosine_from_start else warmup_steps),
        lr_min=config.min_lr * scale,
        warmup_t=warmup_steps,
        warmup_lr_init=config.warmup_lr * scale,
        warmup_prefix=not config.cosine_from_start,
        t_in_epochs=False,
    )
