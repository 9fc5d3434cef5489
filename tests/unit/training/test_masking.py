"""Masks: counts, units, and which of them each kind takes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.config import MaskConfig
from mimco_deploy.training.masking import draw_mask, mask_attended, mask_shape


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
    shape = mask_shape(side * unit * patch, patch, MaskConfig(mask_patch_size_px=unit * patch, mask_ratio=ratio))
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
    shape = mask_shape(image, patch, MaskConfig(mask_patch_size_px=32, mask_ratio=0.6))
    assert shape.side == image // 32
    assert shape.masked_units == units
    assert shape.masked_patches == tokens
    assert int(draw_mask(shape).sum()) == tokens


def test_masks_vary_and_every_place_is_masked_as_often() -> None:
    torch.manual_seed(0)
    shape = mask_shape(64, 8, MaskConfig(mask_patch_size_px=16, mask_ratio=0.5))
    draws = torch.stack([draw_mask(shape) for _ in range(2000)]).float()
    assert len(torch.unique(draws.flatten(1), dim=0)) > 1500
    rate = draws.mean(dim=0)
    assert rate.sub(0.5).abs().max() < 5 * math.sqrt(0.25 / 2000)


def test_the_same_torch_seed_draws_the_same_mask() -> None:
    shape = mask_shape(64, 8, MaskConfig(mask_patch_size_px=8))
    torch.manual_seed(5)
    first = draw_mask(shape)
    second = draw_mask(shape)
    torch.manual_seed(5)
    assert torch.equal(draw_mask(shape), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("unit_px", [4, 12, 24, 40, 128])
def test_a_unit_that_does_not_tile_is_refused(unit_px: int) -> None:
    with pytest.raises(ConfigError) as error:
        mask_shape(64, 8, MaskConfig(mask_patch_size_px=unit_px))
    assert str(unit_px) in error.value.found
    assert "multiple of the 8-px patch that divides 64 px" in error.value.expected


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"mask\.mask_ratio"):
        MaskConfig(mask_patch_size_px=8, mask_ratio=ratio)


def test_a_ratio_of_1_masks_everything() -> None:
    assert draw_mask(mask_shape(32, 8, MaskConfig(mask_patch_size_px=8, mask_ratio=1.0))).all()


# ------------------------------------------------------------------------------------------------------- rectangles


@given(side=st.integers(1, 14), unit=st.integers(1, 3), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_rectangles_mask_as_many_units_as_asked(side: int, unit: int, ratio: float, seed: int) -> None:
    shape = mask_shape(side * unit * 4, 4, MaskConfig(mask_patch_size_px=unit * 4, mask_ratio=ratio))
    torch.manual_seed(seed)
    mask = draw_mask(shape, "rectangles")
    assert int(mask.sum()) == shape.masked_patches
    blocks = mask.view(side, unit, side, unit)
    assert (blocks.all(dim=3).all(dim=1) == blocks.any(dim=3).any(dim=1)).all()


def neighbours_alike(masks: Tensor) -> float:
    """Share of neighbouring units that are both masked or both visible."""
    across, down = masks[:, :, 1:] == masks[:, :, :-1], masks[:, 1:] == masks[:, :-1]
    return float(torch.cat([across.flatten(), down.flatten()]).float().mean())


def test_rectangles_are_connected_where_single_units_are_not() -> None:
    torch.manual_seed(0)
    shape = mask_shape(224, 16, MaskConfig(mask_patch_size_px=16, mask_ratio=0.4))
    scattered, rectangles = (
        torch.stack([draw_mask(shape, kind) for _ in range(200)]) for kind in ("random", "rectangles")
    )
    assert neighbours_alike(scattered) == pytest.approx(0.4**2 + 0.6**2, abs=0.02)
    assert neighbours_alike(rectangles) > 0.8
    assert rectangles.any(dim=0).all()  # every place is masked now and then


# -------------------------------------------------------------------------------------------------------- attention


def test_the_most_attended_units_are_masked() -> None:
    shape = mask_shape(64, 8, MaskConfig(mask_patch_size_px=16, mask_ratio=0.25))
    scores = torch.zeros(2, 8, 8)
    scores[0, :2, :4] = 1.0  # two units of 2 × 2 patches
    scores[0, 4:6, 6:8] = 0.5
    scores[0, 6:8, 0:2] = 0.4
    scores[1] = torch.arange(64).view(8, 8).float()
    mask = mask_attended(shape, scores.flatten(1))
    assert mask.shape == (2, 8, 8)
    assert mask.flatten(1).sum(dim=1).tolist() == [16, 16]
    assert torch.equal(mask[0], scores[0] > 0.0)
    assert mask[1, 6:].all()  # the last row of units


def test_scores_of_another_grid_are_pooled_to_the_units() -> None:
    shape = mask_shape(64, 4, MaskConfig(mask_patch_size_px=16, mask_ratio=0.25))
    scores = torch.rand(3, 64)
    pooled = scores.view(3, 4, 2, 4, 2).mean(dim=(2, 4)).flatten(1)
    mask = mask_attended(shape, scores)
    assert mask.shape == (3, 16, 16)
    wanted = shape.to_patches(torch.zeros(3, 16, dtype=torch.bool).scatter(1, pooled.topk(4, dim=1).indices, True))
    assert torch.equal(mask, wanted)


@given(side=st.integers(1, 14), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**32), hints=st.booleans())
@settings(deadline=None)
def test_attention_masks_as_many_units_as_asked(side: int, ratio: float, seed: int, hints: bool) -> None:
    shape = mask_shape(side * 8, 8, MaskConfig(mask_patch_size_px=8, mask_ratio=ratio))
    generator = torch.Generator().manual_seed(seed)
    scores, noise = (torch.rand(3, side**2, generator=generator) for _ in range(2))
    mask = mask_attended(shape, scores, noise if hints else None)
    assert mask.flatten(1).sum(dim=1).tolist() == [shape.masked_patches] * 3


def test_hints_are_drawn_from_the_most_attended_tenth_and_stay_visible() -> None:
    shape = mask_shape(160, 16, MaskConfig(mask_patch_size_px=16, mask_ratio=0.5))
    scores = torch.arange(100).float().expand(500, 100)
    torch.manual_seed(0)
    mask = mask_attended(shape, scores, torch.rand(500, 100)).flatten(1)
    top = mask[:, 90:]
    assert (top.sum(dim=1) == 5).all()  # a tenth of 50 masked units are hints
    assert (top.float().mean(dim=0) - 0.5).abs().max() < 0.1  # any of the ten
    assert mask[:, 45:90].all()  # the next most attended take their places
    assert not mask[:, :45].any()
