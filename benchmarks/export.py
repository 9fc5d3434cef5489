"""What the proof and the sidecar cost: export of an encoder against bare calls of the same libraries, in turns.

    python benchmarks/export.py [--model vit_small_patch16_224] [--rounds 3]

Prints one JSON line. `onnx`: `torch.onnx.export` alone, and `export_encoder` with its proof on drawn pictures.
`tensorrt_rtx`, where it is installed: parse and build alone, and `mimco export --format tensorrt-rtx`, imports
included in both. Each run is a process of its own; seconds are medians, with the least and the most; peak MiB the most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mimco_deploy.serving.doctor import installed
from mimco_deploy.serving.trt import has_rtx

COMMON = """
import logging, resource, sys, time, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
from pathlib import Path
folder = Path(sys.argv[1])
"""
WEIGHTS = """
import timm, torch
from timm.models import save_for_hf
torch.manual_seed(0)
save_for_hf(timm.create_model(sys.argv[2], num_classes=0), str(folder / "timm"))
"""
LOAD = """
from mimco_deploy.export.student import EncoderModule, from_model
source = from_model(str(folder / "timm"))
"""
BARE_ONNX = (
    LOAD
    + """
import torch
from mimco_deploy.export.to_onnx import OPSET
module = EncoderModule(source.backbone, source.pooling)
side = source.backbone.config.image_size_px
start = time.perf_counter()
program = torch.onnx.export(
    module, (torch.zeros(2, side, side, 3, dtype=torch.uint8),), dynamo=True, opset_version=OPSET, verbose=False,
    input_names=["image"], output_names=["embedding"], dynamic_shapes=({0: torch.export.Dim("batch")},))
program.save(folder / "bare.onnx")
"""
)
ONNX = (
    LOAD
    + """
from mimco_deploy.export.pipeline import ExportOptions, export_encoder
start = time.perf_counter()
export_encoder(source, folder / "encoder", ExportOptions(precisions=tuple(sys.argv[2:])))
"""
)
BARE_RTX = """
from mimco_deploy.serving.trt import load_trt
trt = load_trt("tensorrt-rtx")
log = trt.Logger(trt.Logger.INTERNAL_ERROR)
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
assert parser.parse_from_file(str(folder / "encoder/model.fp16.onnx"))
side = network.get_input(0).shape[1]
config, profile = builder.create_builder_config(), builder.create_optimization_profile()
profile.set_shape("image", *[(batch, side, side, 3) for batch in (1, 32, 256)])
config.add_optimization_profile(profile)
config.num_compute_capabilities = 2
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
config.set_compute_capability(trt.ComputeCapability.SM120, 1)
(folder / "bare.plan").write_bytes(builder.build_serialized_network(network, config))
"""
RTX = """
from mimco_deploy.cli import main
words = ["export", "--format", "tensorrt-rtx", "--compute-capability", "89,120", "--output", str(folder / "encoder")]
main(words, standalone_mode=False)
"""
REPORT = """
print(json.dumps([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def run(code: str, folder: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak MiB of a script in a fresh process; from its start unless it says otherwise."""
    script = f"import json, time\nstart = time.perf_counter()\n{COMMON}{code}{REPORT}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *arguments], capture_output=True, text=True, check=True
    )
    seconds, mib = json.loads(done.stdout.splitlines()[-1])
    return seconds, mib


def in_turns(scripts: dict[str, tuple[str, tuple[str, ...]]], folder: Path, rounds: int) -> dict[str, object]:
    """Median, least and most of each, and their ratios to the first."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in scripts}
    for _ in range(rounds):
        for name, (code, arguments) in scripts.items():
            for plan in (folder / "encoder/engines").glob("*"):
                plan.unlink()
            found[name].append(run(code, folder, *arguments))
    medians = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    first = next(iter(medians.values()))
    return {
        name: {
            "seconds": medians[name],
            "least": min(seconds for seconds, _ in runs),
            "most": max(seconds for seconds, _ in runs),
            "peak_mib": max(mib for _, mib in runs),
            "ratio": medians[name] / first,
        }
        for name, runs in found.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    names = ("torch", "timm", "onnx", "onnxruntime", "tensorrt-rtx-cu13-bindings")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(WEIGHTS, folder, options.model)
        exports = {"bare": (BARE_ONNX, ()), "fp32": (ONNX, ()), "fp32, fp16": (ONNX, ("fp16",))}
        result: dict[str, object] = {"onnx": in_turns(exports, folder, options.rounds)}
        if has_rtx():
            result["tensorrt_rtx"] = in_turns({"bare": (BARE_RTX, ()), "mimco": (RTX, ())}, folder, options.rounds)
            (plan,) = (folder / "encoder/engines").glob("*.plan")
            result["engine_over_graph_bytes"] = (
                plan.stat().st_size / (folder / "encoder/model.fp16.onnx").stat().st_size
            )
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    versions = {package: version for package in names if (version := installed(package))}
    print(json.dumps({"model": options.model, "rounds": options.rounds, **machine, "versions": versions, **result}))


if __name__ == "__main__":
    main()
