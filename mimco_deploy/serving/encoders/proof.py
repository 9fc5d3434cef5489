"""What every encoder does alike: refuse what are no pictures, and prove itself on the golden ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import TOLERANCES, EncoderSpec, Golden
from mimco_deploy.errors import BundleError
from mimco_deploy.serving.agreement import compare

if TYPE_CHECKING:
    from mimco_deploy.serving.encoders import Encoder


def check_images(images: npt.NDArray[np.uint8], spec: EncoderSpec) -> None:
    """Raise ValueError for anything but uint8 [B, H, W, 3], H = W = `spec.image_size_px`, B at least 1."""
    side = spec.image_size_px
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3) or len(images) == 0:
        raise ValueError(
            f"images {images.dtype} {list(images.shape)}, expected uint8 [B, {side}, {side}, 3], B at least 1"
        )


def prove(encoder: Encoder, golden: Golden, artefact: Path, command: str, batch_sizes: Sequence[int] = (1,)) -> None:
    """Embed golden pictures and compare: this artefact, on this machine and runtime, is the encoder.

    Args:
        encoder: to prove.
        golden: of the bundle.
        artefact: what the encoder runs, for the error.
        command: what makes it anew.
        batch_sizes: to try, each at least 1; the pictures come again where they are fewer. By default the first alone:
            each costs a command as long as its own picture does, and all were compared when the bundle was made.

    Raises:
        BundleError: it does not run, or is farther from the golden embeddings than its precision allows.
    """
    count = len(golden.images)
    for size in batch_sizes:
        try:
            embeddings = encoder.embed(golden.images[np.arange(size) % count])
        except Exception as error:  # runtimes' own classes share no base
            raise BundleError(
                f"{artefact} does not run ({first_line(error)})", expected="an encoder", command=command
            ) from error
        for start in range(0, size, count):
            part = embeddings[start : start + count]
            if breaches := compare(part, golden.embeddings[: len(part)]).breaches(TOLERANCES[encoder.precision]):
                raise BundleError(
                    f"{artefact} is not what its golden embeddings say, on {encoder.provider}: {', '.join(breaches)}",
                    expected="the encoder that was exported",
                    command=command,
                )


def first_line(error: Exception) -> str:
    """Of what an error says, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
