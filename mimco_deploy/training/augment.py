"""Views of a picture: two augmented ones, or one crop; each with a mask where the method has masks.

All are callables on an upright RGB picture that draw from torch's global generator and give uint8 tensors;
`to_input` turns those into what a backbone takes.
"""

from __future__ import annotations

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from mimco_deploy.training.config import BackboneConfig, ViewsConfig
from mimco_deploy.training.masking import MaskShape, draw_mask


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


class TwoViews:
    """MoCo v3's two augmentations of one picture: they differ in the rate of blur and in solarisation.

    Args:
        image_size_px: side of the views.
        config: crop scale and blur.

    Source: MoCo v3 (arXiv 2104.02057), appendix; values as in BYOL (arXiv 2006.07733), appendix B.
    """

    def __init__(self, image_size_px: int, config: ViewsConfig) -> None:
        first, last = config.blur_radius_px
        scale = image_size_px / 224
        blur = _PillowBlur((first * scale, last * scale))
        self._view1 = _mocov3_view(image_size_px, config.min_crop_scale, v2.RandomApply([blur], p=1.0))
        self._view2 = _mocov3_view(
            image_size_px, config.min_crop_scale, v2.RandomApply([blur], p=0.1), v2.RandomSolarize(128, p=0.2)
        )

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """Two uint8 [3, H, W]."""
        return self._view1(picture), self._view2(picture)


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
        self._crop = v2.Compose(
            [
                _ResizedCrop(image_size_px, config.min_crop_scale),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )
        self._shape, self._kind = shape, kind

    def __call__(self, picture: Image.Image) -> tuple[Tensor, ...]:
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
    """

    def __init__(self, image_size_px: int, config: ViewsConfig, shape: MaskShape, kind: str) -> None:
        self._views = TwoViews(image_size_px, config)
        self._shape, self._kind = shape, kind

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Twice uint8 [3, H, W] and bool [h, w]."""
        view1, view2 = self._views(picture)
        return view1, draw_mask(self._shape, self._kind), view2, draw_mask(self._shape, self._kind)


def _mocov3_view(image_size_px: int, min_crop_scale: float, *blur_and_solarise: torch.nn.Module) -> v2.Compose:
    return v2.Compose(
        [
            _ResizedCrop(image_size_px, min_crop_scale),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            *blur_and_solarise,
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )


class _ResizedCrop(torch.nn.Module):
    """torchvision's random crop and bilinear resize in one call of Pillow's.

    Pillow first reduces by whole factors what is to shrink several times: the same crops in about half the time there.
    """

    def __init__(self, side_px: int, min_scale: float) -> None:
        super().__init__()
        self._size = (side_px, side_px)
        self._crop = v2.RandomResizedCrop(side_px, scale=(min_scale, 1.0))

    def forward(self, picture: Image.Image) -> Image.Image:
        at = self._crop.make_params([picture])
        box = (at["left"], at["top"], at["left"] + at["width"], at["top"] + at["height"])
        return picture.resize(self._size, Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)


class _PillowBlur(torch.nn.Module):
    """Gaussian blur of a random radius. torchvision's own has a fixed kernel and leaves Pillow, which costs time."""

    def __init__(self, radius_px: tuple[float, float]) -> None:
        super().__init__()
        self._low, self._high = radius_px

    def forward(self, picture: Image.Image) -> Image.Image:
        radius = self._low + (self._high - self._low) * torch.rand(()).item()
        return picture.filter(ImageFilter.GaussianBlur(radius))
