"""The eval-time geometry against torchvision's and timm's own results, and against its own promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import create_transform

from mimco_deploy.errors import ConfigError, ImageError
from mimco_deploy.images import read_image
from mimco_deploy.preprocess import MAX_ASPECT, Interpolation, preprocess, seen_box


def _noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _torchvision_rule(picture: Image.Image, size: int, short: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Resize(short, bicubic) and CenterCrop(size) as torchvision documents them."""
    width, height = picture.size
    if width <= height:
        resized = picture.resize((short, int(short * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = picture.resize((int(short * width / height), short), Image.Resampling.BICUBIC)
    top = round((resized.height - size) / 2.0)
    left = round((resized.width - size) / 2.0)
    return np.asarray(resized)[top : top + size, left : left + size]


@pytest.mark.golden("imagenet_eval/img_seed*.npz")
@pytest.mark.parametrize(("array", "crop_share"), [("timm_pct0875_u8", 0.875), ("timm_pct090_u8", 0.9)])
def test_pixels_are_those_of_torchvision_and_timm(golden_file: Path, array: str, crop_share: float) -> None:
    with np.load(golden_file) as arrays:
        expected = arrays[array]  # [3, 224, 224]

    pixels = preprocess(read_image(golden_file.with_suffix(".png")), 224, crop_share)

    assert np.array_equal(pixels.transpose(2, 0, 1), expected)


@settings(deadline=None, derandomize=True)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.integers(1, 64),
    crop_share=st.floats(0.5, 1.0),
)
def test_any_size_gives_a_square_by_torchvisions_rule(width: int, height: int, size: int, crop_share: float) -> None:
    picture = _noise(width, height)

    pixels = preprocess(picture, size, crop_share)

    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    if max(width, height) <= MAX_ASPECT * min(width, height):
        assert np.array_equal(pixels, _torchvision_rule(picture, size, math.floor(size / crop_share)))


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (64, 64), (7, 200), (4000, 1)])
@pytest.mark.parametrize(("crop_share", "interpolation"), [(1.0, "bicubic"), (0.875, "bilinear"), (0.95, "bicubic")])
def test_a_squashed_picture_is_that_of_timm(
    width: int, height: int, crop_share: float, interpolation: Interpolation
) -> None:
    picture = _noise(width, height)
    make: Any = create_transform
    transform = make((3, 48, 48), crop_pct=crop_share, crop_mode="squash", interpolation=interpolation, normalize=False)
    expected = np.asarray(transform(picture)).transpose(1, 2, 0)  # uint8
    np.testing.assert_array_equal(preprocess(picture, 48, crop_share, interpolation, "squash"), expected)


def test_what_is_seen_of_a_squashed_picture_is_its_middle() -> None:
    assert seen_box(200, 50, 0.8, "squash") == pytest.approx((0.1, 0.1, 0.8, 0.8))
    assert seen_box(200, 50, 0.8, "squash", (0.5, 0.0, 0.5, 0.5)) == pytest.approx((0.55, 0.05, 0.4, 0.4))
    assert seen_box(200, 50, 0.8) == pytest.approx((0.4, 0.1, 0.2, 0.8))


@pytest.mark.parametrize(("width", "height"), [(4000, 1), (1, 4000), (65_535, 1), (3, 20_001), (20_000, 2)])
def test_extreme_aspect_ratios_give_the_middle_without_a_huge_picture(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        sides.append(max(size))
        return resize(self, size, resample)

    monkeypatch.setattr(Image.Image, "resize", watched)
    ramp = np.linspace(0, 255, max(width, height)).astype(np.uint8)
    ramp = ramp[None, :] if width > height else ramp[:, None]
    picture = Image.fromarray(np.broadcast_to(ramp, (height, width))).convert("RGB")

    pixels = preprocess(picture, 32, 0.875)

    assert max(sides) <= (MAX_ASPECT + 1) * 36
    assert pixels.shape == (32, 32, 3)
    assert abs(pixels.astype(float).mean() - 127.5) < 2


def test_a_long_picture_keeps_what_the_plain_rule_would_keep() -> None:
    picture = _noise(40 * (MAX_ASPECT + 2), 40)

    difference = preprocess(picture, 32, 0.875) - _torchvision_rule(picture, 32, 36).astype(float)

    assert np.abs(difference).max() == 0


def test_crop_share_of_one_keeps_the_whole_short_side() -> None:
    picture = _noise(64, 64)

    assert np.array_equal(preprocess(picture, 64, 1.0), np.asarray(picture))


def test_result_is_writable_and_apart_from_the_picture() -> None:
    picture = _noise(32, 32)
    before = picture.tobytes()

    preprocess(picture, 32, 1.0)[:] = 0

    assert picture.tobytes() == before


@pytest.mark.parametrize(("size", "crop_share"), [(0, 0.875), (224, 0.0), (224, 1.01), (224, -1.0), (224, math.nan)])
def test_a_geometry_that_cannot_be_is_refused(size: int, crop_share: float) -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        preprocess(_noise(8, 8), size, crop_share)


def test_a_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ImageError, match="mode L"):
        preprocess(Image.new("L", (8, 8)), 8, 1.0)
