"""Views of a picture: two augmented ones, or one crop; each with a mask where the method has masks.

All are callables on an upright RGB picture, [H, W, 3] uint8 or one of Pillow's, that draw from torch's global generator
and give uint8 tensors, beside each a recipe for its colours where the device is to make them; `ToInputs` turns those
into what a method takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from mimco_deploy.training.colour import Colours, change_batch, change_view
from mimco_deploy.training.config import BackboneConfig, ViewsConfig
from mimco_deploy.training.masking import MaskShape, draw_mask

Pixels = npt.NDArray[np.uint8] | Image.Image


class ToInput(torch.nn.Module):
    """uint8 [B, 3, H, W] in 0…255 → float32 [B, 3, H, W], normalised by channel as a backbone wants it.

    Args:
        backbone: gives mean and standard deviation.
    """

    def __init__(self, backbone: BackboneConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise."""
        return (pixels.float() / 255.0 - self.mean) / self.std


class ToInputs(torch.nn.Module):
    """The tensors of a batch of views → what a method takes: pixels coloured and normalised, masks as they are.

    Args:
        backbone: gives mean and standard deviation.
    """

    def __init__(self, backbone: BackboneConfig) -> None:
        super().__init__()
        self._normalise = ToInput(backbone)

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Pixels are uint8, the recipe of their colours follows them as float32, masks are bool."""
        inputs: list[Tensor] = []
        for view, after in zip(views, [*views[1:], None], strict=True):
            if view.dtype == torch.uint8:
                coloured = change_batch(view, after) if after is not None and after.is_floating_point() else view
                inputs.append(self._normalise(coloured))
            elif view.dtype == torch.bool:
                inputs.append(view)
        return inputs


class TwoViews:
    """MoCo v3's two augmentations of one picture: they differ in the rate of blur and in solarisation.

    Args:
        image_size_px: side of the views.
        config: crop scale and blur.
        recipes: give the colours of each view as a recipe instead of changing them, for a device that does it faster.

    Source: MoCo v3 (arXiv 2104.02057), appendix.
    """

    def __init__(self, image_size_px: int, config: ViewsConfig, *, recipes: bool = False) -> None:
        first, last = (radius * image_size_px / 224 for radius in config.blur_radius_px)
        self._crop = _ResizedCrop(image_size_px, config.min_crop_scale)
        self._colours = (
            Colours((first, last), blurred=1.0, solarised=0.0),
            Colours((first, last), blurred=0.1, solarised=0.2),
        )
        self._recipes = recipes

    def __call__(self, picture: Pixels) -> tuple[Tensor, ...]:
        """Two uint8 [3, H, W], each followed by its float32 [RECIPE] where recipes are asked for."""
        views: list[Tensor] = []
        for colours in self._colours:
            crop, recipe = self._crop(picture), colours.draw()
            views += [crop, recipe] if self._recipes else [change_view(crop, recipe)]
        return tuple(views)


class OneCrop:
    """One crop, the same for student and teacher, and the mask under which the student sees it.

    Args:
        image_size_px: side of the crop.
        config: crop scale.
        shape: of the mask, or None for no mask.
        kind: how the mask is drawn; see `draw_mask`.

    Source: SimMIM (arXiv 2111.09886), section 4.1.
    """

    def __init__(
        self, image_size_px: int, config: ViewsConfig, shape: MaskShape | None = None, kind: str = "random"
    ) -> None:
        self._crop = _ResizedCrop(image_size_px, config.min_crop_scale)
        self._shape, self._kind = shape, kind

    def __call__(self, picture: Pixels) -> tuple[Tensor, ...]:
        """uint8 [3, H, W], and bool [h, w] where there are masks."""
        crop = self._crop(picture)
        return (crop,) if self._shape is None else (crop, draw_mask(self._shape, self._kind))


class MaskedTwoViews:
    """MoCo v3's two views, each with a mask: for training both pretexts at once.

    Args:
        image_size_px: side of the views.
        config: crop scale and blur.
        shape: of the masks.
        kind: how they are drawn.
        recipes: see `TwoViews`.
    """

    def __init__(
        self, image_size_px: int, config: ViewsConfig, shape: MaskShape, kind: str, *, recipes: bool = False
    ) -> None:
        self._views = TwoViews(image_size_px, config, recipes=recipes)
        self._shape, self._kind = shape, kind

    def __call__(self, picture: Pixels) -> tuple[Tensor, ...]:
        """Twice uint8 [3, H, W], its recipe where those are asked for, and bool [h, w]."""
        views = self._views(picture)
        half = len(views) // 2
        masks = [draw_mask(self._shape, self._kind) for _ in range(2)]
        return *views[:half], masks[0], *views[half:], masks[1]


class _ResizedCrop:
    """torchvision's random crop and bilinear resize, and a mirror half of the time.

    On a layout of torch's own for which its resize of bytes takes a sixth of Pillow's time.
    """

    def __init__(self, side_px: int, min_scale: float) -> None:
        self._size = (side_px, side_px)
        self._crop = v2.RandomResizedCrop(side_px, scale=(min_scale, 1.0))

    def __call__(self, picture: Pixels) -> Tensor:
        """uint8 [3, side, side]."""
        pixels = torch.from_numpy(np.require(picture, np.uint8, "W")).permute(2, 0, 1)
        at = self._crop.make_params([pixels])
        part = pixels[None, :, at["top"] : at["top"] + at["height"], at["left"] : at["left"] + at["width"]]
        part = part.contiguous(memory_format=torch.channels_last)
        crop = F.interpolate(part, self._size, mode="bilinear", antialias=True)[0]
        return crop.flip(-1) if torch.rand(()) < 0.5 else crop
