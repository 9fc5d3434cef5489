"""fp32 → int8, by ONNX Runtime's own tools.

Two ways, of which the faster that passes its proof ships: *dynamic*, which scales activations as they come, and
*static*, which scales them by what calibration pictures showed.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from mimco_deploy.serving.encoders.onnx import INPUT_NAME

Way = Literal["dynamic", "static"]
_BATCH = 8
_STATIC_TYPES = ["Conv", "Gemm", "MatMul"]
_DYNAMIC_TYPES = ["Gemm", "MatMul"]
"""Without convolutions: their dynamic form is slower than fp32 on CPUs."""


def quantize(model: Path, target: Path, calibration: npt.NDArray[np.uint8] | None) -> Way | None:
    """Write an int8 graph of `model`.

    Args:
        model: the fp32 graph.
        target: file to write.
        calibration: pictures [N, H, W, 3] for the static way; None for the dynamic one.

    Returns:
        Which way; None where the graph has nothing that it quantises.
    """
    with _quiet_tools(), tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copyfile(model, Path(folder) / "model.onnx"))  # the tools take no path that is not UTF-8
        if calibration is None:
            if not _has_products_with_weights(model):
                return None
            quantize_dynamic(
                model, target, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=_DYNAMIC_TYPES
            )
            return "dynamic"
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(model, prepared, skip_symbolic_shape=True)  # folds batch norms into convolutions
        quantize_static(
            prepared,
            target,
            _Pictures(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_STATIC_TYPES,
        )
        return "static"


class _Pictures(CalibrationDataReader):  # type: ignore[misc]  # the tool's class has no types
    """Gives calibration pictures batch by batch."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self._batches = iter([images[start : start + _BATCH] for start in range(0, len(images), _BATCH)])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def _has_products_with_weights(path: Path) -> bool:
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer if len(numpy_helper.to_array(tensor).shape) == 2}
    return any(node.op_type in _DYNAMIC_TYPES and weights & set(node.input) for node in model.graph.node)


@contextlib.contextmanager
def _quiet_tools() -> Iterator[None]:
    """The tools advise on the root logger."""
    root = logging.getLogger()
    root.addFilter(_is_not_advice)
    handlers = list(root.handlers)
    for handler in handlers:
        handler.addFilter(_is_not_advice)
    try:
        yield
    finally:
        root.removeFilter(_is_not_advice)
        for handler in handlers:
            handler.removeFilter(_is_not_advice)


def _is_not_advice(record: logging.LogRecord) -> bool:
    return record.name != "root" or record.levelno >= logging.ERROR
