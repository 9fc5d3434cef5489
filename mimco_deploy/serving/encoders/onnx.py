"""The encoder on ONNX Runtime: CUDA where it really runs, else the CPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import Bundle, EncoderSpec, Precision
from mimco_deploy.errors import BundleError, MissingExtraError, ProviderError
from mimco_deploy.serving.doctor import telling_line
from mimco_deploy.serving.encoders.proof import check_images, first_line, prove
from mimco_deploy.serving.scan import readable
from mimco_deploy.serving.trt import RTX_PLUGIN

logger = logging.getLogger(__name__)

INPUT_NAME = "image"
OUTPUT_NAME = "embedding"
PATCHES_NAME = "patches"
_AGAIN = "mimco export --format onnx"
_FATAL_ONLY = 4
_LOOKS_WHERE_TOLD = (1, 32)
"""Release of ONNX Runtime from which a graph on the disk finds weights in the folder named and nowhere else; tried:
1.24 does not, 1.32 does."""
_CPU = "CPUExecutionProvider"
# TensorFloat-32 keeps 10 bits of each factor: embeddings would leave the tolerance of the golden check.
_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "tensorrt": ("TensorrtExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
Device = Literal["auto", "cpu", "cuda", "tensorrt"]


class OnnxEncoder:
    """Runs a bundle's graph, which holds normalisation, pooling and L2.

    Args:
        bundle: as `read_bundle` gives it, hashes checked.
        precision: of the graph; by default what the bundle says for the device that runs.
        device: `auto` takes CUDA where it starts, else the CPU; `tensorrt` a provider of either flavour.
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
        device: Device = "auto",
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
        check_images(images, self.spec)
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
        """See `proof.prove`."""
        prove(self, self._bundle.golden, self._model, _AGAIN)

    def _refused(self, found: str, expected: str) -> BundleError:
        return BundleError(f"{self._model} {found}", expected=expected, command=_AGAIN)


def fall_back(missing: str, device: str, *, strict: bool, command: str = "mimco doctor") -> None:
    """Say that a device does not run.

    Raises:
        ProviderError: `strict`.
    """
    if strict:
        raise ProviderError(missing, expected=f"--device {device}, since --strict is set", command=command)
    logger.warning("%s: running on the next best; run: %s", missing, command)


def _open_session(bundle: Bundle, precision: Precision | None, device: Device, strict: bool) -> tuple[Any, Precision]:
    """A session on the device that was asked for, or loudly on the next best; and the precision of its graph."""
    ort = import_runtime()
    offered = ort.get_available_providers()
    if device == "tensorrt" and (rtx := _rtx_devices(ort)):
        chosen = precision or bundle.precision_for("tensorrt")
        try:
            session = _start(ort, bundle, chosen, None, rtx[:1])  # it takes one
            if session.get_providers()[0] == rtx[0].ep_name:
                return session, chosen
        except BundleError as error:  # another provider may be here, or says what is missing
            logger.warning("%s does not start: %s", rtx[0].ep_name, telling_line(error.found))
    tried = [name for name in ("tensorrt", "cuda") if device == name or (device == "auto" and name == "cuda")]
    for name in tried:
        provider = _PROVIDERS[name]
        if provider[0] in offered:
            chosen = precision or bundle.precision_for(name)
            reason = ""
            try:
                session = _start(ort, bundle, chosen, [provider, _CPU])
                if session.get_providers()[0] == provider[0]:
                    return session, chosen
            except BundleError as error:  # if it is the graph, the CPU will say so
                reason = f" ({telling_line(error.found)})"
            # The package lists providers as available even where their libraries or a driver are missing.
            fall_back(f"onnxruntime offers {provider[0]} but could not start it{reason}", device, strict=strict)
        elif device == name:
            fall_back(f"the onnxruntime here has no {provider[0]} ({', '.join(offered)})", device, strict=strict)
    if device == "tensorrt":
        return _open_session(bundle, precision, "auto", strict=False)
    chosen = precision or bundle.precision_for("cpu")
    return _start(ort, bundle, chosen, [_CPU]), chosen


def _rtx_devices(ort: Any) -> list[Any]:
    """The GPUs for which ONNX Runtime's plug-in of TensorRT for RTX is installed and starts."""
    if importlib.util.find_spec(RTX_PLUGIN) is None:
        return []
    try:
        plugin = importlib.import_module(RTX_PLUGIN)
        name = plugin.get_ep_name()
        if name not in [device.ep_name for device in ort.get_ep_devices()]:  # once in a process
            ort.register_execution_provider_library(name, plugin.get_library_path())
        return [device for device in ort.get_ep_devices() if device.ep_name == name]
    except Exception as error:  # ORT's own classes share no base; without a driver it does not load
        logger.info("%s does not load: %s", RTX_PLUGIN, telling_line(str(error)))
        return []


def _start(
    ort: Any, bundle: Bundle, precision: Precision, providers: list[Any] | None, devices: Sequence[Any] = ()
) -> Any:
    """A session on providers that ONNX Runtime has built in, or on the devices of a plug-in."""
    model = bundle.model(precision)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY  # what matters is raised below, in our words
    # Weights in a file beside the graph would be no part of what its hash says. Older releases look beside it whatever
    # they are told, unless they are given the content, which takes twice as long to load.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    told_where = tuple(map(int, ort.__version__.split(".")[:2])) >= _LOOKS_WHERE_TOLD
    opens_it = readable(model) == str(model)  # it takes no path that is not UTF-8
    try:
        if devices:
            options.add_provider_for_devices(devices, {})
        source = model if told_where and opens_it else model.read_bytes()
        return ort.InferenceSession(source, sess_options=options, providers=providers, enable_fallback=0)
    except Exception as error:  # ORT's own classes share no base
        reason = first_line(error)
        if "NOT_IMPLEMENTED" in reason and precision == "bf16":
            raise BundleError(
                f"{model} does not run here: ONNX Runtime has no bf16 on CPUs", expected="fp32, fp16 or int8"
            ) from error
        raise BundleError(f"{model} cannot be loaded ({reason})", expected="an ONNX graph", command=_AGAIN) from error


def has_tensorrt_provider() -> bool:
    """Whether ONNX Runtime is here and offers TensorRT in either flavour, which does not yet say that it starts."""
    try:
        ort = import_runtime()
    except MissingExtraError:
        return False
    return _PROVIDERS["tensorrt"][0] in ort.get_available_providers() or bool(_rtx_devices(ort))


def import_runtime() -> Any:
    """ONNX Runtime, kept from writing to stderr on its own.

    Raises:
        MissingExtraError: it is not installed, or not whole.
    """
    try:
        import onnxruntime

        onnxruntime.set_default_logger_severity(_FATAL_ONLY)  # a provider that does not start is told in our words
    except (ImportError, AttributeError) as error:  # the second of a folder that lost its files
        raise MissingExtraError(
            f"onnxruntime cannot be imported ({error})", command='pip install "mimco-deploy[cpu]"'
        ) from error
    if _PROVIDERS["cuda"][0] in onnxruntime.get_available_providers() and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # prints what it does not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installs them, beside the driver
    return onnxruntime
