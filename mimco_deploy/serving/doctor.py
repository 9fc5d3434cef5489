"""What this machine can run, tried rather than believed, and the next command for each problem.

Providers are started in processes of their own: one that crashes or hangs is a finding, not the end. Standard library
only, so that it runs where everything else is broken.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "problem"]

_TIMEOUT_S = 120
_PYTHON = (sys.executable, "-P", "-c")
"""Without the current folder, whose numpy.py is nobody's NumPy."""
_CUDA, _TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_REMOTE = "AzureExecutionProvider"
"""Runs nothing here: it sends graphs elsewhere."""
_BASE = {
    "click": "from click import command",
    "faiss-cpu": "from faiss import IndexFlat",
    "numpy": "from numpy import array",
    "pillow": "from PIL.Image import open",
    "rich": "from rich.table import Table",
}
"""Each with a line that runs where it is whole: what says that a package is there outlives its files."""
_EXTRAS = {
    "train": ("torch", "torchvision", "timm", "safetensors", "tensorboard"),
    "export": ("onnx", "onnxscript"),
}
_OTHERS = (
    *("tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    *("cuda-python", "cuda-bindings"),
)
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_LIBRARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "CUDA runtime": (("libcudart.so.13", "libcudart.so.12"), "cudaRuntimeGetVersion"),
    "cuDNN": (("libcudnn.so.9",), "cudnnGetVersion"),
    "TensorRT": (("libnvinfer.so.11", "libnvinfer.so.10"), "getInferLibVersion"),
}
# An ONNX graph of one Identity on float[1]: what a session can be made of without any package.
_GRAPH = (
    "080812003a370a100a017812017922084964656e746974791201675a0f0a0178"
    "120a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)
_PROBE = """
import json, sys
import onnxruntime
if hasattr(onnxruntime, "preload_dlls"):
    stdout, sys.stdout = sys.stdout, sys.stderr
    onnxruntime.preload_dlls()
    sys.stdout = stdout
graph = bytes.fromhex(sys.argv[1])
session = onnxruntime.InferenceSession(graph, providers=[sys.argv[2]], enable_fallback=0)
print(json.dumps(session.get_providers()))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    command: str = ""
    """The next one, where there is something to mend."""


def examine() -> list[Finding]:
    """Look at Python, packages, driver, libraries and providers."""
    driver = _driver()
    runtime, providers = _runtime(has_gpu=driver.state == "ok"), _providers()
    if runtime.state == "ok" and isinstance(providers, str):
        command = f"pip install --force-reinstall {runtime.found.split()[0]}"
        runtime = Finding(runtime.name, "problem", f"{runtime.found} cannot be imported: {providers}", command)
    findings = [_python(), *_packages(), runtime, driver, *_libraries()]
    return findings if isinstance(providers, str) else [*findings, *providers]


def _python() -> Finding:
    version = f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    return Finding("Python", "ok", version)


def _packages() -> list[Finding]:
    findings = []
    for name, line in _BASE.items():
        version = installed(name)
        tried = _run([*_PYTHON, f"{line}\nprint([])"])
        found = version or "not installed"
        if version and tried.answer is None:
            found = f"{version} cannot be imported: {tried.reason}"
        state: State = "ok" if version and tried.answer is not None else "problem"
        command = "pip install --force-reinstall mimco-deploy" if state == "problem" else ""
        findings.append(Finding(name, state, found, command))
    for extra, names in _EXTRAS.items():
        for name in names:
            version = installed(name)
            command = "" if version else f'pip install "mimco-deploy[{extra}]"'
            findings.append(Finding(name, "ok" if version else "absent", version or "not installed", command))
    for name in _OTHERS:
        version = installed(name)
        findings.append(Finding(name, "ok" if version else "absent", version or "not installed"))
    return findings


def _runtime(*, has_gpu: bool) -> Finding:
    versions = {name: version for name in _RUNTIMES if (version := installed(name))}
    wanted = "gpu" if has_gpu else "cpu"
    if len(versions) == 2:
        both = " and ".join(f"{name} {version}" for name, version in versions.items())
        command = f'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "mimco-deploy[{wanted}]"'
        return Finding("ONNX Runtime", "problem", f"{both}, which own the same import name", command)
    if not versions:
        return Finding("ONNX Runtime", "problem", "not installed", f'pip install "mimco-deploy[{wanted}]"')
    ((name, version),) = versions.items()
    if has_gpu and name == "onnxruntime":
        command = 'pip uninstall -y onnxruntime && pip install "mimco-deploy[gpu]"'
        return Finding("ONNX Runtime", "problem", f"{name} {version}, without CUDA on a machine with a GPU", command)
    return Finding("ONNX Runtime", "ok", f"{name} {version}")


def _driver() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, errors="replace", timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return Finding("NVIDIA driver", "absent", "no nvidia-smi")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("NVIDIA driver", "problem", f"nvidia-smi: {error}", "install the driver anew")
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode != 0 or not lines:
        return Finding("NVIDIA driver", "problem", lines[0] if lines else "nvidia-smi says nothing", "nvidia-smi")
    return Finding("NVIDIA driver", "ok", "; ".join(lines))


def _libraries() -> list[Finding]:
    findings = []
    for name, (files, function) in _LIBRARIES.items():
        for file in files:
            try:
                library = ctypes.CDLL(file)
            except OSError:
                continue
            findings.append(Finding(name, "ok", f"{file}, version {_version_of(library, function)}"))
            break
        else:
            findings.append(Finding(name, "absent", f"no {' or '.join(files)} where the loader looks"))
    return findings


def _version_of(library: ctypes.CDLL, function: str) -> int:
    asked: Callable[..., int] = getattr(library, function)
    if function == "cudaRuntimeGetVersion":
        version = ctypes.c_int(0)
        asked(ctypes.byref(version))
        return version.value
    return int(asked())


def _providers() -> list[Finding] | str:
    """What each provider says when a session is really made; listing them proves nothing.

    Where there are none to list, why.
    """
    asked = _run(
        [
            sys.executable,
            "-P",
            "-c",
            "import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))",
        ]
    )
    if asked.answer is None:
        return asked.reason
    found = {name: _provider(name) for name in asked.answer if name != _REMOTE}
    without = found.get(_TENSORRT)
    if without is not None and without.state == "problem" and found.get(_CUDA, without).state == "ok":
        # The package lists it whether or not TensorRT is installed, and a GPU serves without.
        found[_TENSORRT] = Finding(_TENSORRT, "absent", without.found)
    return list(found.values())


def _provider(name: str) -> Finding:
    tried = _run([*_PYTHON, _PROBE, _GRAPH, name])
    if tried.answer is None:
        return Finding(name, "problem", tried.reason, _remedy(tried.reason))
    if tried.answer[0] != name:
        found = f"does not start, {tried.answer[0]} runs instead: {tried.reason}"
        return Finding(name, "problem", found, _remedy(tried.reason))
    return Finding(name, "ok", "a session runs on it")


@dataclass(frozen=True)
class _Tried:
    answer: list[str] | None
    """The JSON list that a command printed."""
    reason: str
    """What it wrote on stderr, or how it ended."""


def _run(command: list[str]) -> _Tried:
    try:
        done = subprocess.run(command, capture_output=True, errors="replace", timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _Tried(None, f"gives no answer ({error.__class__.__name__})")
    reason = telling_line(done.stderr)
    if done.returncode < 0:
        return _Tried(None, f"crashes with signal {-done.returncode}: {reason}")
    if done.returncode != 0:
        return _Tried(None, reason)
    return _Tried(json.loads(done.stdout.splitlines()[-1]), reason)


def telling_line(stderr: str) -> str:
    """The one line that tells the reason, among what a runtime writes."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    for pattern in (r"with error: (.+)", r"(Please install [^,.]+)", r"(CUDA failure.+)", r"(\w*Error.+)"):
        if match := re.search(pattern, plain):
            return match[1].strip()[:200]
    lines = [line for line in plain.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"


def _remedy(reason: str) -> str:
    if "nvinfer" in reason or "TensorRT" in reason:
        return "install TensorRT's libraries, or use --device cuda"
    if re.search(r"lib(cu|nv)\w+\.so", reason):
        return 'pip install "onnxruntime-gpu[cuda,cudnn]"'
    if "driver" in reason or "CUDA failure" in reason:
        return "install an NVIDIA driver of this CUDA version or newer"
    return "use --device cpu"


def installed(package: str) -> str:
    """The version of a package, or an empty text."""
    import importlib.metadata  # takes a while, and an encoder that starts needs none of it

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
