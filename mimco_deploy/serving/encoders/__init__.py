"""Encoders that serve: pictures in, embeddings out, whatever runs the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import EncoderSpec, read_bundle


class Encoder(Protocol):
    """Turns pictures into embeddings."""

    @property
    def spec(self) -> EncoderSpec:
        """The contract of the bundle."""
        ...

    @property
    def provider(self) -> str:
        """What really runs the graph, as the runtime reports it."""
        ...

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pictures.

        Args:
            images: [B, H, W, 3] as `preprocess` makes them, B at least 1.

        Returns:
            [B, D], L2-normalised.
        """
        ...


def load_encoder(path: Path) -> Encoder:
    """Load the encoder of a bundle and let it prove itself on the bundle's golden pictures.

    Args:
        path: the bundle, `encoder/` of a workspace.

    Raises:
        BundleError: the bundle is missing, broken, or does not answer as its golden embeddings say.
        MissingExtraError: ONNX Runtime is not installed.
    """
    from mimco_deploy.serving.encoders.onnx import OnnxEncoder

    encoder = OnnxEncoder(read_bundle(path))
    encoder.prove()
    return encoder
