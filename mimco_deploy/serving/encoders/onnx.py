"""The encoder on ONNX Runtime: CUDA where it really runs, else the CPU."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import TOLERANCES, Bundle, EncoderSpec, Precision
from mimco_deploy.errors import BundleError, MissingExtraError, ProviderError
from mimco_deploy.serving.agreement import compare

logger = logging.getLogger(__name__)

INPUT_NAME = "image"
OUTPUT_NAME = "embedding"
PATCHES_NAME = "patches"
_AGAIN = "mimco export --format onnx"
_PROOF_PICTURES = 2
_FATAL_ONLY = 4
_CPU = "CPUExecutionProvider"
# TensorFloat-32 keeps 10 bits of each factor: embeddings would leave the tolerance of the golden check.
_CUDA: tuple[str, dict[str, str]] = ("CUDAExecutionProvider", {"use_tf32": "0"})


class OnnxEncoder:
    """Runs a bundle's graph, which holds normalisation, pooling and L2.

    Args:
        bundle: as `read_bundle` gives it, hashes checked.
        precision: of the graph; by default what the bundle says for the device that runs.
        device: `auto` takes CUDA where it starts, else the CPU.
        strict: whether anything else than the device asked for is an error, not a warning.

    Raises:
        BundleError: the graph cannot be loaded, or has other inputs or outputs.
        ProviderError: `strict`, and the device does not run.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        precision: Precision | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        *,
        strict: bool = False,
    ) -> None:
        self._bundle = bundle
        self._precision: Precision
        self._session, self._precision = _open_session(bundle, precision, device, strict)
        self._model = bundle.model(self._precision)
        self._check_signature()

    @property
    def spec(self) -> EncoderSpec:
        """The contract of the bundle."""
        return self._bundle.spec

    @property
    def provider(self) -> str:
        """The execution provider that the session uses first, such as `CPUExecutionProvider`."""
        return str(self._session.get_providers()[0])

    @property
    def precision(self) -> Precision:
        """Of the graph that runs."""
        return self._precision

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pictures.

        Args:
            images: uint8 [B, H, W, 3] as `preprocess` makes them, H = W = `spec.image_size_px`, B at least 1.

        Returns:
            float32 [B, D], L2-normalised.

        Raises:
            ValueError: another shape or type.
        """
        return self._run([OUTPUT_NAME], images)[0]

    def embed_with_patches(
        self, images: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Embed pictures and their patches.

        Args:
            images: as for `embed`.

        Returns:
            float32 [B, D], L2-normalised, and patch tokens float32 [B, L, width] after the last norm, not normalised,
            row by row, L = `spec.patch_grid`².

        Raises:
            BundleError: the bundle was exported without patches.
            ValueError: another shape or type.
        """
        if not self.spec.patch_grid:
            raise self._refused("has no patch tokens", "an export --with-patches")
        embeddings, patches = self._run([OUTPUT_NAME, PATCHES_NAME], images)
        return embeddings, patches

    def _run(self, names: list[str], images: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        side = self.spec.image_size_px
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3) or len(images) == 0:
            raise ValueError(
                f"images {images.dtype} {list(images.shape)}, expected uint8 [B, {side}, {side}, 3], B at least 1"
            )
        outputs = self._session.run(names, {INPUT_NAME: np.ascontiguousarray(images)})
        return [np.asarray(output, np.float32) for output in outputs]

    def _check_signature(self) -> None:
        side, dim, grid = self.spec.image_size_px, self.spec.embedding_dim, self.spec.patch_grid
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        wanted = [
            (inputs, INPUT_NAME, "tensor(uint8)", [side, side, 3]),
            (outputs, OUTPUT_NAME, "tensor(float)", [dim]),
        ]
        if grid:
            width = outputs[PATCHES_NAME].shape[-1] if PATCHES_NAME in outputs else 0
            wanted.append((outputs, PATCHES_NAME, "tensor(float)", [grid**2, width]))
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
            BundleError: the graph does not run, or is farther from the golden embeddings than its precision allows.
        """
        golden = self._bundle.golden
        try:
            embeddings = self.embed(golden.images[:_PROOF_PICTURES])
        except Exception as error:  # ORT's own classes share no base
            raise self._refused(f"does not run ({_first_line(error)})", "an encoder") from error
        found = compare(embeddings, golden.embeddings[:_PROOF_PICTURES])
        if breaches := found.breaches(TOLERANCES[self._precision]):
            raise self._refused(
                f"is not what its golden embeddings say, on {self.provider}: {', '.join(breaches)}",
                "the encoder that was exported",
            )

    def _refused(self, found: str, expected: str) -> BundleError:
        return BundleError(f"{self._model} {found}", expected=expected, command=_AGAIN)


def fall_back(missing: str, device: str, *, strict: bool) -> None:
    """Say that a device does not run.

    Raises:
        ProviderError: `strict`.
    """
    if strict:
        raise ProviderError(missing, expected=f"--device {device}, since --strict is set", command="mimco doctor")
    logger.warning("%s: running on the next best; mimco doctor tells more", missing)


def _open_session(
    bundle: Bundle, precision: Precision | None, device: Literal["auto", "cpu", "cuda"], strict: bool
) -> tuple[Any, Precision]:
    """A session on the device that was asked for, or loudly on the next best; and the precision of its graph."""
    ort = import_runtime()
    offered = ort.get_available_providers()
    if device != "cpu" and _CUDA[0] in offered:
        chosen = precision or bundle.precision_for("cuda")
        session = _start(ort, bundle, chosen, [_CUDA, _CPU])
        if session.get_providers()[0] == _CUDA[0]:
            return session, chosen
        # The package lists CUDA as available even where its libraries or a driver are missing.
        fall_back("onnxruntime offers CUDA but could not start it", device, strict=strict)
    elif device == "cuda":
        fall_back(f"the onnxruntime here has no CUDA ({', '.join(offered)})", device, strict=strict)
    chosen = precision or bundle.precision_for("cpu")
    return _start(ort, bundle, chosen, [_CPU]), chosen


def _start(ort: Any, bundle: Bundle, precision: Precision, providers: list[Any]) -> Any:
    model = bundle.model(precision)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY  # what matters is raised below, in our words
    try:
        return ort.InferenceSession(model, sess_options=options, providers=providers, enable_fallback=0)
    except Exception as error:  # ORT's own classes share no base
        reason = _first_line(error)
        if "NOT_IMPLEMENTED" in reason and precision == "bf16":
            raise BundleError(
                f"{model} does not run here: ONNX Runtime has no bf16 on CPUs", expected="fp32, fp16 or int8"
            ) from error
        raise BundleError(f"{model} cannot be loaded ({reason})", expected="an ONNX graph", command=_AGAIN) from error


def import_runtime() -> Any:
    """ONNX Runtime, kept from writing to stderr on its own.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f"onnxruntime cannot be imported ({error})", command='pip install "mimco-deploy[cpu]"'
        ) from error
    onnxruntime.set_default_logger_severity(_FATAL_ONLY)  # a provider that does not start is told in our words
    if _CUDA[0] in onnxruntime.get_available_providers() and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # prints what it does not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installs them, beside the driver
    return onnxruntime


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
