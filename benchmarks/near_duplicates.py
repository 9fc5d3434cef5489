"""Which copies of a picture does an encoder know again, and at which score are others taken for copies too?

    python benchmarks/near_duplicates.py --encoder .mimco/encoder --photos photos --distractors more_photos

Of each photo copies are made: JPEG at quality 50 and 10, half the size, a crop of 80 % of each side, mirrored, turned
by 5 degrees, brighter. All are embedded with the distractors. For several least scores:

- recall: share of the copies of a kind whose score with their original reaches it;
- precision: share of all pairs that reach it, of originals, copies and distractors, that are of one photo.

Prints one JSON line with the machine and the versions.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

import mimco_deploy
from mimco_deploy.errors import ImageError
from mimco_deploy.images import IMAGE_SUFFIXES, read_image
from mimco_deploy.preprocess import preprocess
from mimco_deploy.serving.encoders import Encoder, load_encoder

LEAST = (0.8, 0.9, 0.95, 0.98, 0.99)
_AT_ONCE = 16


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """As saved and opened again."""
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=quality)
    return Image.open(encoded).convert("RGB")


def copies(picture: Image.Image) -> dict[str, Image.Image]:
    """Edited copies by kind."""
    width, height = picture.size
    return {
        "jpeg 50": jpeg(picture, 50),
        "jpeg 10": jpeg(picture, 10),
        "half size": picture.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.LANCZOS),
        "crop 80 %": picture.crop((width // 10, height // 10, width - width // 10, height - height // 10)),
        "mirrored": ImageOps.mirror(picture),
        "turned 5°": picture.rotate(5, Image.Resampling.BICUBIC),
        "brighter": ImageEnhance.Brightness(picture).enhance(1.3),
    }


def read_all(folder: Path, most: int) -> list[Image.Image]:
    """Pictures of a folder, by name."""
    found: list[Image.Image] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and len(found) < most:
            try:
                found.append(read_image(path))
            except ImageError:
                continue
    return found


def embed(encoder: Encoder, pictures: list[Image.Image]) -> npt.NDArray[np.float32]:
    """[N, D]."""
    spec = encoder.spec
    pixels = [preprocess(one, *spec.geometry) for one in pictures]
    return np.concatenate(
        [encoder.embed(np.stack(pixels[start : start + _AT_ONCE])) for start in range(0, len(pixels), _AT_ONCE)]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--distractors", type=Path, help="other photos, none of them a copy")
    parser.add_argument("--most", type=int, default=50, help="photos to copy; ten times as many distractors")
    options = parser.parse_args()
    encoder = load_encoder(options.encoder)
    photos = read_all(options.photos, options.most)
    edited = [copies(photo) for photo in photos]
    kinds = list(edited[0])
    others = [] if options.distractors is None else read_all(options.distractors, 10 * options.most)
    pictures = photos + [of[kind] for kind in kinds for of in edited] + others
    vectors = embed(encoder, pictures)
    count = len(photos)
    photo_of = np.concatenate([np.tile(np.arange(count), 1 + len(kinds)), -1 - np.arange(len(others))])
    scores = vectors @ vectors.T
    upper = np.triu(np.ones(scores.shape, bool), 1)
    same = photo_of[:, np.newaxis] == photo_of
    with_original = {
        kind: (vectors[:count] * vectors[(1 + number) * count : (2 + number) * count]).sum(axis=1)
        for number, kind in enumerate(kinds)
    }
    result: dict[str, Any] = {
        "benchmark": "near_duplicates",
        "encoder": encoder.spec.architecture,
        "photos": count,
        "distractors": len(others),
        "recall": {
            kind: {str(least): round(float((found >= least).mean()), 3) for least in LEAST}
            for kind, found in with_original.items()
        },
        "precision": {
            str(least): round(float(same[upper & (scores >= least)].mean()), 3)
            for least in LEAST
            if (upper & (scores >= least)).any()
        },
        "mimco": mimco_deploy.__version__,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
