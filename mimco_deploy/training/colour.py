"""MoCo v3's changes of colour: drawn once for each view, then made by Pillow or, for a whole batch, on the device.

A recipe is a float32 vector of `RECIPE` numbers: the four steps of the jitter in the order in which they come, or −1
where there is none (4), their amounts (4), grey or not, the blur's standard deviation in px, solarised or not. It is
drawn where the picture is cropped, so which colours a view gets does not depend on who makes them.

Source: MoCo v3 (arXiv 2104.02057), appendix; values as in BYOL (arXiv 2006.07733), appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

RECIPE = 11
"""Numbers in a recipe."""
_JITTERED = 0.8
_STRENGTHS = (0.4, 0.4, 0.2, 0.1)
"""Largest change of brightness, contrast and saturation as factors of 1, and of the hue as a share of its circle."""
_GREY = 0.2
_SOLARISE_FROM = 128
_STEPS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    tv.adjust_brightness,
    tv.adjust_contrast,
    tv.adjust_saturation,
    tv.adjust_hue,
)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's


@dataclass(frozen=True)
class Colours:
    """How often a view is blurred and solarised, and how strongly blurred."""

    blur_px: tuple[float, float]
    """Range of the Gaussian's standard deviation."""
    blurred: float
    """Share of views."""
    solarised: float
    """Share of views."""

    def draw(self) -> Tensor:
        """A recipe, from torch's global generator."""
        u = torch.rand(9).tolist()
        jitter = torch.randperm(4).tolist() if u[0] < _JITTERED else [-1.0] * 4
        changes = [strength * (2.0 * x - 1.0) for strength, x in zip(_STRENGTHS, u[1:5], strict=True)]
        low, high = self.blur_px
        sigma_px = low + (high - low) * u[7] if u[6] < self.blurred else 0.0
        amounts = [1.0 + changes[0], 1.0 + changes[1], 1.0 + changes[2], changes[3]]
        return torch.tensor([*jitter, *amounts, u[5] < _GREY, sigma_px, u[8] < self.solarised], dtype=torch.float32)


def change_picture(picture: Image.Image, recipe: Tensor) -> Image.Image:
    """One picture by Pillow.

    Args:
        picture: RGB.
        recipe: [RECIPE].
    """
    *numbers, grey, sigma_px, solarised = recipe.tolist()
    for step in map(int, numbers[:4]):
        if step >= 0:
            picture = _STEPS[step](picture, numbers[4 + step])
    if grey:
        picture = tv.rgb_to_grayscale(picture, num_output_channels=3)
    if sigma_px > 0.0:
        picture = picture.filter(ImageFilter.GaussianBlur(sigma_px))
    return tv.solarize(picture, _SOLARISE_FROM) if solarised else picture


def change_batch(pixels: Tensor, recipes: Tensor) -> Tensor:
    """A batch, each view by its own recipe, without asking the device for anything.

    Every step is computed for every view and chosen by the recipe; compiled, that is a few passes over memory. The blur
    is a product with a band matrix, for which the device has units.

    Args:
        pixels: [B, 3, side, side] uint8.
        recipes: [B, RECIPE].

    Returns:
        [B, 3, side, side] float32 in 0…255; unlike Pillow's not rounded between steps.
    """
    x = pixels.float()
    column = recipes.view(len(recipes), RECIPE, 1, 1, 1).unbind(1)  # each [B, 1, 1, 1]
    brightness, contrast, saturation, hue, grey, _, solarised = column[4:]
    for step in column[:4]:
        luma = _luma(x)
        base = torch.where(step == 1, luma.mean(dim=(2, 3), keepdim=True).round(), torch.where(step == 2, luma, 0.0))
        amount = torch.where(step == 0, brightness, torch.where(step == 1, contrast, saturation))
        blended = (base + amount * (x - base)).clamp(0.0, 255.0)
        x = torch.where(step < 0, x, torch.where(step == 3, _turn_hue(x, hue), blended))
    x = torch.where(grey > 0, _luma(x), x)
    x = _blur(x, recipes[:, 9])
    return torch.where((solarised > 0) & (x.round() >= _SOLARISE_FROM), 255.0 - x, x)


def _luma(x: Tensor) -> Tensor:
    """[B, 3, H, W] → [B, 1, H, W]."""
    red, green, blue = x.chunk(3, dim=1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _turn_hue(x: Tensor, share: Tensor) -> Tensor:
    """Turn the hue by a share of its circle; value and saturation of HSV stay."""
    red, green, blue = x.chunk(3, dim=1)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    sixths = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red, red - green)
    ) / chroma.clamp(min=1e-6) + torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0))
    turned = sixths + 6.0 * share
    shades = []
    for offset in (5.0, 3.0, 1.0):  # red, green, blue
        k = (offset + turned) % 6.0
        shades.append(value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.cat(shades, dim=1)


def _blur(x: Tensor, sigma_px: Tensor) -> Tensor:
    """Gaussian blur with the border's pixels repeated outwards; [B, 3, side, side] and [B]."""
    side = x.shape[-1]
    beyond = math.ceil(side / 8)  # px beyond the border that count; four times what the papers' blurs reach
    to = torch.arange(side, device=x.device).view(side, 1)
    distance = (to - torch.arange(-beyond, side + beyond, device=x.device)).float()
    weights = torch.exp(-0.5 * (distance / sigma_px.clamp(min=1e-3).view(-1, 1, 1)) ** 2)
    weights = weights / weights.sum(dim=2, keepdim=True)  # [B, side, beyond + side + beyond]
    inside = weights[:, :, beyond : beyond + side].clone()
    inside[:, :, 0] += weights[:, :, :beyond].sum(dim=2)
    inside[:, :, -1] += weights[:, :, beyond + side :].sum(dim=2)
    kind = torch.float16 if x.is_cuda else torch.float32  # a 2,000th of a shade of 255 is lost in half precision
    band = inside.to(kind)[:, None]  # [B, 1, side, side]
    return (band @ x.to(kind) @ band.transpose(2, 3)).float()
