"""AdamW over what trains, with or without decay on what is not a matrix; clipping."""

from __future__ import annotations

import torch
from torch import nn

from mimco_deploy.training.config import OptimConfig


def build_optimizer(method: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW; the learning rate is set by `schedules.lr_schedule`.

    `config.decay` says what is decayed.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim > 1 and not name.endswith(".bias")
        is_weight = is_matrix and not name.endswith(("_token", "pos_embed"))
        is_decayed = {"all": True, "matrices": is_matrix, "weights": is_weight}[config.decay]
        (decayed if is_decayed else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=config.betas, fused=True)


def clip_gradients(method: nn.Module, norm: float) -> None:
    """Scale all gradients so that their global norm is at most `norm`; 0 leaves them."""
    if norm:
        nn.utils.clip_grad_norm_(method.parameters(), norm)
