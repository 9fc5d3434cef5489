"""torch → ONNX, with a dynamic batch."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch

from mimco_deploy.errors import ConfigError
from mimco_deploy.export.student import EncoderModule

OPSET = 22
"""The first in which convolutions take bfloat16. It has LayerNormalization and Gelu as one operator each. Attention as
one comes with 23, but TensorRT for RTX 1.7 builds no fp32 engine of that (docs/decisions.md)."""
_MAX_BYTES = (1 << 31) - (1 << 24)
"""Of weights in one file, which protobuf limits to 2 GiB."""


def convert(module: EncoderModule) -> onnx.ModelProto:
    """The fp32 graph: `image` uint8 [batch, H, W, 3] → `embedding` float32 [batch, D], and `patches` where asked for.

    Args:
        module: on the CPU, in eval mode.

    Raises:
        ConfigError: the weights are too large for one file, or torch cannot export the architecture.
    """
    config = module.backbone.config
    size = sum(value.nbytes for value in module.state_dict().values())
    if size > _MAX_BYTES:
        raise ConfigError(f"{size / 2**30:.1f} GiB of weights", expected="at most 2 GiB, which one ONNX file holds")
    example = torch.zeros(2, config.image_size_px, config.image_size_px, 3, dtype=torch.uint8)
    with _quiet_exporter(), _plain_attention(module):
        try:
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["embedding", "patches"] if module.with_patches else ["embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ConfigError(f"torch cannot export {config.name}: {reason}") from error
    assert program is not None, "dynamo=True returns the program"
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where in whose files each line of Python stood
    onnx.checker.check_model(model, full_check=True)
    return model


@contextlib.contextmanager
def _plain_attention(module: EncoderModule) -> Iterator[None]:
    """Let blocks of timm write attention out: torch exports its own fused one for four axes only."""
    fused = [part for part in module.modules() if getattr(part, "fused_attn", False) is True]
    for part in fused:
        part.fused_attn = False  # type: ignore[assignment]  # a flag, of modules that are timm's own
    try:
        yield
    finally:
        for part in fused:
            part.fused_attn = True  # type: ignore[assignment]


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's deprecation notices about its own insides from people who cannot act on them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
