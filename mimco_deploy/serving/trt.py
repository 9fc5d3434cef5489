"""TensorRT's two flavours as one module object, `trt`: their Python APIs are the same but for a few names.

`tensorrt` is the one for data-centre and other NVIDIA GPUs; `tensorrt-rtx` that for RTX GPUs, which also builds engines
where there is no GPU. Standard library only; neither is imported before it is asked for.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mimco_deploy.errors import MissingExtraError

logger = logging.getLogger(__name__)

Flavour = Literal["tensorrt", "tensorrt-rtx"]
_NO_DEVICE = 100
"""CUDA's `cudaErrorNoDevice`."""
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""Of ONNX Runtime; it carries the libraries."""
_RTX_LIBRARIES = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")


@dataclass(frozen=True)
class Gpu:
    """The GPU to build for and run on."""

    name: str
    compute_capability: int
    """Ten times the version: 89 for 8.9."""


def load_trt(flavour: Flavour) -> Any:
    """The module of a flavour.

    Raises:
        MissingExtraError: it is not installed or its libraries do not load; says what can be done here.
    """
    command = f'pip install "mimco-deploy[{flavour}]"'
    if flavour == "tensorrt" and has_rtx():
        command += ", or build for RTX GPUs here: mimco export --format tensorrt-rtx --compute-capability 89"
    try:
        return importlib.import_module("tensorrt") if flavour == "tensorrt" else _load_rtx()
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingExtraError(f"{flavour} cannot be imported ({reason})", command=command) from error


def has_rtx() -> bool:
    """Whether TensorRT for RTX is installed, in either of its two packagings."""
    bindings = importlib.util.find_spec("tensorrt_rtx_bindings") and importlib.util.find_spec(RTX_PLUGIN)
    return bool(importlib.util.find_spec("tensorrt_rtx") or bindings)


def load_cuda() -> Any:
    """cuda-python's binding of the CUDA runtime.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        command = 'pip install "mimco-deploy[tensorrt]"'
        raise MissingExtraError(f"cuda-python cannot be imported ({error})", command=command) from error


def gpu_here() -> Gpu | None:
    """The GPU that CUDA gives a program, by its own count where cuda-python is installed; None where there is none."""
    try:
        cuda = load_cuda()
    except MissingExtraError:
        return _gpu_by_driver()
    status, device = cuda.cudaGetDevice()
    properties: Any = None
    if int(status) == 0:
        status, properties = cuda.cudaGetDeviceProperties(device)
    if int(status) == _NO_DEVICE:
        return None
    if int(status) != 0:  # such as a driver too old for cuda-python: there may be a GPU, and using it will say why not
        return _gpu_by_driver()
    return Gpu(properties.name.rstrip(b"\0").decode(), 10 * properties.major + properties.minor)


def _gpu_by_driver() -> Gpu | None:
    """The first that the driver lists. It knows nothing of CUDA_VISIBLE_DEVICES."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
        name, capability = done.stdout.splitlines()[0].rsplit(",", 1)
        return Gpu(name.strip(), round(10 * float(capability)))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def new_log(trt: Any) -> Any:
    """A logger for `trt` that keeps errors, for our own words, and passes the rest to Python's at debug level."""

    class _Log(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT, from any of its threads."""
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            logger.debug("%s: %s", severity, message)

    return _Log()


def _load_rtx() -> Any:
    if importlib.util.find_spec("tensorrt_rtx"):
        return importlib.import_module("tensorrt_rtx")
    plugin = importlib.util.find_spec(RTX_PLUGIN)
    if plugin is not None:  # carries the libraries under their full version; loaded, they satisfy the bindings
        libraries = [
            library
            for pattern in _RTX_LIBRARIES
            for folder in plugin.submodule_search_locations or []
            for library in sorted(Path(folder).glob(pattern))
        ]
        for library in libraries:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        bindings = importlib.import_module("tensorrt_rtx_bindings")
        _check_same_version(str(bindings.__version__), [library.name.split(".so.")[1] for library in libraries])
        return bindings
    return importlib.import_module("tensorrt_rtx_bindings")


def _check_same_version(bindings: str, libraries: list[str]) -> None:
    """Two packages that pip may bring apart; an engine is of the library's version, and we state that of the bindings.

    Raises:
        ImportError: they are apart.
    """
    whole = [library for library in libraries if library.count(".") == 2]  # links have the first number alone
    if other := [library for library in whole if library.split(".") != bindings.split(".")[:3]]:
        raise ImportError(f"its bindings are of {bindings} and its libraries of {other[0]}; upgrade both together")
