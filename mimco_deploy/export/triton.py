"""A model repository for Triton Inference Server: `config.pbtxt` and the graph or the plan."""

from __future__ import annotations

import shutil
from pathlib import Path

from mimco_deploy.atomic import staged_dir
from mimco_deploy.bundle import EncoderSpec
from mimco_deploy.serving.encoders.onnx import INPUT_NAME, OUTPUT_NAME, PATCHES_NAME

MODEL_NAME = "mimco_encoder"


def write_repository(folder: Path, spec: EncoderSpec, model: Path, max_batch: int, patch_width: int = 0) -> Path:
    """Write `<folder>/mimco_encoder/` with its first version.

    Args:
        folder: the repository.
        spec: of the bundle.
        model: a `.plan` or an `.onnx` file.
        max_batch: largest batch to serve.
        patch_width: of patch tokens, where the graph gives them.

    Returns:
        The model's folder.
    """
    is_plan = model.suffix == ".plan"
    side = spec.image_size_px
    outputs = [_tensor(OUTPUT_NAME, "TYPE_FP32", [spec.embedding_dim])]
    if spec.patch_grid:
        outputs.append(_tensor(PATCHES_NAME, "TYPE_FP32", [spec.patch_grid**2, patch_width]))
    lines = [
        f'name: "{MODEL_NAME}"',
        f'platform: "{"tensorrt_plan" if is_plan else "onnxruntime_onnx"}"',
        f"max_batch_size: {max_batch}",
        f"input [ {_tensor(INPUT_NAME, 'TYPE_UINT8', [side, side, 3])} ]",
        f"output [ {', '.join(outputs)} ]",
        "dynamic_batching { max_queue_delay_microseconds: 2000 }",
    ]
    target = folder / MODEL_NAME
    with staged_dir(target) as staging:
        (staging / "1").mkdir()
        shutil.copyfile(model, staging / "1" / ("model.plan" if is_plan else "model.onnx"))
        (staging / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _tensor(name: str, kind: str, dims: list[int]) -> str:
    return f'{{ name: "{name}" data_type: {kind} dims: [ {", ".join(map(str, dims))} ] }}'
