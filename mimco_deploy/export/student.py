"""From weights to an eval module that takes pixels and gives embeddings: everything that the graph will hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.errors import CheckpointError, ConfigError
from mimco_deploy.serving.scan import readable
from mimco_deploy.training.augment import ToInput
from mimco_deploy.training.backbone import Backbone, weights_hash
from mimco_deploy.training.checkpoint import Checkpoint, is_checkpoint, load_encoder, read_checkpoint
from mimco_deploy.training.method_config import Pooling
from mimco_deploy.training.published import load_teacher

_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
"""What architectures raise for an input that is not theirs."""


class EncoderModule(nn.Module):
    """Normalisation, backbone, pooling and L2, in eval mode and float32.

    Args:
        backbone: trained.
        pooling: `mean` or `cls`, as its loss trained it.
        with_patches: whether the patch tokens are a second output.
    """

    def __init__(self, backbone: Backbone, pooling: str, *, with_patches: bool = False) -> None:
        super().__init__()
        self.backbone = backbone.float()
        self.to_input = ToInput(backbone.config)
        self.pooling = pooling
        self.with_patches = with_patches
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """uint8 [B, H, W, 3] → float32 [B, D], L2-normalised; with patches also float32 [B, L, width]."""
        pixels = image.float().permute(0, 3, 1, 2)  # TensorRT moves no bytes: float first
        features = self.backbone(self.to_input(pixels))
        embedding = F.normalize(features.pooled(self.pooling), dim=1)
        return (embedding, features.patches) if self.with_patches else embedding


@dataclass(frozen=True)
class Source:
    """Trained weights, and what is known of them."""

    backbone: Backbone
    pooling: Pooling
    weights: str
    """Where they come from, in words that mean something elsewhere: no path."""
    teacher: str = "none"
    """Where the teacher behind them comes from."""
    recipe: Mapping[str, str] | None = None
    """How they were trained, for the model card."""
    start: str = ""
    """What their training started as; empty where it was at random, or as the teacher."""


def from_checkpoint(checkpoint: Checkpoint) -> Source:
    """The encoder of a run.

    Raises:
        CheckpointError: the weights are missing or do not fit.
    """
    backbone, pooling = load_encoder(checkpoint)
    config = checkpoint.config
    run, optim = config.run, config.optim
    recipe = {
        "Method": f"{config.method.name} ({checkpoint.stage})",
        "Trained": f"{checkpoint.step} of {checkpoint.total_steps} optimiser steps of {run.global_batch_size} images; "
        f"{run.epochs} epochs were planned",
        "Optimiser": f"AdamW, base lr {optim.base_lr:g} for 256 images, weight decay {optim.weight_decay:g}",
        "Data": f"unlabelled pictures of the one who trained it; fingerprint of the corpus {checkpoint.corpus[:16]}",
    }
    weights = f"mimco {checkpoint.stage}, step {checkpoint.step} of {checkpoint.total_steps}"
    start = checkpoint.start.weights if checkpoint.start is not None else ""
    return Source(backbone, pooling, weights, _teacher_of(checkpoint), recipe, start)


def from_model(name: str) -> Source:
    """A model that others trained, or a checkpoint by its folder.

    Args:
        name: `timm/NAME`, a folder that timm wrote, a file of published weights; see `load_teacher`.

    Raises:
        CheckpointError: there is none, or it cannot be loaded in full.
    """
    path = Path(name)
    if is_checkpoint(path):
        raise CheckpointError(f"{name} is a checkpoint of mimco's", expected=f"--checkpoint {name}")
    if path.is_dir() and _is_of_a_stage(path.resolve().parent):  # which alone tells the teacher and what was trained
        raise CheckpointError(
            f"{name} lies in a checkpoint of mimco's", expected=f"--checkpoint {path.parent}, or a copy elsewhere"
        )
    backbone, pooling = load_teacher(name, to_train=False)
    _try_out(backbone, name)
    return Source(backbone, pooling, readable(path.resolve().name) if path.exists() else name)


def _is_of_a_stage(folder: Path) -> bool:
    try:
        read_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def resize(backbone: Backbone, image_size_px: int) -> None:
    """Make an encoder take pictures of another size.

    Raises:
        ConfigError: the architecture does not take that size.
    """
    own, name, body = backbone.config.image_size_px, backbone.config.name, backbone.body
    if image_size_px == own:
        return
    expected = f"{own} px, its own: leave --image-size out"
    if hasattr(body, "patch_embed") and not hasattr(body, "set_input_size"):
        raise ConfigError(f"{name} at {image_size_px} px: mimco builds it at its own size only", expected=expected)
    try:
        backbone.resize(image_size_px)
        _encode_one(backbone)
    except _FAILURES as error:
        raise ConfigError(f"{name} does not take {image_size_px} px: {_line(error)}", expected=expected) from error


def _try_out(backbone: Backbone, name: str) -> None:
    try:
        _encode_one(backbone)
    except _FAILURES as error:
        raise CheckpointError(f"{name} as an encoder: {_line(error)}", expected="a model that gives one map") from error


def _encode_one(backbone: Backbone) -> None:
    """A black image: architectures of timm differ in more ways than their descriptions tell."""
    side = backbone.config.image_size_px
    with torch.inference_mode():
        backbone.eval()(torch.zeros(1, 3, side, side))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def fingerprint(module: EncoderModule) -> str:
    """SHA-256 over all that decides an embedding: weights, architecture, pooling and geometry."""
    backbone = module.backbone
    geometry = backbone.geometry._asdict()
    if geometry["crop_mode"] == "center":  # as all had before it was one of several
        del geometry["crop_mode"]
    contract = {**asdict(backbone.config), **geometry, "pooling": module.pooling}
    if backbone.built_with:
        contract["built_with"] = backbone.built_with
    weights = weights_hash(backbone.state_dict())
    return hashlib.sha256(f"{json.dumps(contract, sort_keys=True)}\n{weights}".encode()).hexdigest()


def _teacher_of(checkpoint: Checkpoint) -> str:
    """The teacher by its weights: a path would mean nothing where the bundle goes."""
    prefix = "teacher."
    state = {key: value for key, value in checkpoint.load_model().items() if key.startswith(prefix)}
    if not state or checkpoint.teacher is None:
        return "none"
    return f"{checkpoint.teacher.backbone.name}, weights with SHA-256 {weights_hash(state)}"
