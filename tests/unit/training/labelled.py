"""Pictures with classes, small encoders and small runs for the tests of training with labels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mimco_deploy.drawings import draw
from mimco_deploy.training.backbone import Backbone, save_as_timm
from mimco_deploy.training.config import BackboneConfig, DataConfig
from mimco_deploy.training.finetune_config import (
    FinetuneConfig,
    FinetuneOptimConfig,
    LinearConfig,
    LinearOptimConfig,
)
from tests.unit.training.small import BACKBONE, run_config

KINDS = ("checks", "rings")
Config = FinetuneConfig | LinearConfig


def draw_classes(folder: Path, per_kind: int, first: int = 0) -> Path:
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for number in range(first, first + per_kind):
            draw(kind, number, 24).save(folder / kind / f"{number}.png")
    return folder


def save_encoder(folder: Path, backbone: BackboneConfig = BACKBONE) -> Path:
    torch.manual_seed(5)
    save_as_timm(Backbone(backbone), folder, "unstated")
    return folder


def draw_labelled(folder: Path) -> Path:
    """A folder with train, val and an encoder of random weights."""
    draw_classes(folder / "train", 12)
    draw_classes(folder / "val", 5, first=100)
    save_encoder(folder / "encoder")
    return folder


def finetune_config(here: Path, **run: Any) -> FinetuneConfig:
    """With all that draws random numbers."""
    return FinetuneConfig(
        backbone=dataclasses.replace(BACKBONE, drop_path=0.2),
        run=run_config(epochs=3, **run),
        optim=FinetuneOptimConfig(base_lr=0.03, layer_decay=0.75, warmup_epochs=0.5, clip_norm=5.0),
        data=DataConfig(sources=(str(here / "train"),), workers=0, short_side_px=24),
        val=(str(here / "val"),),
        encoder=str(here / "encoder"),
    )


def linear_config(here: Path, **run: Any) -> LinearConfig:
    return LinearConfig(
        backbone=BACKBONE,
        run=run_config(epochs=3, **run),
        optim=LinearOptimConfig(base_lr=3.0),
        data=DataConfig(sources=(str(here / "train"),), workers=0, short_side_px=24),
        val=(str(here / "val"),),
        encoder=str(here / "encoder"),
    )


CONFIGS: dict[str, Callable[..., Config]] = {"finetune": finetune_config, "linear": linear_config}
BOTH = pytest.mark.parametrize("kind", ["finetune", "linear"])


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The log, without what is timed."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
