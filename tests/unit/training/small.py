"""The smallest runs that still go through everything: drawn pictures, a ViT of a few thousand weights, fp32."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimco_deploy.drawings import draw_gallery
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import (
    BackboneConfig,
    DataConfig,
    Dictionary,
    MaskConfig,
    MimCoConfig,
    MoCoV3Config,
    OptimConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    ViewsConfig,
)
from mimco_deploy.training.loop import StepReport
from mimco_deploy.training.monitor import spread

BACKBONE = BackboneConfig(
    name="vit_tiny_patch16_224", image_size_px=16, patch_size_px=4, embed_dim=24, depth=2, num_heads=2
)
STEPS = 6
"""Of a whole run: 24 pictures, 8 a step, 2 epochs of 3 steps."""


def draw_photos(folder: Path) -> Path:
    """24 pictures, two of each kind."""
    draw_gallery(folder, 2, 32)
    return folder


def run_config(**changes: Any) -> RunConfig:
    run = RunConfig(
        epochs=2, global_batch_size=8, precision="fp32", seed=3, log_every_steps=1, checkpoint_every_steps=1000
    )
    return dataclasses.replace(run, **changes)


def stage1_config(photos: Path, **run: Any) -> Stage1Config:
    return Stage1Config(
        backbone=BACKBONE,
        run=run_config(**run),
        optim=OptimConfig(base_lr=0.03, weight_decay=0.1, decay_everything=True, warmup_epochs=0.5, clip_norm=1.0),
        data=DataConfig(sources=(str(photos),), workers=0, short_side_px=32),
        views=ViewsConfig(min_crop_scale=0.2),
        method=MoCoV3Config(hidden_dim=32, projection_dim=16),
    )


def stage2_config(
    photos: Path,
    teacher: Path,
    *,
    dictionaries: tuple[Dictionary, ...] = ("intra", "batch"),
    image_weight: float = 1.0,
    **run: Any,
) -> Stage2Config:
    """With drop path, so that the model's own random numbers count as well."""
    return Stage2Config(
        backbone=dataclasses.replace(BACKBONE, drop_path=0.2),
        run=run_config(**run),
        optim=OptimConfig(base_lr=0.03, weight_decay=0.05, decay_everything=False, warmup_epochs=0.5, clip_norm=5.0),
        data=DataConfig(sources=(str(photos),), workers=0, short_side_px=32),
        mask=MaskConfig(mask_patch_size_px=4),
        method=MimCoConfig(
            dictionaries=dictionaries, batch_keys=64, queue_size=100, hidden_dim=32, image_weight=image_weight
        ),
        teacher=str(teacher),
    )


def stop_at(step: int) -> Callable[[StepReport], None]:
    """A callback that asks for a stop as Ctrl-C does, so that `step` is the last one done."""

    def on_step(report: StepReport) -> None:
        if report.step == step - 1:
            signal.raise_signal(signal.SIGINT)

    return on_step


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The log of a run, without what is timed."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    timed = {"images_per_s", "waiting"}
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists → one dict of leaves."""
    if isinstance(state, Mapping):
        items: list[tuple[Any, Any]] = list(state.items())
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    else:
        return {prefix: state}
    return {key: leaf for name, value in items for key, leaf in flat(value, f"{prefix}/{name}").items()}


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Bit for bit: weights, optimiser, step; and the log's numbers."""
    a, b = read_checkpoint(ours / "last"), read_checkpoint(theirs / "last")
    assert (a.step, a.total_steps, a.corpus) == (b.step, b.total_steps, b.corpus)
    assert_same_state(a.load_model(), b.load_model())
    assert_same_state(a.load_optimizer(), b.load_optimizer())
    assert rows_of(ours) == rows_of(theirs)


def assert_close_weights(ours: Path, theirs: Path) -> None:
    """But for sums in another order. Left out is what gets no gradient but rounding, which Adam blows up to full steps:
    the keys' bias, which a softmax does not see. And batch norm's statistics, which belong to a process's micro-batch.
    """
    a, b = (read_checkpoint(folder / "last").load_model() for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        if name.endswith("qkv.bias"):
            x, y = (torch.cat([value.chunk(3)[0], value.chunk(3)[2]]) for value in (x, y))
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.allclose(x, y, rtol=1e-3, atol=2e-5), (name, float((x - y).abs().max()))


def assert_same_state(ours: Any, theirs: Any) -> None:
    a, b = flat(ours), flat(theirs)
    assert a.keys() == b.keys()
    differing = [name for name in a if not _same(a[name], b[name])]
    assert not differing


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


class Stub(nn.Module):
    """The smallest method of the loop: no batch norm, no negatives; the views' mean colour from the features."""

    def __init__(self, backbone: BackboneConfig = BACKBONE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Backbone(backbone)
        self.head = nn.Linear(backbone.embed_dim, 3)
        self.progress: list[float] = []

    def start_step(self, progress: float) -> None:
        self.progress.append(progress)

    def forward(self, view: Tensor, *_: Tensor) -> dict[str, Tensor]:
        features = self.encoder(view).pooled("mean")
        loss = (self.head(features) - view.mean(dim=(2, 3))).square().mean()
        return {"loss": loss, "feature_spread": spread(features)}
