"""Which types the layers of a built engine have, as TensorRT's inspector tells: asked for fp16, is it?"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mimco_deploy.bundle import Precision
from mimco_deploy.errors import EngineError

TYPES: dict[Precision, str] = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
"""What an engine can be made of, and TensorRT's name of the type."""
LISTED = 5
_PRODUCT = re.compile("gemm|conv|matrix|matmul", re.IGNORECASE)
_NAMES: dict[Precision, set[str]] = {
    "fp32": {"float", "fp32"},
    "fp16": {"half", "fp16"},
    "bf16": {"bf16", "bfloat16"},
}
_FLOATS = set().union(*_NAMES.values())


def check_engine_types(trt: Any, engine: Any, precision: Precision) -> None:
    """Read the types back from an engine, which takes a GPU that it runs on.

    Raises:
        EngineError: see `check_built_types`.
    """
    told = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    check_built_types(told, precision)


def check_built_types(told: str, precision: Precision) -> None:
    """Whether the products of a built engine multiply in the type asked for.

    A product goes by what it takes, for a conversion that follows it may be part of it; by what it gives, where the
    inspector does not tell. Layers that were fused count by what they give, and there must be one of the type.

    Args:
        told: what the engine inspector says, JSON.
        precision: asked for.

    Raises:
        EngineError: a product is of another type, or nothing in the engine is of this one; lists layers.
    """
    entries = [entry for entry in json.loads(told).get("Layers", []) if isinstance(entry, dict)]
    gives = [_types(entry, "Outputs") for entry in entries]
    names, wrong = _NAMES[precision], []
    for entry, given in zip(entries, gives, strict=True):
        if _PRODUCT.search(str(entry.get("LayerType"))):
            multiplied = _types(entry, "Inputs") & _FLOATS or given
            if not multiplied & names:
                wrong.append(f"{entry.get('Name')} is {'/'.join(sorted(multiplied))}")
    if wrong or not any(given & names for given in gives):
        listed = ", ".join(sorted(wrong)[:LISTED]) or f"none of {len(entries)} layers is"
        raise EngineError(f"asked for {precision}, but in the built engine {listed}", expected=TYPES[precision])


def _types(entry: Mapping[str, Any], side: str) -> set[str]:
    """The words in which the inspector tells the types of a layer's inputs or outputs."""
    told = (str(value) for tensor in entry.get(side, []) for key, value in tensor.items() if "type" in key.lower())
    return {word for text in told for word in text.lower().split()}
