"""Layer-wise learning rates: the nearer a layer is to the pixels, the less fine-tuning moves it.

timm has such groups too, but counts a Swin's merging of patches to the stage after it, and sorts any other model by
rules of its own; the recipes that mimco compares itself with do not.

Source: BEiT (arXiv 2106.08254), MAE (2111.06377), SimMIM (2111.09886).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone

_TABLES = ("_token", "pos_embed", "relative_position_bias_table")
"""Ends of the names of what is no weight matrix though it has two dimensions: none of them decays."""
_EMBEDDING = ("patch_embed.", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre.")


def layer_numbers(names: Iterable[str]) -> dict[str, int]:
    """The layer of each parameter of a ViT, BEiT or Swin, by timm's names.

    Args:
        names: of all its parameters.

    Returns:
        0 for what embeds patches, 1 … N for the blocks, counted through the stages of a Swin, whose merging of patches
        belongs to the last block before it; N + 1 for all that follows the blocks.

    Raises:
        ConfigError: there are no blocks.
    """
    names = tuple(names)
    blocks = sorted({place for name in names if (place := _block(name)) is not None})
    if not blocks:
        raise ConfigError("layer decay for a model without blocks", expected="a ViT, BEiT or Swin")
    number = {place: 1 + index for index, place in enumerate(blocks)}
    last_of = {stage: number[stage, block] for stage, block in blocks}  # blocks come in order: the last one stays
    numbers = {}
    for name in names:
        place, merging = _block(name), re.match(r"layers\.(\d+)\.downsample\.", name)
        if place is not None:
            numbers[name] = number[place]
        elif merging:
            numbers[name] = last_of[int(merging[1]) - 1]  # timm puts it at the head of the next stage
        else:
            numbers[name] = 0 if name.startswith(_EMBEDDING) else len(blocks) + 1
    return numbers


def decayed_groups(method: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters for AdamW: `lr_scale` is layer_decay^(N + 1 − layer), and 1 for the head.

    Args:
        method: has the backbone as `encoder`; everything else of it is head.
        layer_decay: in (0, 1]; 1 gives all the same rate, whatever the architecture.
        weight_decay: of matrices; parameters of one dimension, tokens, positions and relative-position tables have
            none.

    Raises:
        ConfigError: the encoder has no blocks to count.
    """
    encoder = method.encoder
    assert isinstance(encoder, Backbone)
    names = [name for name, _ in encoder.body.named_parameters()]
    if layer_decay == 1.0:
        numbers, top = dict.fromkeys(names, 0), 0
    else:
        try:
            numbers = layer_numbers(names)
        except ConfigError as error:
            expected = "a ViT, BEiT or Swin, or --set optim.layer_decay=1"
            raise ConfigError(
                f"optim.layer_decay {layer_decay} for {encoder.config.name}", expected=expected
            ) from error
        top = 1 + max(number for name, number in numbers.items() if _block(name) is not None)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            layer = numbers.get(name.removeprefix("encoder.body."), top)
            decays = parameter.ndim > 1 and not name.endswith(_TABLES)
            key = (layer_decay ** (top - layer), weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def _block(name: str) -> tuple[int, int] | None:
    """Stage and block of a parameter that lies in one; a ViT has one stage."""
    match = re.match(r"(?:layers\.(\d+)\.)?blocks\.(\d+)\.", name)
    return (int(match[1] or 0), int(match[2])) if match else None
