"""SimMIM's masks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.config import BackboneConfig, MaskConfig
from mimco_deploy.training.masking import draw_mask, mask_shape


def backbone(image_size_px: int, patch_size_px: int) -> BackboneConfig:
    return BackboneConfig(
        name="vit_small_patch16_224",
        image_size_px=image_size_px,
        patch_size_px=patch_size_px,
        embed_dim=8,
        depth=1,
        num_heads=1,
    )


@given(
    side=st.integers(1, 8),
    unit=st.integers(1, 4),
    patch=st.sampled_from([4, 8, 16]),
    ratio=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_the_share_of_units_is_masked_rounded_up_and_units_are_whole(
    side: int, unit: int, patch: int, ratio: float, seed: int
) -> None:
    shape = mask_shape(
        backbone(side * unit * patch, patch), MaskConfig(mask_patch_size_px=unit * patch, mask_ratio=ratio)
    )
    units = math.ceil(side * side * ratio)
    assert (shape.side, shape.unit, shape.masked_units) == (side, unit, units)
    assert shape.masked_patches == units * unit**2
    torch.manual_seed(seed)
    mask = draw_mask(shape)
    assert mask.dtype == torch.bool
    assert mask.shape == (side * unit, side * unit)
    assert int(mask.sum()) == shape.masked_patches
    blocks = mask.view(side, unit, side, unit)
    assert (blocks.all(dim=3).all(dim=1) == blocks.any(dim=3).any(dim=1)).all()


@pytest.mark.parametrize(("image", "patch", "units", "tokens"), [(192, 16, 22, 88), (224, 16, 30, 120)])
def test_counts_are_simmims(image: int, patch: int, units: int, tokens: int) -> None:
    shape = mask_shape(backbone(image, patch), MaskConfig(mask_patch_size_px=32, mask_ratio=0.6))
    assert shape.side == image // 32
    assert shape.masked_units == units
    assert shape.masked_patches == tokens
    assert int(draw_mask(shape).sum()) == tokens


def test_masks_vary_and_every_place_is_masked_as_often() -> None:
    torch.manual_seed(0)
    shape = mask_shape(backbone(64, 8), MaskConfig(mask_patch_size_px=16, mask_ratio=0.5))
    draws = torch.stack([draw_mask(shape) for _ in range(2000)]).float()
    assert len(torch.unique(draws.flatten(1), dim=0)) > 1500
    rate = draws.mean(dim=0)
    assert rate.sub(0.5).abs().max() < 5 * math.sqrt(0.25 / 2000)


def test_the_same_torch_seed_draws_the_same_mask() -> None:
    shape = mask_shape(backbone(64, 8), MaskConfig(mask_patch_size_px=8))
    torch.manual_seed(5)
    first = draw_mask(shape)
    second = draw_mask(shape)
    torch.manual_seed(5)
    assert torch.equal(draw_mask(shape), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("unit_px", [0, 4, 12, 24, 40, 128, -8])
def test_a_unit_that_does_not_tile_is_refused(unit_px: int) -> None:
    with pytest.raises(ConfigError) as error:
        mask_shape(backbone(64, 8), MaskConfig(mask_patch_size_px=unit_px))
    assert str(unit_px) in error.value.found
    assert "multiple of the 8-px patch that divides 64 px" in error.value.expected


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"mask\.mask_ratio"):
        mask_shape(backbone(64, 8), dataclasses.replace(MaskConfig(mask_patch_size_px=8), mask_ratio=ratio))


def test_a_ratio_of_1_masks_everything() -> None:
    assert draw_mask(mask_shape(backbone(32, 8), MaskConfig(mask_patch_size_px=8, mask_ratio=1.0))).all()
