"""Several processes, and the same calls when there is only one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes logs and checkpoints."""
    return rank() == 0


def wait_for_all() -> None:
    """Return once every process has come here."""
    if world_size() > 1:
        dist.barrier()


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate every process's rows in rank order.

    Args:
        rows: [B, …], the same shape everywhere. No gradient flows through.

    Returns:
        [B · world, …]
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def draw_for_all(draw: Callable[[], Tensor]) -> Tensor:
    """Random numbers that are the same in every process: the first one's.

    One process alone draws just the same, so that the number of processes does not change what is drawn.
    """
    drawn = draw()
    if world_size() > 1:
        dist.broadcast(drawn, src=0)
    return drawn


def own_part(rows: Tensor) -> Tensor:
    """This process's share of rows [B · world, …] that all have: [B, …]."""
    return rows.chunk(world_size())[rank()]


def rows_of_all(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows by their number among those of all processes, in rank order.

    Args:
        rows: [n, D] of this process, as many everywhere. No gradient flows through.
        numbers: [K] int64 in 0 … n · world − 1, the same everywhere.

    Returns:
        [K, D], the same everywhere.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows[numbers]
    local = numbers - rank() * len(rows)
    here = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)].float() * here.unsqueeze(1)  # others add what is theirs
    dist.all_reduce(found)
    return found.to(rows.dtype)


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Make batch norm take its statistics over all processes: torch's own on GPUs, ours on CPUs, where torch has none.

    Parameters stay the same objects under the same names.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is not nn.BatchNorm1d:  # that of heads; a teacher's own kinds would lose their activations
                continue
            if device.type == "cuda":
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
            else:
                child.__class__ = _SyncedBatchNorm


class _SyncedBatchNorm(nn.BatchNorm1d):
    """Batch norm over all processes' rows, as many in each."""

    def forward(self, rows: Tensor) -> Tensor:
        """[B, C] → [B, C]; eval mode is plain batch norm's."""
        if not self.training:
            return super().forward(rows)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        wide = rows.float()
        mean = mean_of_all(wide.mean(dim=0))
        variance = mean_of_all((wide - mean).square().mean(dim=0))
        count = len(rows) * world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        normalised = (wide - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            normalised = normalised * self.weight + self.bias
        return normalised.to(rows.dtype)


def mean_of_all(value: Tensor) -> Tensor:
    """Mean over processes, of any shape; gradients flow through."""
    if world_size() == 1:
        return value
    result: Tensor = _SumOfAll.apply(value)
    return result / world_size()


class _SumOfAll(torch.autograd.Function):
    """Sum over processes. Each one's loss depends on every one's value, so gradients are summed too."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process: so that all of them stop at the same step."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([int(flag)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the group that `torchrun` describes, if it started this process, and yield the device to train on."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if started:
            dist.destroy_process_group()
