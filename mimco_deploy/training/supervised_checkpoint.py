"""Checkpoints of runs with labels: one folder, replaced as a whole.

last/
├── state.json          format version, kind, step, settings, fingerprint of the corpus, rows of the log
├── classes.json        names of the classes, in the order of the head's outputs
├── model.safetensors   encoder and head
├── optimizer.pt        the optimiser's state, loaded with weights_only=True
└── timm/               of fine-tuning, the encoder alone: `mimco export --model …/last/timm`
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimco_deploy.atomic import current_dir
from mimco_deploy.errors import CheckpointError
from mimco_deploy.preprocess import CropMode, Interpolation
from mimco_deploy.training.backbone import CROP_SHARE, Backbone, save_as_timm
from mimco_deploy.training.checkpoint import written_whole
from mimco_deploy.training.finetune_config import FinetuneConfig, LinearConfig
from mimco_deploy.training.settings import from_document, to_document

FORMAT_VERSION = 1
KINDS: dict[str, type[FinetuneConfig] | type[LinearConfig]] = {"finetune": FinetuneConfig, "linear": LinearConfig}


def kind_of(config: FinetuneConfig | LinearConfig) -> str:
    """`finetune` or `linear`."""
    return next(name for name, kind in KINDS.items() if isinstance(config, kind))


@dataclass(kw_only=True)
class Progress:
    """How far a run is; all that a resumed one needs beside weights and optimiser."""

    step: int = 0
    """Optimiser steps done."""
    total_steps: int
    corpus: str
    """Fingerprint of the pictures to train on."""
    licence: str
    """Of the encoder that it started from."""
    crop_share: float = CROP_SHARE
    """Of that encoder's geometry, as the next; runs from before 2026-11-27 were measured with these."""
    interpolation: Interpolation = "bicubic"
    crop_mode: CropMode = "center"
    loss_sum: float = 0.0
    """Over the steps of the epoch under way."""
    seconds: float = 0.0
    """Of the epoch under way."""
    rows: list[dict[str, float]] = field(default_factory=list)
    """Of the log: one for each epoch done."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A checkpoint on disk, but for its weights."""

    path: Path
    config: FinetuneConfig | LinearConfig
    progress: Progress
    classes: list[str]

    def load_model(self) -> dict[str, Tensor]:
        """Weights of encoder and head.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        path = self.path / "model.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}", expected="safetensors") from error

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimiser the state that it had.

        Raises:
            CheckpointError: the file is missing or broken, or does not fit.
        """
        path = self.path / "optimizer.pt"
        try:
            optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # an unpickler of broken bytes raises nearly anything, with advice over many lines
            raise CheckpointError(f"{path} cannot be read", expected="a state of this run's optimiser") from error


def save_run(
    folder: Path,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: FinetuneConfig | LinearConfig,
    progress: Progress,
    classes: list[str],
) -> None:
    """Replace `folder` by the present state of a run."""
    document = {
        "format_version": FORMAT_VERSION,
        "kind": kind_of(config),
        **to_document(progress),
        "config": to_document(config),
    }
    encoder = method.encoder
    assert isinstance(encoder, Backbone)
    with written_whole(folder) as staging:
        (staging / "state.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (staging / "classes.json").write_text(json.dumps(classes, indent=2) + "\n", encoding="utf-8")
        save_file(method.state_dict(), staging / "model.safetensors")
        torch.save(optimizer.state_dict(), staging / "optimizer.pt")
        if isinstance(config, FinetuneConfig):
            _save_encoder(encoder, config.method.pooling, staging / "timm")
        mode = (staging / "state.json").stat().st_mode
        for path in staging.rglob("*.safetensors"):
            path.chmod(mode)  # safetensors writes for the owner alone, whatever the umask


def read_run(folder: Path, kind: str) -> SavedRun:
    """Read a checkpoint but for its weights.

    Raises:
        CheckpointError: there is none, or it is of another kind or format.
    """
    folder = current_dir(folder)
    try:
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        version, found = document.pop("format_version"), document.pop("kind")
        if (version, found) != (FORMAT_VERSION, kind):
            raise CheckpointError(f"{folder} is {found}, version {version}", expected=f"{kind}, {FORMAT_VERSION}")
        config = from_document(KINDS[kind], document.pop("config"))
        return SavedRun(path=folder, config=config, progress=Progress(**document), classes=classes)
    except OSError as error:
        raise CheckpointError(f"no run in {folder}", expected="state.json and classes.json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: {error}", expected="a run with labels") from error


def _save_encoder(encoder: Backbone, pooling: str, folder: Path) -> None:
    """A folder of timm's whose model pools as the head did; nothing where timm cannot say so of the architecture."""
    plain_vit = type(encoder.body).__name__ == "VisionTransformer"
    if pooling == "mean" and not plain_vit and encoder.own_pooling != "mean":
        return
    save_as_timm(encoder, folder, encoder.licence)
    if pooling == "mean" and plain_vit:
        path = folder / "config.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        document["model_args"] |= {"global_pool": "avg", "fc_norm": False}
        document["global_pool"] = "avg"
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
