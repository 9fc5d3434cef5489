"""A model repository for Triton Inference Server: `config.pbtxt` and the graph or the plan."""

from __future__ import annotations

from pathlib import Path

from mimco_deploy.atomic import write_bytes
from mimco_deploy.bundle import Bundle
from mimco_deploy.errors import ConfigError
from mimco_deploy.serving.encoders.onnx import INPUT_NAME, OUTPUT_NAME, PATCHES_NAME

MODEL_NAME = "mimco_encoder"


def write_repository(folder: Path, bundle: Bundle, model: Path, max_batch: int) -> Path:
    """Write `<folder>/mimco_encoder/` with its first version; other versions that are there stay.

    Args:
        folder: the repository.
        bundle: whose encoder it is.
        model: a `.plan` or an `.onnx` file of it.
        max_batch: largest batch to serve.

    Returns:
        The model's folder.

    Raises:
        ConfigError: another thing than a model of Triton's is there.
    """
    target = folder / MODEL_NAME
    if target.exists() and not (target / "config.pbtxt").is_file() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"{target} is there and is no model of Triton's", expected="a new folder")
    spec = bundle.spec
    is_plan = model.suffix == ".plan"
    side = spec.image_size_px
    outputs = [_tensor(OUTPUT_NAME, "TYPE_FP32", [spec.embedding_dim])]
    if spec.patch_grid:
        outputs.append(_tensor(PATCHES_NAME, "TYPE_FP32", [spec.patch_grid**2, _patch_width(bundle)]))
    lines = [
        f'name: "{MODEL_NAME}"',
        f'platform: "{"tensorrt_plan" if is_plan else "onnxruntime_onnx"}"',
        f"max_batch_size: {max_batch}",
        f"input [ {_tensor(INPUT_NAME, 'TYPE_UINT8', [side, side, 3])} ]",
        f"output [ {', '.join(outputs)} ]",
        "dynamic_batching { max_queue_delay_microseconds: 2000 }",
    ]
    (target / "1").mkdir(parents=True, exist_ok=True)
    write_bytes(target / "1" / ("model.plan" if is_plan else "model.onnx"), model.read_bytes())
    write_bytes(target / "config.pbtxt", ("\n".join(lines) + "\n").encode())
    return target


def _patch_width(bundle: Bundle) -> int:
    import onnx  # which an engine of a bundle without patches needs not

    outputs = {value.name: value for value in onnx.load(bundle.model("fp32")).graph.output}
    return int(outputs[PATCHES_NAME].type.tensor_type.shape.dim[2].dim_value)


def _tensor(name: str, kind: str, dims: list[int]) -> str:
    return f'{{ name: "{name}" data_type: {kind} dims: [ {", ".join(map(str, dims))} ] }}'
