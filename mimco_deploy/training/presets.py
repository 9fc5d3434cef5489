"""Presets: functions that return the settings of both stages for one backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mimco_deploy.training.config import (
    BackboneConfig,
    DataConfig,
    MaskConfig,
    MimCoConfig,
    MoCoV3Config,
    OptimConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    ViewsConfig,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Both stages for one backbone."""

    stage1: Stage1Config
    stage2: Stage2Config


def vit_tiny_debug() -> Recipe:
    """A ViT of 1.2 M parameters at 32 px: minutes on two CPU cores. For demos and tests, not for quality."""
    backbone = BackboneConfig(
        name="vit_tiny_patch16_224", image_size_px=32, patch_size_px=8, embed_dim=128, depth=6, num_heads=4
    )
    run = RunConfig(epochs=20, global_batch_size=256, checkpoint_every_steps=100)
    data = DataConfig(short_side_px=128)
    return Recipe(
        stage1=Stage1Config(
            backbone=backbone,
            run=run,
            data=data,
            optim=OptimConfig(base_lr=1e-3, weight_decay=0.1, decay_everything=True, warmup_epochs=1, clip_norm=1.0),
            views=ViewsConfig(min_crop_scale=0.2),
            method=MoCoV3Config(hidden_dim=512, projection_dim=128),
        ),
        stage2=Stage2Config(
            backbone=backbone,
            run=run,
            data=data,
            optim=OptimConfig(base_lr=1e-3, weight_decay=0.05, decay_everything=False, warmup_epochs=1, clip_norm=5.0),
            mask=MaskConfig(mask_patch_size_px=8),
            method=MimCoConfig(hidden_dim=512, init_from_teacher=True),
        ),
    )


def vit_small() -> Recipe:
    """The paper's backbone: ViT-S/16 with 12 heads at 224 px, MoCo v3's 300 epochs and SimMIM's 100."""
    backbone = BackboneConfig(
        name="vit_small_patch16_224", image_size_px=224, patch_size_px=16, embed_dim=384, depth=12, num_heads=12
    )
    return Recipe(
        stage1=Stage1Config(
            backbone=backbone,
            run=RunConfig(epochs=300, global_batch_size=1024),
            optim=OptimConfig(base_lr=1.5e-4, weight_decay=0.1, decay_everything=True, warmup_epochs=40),
            data=DataConfig(workers=8),
        ),
        stage2=Stage2Config(
            backbone=backbone,
            run=RunConfig(epochs=100, global_batch_size=2048, accumulate=4),
            optim=OptimConfig(
                base_lr=1e-4,
                weight_decay=0.05,
                decay_everything=False,
                warmup_epochs=10,
                warmup_lr=5e-7,
                min_lr=5e-6,
                clip_norm=5.0,
            ),
            data=DataConfig(workers=8),
        ),
    )


PRESETS: dict[str, Callable[[], Recipe]] = {"vit_small": vit_small, "vit_tiny_debug": vit_tiny_debug}
