"""Random masks for masked image modelling (SimMIM, arXiv 2111.09886, section 3.1). True = masked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.config import BackboneConfig, MaskConfig


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
        """M, masked patches an image."""
        return self.masked_units * self.unit**2


def mask_shape(backbone: BackboneConfig, config: MaskConfig) -> MaskShape:
    """Fit the mask's unit to the backbone's patches.

    Raises:
        ConfigError: the unit is no whole number of patches, or does not tile the image, or the ratio masks nothing.
    """
    unit, ragged = divmod(config.mask_patch_size_px, backbone.patch_size_px)
    if ragged or unit < 1 or backbone.grid % unit:
        raise ConfigError(
            f"mask.mask_patch_size_px {config.mask_patch_size_px}",
            expected=f"a multiple of the {backbone.patch_size_px}-px patch that divides {backbone.image_size_px} px",
        )
    if not 0.0 < config.mask_ratio <= 1.0:
        raise ConfigError(f"mask.mask_ratio {config.mask_ratio}", expected="a share above 0 and up to 1")
    side = backbone.grid // unit
    return MaskShape(side, unit, math.ceil(side**2 * config.mask_ratio))


def draw_mask(shape: MaskShape) -> Tensor:
    """Draw one mask from torch's global generator.

    Returns:
        [h, w] bool, True = masked; `shape.masked_patches` of them.
    """
    masked = torch.zeros(shape.side**2, dtype=torch.bool)
    masked[torch.randperm(shape.side**2)[: shape.masked_units]] = True
    side, unit = shape.side, shape.unit
    return masked.view(side, side).repeat_interleave(unit, 0).repeat_interleave(unit, 1)  # [h, w]
