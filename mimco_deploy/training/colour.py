"""MoCo v3's changes of colour: drawn once for each view, then made for that view, or on the device for a whole batch.

A recipe is a float32 vector of `RECIPE` numbers: the four steps of the jitter in the order in which they come, or −1
where there is none (4), their amounts (4), grey or not, the blur's standard deviation in px, solarised or not. It is
drawn where the picture is cropped, so which colours a view gets does not depend on who makes them. Shades are floats in
0…255 throughout and rounded at most once, at the end.

Source: MoCo v3 (arXiv 2104.02057), appendix; values as in BYOL (arXiv 2006.07733), appendix B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RECIPE = 11
"""Numbers in a recipe."""
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_STRENGTHS = (0.4, 0.4, 0.2, 0.1)
"""Largest change of brightness, contrast and saturation as factors of 1, and of the hue as a share of its circle."""
_JITTERED, _GREY = 0.8, 0.2
_SOLARISE_FROM = 128
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
_REACH = 3
"""Standard deviations at which the blur's Gaussian ends."""


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


def change_view(pixels: Tensor, recipe: Tensor) -> Tensor:
    """One view, only what its recipe asks for.

    Args:
        pixels: [3, H, W] uint8.
        recipe: [RECIPE].

    Returns:
        [3, H, W] uint8.
    """
    *numbers, grey, sigma_px, solarised = recipe.tolist()
    x = pixels.contiguous().float()
    for step in map(int, numbers[:4]):
        if step >= 0:
            x = _jitter(x, step, numbers[4 + step])
    if grey:
        x = _luma(x).expand(3, -1, -1)
    if sigma_px > 0.0:
        x = _blur(x, sigma_px)
    if solarised:
        x = _solarise(x)
    return x.round().to(torch.uint8)


def change_batch(pixels: Tensor, recipes: Tensor) -> Tensor:
    """A batch, each view by its own recipe, without asking the device for anything.

    Every step is computed for every view and chosen by the recipe; compiled, that is a few passes over memory. The blur
    is a product with a band matrix, for which the device has units.

    Args:
        pixels: [B, 3, side, side] uint8.
        recipes: [B, RECIPE].

    Returns:
        [B, 3, side, side] float32 in 0…255.
    """
    x = pixels.float()
    column = recipes.view(len(recipes), RECIPE, 1, 1, 1).unbind(1)  # each [B, 1, 1, 1]
    for slot in column[:4]:
        changed = x
        for step in (_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE):
            changed = torch.where(slot == step, _jitter(x, step, column[4 + step]), changed)
        x = changed
    x = torch.where(column[8] > 0, _luma(x), x)
    x = _blur_batch(x, recipes[:, 9])
    return torch.where(column[10] > 0, _solarise(x), x)


def _jitter(x: Tensor, step: int, amount: Tensor | float) -> Tensor:
    """One step on [..., 3, H, W], by an amount that fits it."""
    if step == _HUE:
        return _turn_hue(x, amount)
    if step == _BRIGHTNESS:
        return (x * amount).clamp(0.0, 255.0)
    luma = _luma(x)
    base = luma.mean(dim=(-2, -1), keepdim=True) if step == _CONTRAST else luma
    return (base + (x - base) * amount).clamp(0.0, 255.0)


def _luma(x: Tensor) -> Tensor:
    """[..., 3, H, W] → [..., 1, H, W]."""
    red, green, blue = x.chunk(3, dim=-3)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _turn_hue(x: Tensor, share: Tensor | float) -> Tensor:
    """Turn the hue by a share of its circle; value and saturation of HSV stay."""
    red, green, blue = x.chunk(3, dim=-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = value == red, value == green
    apart = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    sixths = apart / chroma.clamp(min=1e-6) + torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)) + 6.0 * share
    at = torch.cat([sixths + 5.0, sixths + 3.0, sixths + 1.0], dim=-3)  # red, green, blue
    at = at - 6.0 * torch.floor(at / 6.0)
    return value - chroma * torch.minimum(at, 4.0 - at).clamp(0.0, 1.0)


def _solarise(x: Tensor) -> Tensor:
    """Invert what is bright."""
    return torch.where(x.round() >= _SOLARISE_FROM, 255.0 - x, x)


def _blur(x: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur with the border's pixels repeated outwards; [3, H, W]. Sums of shifted pictures: few taps."""
    reach = math.ceil(_REACH * sigma_px)
    taps = [math.exp(-0.5 * (step / sigma_px) ** 2) for step in range(reach + 1)]
    total = taps[0] + 2.0 * sum(taps[1:])
    height, width = x.shape[-2:]
    padded = F.pad(x[None], (reach, reach, reach, reach), mode="replicate")[0]
    for dim, length in ((-1, width), (-2, height)):
        result = padded.narrow(dim, reach, length) * (taps[0] / total)
        for step in range(1, reach + 1):
            both = padded.narrow(dim, reach - step, length) + padded.narrow(dim, reach + step, length)
            result.add_(both, alpha=taps[step] / total)
        padded = result
    return padded


def _blur_batch(x: Tensor, sigma_px: Tensor) -> Tensor:
    """The same for [B, 3, side, side] and [B], none where it is 0; deviations up to a 24th of the side."""
    side = x.shape[-1]
    beyond = math.ceil(side / 8)  # four times what the papers' blurs reach
    to = torch.arange(side, device=x.device).view(side, 1)
    distance = (to - torch.arange(-beyond, side + beyond, device=x.device)).float()
    sigma = sigma_px.clamp(min=1e-3).view(-1, 1, 1)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= torch.ceil(_REACH * sigma))
    weights = weights / weights.sum(dim=2, keepdim=True)  # [B, side, beyond + side + beyond]
    inside = weights[:, :, beyond : beyond + side].clone()
    inside[:, :, 0] += weights[:, :, :beyond].sum(dim=2)
    inside[:, :, -1] += weights[:, :, beyond + side :].sum(dim=2)
    kind = torch.float16 if x.is_cuda else torch.float32  # half precision loses a 2,000th of a shade of 255
    band = inside.to(kind)[:, None]  # [B, 1, side, side]
    return (band @ x.to(kind) @ band.transpose(2, 3)).float()
