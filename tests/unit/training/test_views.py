"""Augmentations, by statistics over some hundreds of draws, and what a backbone is given."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mimco_deploy.drawings import draw
from mimco_deploy.training import colour
from mimco_deploy.training.augment import MaskedTwoViews, OneCrop, ToInput, TwoViews
from mimco_deploy.training.config import MaskConfig, ViewsConfig
from mimco_deploy.training.masking import mask_shape
from tests.unit.training.small import BACKBONE

DRAWS = 500


def ramp(side: int = 64) -> Image.Image:
    """Red tells the column, green the row, blue is 60: a crop says where it was taken."""
    across = np.broadcast_to(np.arange(side, dtype=np.uint8) * (240 // side) + 8, (side, side))
    return Image.fromarray(np.stack([across, across.T, np.full_like(across, 60)], axis=2))


def within(rate: float, expected: float, draws: int = DRAWS) -> bool:
    """Five standard errors."""
    return abs(rate - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1e-3) / draws)


def is_grey(view: Tensor) -> bool:
    return bool((view[0] == view[1]).all() and (view[1] == view[2]).all())


VIEWS = ViewsConfig(min_crop_scale=0.08)
CROP = ViewsConfig(min_crop_scale=0.67)
SHAPE = mask_shape(16, 4, MaskConfig(mask_patch_size_px=4))


def draw_pairs(picture: Image.Image, count: int, config: ViewsConfig, side: int = 16) -> tuple[list[Tensor], ...]:
    torch.manual_seed(0)
    make = TwoViews(side, config)
    pairs = [make(picture) for _ in range(count)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def test_views_are_bytes_of_the_asked_size() -> None:
    for view in TwoViews(24, VIEWS)(draw("rings", 0, 50)):
        assert (view.dtype, view.shape) == (torch.uint8, (3, 24, 24))
    pixels, mask = OneCrop(16, CROP, SHAPE)(draw("rings", 0, 50))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 16, 16))
    assert (mask.dtype, mask.shape) == (torch.bool, (4, 4))
    assert int(mask.sum()) == SHAPE.masked_patches


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 7)])
def test_a_picture_of_any_shape_gives_views(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (10, 200, 90))
    assert all(view.shape == (3, 16, 16) for view in TwoViews(16, VIEWS)(picture))
    assert OneCrop(16, CROP, SHAPE)(picture)[0].shape == (3, 16, 16)


def test_the_same_torch_seed_gives_the_same_views() -> None:
    picture = draw("plaid", 0, 48)
    for make in (TwoViews(16, VIEWS), OneCrop(16, CROP, SHAPE)):
        torch.manual_seed(11)
        first, other = make(picture), make(picture)
        torch.manual_seed(11)
        again = make(picture)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])


def test_views_draw_from_torchs_generator_alone() -> None:
    picture, make = draw("plaid", 0, 48), TwoViews(16, VIEWS)
    torch.manual_seed(3)
    first = make(picture)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 - the very thing that must not matter
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, make(picture), strict=True))


def test_a_fifth_of_the_views_is_grey() -> None:
    for views in draw_pairs(draw("checks", 1, 48), DRAWS, VIEWS):
        assert within(sum(map(is_grey, views)) / DRAWS, 0.2)


def test_grey_is_drawn_for_each_view_alone() -> None:
    first, second = draw_pairs(draw("checks", 1, 48), DRAWS, VIEWS)
    both = sum(is_grey(a) and is_grey(b) for a, b in zip(first, second, strict=True)) / DRAWS
    assert within(both, 0.04)


def test_half_of_the_views_is_mirrored() -> None:
    """A picture that is dark left and bright right, whatever crop and colour."""
    columns = np.repeat(np.linspace(20, 120, 48).astype(np.uint8)[None], 48, axis=0)
    picture = Image.fromarray(np.stack([columns] * 3, axis=2))

    def share_mirrored(views: list[Tensor]) -> float:
        return sum(float(view[..., :8].float().mean()) > float(view[..., 8:].float().mean()) for view in views) / DRAWS

    first, _ = draw_pairs(picture, DRAWS, ViewsConfig(min_crop_scale=0.5))
    assert within(share_mirrored(first), 0.5)
    torch.manual_seed(0)
    make = OneCrop(16, CROP, SHAPE)
    assert within(share_mirrored([make(picture)[0] for _ in range(DRAWS)]), 0.5)


def test_solarisation_comes_in_view_2_alone_and_in_a_fifth_of_it() -> None:
    """A white picture stays the brightest there is under jitter to 40 %, unless it is inverted: 255 → 0."""
    first, second = draw_pairs(Image.new("RGB", (32, 32), (255, 255, 255)), DRAWS, VIEWS)
    assert all(float(view.float().mean()) > 128 for view in first)
    assert within(sum(float(view.float().mean()) < 128 for view in second) / DRAWS, 0.2)


def test_solarisation_inverts_what_is_bright() -> None:
    _, second = draw_pairs(Image.new("RGB", (32, 32), (100, 100, 100)), DRAWS, VIEWS)
    darkest = min(float(view.float().mean()) for view in second)
    assert darkest > 50  # brightness 0.6 of 100 is 60; below 128 nothing is inverted


@pytest.mark.parametrize("smallest", [0.08, 0.2, 0.67])
def test_crops_cover_the_asked_share_of_the_area(smallest: float) -> None:
    """The ramp says where a crop was taken: its extent in red and green, without the colour jitter's doing."""
    torch.manual_seed(0)
    make = OneCrop(16, ViewsConfig(min_crop_scale=smallest), SHAPE)
    shares, ratios = [], []
    for _ in range(300):
        view = make(ramp())[0].float()
        # from the first pixel's centre to the last one's: 15 of the crop's 16 parts
        across = float((view[0, :, -1] - view[0, :, 0]).abs().mean()) / 3 * 16 / 15
        down = float((view[1, -1, :] - view[1, 0, :]).abs().mean()) / 3 * 16 / 15
        shares.append(across * down / 64**2)
        ratios.append(across / down)
    assert min(shares) > smallest * 0.85
    assert max(shares) < 1.05
    assert min(shares) < smallest + 0.15 * (1 - smallest)
    assert max(shares) > 0.8
    assert 0.66 < min(ratios) < 0.85
    assert 1.18 < max(ratios) < 1.52


def test_the_stage_1_crop_takes_its_scale_from_the_config() -> None:
    """Detail survives only where crops are small: the share of the picture's stripes that a view shows."""

    def changes(smallest: float) -> float:
        columns = np.repeat((np.arange(64) // 4 % 2 * 100).astype(np.uint8)[None], 64, axis=0)
        views, _ = draw_pairs(
            Image.fromarray(np.stack([columns] * 3, axis=2)),
            100,
            ViewsConfig(min_crop_scale=smallest, blur_radius_px=(0, 0)),
            64,
        )
        counts = []
        for view in views:
            row = view[0, 32].float()
            counts.append(int(((row[1:] > row.mean()) != (row[:-1] > row.mean())).sum()))
        return float(np.mean(counts))

    assert changes(0.95) > 13 > 11 > changes(0.05)


def edge_width(view: Tensor) -> float:
    """Pixels that are neither side of a black and white edge, on the middle row."""
    row = view[0, 32].float()
    low, high = float(row.min()), float(row.max())
    return float(((row > low + 0.1 * (high - low)) & (row < high - 0.1 * (high - low))).sum())


def test_view_1_is_always_blurred_and_view_2_a_tenth_of_the_time() -> None:
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 120
    config = ViewsConfig(min_crop_scale=0.95, blur_radius_px=(7.0, 7.0))  # 2 px at 64 px
    first, second = draw_pairs(Image.fromarray(half), DRAWS, config, 64)
    assert all(edge_width(view) >= 3 for view in first)
    assert within(sum(edge_width(view) >= 3 for view in second) / DRAWS, 0.1)


def test_blur_is_drawn_from_its_range_and_scales_with_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[float] = []
    blur = colour._blur

    def spy(pixels: Tensor, sigma_px: float) -> Tensor:
        radii.append(sigma_px)
        return blur(pixels, sigma_px)

    monkeypatch.setattr(colour, "_blur", spy)
    draw_pairs(draw("sky", 0, 40), 300, ViewsConfig(min_crop_scale=0.08, blur_radius_px=(0.1, 2.0)), 112)
    assert 0.05 <= min(radii) < 0.1
    assert 0.95 < max(radii) <= 1.0
    assert np.mean(radii) == pytest.approx(0.525, abs=0.05)
    assert within(len(radii) / 300 - 1, 0.1, 300)


def test_colours_are_jittered_in_four_fifths_of_the_views() -> None:
    """A flat colour stays as it is through crop, blur and flip; grey and jitter change it."""
    colour = (90, 60, 110)
    first, _ = draw_pairs(Image.new("RGB", (32, 32), colour), DRAWS, VIEWS)
    expected = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)
    untouched = sum(torch.equal(view, expected) for view in first) / DRAWS
    assert within(untouched, 0.2 * 0.8)


def test_stage_2_changes_no_colour() -> None:
    colour = (90, 60, 110)
    torch.manual_seed(0)
    make = OneCrop(16, CROP, SHAPE)
    for _ in range(50):
        view = make(Image.new("RGB", (32, 32), colour))[0]
        assert view.amax(dim=(1, 2)).tolist() == view.amin(dim=(1, 2)).tolist() == list(colour)


def test_input_is_normalised_by_channel() -> None:
    mean, std = BACKBONE.mean, BACKBONE.std
    assert (mean, std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    pixels[1] = 255
    pixels[0, :, 0, 1] = torch.tensor([0, 51, 102], dtype=torch.uint8)
    values = ToInput(BACKBONE)(pixels)
    assert (values.dtype, values.shape) == (torch.float32, pixels.shape)
    for channel in range(3):
        for image, column in ((0, 0), (0, 1), (1, 0)):
            expected = (int(pixels[image, channel, 0, column]) / 255 - mean[channel]) / std[channel]
            assert values[image, channel, 0, column].item() == pytest.approx(expected, rel=1e-5)


def test_a_crop_without_a_mask_is_one_tensor() -> None:
    (crop,) = OneCrop(16, CROP)(draw("rings", 0, 50))
    assert (crop.dtype, crop.shape) == (torch.uint8, (3, 16, 16))


def test_two_masked_views_have_masks_of_their_own() -> None:
    make = MaskedTwoViews(16, VIEWS, SHAPE, "random")
    torch.manual_seed(0)
    view1, mask1, view2, mask2 = make(draw("rings", 0, 50))
    assert view1.shape == view2.shape == (3, 16, 16)
    assert mask1.sum() == mask2.sum() == SHAPE.masked_patches
    assert not torch.equal(mask1, mask2)
    assert not torch.equal(view1, view2)
