"""Exported graphs against torch on a GPU, all in one process and in turns; and the attention that training stands on.

    python benchmarks/encoder_gpu.py --encoder .mimco/encoder --source timm/vit_small_patch16_224 --batch 128 16
    python benchmarks/encoder_gpu.py --encoder .mimco/encoder --source timm/vit_small_patch16_224 --one-operator
    python benchmarks/encoder_gpu.py --attention

A run is from pictures in host memory to embeddings there. `mimco bench` measures the same in processes of their own;
here the clocks of the GPU are the same for all. The reference for neighbours is the fp32 graph. Prints one JSON line a
case. `--one-operator` adds each precision with the attention of a ViT as one operator, which ONNX Runtime has kernels
for from opset 23 on; the graphs of bundles have it written out. `--device cpu` is for trying the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimco_deploy.bundle import read_bundle
from mimco_deploy.export.torch_variants import torch_variants
from mimco_deploy.serving.agreement import compare
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.sample import draw_pictures

DRAWN = 48
BATCH, TOKENS = 256, 197
HEADS = ((12, 32), (6, 64))
"""Number and width: MoCo v3's ViT-S, and timm's."""


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Of each run, after one that does not count."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def encoders(options: argparse.Namespace) -> None:
    """Every precision of the bundle, and torch."""
    bundle, device = read_bundle(options.encoder), options.device
    spec = bundle.spec
    runs: dict[str, Callable[[Any], Any]] = {}
    for precision in bundle.precisions:
        if device == "cuda" or precision != "bf16":
            encoder = load_encoder(options.encoder, device, strict=True, precision=precision)
            runs[f"onnxruntime {precision}"] = encoder.embed
        if options.one_operator and (device == "cuda" or precision == "fp32"):
            graph = one_operator(onnx.load(bundle.model(precision)))
            runs[f"onnxruntime {precision}, one operator"] = run_graph(graph, device)
    for variant in torch_variants(spec, options.source, device):
        runs[f"{variant.backend} {variant.precision}"] = variant.load(*variant.arguments)[0]
    drawn = draw_pictures(DRAWN, *spec.geometry, seed=5)
    reference = runs["onnxruntime fp32"](drawn)
    for batch in options.batch:
        images = np.resize(drawn, (batch, *drawn.shape[1:]))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            seconds(lambda run=run, images=images: run(images), 2)  # type: ignore[misc]
        for _ in range(options.rounds):
            for name, run in runs.items():
                times[name] += seconds(lambda run=run, images=images: run(images), 6)  # type: ignore[misc]
        compiled = next(statistics.median(found) for name, found in times.items() if name.startswith("torch.compile"))
        for name, found in times.items():
            median = statistics.median(found)
            agreement = compare(runs[name](drawn), reference)
            report(
                {
                    "batch": batch,
                    "variant": name,
                    "images_per_s": round(batch / median, 1),
                    "p50_ms": round(1e3 * median, 3),
                    "low_high_ms": [round(1e3 * float(np.quantile(found, q)), 3) for q in (0.05, 0.95)],
                    "times torch.compile": round(compiled / median, 3),
                    "overlap": agreement.overlap,
                    "min_cosine": agreement.min_cosine,
                }
            )


def one_operator(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every softmax(q·kᵀ)·v of timm's ViT as one `Attention`, fed by a `Split` of the product that made all three.

    Args:
        model: as `mimco export` makes it, in any precision; the Casts around the softmax go too.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    users = {name: node for node in model.graph.node for name in node.input}  # the last, where there are several
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    new: dict[str, list[onnx.NodeProto]] = {}
    for softmax in [node for node in model.graph.node if node.op_type == "Softmax"]:
        scores = _before(makers, softmax, "MatMul")
        unpacked = _before(makers, scores, "Reshape")
        *_, three, heads, width = constants[unpacked.input[1]].tolist()
        joined = _after(users, softmax, "Reshape")  # the heads' results, side by side again
        if three != 3:
            raise SystemExit(f"{unpacked.name} is not a ViT's query, key and value: {three} × {heads} × {width}")
        qkv = [f"{joined.output[0]}.{part}" for part in "qkv"]
        new[joined.name] = [
            helper.make_node("Split", [unpacked.input[0]], qkv, axis=2, num_outputs=3),
            helper.make_node("Attention", qkv, joined.output, q_num_heads=heads, kv_num_heads=heads),
        ]
    nodes = [part for node in model.graph.node for part in new.get(node.name, [node])]
    needed, kept = {output.name for output in model.graph.output}, []
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    graph = helper.make_graph(kept[::-1], model.graph.name, model.graph.input, model.graph.output, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _before(makers: dict[str, onnx.NodeProto], node: onnx.NodeProto, kind: str) -> onnx.NodeProto:
    """The next operator of a kind on the way up, along first inputs."""
    node = makers[node.input[0]]
    return node if node.op_type == kind else _before(makers, node, kind)


def _after(users: dict[str, onnx.NodeProto], node: onnx.NodeProto, kind: str) -> onnx.NodeProto:
    """The next operator of a kind on the way down."""
    node = users[node.output[0]]
    return node if node.op_type == kind else _after(users, node, kind)


def run_graph(model: onnx.ModelProto, device: str) -> Callable[[Any], Any]:
    """On one provider alone."""
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
    if session.get_providers()[0] != provider:
        raise SystemExit(f"ONNX Runtime did not start {provider}")
    return lambda images: session.run(["embedding"], {"image": images})[0]


def attention(options: argparse.Namespace) -> None:
    """Forward, and forward with backward, of one layer in bf16 by each of torch's implementations."""
    for heads, width in HEADS:
        shape = (BATCH if options.device == "cuda" else 2, heads, TOKENS, width)
        q, k, v = (
            torch.randn(shape, device=options.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )

        def forward(q: Any = q, k: Any = k, v: Any = v) -> Any:
            result = F.scaled_dot_product_attention(q, k, v)
            wait(options.device)
            return result

        gradient = torch.randn_like(q)

        def both(q: Any = q, k: Any = k, v: Any = v, gradient: Any = gradient) -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)
            wait(options.device)

        for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            if options.device == "cpu" and kind != SDPBackend.FLASH_ATTENTION:
                continue
            with sdpa_kernel(kind):
                row = {
                    "heads": heads,
                    "width": width,
                    "backend": kind.name,
                    "forward_ms": 1e3 * statistics.median(seconds(forward, 50)),
                    "forward_backward_ms": 1e3 * statistics.median(seconds(both, 50)),
                }
            report(row)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def report(row: dict[str, Any]) -> None:
    """A line, with versions and the GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    print(json.dumps({"benchmark": "encoder_gpu", **row, "gpu": gpu, "versions": versions}), flush=True)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, help="a bundle with the precisions to measure")
    parser.add_argument("--source", help="the same weights for torch, as for `mimco export`")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--one-operator", action="store_true", help="the graphs with attention as one operator too")
    parser.add_argument("--attention", action="store_true", help="measure that instead")
    options = parser.parse_args()
    if options.attention:
        attention(options)
    elif options.encoder is None or options.source is None:
        parser.error("--encoder and --source, or --attention")
    else:
        encoders(options)


if __name__ == "__main__":
    main()
