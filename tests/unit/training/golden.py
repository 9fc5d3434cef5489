"""Reading the authors' numbers, and comparing a whole small training run with theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Arrays = Mapping[str, Any]
Rename = Callable[[str], str | None]
"""The authors' name of a parameter or buffer → ours; None for a constant that timm computes anew."""


def load(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays}


def sizes_of(arrays: Arrays) -> dict[str, Any]:
    sizes: dict[str, Any] = json.loads(str(arrays["config_json"]))
    return sizes


def deviations_of(arrays: Arrays) -> dict[str, list[float]]:
    """Of each array: how far float32 is from float64 in the authors' code, and the largest value."""
    deviations: dict[str, list[float]] = json.loads(str(arrays["f64_dev_json"]))
    return deviations


def leaf(array: Any) -> Tensor:
    return torch.from_numpy(array).requires_grad_()


def renamed(arrays: Arrays, group: str, rename: Rename) -> dict[str, str]:
    """Our name → the authors' whole key, for all of `init/`, `grad0/` or `final/`."""
    keys = [key for key in arrays if key.startswith(f"{group}/")]
    return {ours: key for key in keys if (ours := rename(key.removeprefix(f"{group}/"))) is not None}


def assert_gradients(method: nn.Module, arrays: Arrays, rename: Rename) -> None:
    """Step 0's gradients agree, and exactly the authors' parameters have one."""
    deviations = deviations_of(arrays)
    ours = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.grad is not None}
    theirs = renamed(arrays, "grad0", rename)
    assert set(ours) == set(theirs)
    for name, official in theirs.items():
        error, size = deviations[official]
        np.testing.assert_allclose(
            ours[name].reshape(arrays[official].shape),
            arrays[official],
            rtol=1e-4,
            atol=1e-6 * size + 8 * error,
            err_msg=name,
        )


def assert_final(
    state: Mapping[str, Tensor], arrays: Arrays, rename: Rename, convert: Callable[[str, Any], Any] = lambda _, x: x
) -> None:
    """The state after three steps is the authors', within what their own code in float64 differs by."""
    deviations = deviations_of(arrays)
    theirs = renamed(arrays, "final", rename)
    assert set(theirs) == set(state)
    for name, official in theirs.items():
        tolerance = 1e-5 + 4 * deviations.get(official, [0.0])[0]
        wanted = convert(name, arrays[official])
        np.testing.assert_allclose(
            state[name].reshape(wanted.shape), wanted, rtol=1e-5, atol=tolerance, err_msg=official
        )
