"""The one eval-time geometry: RGB picture → uint8 [H, W, 3].

Resize of the short side, or of both where an encoder was trained so, then a centre crop, equal bit for bit to
torchvision's `Resize` and `CenterCrop` on Pillow pictures (and so to timm's evaluation transform). Normalisation is not
here: it is part of the exported graph.

Standard library, NumPy and Pillow only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mimco_deploy.errors import ConfigError, ImageError, QueryError
from mimco_deploy.images import decode_image, read_image

Interpolation = Literal["bicubic", "bilinear"]
CropMode = Literal["center", "squash"]
"""timm's words: whether the picture keeps its proportions, or becomes a square before the crop."""
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Crop = tuple[float, float, float, float]
"""Left, top, width and height in pixels of the upright picture; or, where none is above 1, as shares of its sides."""
MAX_ASPECT = 32
"""Longer pictures lose their ends before the resize. The centre crop would cut them off anyway; but a picture of
4000 × 1 px would first become 1,024,000 px wide. Up to this ratio the result is that of torchvision."""


def preprocess(
    picture: Image.Image,
    image_size_px: int,
    crop_share: float,
    interpolation: Interpolation = "bicubic",
    crop_mode: CropMode = "center",
) -> npt.NDArray[np.uint8]:
    """Bring a picture to the square that an encoder takes.

    Args:
        picture: mode RGB, any size, as `images.decode_image` gives it.
        image_size_px: side of the square, ≥ 1.
        crop_share: side of the square over the short side of the resized picture, in (0, 1]; 0.875 gives 256 → 224.
        interpolation: filter of the resize, antialiased as Pillow's are.
        crop_mode: `center` resizes the short side, `squash` both sides to its length.

    Returns:
        Pixels uint8 [image_size_px, image_size_px, 3].

    Raises:
        ImageError: the picture is not RGB.
        ConfigError: the size or the share is out of range.
    """
    if picture.mode != "RGB":
        raise ImageError("unsupported", f"the picture has mode {picture.mode}, not RGB: decode it with decode_image")
    if image_size_px < 1 or not 0 < crop_share <= 1:
        raise ConfigError(
            f"image size {image_size_px} px with crop share {crop_share}", expected="a size ≥ 1 and a share in (0, 1]"
        )
    short_px, resampling = _short_side(image_size_px, crop_share), _FILTERS[interpolation]
    if crop_mode == "squash":
        resized = picture.resize((short_px, short_px), resampling)
    else:
        resized = _resize(_without_far_ends(picture), short_px, resampling)
    # Python's round, half to even, is what torchvision uses.
    left = round((resized.width - image_size_px) / 2)
    top = round((resized.height - image_size_px) / 2)
    return np.array(resized.crop((left, top, left + image_size_px, top + image_size_px)))  # [H, W, 3]


def decode_pixels(
    content: bytes,
    name: str,
    image_size_px: int,
    crop_share: float,
    interpolation: Interpolation,
    crop_mode: CropMode = "center",
    crop: Crop | None = None,
) -> npt.NDArray[np.uint8]:
    """An encoded picture, or a part of it, as the pixels that an encoder takes: `decode_image`, then `preprocess`.

    Every picture that is indexed or searched with comes through here or `read_pixels`, so that large JPEGs are reduced
    by the decoder alike on both sides. Parts are cut from the whole picture.

    Raises:
        ImageError: it is no picture.
        ConfigError: the crop lies outside of it.
    """
    picture = decode_image(content, name, None if crop else _short_side(image_size_px, crop_share))
    return preprocess(cut(picture, crop), image_size_px, crop_share, interpolation, crop_mode)


def read_pixels(
    path: Path,
    image_size_px: int,
    crop_share: float,
    interpolation: Interpolation,
    crop_mode: CropMode = "center",
    crop: Crop | None = None,
) -> npt.NDArray[np.uint8]:
    """A picture on the disk, or a part of it, as `decode_pixels` gives it."""
    picture = read_image(path, None if crop else _short_side(image_size_px, crop_share))
    return preprocess(cut(picture, crop), image_size_px, crop_share, interpolation, crop_mode)


def cut(picture: Image.Image, crop: Crop | None) -> Image.Image:
    """The part of an upright picture inside a crop; the whole where None.

    Raises:
        QueryError: the crop holds no pixel of it.
    """
    if crop is None:
        return picture
    width, height = picture.size
    box = crop
    if max(crop) <= 1:
        box = (crop[0] * width, crop[1] * height, crop[2] * width, crop[3] * height)
    left, top = max(0, round(box[0])), max(0, round(box[1]))
    right, bottom = min(width, round(box[0] + box[2])), min(height, round(box[1] + box[3]))
    if left >= right or top >= bottom:
        raise QueryError(
            f"the crop {', '.join(f'{number:g}' for number in crop)} holds nothing of {width} × {height} pixels",
            expected="left, top, width, height",
        )
    return picture.crop((left, top, right, bottom))


def seen_box(
    width: int, height: int, crop_share: float, crop_mode: CropMode = "center", crop: Crop | None = None
) -> Crop:
    """The part of a picture that `preprocess` lets an encoder see, as shares of its sides; to a pixel or so.

    Args:
        width: of the upright picture in pixels.
        height: the same.
        crop_share: of the encoder.
        crop_mode: of the encoder.
        crop: as shares; what was cut out before.
    """
    left, top, wide, high = crop or (0.0, 0.0, 1.0, 1.0)
    if crop_mode == "squash":
        lost = (1 - crop_share) / 2
        return left + lost * wide, top + lost * high, crop_share * wide, crop_share * high
    side = crop_share * min(wide * width, high * height)
    seen = (side / width, side / height)
    return left + (wide - seen[0]) / 2, top + (high - seen[1]) / 2, seen[0], seen[1]


def _short_side(image_size_px: int, crop_share: float) -> int:
    """The short side in pixels that a picture is resized to before the crop."""
    return math.floor(image_size_px / crop_share)


def _resize(picture: Image.Image, short_px: int, resampling: Image.Resampling) -> Image.Image:
    width, height = picture.size
    short = min(width, height)
    size = (int(short_px * width / short), int(short_px * height / short))  # exact for the short side itself
    return picture.resize(size, resampling)


def _without_far_ends(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    kept = MAX_ASPECT * min(width, height)
    cut_x, cut_y = max(0, (width - kept) // 2), max(0, (height - kept) // 2)  # alike on both ends: the centre stays
    if not cut_x and not cut_y:
        return picture
    return picture.crop((cut_x, cut_y, width - cut_x, height - cut_y))
