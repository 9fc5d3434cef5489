"""The smallest runs that still go through everything: drawn pictures, a ViT of a few thousand weights, fp32."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimco_deploy.drawings import draw_gallery
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import (
    BackboneConfig,
    DataConfig,
    MaskConfig,
    OptimConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    ViewsConfig,
)
from mimco_deploy.training.loop import StepReport
from mimco_deploy.training.method_config import (
    Dictionary,
    FDConfig,
    ImageLossConfig,
    JointConfig,
    MAEConfig,
    MimCoConfig,
    MoBYConfig,
    MoCoV3Config,
    PatchLossConfig,
    SimMIMConfig,
)
from mimco_deploy.training.monitor import spread
from mimco_deploy.training.stages import train_stage1, train_stage2

BACKBONE = BackboneConfig(
    name="vit_tiny_patch16_224", image_size_px=16, patch_size_px=4, embed_dim=24, depth=(2,), num_heads=(2,)
)
SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    image_size_px=16,
    patch_size_px=2,
    embed_dim=8,
    depth=(1, 2),
    num_heads=(2, 2),
    window=2,
)
"""4 × 4 output tokens of 4 px and width 16, with shifted windows in its second stage."""
MASK = MaskConfig(mask_patch_size_px=4)
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
        optim=OptimConfig(base_lr=0.03, weight_decay=0.1, decay="all", warmup_epochs=0.5, clip_norm=1.0),
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
        optim=OptimConfig(base_lr=0.03, weight_decay=0.05, decay="weights", warmup_epochs=0.5, clip_norm=5.0),
        data=DataConfig(sources=(str(photos),), workers=0, short_side_px=32),
        mask=MASK,
        method=MimCoConfig(
            patch=PatchLossConfig(dictionaries=dictionaries, batch_keys=64, queue_size=100),
            image=ImageLossConfig(hidden_dim=32, weight=image_weight),
        ),
        teacher=str(teacher),
    )


def every_method(photos: Path, teacher: Path) -> dict[str, Stage1Config | Stage2Config]:
    """A run of each method, MimCo in its variants; without drop path, whose draws belong to a process."""
    first = stage1_config(photos)
    second = stage2_config(photos, teacher)
    second = dataclasses.replace(second, backbone=BACKBONE)
    levels = PatchLossConfig(dictionaries=("intra", "batch", "queue"), batch_keys=64, queue_size=100)
    image = ImageLossConfig(hidden_dim=32)
    swin = dataclasses.replace(second, backbone=SWIN)

    def mimco(kind: Literal["contrastive", "l1", "l1_normalised", "smooth_l1", "cosine"]) -> MimCoConfig:
        return MimCoConfig(patch=dataclasses.replace(levels, kind=kind), image=image)

    def masked(kind: Literal["rectangles", "attention", "attention_hints"]) -> Stage2Config:
        return dataclasses.replace(second, mask=dataclasses.replace(MASK, kind=kind), method=mimco("contrastive"))

    return {
        "mocov3": first,
        "moby": dataclasses.replace(
            first, backbone=SWIN, method=MoBYConfig(hidden_dim=32, projection_dim=16, queue_size=20)
        ),
        "moby-vit": dataclasses.replace(first, method=MoBYConfig(hidden_dim=32, projection_dim=16, queue_size=20)),
        "mimco": dataclasses.replace(second, method=mimco("contrastive")),
        "mimco-swin": dataclasses.replace(swin, method=mimco("contrastive")),
        "mimco-patch": dataclasses.replace(second, method=MimCoConfig(patch=levels, image=ImageLossConfig(weight=0))),
        "mimco-image": dataclasses.replace(second, method=MimCoConfig(patch=PatchLossConfig(weight=0), image=image)),
        "mimco-l1": dataclasses.replace(second, method=mimco("l1")),
        "mimco-l1-normalised": dataclasses.replace(second, method=mimco("l1_normalised")),
        "mimco-smooth-l1": dataclasses.replace(second, method=mimco("smooth_l1")),
        "mimco-cosine": dataclasses.replace(second, method=mimco("cosine")),
        "mimco-rectangles": masked("rectangles"),
        "mimco-attention": masked("attention"),
        "mimco-hints": masked("attention_hints"),
        "fd": dataclasses.replace(second, method=FDConfig()),
        "simmim": dataclasses.replace(second, method=SimMIMConfig(), teacher=""),
        "simmim-swin": dataclasses.replace(swin, method=SimMIMConfig(), teacher=""),
        "mae": dataclasses.replace(
            second, method=MAEConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2), teacher=""
        ),
        "joint": dataclasses.replace(
            second,
            views=first.views,
            method=JointConfig(patch=levels, contrastive=MoCoV3Config(hidden_dim=32, projection_dim=16)),
            teacher="",
        ),
    }


def train_any(config: Stage1Config | Stage2Config, folder: Path, **options: Any) -> None:
    """The stage that the config is of."""
    if isinstance(config, Stage1Config):
        train_stage1(config, folder, **options)
    else:
        train_stage2(config, folder, **options)


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


_UNSEEN = (
    "running_mean",
    "image_head.0.bias",
    "projector.0.bias",
    "projector.3.bias",  # the predictor's first layer and its batch norm come next
    "predictor.0.bias",
    "encoder.body.norm.bias",  # with the CLS token or the mean, the projector's first layer and its batch norm
)


def assert_close_weights(ours: Path, theirs: Path) -> None:
    """But for sums in another order. Left out is what gets no gradient but rounding, which Adam blows up to full steps:
    the keys' bias, which a softmax does not see, and a bias that a batch norm removes, with the running mean it moves.
    """
    a, b = (read_checkpoint(folder / "last").load_model() for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        if name.endswith("qkv.bias"):
            x, y = (torch.cat([value.chunk(3)[0], value.chunk(3)[2]]) for value in (x, y))
        if not name.endswith(_UNSEEN):
            assert torch.allclose(x, y, rtol=1e-3, atol=1e-5), (name, float((x - y).abs().max()))


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
