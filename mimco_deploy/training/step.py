"""One optimiser step: forward and backward over micro-batches, clip, update. As fast as the device allows.

Nothing here waits for the device: losses stay tensors, and learning rates are set from the step's number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.augment import ToInputs
from mimco_deploy.training.backbone import Backbone, write_attention_out
from mimco_deploy.training.config import RunConfig, Stage1Config, Stage2Config
from mimco_deploy.training.data import Views, seed_for
from mimco_deploy.training.distributed import rank, synchronise_batch_norm, world_size
from mimco_deploy.training.optim import build_optimizer, clip_gradients
from mimco_deploy.training.schedules import lr_schedule

logger = logging.getLogger(__name__)

WIDE = 192
"""Width of a backbone from which bf16 gains time on a CPU: casts cost more than they gain below (docs/decisions.md)."""
_MODEL_STREAM = 1  # keeps the model's random numbers apart from the views', which use (seed, position)


class Method(Protocol):
    """What a step asks of a method, which is an `nn.Module` as well."""

    encoder: Backbone

    def start_step(self, progress: float) -> None:
        """Called once before each optimiser step, with the share of the run done."""


class Stepper:
    """A method with its optimiser and schedules, ready to take steps.

    Args:
        method: on its device; satisfies `Method`.
        config: of the stage.
        steps_per_epoch: optimiser steps in an epoch.
        restore: called with the optimiser before the first step, where a run is resumed.
    """

    def __init__(
        self,
        method: nn.Module,
        config: Stage1Config | Stage2Config,
        steps_per_epoch: int,
        restore: Callable[[torch.optim.Optimizer], None] = lambda _: None,
    ) -> None:
        run = config.run
        self.method, self._config = method, config
        self.total_steps = steps_per_epoch * run.epochs
        self.device = next(method.parameters()).device
        self.optimizer = build_optimizer(method, config.optim)
        restore(self.optimizer)
        self._schedule = lr_schedule(
            self.optimizer,
            config.optim,
            steps_per_epoch=steps_per_epoch,
            epochs=run.epochs,
            global_batch_size=run.global_batch_size,
        )
        encoder = cast(Method, method).encoder
        self._to_inputs = ToInputs(config.backbone).to(self.device)
        self._bf16 = uses_bf16(run, encoder.width, self.device)
        encoder.checkpoint_gradients(run.grad_checkpointing)
        if self.device.type == "cpu":
            write_attention_out(method)
        if compiles(run, self.device):
            for module in method.modules():
                if isinstance(module, Backbone):  # nearly all of the work, and free of state and of other processes
                    module.compile()
            self._to_inputs.compile()  # changes of colour become a few passes over memory
        self._parallel = parallel(method, self.device)
        self._parallel.train()

    @property
    def lr(self) -> float:
        """Learning rate of the step last taken."""
        return float(self.optimizer.param_groups[0]["lr"])

    def take(self, step: int, next_views: Callable[[], Views]) -> dict[str, Tensor]:
        """Take one step.

        Args:
            step: its number; decides learning rate, momentum and random numbers.
            next_views: gives the views of the next micro-batch, stacked; uint8 pixels and masks.

        Returns:
            Mean metrics over the micro-batches, on the device.
        """
        cast(Method, self.method).start_step(step / self.total_steps)
        self._schedule.step_update(step)
        metrics = self._accumulate_gradients(step, next_views)
        clip_gradients(self.method, self._config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics

    def _accumulate_gradients(self, step: int, next_views: Callable[[], Views]) -> dict[str, Tensor]:
        run = self._config.run
        means: dict[str, Tensor] = {}
        for micro in range(run.accumulate):
            inputs = self._to_inputs([view.to(self.device, non_blocking=True) for view in next_views()])
            torch.manual_seed(seed_for(run.seed, _MODEL_STREAM, step, micro, rank()))
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)
            with no_sync(self._parallel, unless=micro == run.accumulate - 1), autocast:
                metrics: dict[str, Tensor] = self._parallel(*inputs)
                (metrics["loss"] / run.accumulate).backward()  # type: ignore[no-untyped-call]
            for name, value in metrics.items():
                means[name] = means.get(name, 0.0) + value.detach() / run.accumulate
        return means


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in the device's own units, so that autocast gains time."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tell = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch from 2.11 on
    capabilities: dict[str, bool] = tell()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def uses_bf16(run: RunConfig, width: int, device: torch.device) -> bool:
    """Whether a step computes under bf16 autocast: where asked, and by default where that is faster.

    Args:
        run: gives `precision`.
        width: of the backbone's tokens.
        device: to train on.
    """
    if run.precision != "auto":
        return run.precision == "bf16"
    return computes_bf16(device) and (device.type == "cuda" or width >= WIDE)


_COMPILERS = {"cuda": ("CC", "cc", "gcc", "clang"), "cpu": ("CXX", "c++", "g++", "clang++")}
"""What torch compiles with on a device: an environment variable, and names."""


def check_compiler(run: RunConfig, device: torch.device) -> None:
    """Refuse what cannot be compiled before anything is moved out of the way.

    Raises:
        ConfigError: it was asked for, and there is no compiler for C or C++, which it needs.
    """
    if run.compile == "on" and not _has_compiler(device):
        variable, name, *_ = _COMPILERS[device.type]
        raise ConfigError("run.compile on without a compiler", expected=f"{name} or what {variable} names, or off")


def _has_compiler(device: torch.device) -> bool:
    variable, *names = _COMPILERS[device.type]
    return any(map(shutil.which, (os.environ.get(variable, names[0]), *names)))


def compiles(run: RunConfig, device: torch.device) -> bool:
    """Whether backbones are compiled: where asked, and by default on GPUs, where the minutes it takes come back."""
    if run.compile != "auto" or device.type != "cuda":
        return run.compile == "on"
    if _has_compiler(device):
        return True
    logger.warning("no C compiler, which compiled steps need: they run as they are, and take longer")
    return False


def parallel(method: nn.Module, device: torch.device) -> nn.Module:
    """The method as one of several processes; as it is where there is one."""
    if world_size() == 1:
        return method
    synchronise_batch_norm(method, device)
    with warnings.catch_warnings():
        # The name that replaces it is not in torch 2.11. Every process comes to the same buffers by itself.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(method, broadcast_buffers=False)


def no_sync(parallel: nn.Module, *, unless: bool) -> AbstractContextManager[None]:
    """Leave gradients of a micro-batch to their own process, unless it is the step's last."""
    if isinstance(parallel, DistributedDataParallel) and not unless:
        return cast("AbstractContextManager[None]", parallel.no_sync())
    return contextlib.nullcontext()
