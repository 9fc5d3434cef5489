"""Every name of TensorRT that mimco uses exists in the real bindings of 10, 11 and RTX. Names, not behaviour.

The bindings are small wheels; the libraries behind them, which cannot be had everywhere, are replaced by ones that give
the few functions that an import needs. What is used is read off the code itself.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mimco_deploy
from mimco_deploy.serving.trt import has_rtx

PACKAGE = Path(mimco_deploy.__file__).parent
# File → the name a TensorRT object goes by there → its class.
OBJECTS = {
    "export/to_tensorrt.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "layer": "ILayer",
        "parser": "OnnxParser",
        "problem": "ParserError",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "measured": "ITimingCache",
    },
    "serving/engine_types.py": {"engine": "ICudaEngine"},
    "serving/encoders/tensorrt.py": {
        "self._runtime": "Runtime",
        "self._engine": "ICudaEngine",
        "context": "IExecutionContext",
        "config": "IRuntimeConfig",
    },
    "serving/trt.py": {},
}
RESULTS = {  # of calls that are chained, and of attributes
    "builder.create_network": "INetworkDefinition",
    "layer.get_output": "ITensor",
    "engine.create_engine_inspector": "EngineInspector",
    "trt.Runtime": "Runtime",
    "serialize": "IHostMemory",
    "layer.type": "LayerType",
    "dtype": "DataType",
}
RTX_ONLY = {"IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability", "ComputeCapability"}
RTX_ONLY |= {"ComputeCapability.CURRENT", "IRuntimeConfig.cuda_graph_strategy"}
RTX_ONLY |= {"CudaGraphStrategy", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE"}
ENUMS = {
    "LayerType": ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "CONSTANT"),
    "DataType": ("FLOAT", "HALF", "BF16"),
}
OVERRIDES = {"IProgressMonitor": ("phase_start", "phase_finish", "step_complete"), "ILogger": ("log",)}
STUB = "#define STUB(name) void *name(void) { return 0; }\n" + " ".join(
    f"STUB({name})"
    for name in (
        *("createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL"),
        *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
        *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"),
    )
)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
CHECK = """
import json, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "tensorrt-rtx":
    from mimco_deploy.serving.trt import load_trt
    trt = load_trt("tensorrt-rtx")
else:
    import tensorrt_bindings as trt
missing = []
for name, words in json.load(sys.stdin).items():
    found = trt
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None or any(word not in (found.__doc__ or "") for word in words):
        missing.append(name)
print(json.dumps([trt.__version__, missing]))
"""


def names_used() -> dict[str, list[str]]:
    """Dotted name → keyword arguments it is called with."""
    used: dict[str, list[str]] = {f"{enum}.{member}": [] for enum, members in ENUMS.items() for member in members}
    used.update({f"{base}.{name}": [] for base, names in OVERRIDES.items() for name in names})
    for file, objects in OBJECTS.items():
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        keywords = {id(call.func): [word.arg for word in call.keywords if word.arg] for call in calls(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (name := dotted(node, objects)):
                used.setdefault(name, []).extend(keywords.get(id(node), []))
    return used


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def dotted(node: ast.Attribute, objects: dict[str, str]) -> str:
    """`Class.attribute` of an access to TensorRT, or nothing."""
    owner = ast.unparse(node.value)
    if owner == "trt" and not node.attr.startswith("__"):
        return node.attr
    if owner.startswith("trt.") and "(" not in owner:
        return f"{owner.removeprefix('trt.')}.{node.attr}"
    kind = objects.get(owner) or next(
        (RESULTS[made] for made in RESULTS if f"{made}(" in owner and owner.endswith(")")), ""
    )
    return f"{kind}.{node.attr}" if kind else ""


def missing_in(
    folder: Path, flavour: str, names: dict[str, list[str]], libraries: Path | None
) -> tuple[str, list[str]]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries or "")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(folder), flavour],
        input=json.dumps(names),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, missing = json.loads(done.stdout)
    return version, missing


def test_the_list_holds_what_the_code_is_known_to_use() -> None:
    names = names_used()
    known = {
        *("Builder.build_serialized_network", "OnnxParser.parse", "ParserError.desc", "ITensor.dtype"),
        *("IBuilderConfig.progress_monitor", "Runtime.deserialize_cuda_engine", "IExecutionContext.execute_async_v3"),
        *("NetworkDefinitionCreationFlag.STRONGLY_TYPED", "LayerInformationFormat.JSON", "ILogger.ERROR"),
        *("ICudaEngine.get_tensor_shape", "MemoryPoolType.WORKSPACE", "ITimingCache.serialize"),
    }
    assert known <= set(names)
    assert set(names["IBuilderConfig.set_timing_cache"]) == {"ignore_mismatch"}
    assert len(names) > 45


@pytest.mark.install
@pytest.mark.parametrize(
    ("package", "major"), [("tensorrt-cu12-bindings>=10,<11", "10"), ("tensorrt-cu13-bindings>=11,<12", "11")]
)
def test_every_name_is_in_tensorrt(tmp_path: Path, package: str, major: str) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to stand in for TensorRT's libraries")
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "bindings"),
        package,
    ]
    subprocess.run(fetch, check=True, capture_output=True)
    (tmp_path / "stub.c").write_text(STUB, encoding="utf-8")
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(tmp_path / name), str(tmp_path / "stub.c")],
            check=True,
        )
    names = {name: words for name, words in names_used().items() if name not in RTX_ONLY}
    version, missing = missing_in(tmp_path / "bindings", "tensorrt", names, tmp_path)
    assert version.startswith(f"{major}.")
    assert missing == []
    _, missing = missing_in(tmp_path / "bindings", "tensorrt", {"Builder.build_everything": []}, tmp_path)
    assert missing == ["Builder.build_everything"]  # what is not there is found


def test_every_name_is_in_tensorrt_for_rtx(tmp_path: Path) -> None:
    if not has_rtx():
        pytest.skip('no TensorRT for RTX: pip install "mimco-deploy[tensorrt-rtx]"')
    _, missing = missing_in(tmp_path, "tensorrt-rtx", names_used(), None)
    assert missing == []


def test_every_name_is_in_cuda_python() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-python")
    used = set()
    for file in ("serving/encoders/tensorrt.py", "serving/trt.py"):
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        used |= {node.attr for node in nodes if re.match("cuda[A-Z]", node.attr)}
    assert {"cudaMalloc", "cudaHostAlloc", "cudaGraphLaunch", "cudaMemcpyKind", "cudaFreeHost", "cudaGetDevice"} <= used
    members = {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaStreamCaptureModeThreadLocal"}
    assert {name for name in used - members if not hasattr(runtime, name)} == set()
    assert {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"} <= set(runtime.cudaMemcpyKind.__members__)
    assert "cudaStreamCaptureModeThreadLocal" in runtime.cudaStreamCaptureMode.__members__
