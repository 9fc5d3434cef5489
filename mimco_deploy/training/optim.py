"""AdamW over what trains, with or without decay on what is not a matrix; clipping."""

from __future__ import annotations

import torch
from torch import nn

from mimco_deploy.training.config import OptimConfig


def build_optimizer(method: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW; the learning rate is set by `schedules.lr_schedule`.

    Where `config.decay_everything` is off, biases, norms and tokens are spared the decay.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim > 1 and not name.endswith("_token")
        (decayed if config.decay_everything or is_matrix else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=config.betas)


def clip_gradients(method: nn.Module, norm: float) -> None:
    """Scale all gradients so that their global norm is at most `norm`; 0 leaves them."""
    if norm:
        nn.utils.clip_grad_norm_(method.parameters(), norm)
