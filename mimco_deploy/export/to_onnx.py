"""torch → ONNX, with a dynamic batch."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

OPSET = 18
"""The exporter's own; has LayerNormalization as one operator, and every runtime we serve takes it."""


def convert(module: nn.Module, image_size_px: int, path: Path) -> None:
    """Write `module` as an fp32 graph: `image` uint8 [batch, H, W, 3] → `embedding` float32 [batch, D].

    Args:
        module: on the CPU, in eval mode.
        image_size_px: H = W.
        path: file to write, weights inside.
    """
    example = torch.zeros(2, image_size_px, image_size_px, 3, dtype=torch.uint8)
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["embedding"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None, "dynamo=True returns the program"
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


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
