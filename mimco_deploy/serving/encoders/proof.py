"""What every encoder does alike: refuse what are no pictures, and prove itself on the golden ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import TOLERANCES, EncoderSpec, Golden
from mimco_deploy.errors import BundleError
from mimco_deploy.serving.agreement import compare

if TYPE_CHECKING:
    from mimco_deploy.serving.encoders import Encoder

_PROOF_PICTURES = 1
"""Each costs a command as long as its own picture does; all of them were compared when the bundle was made."""


def check_images(images: npt.NDArray[np.uint8], spec: EncoderSpec) -> None:
    """Raise ValueError for anything but uint8 [B, H, W, 3], H = W = `spec.image_size_px`, B at least 1."""
    side = spec.image_size_px
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3) or len(images) == 0:
        raise ValueError(
            f"images {images.dtype} {list(images.shape)}, expected uint8 [B, {side}, {side}, 3], B at least 1"
        )


def prove(encoder: Encoder, golden: Golden, artefact: Path, command: str) -> None:
    """Embed the first golden pictures and compare: this artefact, on this machine and runtime, is the encoder.

    Args:
        encoder: to prove.
        golden: of the bundle.
        artefact: what the encoder runs, for the error.
        command: what makes it anew.

    Raises:
        BundleError: it does not run, or is farther from the golden embeddings than its precision allows.
    """
    try:
        embeddings = encoder.embed(golden.images[:_PROOF_PICTURES])
    except Exception as error:  # runtimes' own classes share no base
        raise BundleError(
            f"{artefact} does not run ({first_line(error)})", expected="an encoder", command=command
        ) from error
    found = compare(embeddings, golden.embeddings[:_PROOF_PICTURES])
    if breaches := found.breaches(TOLERANCES[encoder.precision]):
        raise BundleError(
            f"{artefact} is not what its golden embeddings say, on {encoder.provider}: {', '.join(breaches)}",
            expected="the encoder that was exported",
            command=command,
        )


def first_line(error: Exception) -> str:
    """Of what an error says, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
