"""Copy detection on a user's own pictures: each is edited as people edit pictures, and must find its original.

The edits are made on the fly from what the folder holds, so the test needs no labels and measures the very pictures
that will be searched.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from mimco_deploy.evaluation.measures import Measure, mean_of, statistic_of
from mimco_deploy.evaluation.pictures import BATCH, Embeddings, Tell, embed_finite
from mimco_deploy.preprocess import preprocess
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.sources import Picture, decode_reduced

Rows = npt.NDArray[np.int64]
Edit = Callable[[Image.Image, np.random.Generator], Image.Image]
SIDE_PX = 512
"""Pictures are edited at this short side, or the encoder's where that is larger: a JPEG of a 12-megapixel photo would
take longer than all else."""
_BLOCK = 256
_MAX_JPEG_PX = 65_500
"""Longer sides its library refuses."""


def _crop(share: float) -> Edit:
    def edit(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = (max(1, round(side * share**0.5)) for side in picture.size)
        left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
        return picture.crop((int(left), int(top), int(left) + width, int(top) + height))

    return edit


def _flip(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _jpeg(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    width, height = (min(side, _MAX_JPEG_PX) for side in picture.size)
    picture.crop((0, 0, width, height)).save(buffer, "JPEG", quality=20)
    return Image.open(buffer).convert("RGB")


def _colour(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(float(rng.uniform(0.6, 1.4)))
    return picture


def _grey(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _blur(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(min(picture.size) / 64))


def _text(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    written = picture.copy()
    size = max(8, round(min(picture.size) / 7))
    place = (picture.width * float(rng.uniform(0.02, 0.3)), picture.height * float(rng.uniform(0.1, 0.8)))
    draw = ImageDraw.Draw(written)
    draw.text(place, "FOR SALE", fill="white", stroke_fill="black", stroke_width=2, font=ImageFont.load_default(size))
    return written


def _rotate(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.rotate(float(rng.choice([-10, 10])), Image.Resampling.BILINEAR)


def _frame(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    width, height = round(1.3 * picture.width), round(1.3 * picture.height)
    framed = Image.new("RGB", (width, height), (245, 245, 245))
    framed.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return framed


EDITS: dict[str, Edit] = {
    "crop 80 %": _crop(0.8),
    "crop 50 %": _crop(0.5),
    "mirrored": _flip,
    "JPEG 20": _jpeg,
    "colour": _colour,
    "grey": _grey,
    "blur": _blur,
    "text": _text,
    "rotated 10°": _rotate,
    "framed": _frame,
}
"""By the names of the report. Crops keep that share of the area; colour is brightness, contrast and saturation, each by
0.6 to 1.4; blur is 1/64 of the short side; framed adds a light border of 15 % on each side, as screenshots have."""


def edit_picture(picture: Image.Image, name: str, key: int) -> Image.Image:
    """One edited copy, always the same for the same picture and key.

    Args:
        picture: upright, RGB.
        name: one of `EDITS`.
        key: 0 or more, of the picture's content: what is random about the edit is drawn from it. A file is then edited
            the same for every encoder, and wherever it lies.
    """
    return EDITS[name](picture, np.random.default_rng([zlib.crc32(name.encode()), key]))


def embed_copies(
    encoder: Encoder, pictures: Sequence[Picture], tell: Tell = lambda _done, _all: None
) -> dict[str, Embeddings]:
    """Embeddings of the pictures edited, under each name of `EDITS`: [N, D].

    Args:
        encoder: of a bundle.
        pictures: N that can be read.
        tell: called with how many are done, and of how many.

    Raises:
        ImageError: one of them cannot be read (any more).
    """
    spec = encoder.spec
    rows: dict[str, list[Embeddings]] = {name: [] for name in EDITS}
    group = max(1, BATCH // len(EDITS))
    side_px = max(SIDE_PX, math.ceil(spec.image_size_px / spec.crop_share))
    for start in range(0, len(pictures), group):
        some = pictures[start : start + group]
        pixels = []
        for picture in some:
            content = picture.read()
            upright, key = decode_reduced(content, picture.name, side_px), zlib.crc32(content)
            pixels += [preprocess(edit_picture(upright, name, key), *spec.geometry) for name in EDITS]
        found = embed_finite(encoder, np.stack(pixels)).reshape(len(some), len(EDITS), -1)
        for number, name in enumerate(EDITS):
            rows[name].append(found[:, number])
        tell(start + len(some), len(pictures))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def copy_detection(gallery: Embeddings, rows: Rows, copies: dict[str, Embeddings]) -> list[Measure]:
    """How surely each edited picture finds its original in the gallery.

    Args:
        gallery: [M, D], L2-normalised.
        rows: [N], where the pictures that were edited lie in it.
        copies: [N, D] for each edit, L2-normalised, in the order of `rows`.

    Returns:
        recall@1 of each edit; over all edits recall@1 and mean reciprocal rank, and micro average precision: the best
        candidate of every query in one order by score, as one threshold for all queries sees them.

    Source: micro average precision as in the image similarity challenge (arXiv 2106.09672), section 4.1.
    """
    ranks, best, right = _search(gallery, rows, np.stack(list(copies.values())))  # [E, N] each
    measures = [mean_of("copies", f"recall@1, {name}", rank == 0) for name, rank in zip(copies, ranks, strict=True)]
    # One value a picture, over its edits: pictures are what an interval resamples.
    measures.append(mean_of("copies", "recall@1, all edits", (ranks == 0).mean(axis=0)))
    measures.append(mean_of("copies", "reciprocal rank, all edits", (1 / (ranks + 1)).mean(axis=0)))
    order = np.argsort(-best.ravel(), kind="stable")
    hits, picture = right.ravel()[order], order % len(rows)

    def average_precision(counts: npt.NDArray[np.float64]) -> float:
        weights = counts[picture]
        above = np.cumsum(weights)
        precision = np.divide(np.cumsum(weights * hits), above, out=np.zeros(len(above)), where=above > 0)
        return float((precision * hits * weights).sum() / weights.sum())

    measures.append(statistic_of("copies", "micro average precision", len(rows), average_precision))
    return measures


def _search(
    gallery: Embeddings, rows: Rows, copies: npt.NDArray[np.float32]
) -> tuple[Rows, npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Search for copies [E, N, D]: ranks of the originals, best scores, and whose they are; [E, N] each.

    A rank is how many others score at least as high as the original. Ties count against the encoder, or one that gives
    all pictures the same embedding would be perfect.
    """
    edits, count, _ = copies.shape
    ranks = np.empty((edits, count), np.int64)
    best = np.empty((edits, count), np.float32)
    right = np.empty((edits, count), np.bool_)
    for number, edited in enumerate(copies):
        for start in range(0, count, _BLOCK):
            part = slice(start, start + _BLOCK)
            cosines = edited[part] @ gallery.T
            own = cosines[np.arange(len(cosines)), rows[part]]
            ranks[number, part] = (cosines >= own[:, None]).sum(axis=1) - 1
            best[number, part] = cosines.max(axis=1)
            right[number, part] = ranks[number, part] == 0
    return ranks, best, right
