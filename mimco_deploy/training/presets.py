"""Presets: functions that return the settings of both stages for one backbone. Each line says whose value it is.

Papers and codes are named as: MoCo v3 (arXiv 2104.02057), MoBY (2105.04553), SimMIM (2111.09886), MAE (2111.06377),
FD (2205.14141). Rates are per 256 images; MoBY's and SimMIM's codes give theirs per 512, so here stands half of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from mimco_deploy.errors import ConfigError
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
from mimco_deploy.training.method_config import (
    FDConfig,
    ImageLossConfig,
    JointConfig,
    MAEConfig,
    MimCoConfig,
    MoBYConfig,
    MoCoV3Config,
    SimMIMConfig,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Both stages for one backbone."""

    stage1: Stage1Config
    stage2: Stage2Config


def vit_tiny_debug() -> Recipe:
    """A ViT of 1.2 M parameters at 32 px: minutes on two CPU cores. For demos and tests, not for quality."""
    backbone = BackboneConfig(  # all of this preset is our choice
        name="vit_tiny_patch16_224", image_size_px=32, patch_size_px=8, embed_dim=128, depth=(6,), num_heads=(4,)
    )
    run = RunConfig(epochs=20, global_batch_size=256, checkpoint_every_steps=100)
    data = DataConfig(short_side_px=128)
    return Recipe(
        stage1=Stage1Config(
            backbone=backbone,
            run=run,
            data=data,
            optim=OptimConfig(base_lr=1e-3, weight_decay=0.1, decay="all", warmup_epochs=1, clip_norm=1.0),
            views=ViewsConfig(min_crop_scale=0.2),
            method=MoCoV3Config(hidden_dim=512, projection_dim=128),
        ),
        stage2=Stage2Config(
            backbone=backbone,
            run=run,
            data=data,
            optim=OptimConfig(base_lr=1e-3, weight_decay=0.05, decay="weights", warmup_epochs=1, clip_norm=5.0),
            mask=MaskConfig(mask_patch_size_px=8),
            method=MimCoConfig(image=ImageLossConfig(hidden_dim=512), init_from_teacher=True),
        ),
    )


def vit_tiny_64() -> Recipe:
    """ViT-Ti/8 at 64 px, for pictures as small as Tiny-ImageNet's."""
    return _at_64_px(
        BackboneConfig(
            name="vit_tiny_patch16_224",
            image_size_px=64,  # our choice: Tiny-ImageNet's
            patch_size_px=8,  # our choice: 64 tokens
            embed_dim=192,  # DeiT's ViT-Ti
            depth=(12,),  # DeiT's ViT-Ti
            num_heads=(12,),  # MoCo v3's ViT-S has 12 as well
        )
    )


def vit_small_64() -> Recipe:
    """ViT-S/8 with 12 heads at 64 px, for pictures as small as Tiny-ImageNet's."""
    return _at_64_px(
        BackboneConfig(
            name="vit_small_patch16_224",
            image_size_px=64,  # our choice: Tiny-ImageNet's
            patch_size_px=8,  # our choice: 64 tokens
            embed_dim=384,  # MoCo v3
            depth=(12,),  # MoCo v3
            num_heads=(12,),  # MoCo v3
        )
    )


def vit_small() -> Recipe:
    """MimCo's backbone: ViT-S/16 with 12 heads at 224 px, MoCo v3's 300 epochs and SimMIM's 100."""
    backbone = BackboneConfig(
        name="vit_small_patch16_224",
        image_size_px=224,  # MoCo v3
        patch_size_px=16,  # MoCo v3
        embed_dim=384,  # MoCo v3
        depth=(12,),  # MoCo v3
        num_heads=(12,),  # MoCo v3
    )
    return Recipe(
        stage1=_mocov3(backbone, batch_size=1024),  # MoCo v3's code, one machine; the published weights: 4096
        stage2=_mimco(backbone, accumulate=4),  # our choice: 512 images at once
    )


def vit_base() -> Recipe:
    """ViT-B/16 at 224 px, MoCo v3's 300 epochs and SimMIM's 100."""
    backbone = BackboneConfig(
        name="vit_base_patch16_224",
        image_size_px=224,  # MoCo v3
        patch_size_px=16,  # MoCo v3
        embed_dim=768,  # MoCo v3
        depth=(12,),  # MoCo v3
        num_heads=(12,),  # MoCo v3
    )
    return Recipe(
        stage1=_mocov3(backbone, batch_size=4096),  # MoCo v3
        stage2=_mimco(backbone, accumulate=8),  # our choice: 256 images at once
    )


def swin_tiny() -> Recipe:
    """Swin-T at 224 px, MoBY's 300 epochs and SimMIM's 100."""
    backbone = BackboneConfig(
        name="swin_tiny_patch4_window7_224",
        image_size_px=224,  # MoBY
        patch_size_px=4,  # MoBY
        embed_dim=96,  # MoBY
        depth=(2, 2, 6, 2),  # MoBY
        num_heads=(3, 6, 12, 24),  # MoBY
        window=7,  # MoBY
    )
    return Recipe(
        stage1=Stage1Config(
            backbone=dataclasses.replace(backbone, drop_path=0.2),  # MoBY, in the online encoder only
            run=RunConfig(epochs=300, global_batch_size=512),  # MoBY
            optim=_moby_optim(),
            data=DataConfig(workers=8),  # our choice
            views=ViewsConfig(min_crop_scale=0.08),  # MoBY
            method=MoBYConfig(),  # MoBY
        ),
        stage2=_mimco(backbone, accumulate=8),  # our choice: 256 images at once
    )


def _mocov3(backbone: BackboneConfig, batch_size: int) -> Stage1Config:
    return Stage1Config(
        backbone=backbone,
        run=RunConfig(epochs=300, global_batch_size=batch_size),  # MoCo v3
        optim=OptimConfig(
            base_lr=1.5e-4,  # MoCo v3
            weight_decay=0.1,  # MoCo v3
            decay="all",  # MoCo v3's code
            warmup_epochs=40,  # MoCo v3
        ),
        data=DataConfig(workers=8),  # our choice
        views=ViewsConfig(min_crop_scale=0.08),  # MoCo v3
        method=MoCoV3Config(),  # MoCo v3
    )


def _mimco(backbone: BackboneConfig, accumulate: int) -> Stage2Config:
    return Stage2Config(
        backbone=backbone,
        run=RunConfig(
            epochs=100,  # MimCo
            global_batch_size=2048,  # our choice: SimMIM's
            accumulate=accumulate,
        ),
        optim=OptimConfig(  # our choice: SimMIM's 100-epoch run throughout
            base_lr=1e-4,
            weight_decay=0.05,
            decay="weights",
            warmup_epochs=10,
            cosine_from_start=True,
            warmup_lr=5e-7,
            min_lr=5e-6,
            clip_norm=5.0,
        ),
        data=DataConfig(workers=8),  # our choice
        views=ViewsConfig(min_crop_scale=0.67),  # our choice: SimMIM's
        mask=MaskConfig(mask_patch_size_px=32, mask_ratio=0.6),  # our choice: SimMIM's
        method=MimCoConfig(),
    )


def _at_64_px(backbone: BackboneConfig) -> Recipe:
    data = DataConfig(workers=8, short_side_px=128)  # our choice
    stage1, stage2 = _mocov3(backbone, batch_size=1024), _mimco(backbone, accumulate=1)
    return Recipe(
        stage1=dataclasses.replace(
            stage1,
            run=RunConfig(epochs=200, global_batch_size=1024),  # our choice: 20,000 steps on Tiny-ImageNet
            optim=dataclasses.replace(stage1.optim, base_lr=3e-4, warmup_epochs=20),  # our choice
            views=ViewsConfig(min_crop_scale=0.2),  # our choice: 8 % of 64 px say little
            data=data,
        ),
        stage2=dataclasses.replace(
            stage2,
            run=RunConfig(epochs=100, global_batch_size=1024),  # our choice
            optim=dataclasses.replace(stage2.optim, base_lr=3e-4),  # our choice
            mask=MaskConfig(mask_patch_size_px=16, mask_ratio=0.6),  # our choice: 2 × 2 patches, as SimMIM's at 224 px
            data=data,
        ),
    )


def _moby_optim() -> OptimConfig:
    return OptimConfig(
        base_lr=5e-4,  # MoBY: 1e-3 per 512
        weight_decay=0.05,  # MoBY
        decay="matrices",  # MoBY's code
        warmup_epochs=5,  # MoBY
        cosine_from_start=True,  # MoBY's code
        warmup_lr=2.5e-7,  # MoBY's code: 5e-7 per 512
        min_lr=2.5e-6,  # MoBY's code: 5e-6 per 512
        clip_norm=5.0,  # MoBY's code
    )


def with_stage1_method(config: Stage1Config, name: str) -> Stage1Config:
    """The same run by another method of stage 1, with that method's optimiser.

    Raises:
        ConfigError: there is no such method.
    """
    if name == config.method.name:
        return config
    hidden, out = config.method.hidden_dim, config.method.projection_dim
    if name == "mocov3":  # in place of a Swin's MoBY; the method says that it wants a ViT
        return dataclasses.replace(config, method=MoCoV3Config(hidden_dim=hidden, projection_dim=out))
    if name == "moby":
        optim, drop_path = _moby_optim(), 0.2  # MoBY, for Swin-T and DeiT-S alike
        optim = dataclasses.replace(optim, warmup_epochs=min(optim.warmup_epochs, config.optim.warmup_epochs))
        backbone = dataclasses.replace(config.backbone, drop_path=drop_path)
        return dataclasses.replace(
            config, backbone=backbone, optim=optim, method=MoBYConfig(hidden_dim=hidden, projection_dim=out)
        )
    raise ConfigError(f"no method {name} in stage 1", expected="mocov3 or moby")


def with_stage2_method(recipe: Recipe, name: str) -> Stage2Config:
    """Stage 2's run by another method, with that method's views and masks.

    Epochs, batch and learning rate stay, so that methods are compared at equal cost.

    Raises:
        ConfigError: there is no such method.
    """
    config = recipe.stage2
    if name == "mimco":
        return config
    if name == "fd":
        views = ViewsConfig(min_crop_scale=0.08)  # FD
        return dataclasses.replace(config, views=views, method=FDConfig())
    if name == "simmim":
        return dataclasses.replace(config, method=SimMIMConfig())
    if name == "mae":
        width = config.backbone.embed_dim
        small = width < 384  # our choice: a decoder narrower than the encoder, as the paper's beside ViT-B and larger
        return dataclasses.replace(
            config,
            optim=dataclasses.replace(config.optim, betas=(0.9, 0.95), decay="matrices"),  # MAE
            views=ViewsConfig(min_crop_scale=0.2),  # MAE
            mask=MaskConfig(mask_patch_size_px=config.backbone.patch_size_px, mask_ratio=0.75),  # MAE
            method=MAEConfig(decoder_dim=64, decoder_depth=2, decoder_heads=4) if small else MAEConfig(),
        )
    if name == "joint":
        teacher = recipe.stage1.method
        heads = MoCoV3Config(hidden_dim=teacher.hidden_dim, projection_dim=teacher.projection_dim)
        views = recipe.stage1.views  # our choice: contrast needs strong views, and one kind has to do for both
        return dataclasses.replace(config, views=views, method=JointConfig(contrastive=heads))
    raise ConfigError(f"no method {name} in stage 2", expected="mimco, fd, simmim, mae or joint")


STAGE1_METHODS = ("mocov3", "moby")
STAGE2_METHODS = ("mimco", "fd", "simmim", "mae", "joint")
WITH_TEACHER = ("mimco", "fd")
"""Methods of stage 2 that learn from a teacher."""

PRESETS: dict[str, Callable[[], Recipe]] = {
    preset.__name__: preset for preset in (vit_tiny_debug, vit_tiny_64, vit_small_64, vit_small, vit_base, swin_tiny)
}
