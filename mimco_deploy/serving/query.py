"""What is searched with: a picture or a part of one, or several of them with weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import EncoderSpec
from mimco_deploy.errors import ConfigError, ImageError, QueryError
from mimco_deploy.preprocess import Crop, decode_pixels, read_pixels
from mimco_deploy.serving import MAX_WEIGHT
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.filters import Filter
from mimco_deploy.serving.generations import check_encoder
from mimco_deploy.serving.index import Hit, ImageIndex
from mimco_deploy.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

RERANKED = 3
"""Times k hits are ordered by their parts."""


@dataclass(frozen=True)
class Part:
    """One picture of a query."""

    picture: Path | bytes
    """A file, or the content of one. A file that is gone but indexed is taken from the index."""
    weight: float = 1.0
    """In [−100, 100]; below 0: unlike this."""
    crop: Crop | None = None


def query_pixels(part: Part, spec: EncoderSpec) -> npt.NDArray[np.uint8]:
    """Decode one picture of a query as the encoder takes it.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: it is no picture.
        ConfigError: the crop lies outside of it.
    """
    if isinstance(part.picture, bytes):
        return decode_pixels(part.picture, "query", *spec.geometry, part.crop)
    return read_pixels(part.picture, *spec.geometry, part.crop)


def query_embedding(
    index: ImageIndex, encoder: Encoder, parts: Sequence[Part], watch: Stopwatch | None = None
) -> npt.NDArray[np.float32]:
    """Embed a query: the weighted sum of its pictures, of length 1.

    Args:
        index: where files that are gone are looked up.
        encoder: the one that made the index.
        parts: at least one.
        watch: told when the pictures are decoded and embedded.

    Returns:
        [D].

    Raises:
        ImageError: one of them is no picture.
        ConfigError: a crop or a weight is wrong, or the weights cancel each other.
        EncoderMismatchError: another encoder made the index.
    """
    check_encoder(index.path, index.fingerprint, encoder.spec.fingerprint)
    watch = watch or Stopwatch()
    embeddings: dict[int, npt.NDArray[np.float32]] = {}
    pixels: dict[int, npt.NDArray[np.uint8]] = {}
    for number, part in enumerate(parts):
        try:
            pixels[number] = query_pixels(part, encoder.spec)
        except ImageError as error:
            stored = None
            if error.problem == "missing" and part.crop is None and isinstance(part.picture, Path):
                stored = index.embedding_of(part.picture)
            if stored is None:
                raise
            embeddings[number] = stored
    watch.lap("decode")
    if pixels:
        embeddings |= zip(pixels, encoder.embed(np.stack(list(pixels.values()))), strict=True)
    watch.lap("embed")
    return weighted_sum([part.weight for part in parts], [embeddings[number] for number in range(len(parts))])


def weighted_sum(weights: Sequence[float], embeddings: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Several pictures as one query.

    Args:
        weights: of each, in [−100, 100].
        embeddings: [D] each.

    Returns:
        [D], of length 1.

    Raises:
        ConfigError: one is out of range; `QueryError`: they cancel each other.
    """
    for weight in weights:
        if not abs(weight) <= MAX_WEIGHT:
            raise ConfigError(
                f"a picture of the query has the weight {weight}", expected=f"from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            )
    total = np.asarray(weights, np.float64) @ np.asarray(embeddings, np.float64)
    length = float(np.linalg.norm(total))
    if length < 1e-6:
        raise QueryError("the pictures of the query cancel each other", expected="other weights")
    return np.asarray(total / length, np.float32)


def search_image(
    index: ImageIndex,
    encoder: Encoder,
    query: Path | Sequence[Part],
    k: int,
    condition: Filter | None = None,
    *,
    min_score: float = -1.0,
    min_confidence: float = 0.0,
    rerank: bool = False,
    watch: Stopwatch | None = None,
) -> list[Hit]:
    """Find the files that look most like a picture, which need not be indexed, or like several.

    Args:
        index: where to look.
        encoder: the one that made the index.
        query: the query image, or its parts.
        k: at least 1.
        condition: which files may be hits.
        min_score: least score of a hit.
        min_confidence: least confidence of a hit, where it is known.
        rerank: order the best hits by how alike their parts are to those of the first picture (`why.py`). The scores
            stay those of the whole pictures. Of a picture that is gone the order stays, with a warning.
        watch: told when the query is decoded, embedded and searched for.

    Returns:
        Up to k hits, best first. An indexed query image finds itself, with a score of 1 but for rounding.

    Raises:
        ImageError: the query is not a picture.
        EncoderMismatchError: another encoder made the index.
        IndexStoreError: the index is empty or broken.
        ConfigError: the condition, a crop or a weight cannot be used.
        BundleError: `rerank`, and the encoder gives no patch tokens.
    """
    watch = watch or Stopwatch()
    parts = [Part(query)] if isinstance(query, Path) else query
    embedding = query_embedding(index, encoder, parts, watch)
    hits = index.search(embedding, RERANKED * k if rerank else k, condition, min_score=min_score)
    hits = [hit for hit in hits if hit.confidence is None or hit.confidence >= min_confidence]
    watch.lap("search")
    if rerank and hits:
        from mimco_deploy.serving.why import explain, order_by_parts

        reasons = explain(encoder, parts[0], [hit.path for hit in hits])
        if not any(reasons):
            logger.warning("the query cannot be read any more: its hits are not reranked")
        hits = order_by_parts(hits, reasons)[:k]
        watch.lap("rerank")
    return hits
