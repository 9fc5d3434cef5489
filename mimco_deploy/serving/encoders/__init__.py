"""Encoders that serve: pictures in, embeddings out, whatever runs the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import EncoderSpec, Precision, read_bundle
from mimco_deploy.errors import EngineError, MissingExtraError

Device = Literal["auto", "cpu", "cuda", "tensorrt"]


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

    @property
    def precision(self) -> Precision:
        """Of the graph that runs."""
        ...

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pictures.

        Args:
            images: [B, H, W, 3] as `preprocess` makes them, B at least 1.

        Returns:
            [B, D], L2-normalised.
        """
        ...


def load_encoder(
    path: Path, device: Device = "auto", *, strict: bool = False, precision: Precision | None = None
) -> Encoder:
    """Load the encoder of a bundle and let it prove itself on the bundle's golden pictures.

    Args:
        path: the bundle, `encoder/` of a workspace, or a `.zip` or `.tar` of one.
        device: where to run; `auto` takes CUDA where it starts, else the CPU; `tensorrt` an engine of the
            bundle, else ONNX Runtime's TensorRT.
        strict: whether anything else than the device asked for is an error. Otherwise it is a warning, and the next
            best device runs.
        precision: of the graph; by default what the bundle says for the device.

    Raises:
        BundleError: the bundle is missing, broken, or does not answer as its golden embeddings say.
        ProviderError: `strict`, and the device does not run.
        MissingExtraError: ONNX Runtime is not installed.
    """
    from mimco_deploy.serving.encoders.onnx import OnnxEncoder, fall_back, has_tensorrt_provider

    bundle = read_bundle(path)
    if device == "tensorrt":
        from mimco_deploy.serving.encoders.tensorrt import open_engine

        try:
            engine = open_engine(bundle, precision)
        except (EngineError, MissingExtraError) as error:
            offered = has_tensorrt_provider()  # builds engines of its own, and needs none of ours
            fall_back(error.found, device, strict=strict and not offered, command=error.command or "mimco doctor")
            device = device if offered else "auto"
        else:
            engine.prove()
            return engine
    encoder = OnnxEncoder(bundle, precision, device, strict=strict)
    encoder.prove()
    return encoder


class LazyEncoder:
    """An encoder that is loaded when it is first asked for something: an index that is up to date needs none.

    Args:
        path: as for `load_encoder`.
        device: as for `load_encoder`.
        strict: as for `load_encoder`.

    Raises:
        BundleError: the bundle is missing or broken; whatever else is wrong shows when it is loaded.
    """

    def __init__(self, path: Path, device: Device = "auto", *, strict: bool = False) -> None:
        self.spec: EncoderSpec = read_bundle(path).spec
        self._path, self._strict = path, strict
        self._device: Device = device
        self.loaded: Encoder | None = None

    @property
    def provider(self) -> str:
        """What really runs the graph."""
        return self._ready().provider

    @property
    def precision(self) -> Precision:
        """Of the graph that runs."""
        return self._ready().precision

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """As `Encoder.embed`; the first call may raise what `load_encoder` does."""
        return self._ready().embed(images)

    def _ready(self) -> Encoder:
        if self.loaded is None:
            self.loaded = load_encoder(self._path, self._device, strict=self._strict)
        return self.loaded
