"""What a momentum encoder needs: its update, and a queue of the keys that it made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def ema_update(slow: nn.Module, online: nn.Module, momentum: float) -> None:
    """EMA over parameters: m · old + (1 − m) · new. Batch-norm statistics stay the slow module's own.

    Args:
        slow: of the momentum encoder.
        online: of the same shape.
        momentum: m, in [0, 1]: 1 freezes, 0 copies.
    """
    old: list[Tensor] = list(slow.parameters())
    new: list[Tensor] = list(online.parameters())
    assert len(old) == len(new)
    torch._foreach_lerp_(old, new, 1.0 - momentum)  # one launch for all of them


class KeyQueue(nn.Module):
    """First-in first-out store of L2-normalised keys; part of the checkpoint. Starts with random directions.

    Args:
        size: K
        dim: P
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self.rows: Tensor
        self.pushed: Tensor

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Overwrite the oldest rows by `rows` [n, P]; the last K of them where n > K."""
        size = len(self.rows)
        rows = F.normalize(rows[-size:].to(self.rows.dtype), dim=1)
        at = (self.pushed + torch.arange(len(rows), device=rows.device)) % size
        self.rows[at] = rows
        self.pushed += len(rows)
