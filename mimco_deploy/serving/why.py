"""Why a hit is one: which parts of the query and of the hit are alike, by their patch tokens.

The tokens of both pictures, of length 1, are compared patch with patch. The heat of a patch is its highest cosine with
any patch of the other picture; how alike two pictures are by parts is the mean of that over both. Needs a bundle that
was exported `--with-patches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import BundleError, ImageError
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.index import Hit
from mimco_deploy.serving.query import Part, query_pixels

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
_AT_ONCE = 16


@dataclass(frozen=True)
class Reason:
    """Two pictures as the encoder saw them, and where they are alike."""

    query: Pixels
    """[H, W, 3]"""
    hit: Pixels
    """[H, W, 3]"""
    query_heat: Floats
    """[g, g], highest cosine of each patch with any of the hit."""
    hit_heat: Floats
    """[g, g], the same the other way."""

    @property
    def score(self) -> float:
        """How alike the two are by parts, in [−1, 1]."""
        return float((self.query_heat.mean() + self.hit_heat.mean()) / 2)


class PatchEncoder(Encoder, Protocol):
    """An encoder with patch tokens."""

    def embed_with_patches(self, images: Pixels) -> tuple[Floats, Floats]:
        """Embeddings [B, D] and patch tokens [B, L, width]."""
        ...


def explain(encoder: Encoder, query: Part, hits: Sequence[Path]) -> list[Reason | None]:
    """Compare a query with hits, patch by patch.

    Args:
        encoder: of a bundle with patches.
        query: one picture.
        hits: files.

    Returns:
        One for each hit; None where the query or the hit cannot be read any more.

    Raises:
        BundleError: the bundle has no patch tokens, or the runtime gives none.
    """
    check_patches(encoder)
    query_picture, *pictures = [_pixels_or_none(part, encoder) for part in (query, *map(Part, hits))]
    return [None] * len(hits) if query_picture is None else explain_pixels(encoder, query_picture, pictures)


def explain_pixels(encoder: Encoder, query: Pixels, hits: Sequence[Pixels | None]) -> list[Reason | None]:
    """As `explain`, of pictures that are decoded.

    Args:
        encoder: of a bundle with patches.
        query: [H, W, 3].
        hits: [H, W, 3] each, or None.
    """
    patches = check_patches(encoder)
    tokens = _tokens(patches, [query, *(picture for picture in hits if picture is not None)])
    query_tokens = next(tokens)
    grid = (encoder.spec.patch_grid,) * 2
    reasons: list[Reason | None] = []
    for picture in hits:
        if picture is None:
            reasons.append(None)
            continue
        alike = query_tokens @ next(tokens).T  # [L, L]
        reasons.append(Reason(query, picture, alike.max(axis=1).reshape(grid), alike.max(axis=0).reshape(grid)))
    return reasons


def order_by_parts(hits: Sequence[Hit], reasons: Sequence[Reason | None]) -> list[Hit]:
    """Hits by how alike their parts are to the query's, those that cannot be read any more last."""
    alike = [-2.0 if reason is None else reason.score for reason in reasons]
    return [hits[number] for number in sorted(range(len(hits)), key=lambda number: -alike[number])]


def _pixels_or_none(part: Part, encoder: Encoder) -> Pixels | None:
    try:
        return query_pixels(part, encoder.spec)
    except ImageError:
        return None


def check_patches(encoder: Encoder) -> PatchEncoder:
    """The same encoder, as one with patch tokens.

    Raises:
        BundleError: it has none.
    """
    if not encoder.spec.patch_grid or not hasattr(encoder, "embed_with_patches"):
        raise BundleError(
            "the encoder gives no patch tokens",
            expected="a bundle with patches, on ONNX Runtime",
            command="mimco export --format onnx --with-patches",
        )
    return encoder  # type: ignore[return-value]  # it has the method


def _tokens(encoder: PatchEncoder, pictures: Sequence[Pixels]) -> Iterator[Floats]:
    """Patch tokens [L, width] of each picture, of length 1."""
    for start in range(0, len(pictures), _AT_ONCE):
        tokens = encoder.embed_with_patches(np.stack(pictures[start : start + _AT_ONCE]))[1]  # [B, L, width]
        lengths = np.linalg.norm(tokens, axis=2, keepdims=True)
        yield from (tokens / np.maximum(lengths, 1e-6)).astype(np.float32)
