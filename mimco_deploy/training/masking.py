"""Masks for masked image modelling: drawn at random, in rectangles, or by a teacher's attention. True = masked.

Every mask of a shape has the same number of masked units, so that a batch needs no padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.config import MaskConfig

_LEAST_SHARE = 16 / 196
"""Of the grid's units in one rectangle: BEiT's 16 of 14 × 14."""
_ASPECT = 0.3
"""Smallest ratio of a rectangle's sides; the largest is its inverse (BEiT)."""
_TRIES = 10
"""To fit a rectangle, before single units fill up (BEiT)."""
_HINT_SHARE = 0.1
"""Of the masked units' number that are left visible as hints, drawn from that share of the grid which the teacher
attends to most (AttMask, section 3.2)."""


@dataclass(frozen=True)
class MaskShape:
    """Which masks fit a backbone.

    Source: SimMIM, section 3.1: the unit is larger than a patch, so that it cannot be guessed from its border.
    """

    side: int
    """Units along one side of the image."""
    unit: int
    """Patches along one side of a unit."""
    masked_units: int
    """Units masked, rounded up."""

    @property
    def masked_patches(self) -> int:
        """Masked patches an image."""
        return self.masked_units * self.unit**2

    def to_patches(self, units: Tensor) -> Tensor:
        """[..., side²] bool of units → [..., h, w] bool of patches."""
        grid = units.view(*units.shape[:-1], self.side, self.side)
        return grid.repeat_interleave(self.unit, -2).repeat_interleave(self.unit, -1)


def mask_shape(image_size_px: int, patch_px: int, config: MaskConfig) -> MaskShape:
    """Fit the mask's unit to a backbone's patches.

    Raises:
        ConfigError: the unit is no whole number of patches, or does not tile the image.
    """
    unit, ragged = divmod(config.mask_patch_size_px, patch_px)
    side, left = divmod(image_size_px, config.mask_patch_size_px)
    if ragged or left:
        raise ConfigError(
            f"mask.mask_patch_size_px {config.mask_patch_size_px}",
            expected=f"a multiple of the {patch_px}-px patch that divides {image_size_px} px",
        )
    return MaskShape(side, unit, math.ceil(side**2 * config.mask_ratio))


def draw_mask(shape: MaskShape, kind: str = "random") -> Tensor:
    """Draw one mask from torch's global generator.

    Args:
        shape: of the mask.
        kind: `random`, or `rectangles` as in BEiT (arXiv 2106.08254, algorithm 1).

    Returns:
        [h, w] bool, True = masked; `shape.masked_units` units of it.
    """
    masked = torch.zeros(shape.side, shape.side, dtype=torch.bool)
    if kind == "rectangles":
        _fill_with_rectangles(masked, shape.masked_units)
    free = (~masked).flatten().nonzero().flatten()
    missing = shape.masked_units - int(masked.sum())
    masked.view(-1)[free[torch.randperm(len(free))[:missing]]] = True
    return shape.to_patches(masked.flatten())


def mask_attended(shape: MaskShape, scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """Mask what a teacher attends to most.

    Args:
        shape: of the masks.
        scores: [B, L] of the teacher's patches, higher is more attended; any square grid.
        noise: [B, side²] random numbers that pick the hints: a tenth as many units as are masked, from the tenth of the
            grid that is attended to most, stay visible; None gives no hints.

    Returns:
        [B, h, w] bool, True = masked; `shape.masked_units` units of each.

    Source: AttMask (arXiv 2203.12719), section 3.2. There hints lessen the number of masked patches; here the next most
    attended take their places, so that it stays.
    """
    grid = math.isqrt(scores.shape[1])
    units = F.adaptive_avg_pool2d(scores.float().view(-1, 1, grid, grid), shape.side).flatten(1)  # [B, side²]
    if noise is not None:
        pool = math.ceil(_HINT_SHARE * units.shape[1])
        hints = min(int(_HINT_SHARE * shape.masked_units), units.shape[1] - shape.masked_units, pool)
        most = units.topk(pool, dim=1).indices  # [B, pool]
        chosen = most.gather(1, noise.gather(1, most).topk(hints, dim=1).indices)
        units = units.scatter(1, chosen, -torch.inf)
    masked = torch.zeros_like(units, dtype=torch.bool)
    masked.scatter_(1, units.topk(shape.masked_units, dim=1).indices, True)
    return shape.to_patches(masked)


def _fill_with_rectangles(masked: Tensor, wanted: int) -> None:
    """Mask rectangles until no further one fits into what is wanted; at most `wanted` units."""
    side = len(masked)
    least = max(1, round(_LEAST_SHARE * side**2))
    while (missing := wanted - int(masked.sum())) > 0:
        for _ in range(_TRIES):
            area = least + torch.rand(()).item() * max(0, missing - least)
            aspect = math.exp((2.0 * torch.rand(()).item() - 1.0) * math.log(1.0 / _ASPECT))
            height, width = (round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect)))
            if not (0 < height <= side and 0 < width <= side):
                continue
            top, left = (int(torch.randint(side - length + 1, ())) for length in (height, width))
            here = masked[top : top + height, left : left + width]
            if 0 < int((~here).sum()) <= missing:
                here.fill_(True)
                break
        else:
            return
