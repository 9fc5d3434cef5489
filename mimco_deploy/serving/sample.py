"""The pictures that an encoder is proved and measured on: a sample of the user's folder, or drawn ones."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.errors import ConfigError, ImageError
from mimco_deploy.preprocess import CropMode, Interpolation, preprocess, read_pixels
from mimco_deploy.serving.scan import scan_root

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
_SEED = 2209
_MAX_DRAWN_PX = 160
"""Drawing larger ones takes longer than proving an encoder on them."""


def draw_pictures(
    count: int,
    image_size_px: int,
    crop_share: float,
    interpolation: Interpolation,
    crop_mode: CropMode = "center",
    seed: int = _SEED,
) -> Pixels:
    """Drawn pictures, kind by kind in turn, as an encoder of that geometry takes them.

    Returns:
        uint8 [count, H, W, 3].
    """
    drawn_px = min(2 * image_size_px, _MAX_DRAWN_PX)
    pictures = (draw(KINDS[n % len(KINDS)], seed + n // len(KINDS), drawn_px) for n in range(count))
    return np.stack([preprocess(picture, image_size_px, crop_share, interpolation, crop_mode) for picture in pictures])


def sample_folder(
    folder: Path,
    count: int,
    image_size_px: int,
    crop_share: float,
    interpolation: Interpolation,
    crop_mode: CropMode = "center",
) -> Pixels:
    """Up to `count` pictures that an index of the folder would hold, taken at random but always the same.

    Returns:
        uint8 [N, H, W, 3], 1 ≤ N ≤ count. Files that are no pictures are left out.

    Raises:
        ConfigError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}", expected="a folder of pictures")
    files = sorted(folder / path for path, *_ in scan_root(folder).files)
    random.Random(_SEED).shuffle(files)
    pixels: list[Pixels] = []
    refused = 0
    for path in files:
        if len(pixels) == count:
            break
        try:
            pixels.append(read_pixels(path, image_size_px, crop_share, interpolation, crop_mode))
        except ImageError:
            refused += 1
    if not pixels:
        raise ConfigError(f"no picture in {folder}", expected="pictures like those to search")
    if refused:
        logger.info("%d files of %s are no pictures", refused, folder)
    return np.stack(pixels)
