"""Stand-ins for the serving tests: a bundle that needs no torch, pictures, and an encoder that counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from mimco_deploy.bundle import MODEL_FILES, EncoderSpec, Golden, Precision, write_contract, write_golden
from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.engines import Engine, EngineSpec, write_plan, write_sidecar

if TYPE_CHECKING:
    import onnx

SIDE = 32
DIM = 16
_CELLS = 8  # the picture is averaged to 8 × 8 before the projection

Images = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]


def tiny_spec(fingerprint: str = "f" * 64) -> EncoderSpec:
    return EncoderSpec(
        architecture="tiny_projection",
        image_size_px=SIDE,
        crop_share=1.0,
        interpolation="bicubic",
        crop_mode="center",
        embedding_dim=DIM,
        pooling="mean",
        patch_grid=0,
        fingerprint=fingerprint,
        licence="CC0-1.0",
        weights_source="drawn at random",
        teacher_source="none",
        opset=18,
    )


def _weights(seed: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((_CELLS * _CELLS * 3, DIM)).astype(np.float32)


def tiny_embed(images: Images, seed: int = 0) -> Embeddings:
    """The graph of `tiny_bundle` in NumPy."""
    cell = SIDE // _CELLS
    cells = images.astype(np.float32).reshape(-1, _CELLS, cell, _CELLS, cell, 3).mean(axis=(2, 4))  # [B, 8, 8, 3]
    flat = cells.reshape(len(images), -1) / np.float32(127.5) - np.float32(1)
    features = flat @ _weights(seed)
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True), np.float32)


def tiny_graph(seed: int = 0, input_name: str = "image", batch: str | int = "batch") -> onnx.ModelProto:
    """Cast → average of cells → scale → projection → L2."""
    from onnx import TensorProto, helper, numpy_helper  # slow to import, and most tests need no graph

    cell = SIDE // _CELLS
    constants: dict[str, npt.NDArray[Any]] = {
        "cells": np.array([-1, _CELLS, cell, _CELLS, cell, 3], np.int64),
        "within": np.array([2, 4], np.int64),
        "flat": np.array([-1, _CELLS * _CELLS * 3], np.int64),
        "half": np.array(127.5, np.float32),
        "one": np.array(1.0, np.float32),
        "weights": _weights(seed),
    }
    nodes = [
        helper.make_node("Cast", [input_name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "cells"], ["grid"]),
        helper.make_node("ReduceMean", ["grid", "within"], ["means"], keepdims=0),
        helper.make_node("Reshape", ["means", "flat"], ["vector"]),
        helper.make_node("Div", ["vector", "half"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["centred"]),
        helper.make_node("MatMul", ["centred", "weights"], ["features"]),
        helper.make_node("LpNormalization", ["features"], ["embedding"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(input_name, TensorProto.UINT8, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, DIM])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def golden_images(count: int = 4) -> Images:
    return np.stack([np.asarray(draw(KINDS[number % len(KINDS)], number, SIDE)) for number in range(count)])


def tiny_bundle(
    folder: Path,
    *,
    seed: int = 0,
    fingerprint: str = "f" * 64,
    graph: onnx.ModelProto | None = None,
    golden: Golden | None = None,
) -> Path:
    """Write a bundle that `load_encoder` accepts, unless told to write another graph or other golden embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILES["fp32"]).write_bytes((graph or tiny_graph(seed)).SerializeToString())
    images = golden_images()
    write_golden(folder, golden or Golden(images, tiny_embed(images, seed)))
    write_contract(folder, tiny_spec(fingerprint))
    return folder


def write_engine(folder: Path, spec: EngineSpec, plan: bytes, layers: dict[str, int]) -> Engine:
    """Write a plan and its sidecar, as if it had been built and proved."""
    engine = write_plan(folder, spec, plan, layers)
    write_sidecar(engine)
    return engine


class CountingEncoder:
    """Embeds as the graph of `tiny_bundle` does and remembers how much it was asked."""

    provider = "NumPy"
    precision: Precision = "fp32"

    def __init__(self, seed: int = 0, fingerprint: str = "f" * 64) -> None:
        self.spec = tiny_spec(fingerprint)
        self.batches: list[int] = []
        self._seed = seed

    @property
    def pictures(self) -> int:
        return sum(self.batches)

    def embed(self, images: Images) -> Embeddings:
        self.batches.append(len(images))
        return tiny_embed(images, self._seed)


def as_encoder(encoder: CountingEncoder) -> Encoder:
    """Lets mypy check that the stand-in is an encoder."""
    return encoder


def noise(seed: int, side: int = SIDE) -> Image.Image:
    """A picture like no other: what the tests need many of, fast."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.NEAREST)


def save(path: Path, seed: int) -> Path:
    """Write picture number `seed` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed).save(path, "PNG")
    return path


def gallery(folder: Path, count: int, first: int = 0) -> list[Path]:
    return [save(folder / f"{number:04d}.png", number) for number in range(first, first + count)]


def below(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """The commands of a group by name, in its order."""
    context = click.Context(group)
    for name in group.list_commands(context):
        child = group.get_command(context, name)
        assert child is not None
        yield name, child
