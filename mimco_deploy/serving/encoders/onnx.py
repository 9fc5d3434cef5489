"""The encoder on ONNX Runtime: CUDA where it really runs, else the CPU."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import MAX_ABS_FP32, Bundle, EncoderSpec
from mimco_deploy.errors import BundleError, MissingExtraError

logger = logging.getLogger(__name__)

INPUT_NAME = "image"
OUTPUT_NAME = "embedding"
_AGAIN = "mimco export --format onnx"
_PROOF_PICTURES = 2
_FATAL_ONLY = 4
# TensorFloat-32 keeps 10 bits of each factor: embeddings would leave the tolerance of the golden check.
_CUDA: tuple[str, dict[str, str]] = ("CUDAExecutionProvider", {"use_tf32": "0"})


class OnnxEncoder:
    """Runs a bundle's `model.onnx`, which holds normalisation, pooling and L2.

    Args:
        bundle: as `read_bundle` gives it, hashes checked.

    Raises:
        BundleError: the graph cannot be loaded, or has other inputs or outputs.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._session = _open_session(bundle)
        self._check_signature()

    @property
    def spec(self) -> EncoderSpec:
        """The contract of the bundle."""
        return self._bundle.spec

    @property
    def provider(self) -> str:
        """The execution provider that the session uses first, such as `CPUExecutionProvider`."""
        return str(self._session.get_providers()[0])

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pictures.

        Args:
            images: uint8 [B, H, W, 3] as `preprocess` makes them, H = W = `spec.image_size_px`, B at least 1.

        Returns:
            float32 [B, D], L2-normalised.

        Raises:
            ValueError: another shape or type.
        """
        side = self.spec.image_size_px
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3) or len(images) == 0:
            raise ValueError(
                f"images {images.dtype} {list(images.shape)}, expected uint8 [B, {side}, {side}, 3], B at least 1"
            )
        (embeddings,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: np.ascontiguousarray(images)})
        return np.asarray(embeddings, np.float32)

    def _check_signature(self) -> None:
        side, dim = self.spec.image_size_px, self.spec.embedding_dim
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        wanted = [
            (inputs, INPUT_NAME, "tensor(uint8)", [side, side, 3]),
            (outputs, OUTPUT_NAME, "tensor(float)", [dim]),
        ]
        for values, name, kind, shape in wanted:
            expected = f"{name} {kind} [batch, {', '.join(map(str, shape))}]"
            value = values.get(name)
            if value is None:
                raise self._refused(f"has {', '.join(values) or 'nothing'} where {name} belongs", expected)
            # A batch size that is a number would hold for that batch size only.
            if value.type != kind or list(value.shape[1:]) != shape or isinstance(value.shape[0], int):
                raise self._refused(f"has {name} {value.type} {value.shape}", expected)
        if set(inputs) != {INPUT_NAME}:
            raise self._refused(f"has the inputs {', '.join(inputs)}", f"{INPUT_NAME} alone")

    def prove(self) -> None:
        """Embed the first golden pictures and compare: this graph, on this machine and runtime, is the encoder.

        Raises:
            BundleError: the graph does not run, or is farther from the golden embeddings than `MAX_ABS_FP32`.
        """
        images, stored = self._bundle.golden.images[:_PROOF_PICTURES], self._bundle.golden.embeddings[:_PROOF_PICTURES]
        if len(images) == 0 or stored.shape != (len(images), self.spec.embedding_dim):
            raise self._refused(
                f"comes with golden embeddings {list(stored.shape)} of {len(images)} pictures", "one for each picture"
            )
        try:
            embeddings = self.embed(images)
        except ValueError as error:
            raise self._refused(f"comes with golden {error}", "") from error
        except Exception as error:  # ORT's own classes share no base
            raise self._refused(f"does not run ({_first_line(error)})", "an encoder") from error
        farthest = float(np.max(np.abs(embeddings - stored)))
        if not farthest <= MAX_ABS_FP32:  # so that NaN is refused too
            raise self._refused(
                f"is {farthest:.2e} away from its golden embeddings on {self.provider}", f"at most {MAX_ABS_FP32:.0e}"
            )

    def _refused(self, found: str, expected: str) -> BundleError:
        return BundleError(f"{self._bundle.model} {found}", expected=expected, command=_AGAIN)


def _open_session(bundle: Bundle) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f"onnxruntime cannot be imported ({error})", command='pip install "mimco-deploy[cpu]"'
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY  # what matters is raised below, in our words
    offered = _CUDA[0] in onnxruntime.get_available_providers()
    providers = [*([_CUDA] if offered else []), "CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(bundle.model, sess_options=options, providers=providers)
    except Exception as error:  # ORT's own classes share no base
        raise BundleError(
            f"{bundle.model} cannot be loaded ({_first_line(error)})", expected="an ONNX graph", command=_AGAIN
        ) from error
    if offered and session.get_providers()[0] != _CUDA[0]:
        # The package lists CUDA as available even where its libraries or a driver are missing.
        logger.warning("onnxruntime offers CUDA but could not start it: running on the CPU")
    return session


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
