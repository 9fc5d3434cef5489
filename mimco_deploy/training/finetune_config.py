"""What a run with labels is made of: fine-tuning and the linear probe, and their values for a backbone.

Sources are named as: MAE (arXiv 2111.06377), SimMIM (2111.09886), MoCo v3 (2104.02057). Rates are per 256 images, as in
pre-training; SimMIM's code gives its own per 512, so here stands half of it. Standard library only.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from mimco_deploy.training.config import BackboneConfig, DataConfig, RunConfig
from mimco_deploy.training.method_config import Pooling, require

SMALL_PX = 128
"""Side of the input below which a run gets the small values. Our choice."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig:
    """AdamW with smaller rates the nearer a layer is to the pixels; linear warm-up, then a cosine, step by step."""

    base_lr: float = 5e-4
    """Learning rate of the head per 256 images. MAE, for ViT-B."""
    weight_decay: float = 0.05
    """Decoupled weight decay, of matrices alone. MAE and SimMIM."""
    layer_decay: float = 0.65
    """Factor from a layer's rate to that of the layer below it; 1 trains all alike. MAE, for ViT-B; iBOT has 0.75 for
    ViT-S and 200 epochs."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments. MAE and SimMIM."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from 0. MAE."""
    min_lr: float = 2.5e-7
    """Where the cosine ends, per 256 images. MAE: 1e-6 for its batch of 1024."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0 does not clip. MAE does not."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("base_lr", "weight_decay", "warmup_epochs", "min_lr", "clip_norm"):
            require(getattr(self, name) >= 0.0, f"optim.{name}", getattr(self, name), "0 or more")
        require(0.0 < self.layer_decay <= 1.0, "optim.layer_decay", self.layer_decay, "above 0, up to 1")
        require(all(0.0 <= beta < 1.0 for beta in self.betas), "optim.betas", self.betas, "two values in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LinearOptimConfig:
    """SGD, and a cosine to 0."""

    base_lr: float = 0.1
    """Learning rate per 256 images. MAE; its LARS serves batches of 16,384 and is not needed at ours."""
    momentum: float = 0.9
    """Of SGD. MAE and MoCo v3."""
    weight_decay: float = 0.0
    """MAE and MoCo v3."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0. MoCo v3 has none; MAE's 10 go with its large batch."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("base_lr", "weight_decay", "warmup_epochs"):
            require(getattr(self, name) >= 0.0, f"optim.{name}", getattr(self, name), "0 or more")
        require(0.0 <= self.momentum < 1.0, "optim.momentum", self.momentum, "a value in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FinetuneViewsConfig:
    """How a training picture is shown: a random crop, flipped half of the time, and changed."""

    min_crop_scale: float = 0.08
    """Smallest share of the picture's area in a crop; the largest is 1. MAE."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment; empty for none. MAE and SimMIM."""
    erase: float = 0.25
    """Share of pictures of which a rectangle becomes noise. MAE and SimMIM."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        require(0.0 < self.min_crop_scale <= 1.0, "views.min_crop_scale", self.min_crop_scale, "above 0, up to 1")
        known = re.fullmatch(r"(rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|mmax\d+|inc[01]|t\w+))+)?", self.rand_augment)
        require(
            known is not None,
            "views.rand_augment",
            self.rand_augment,
            "timm's name of one, such as rand-m9-mstd0.5-inc1",
        )
        require(0.0 <= self.erase <= 1.0, "views.erase", self.erase, "a share")


@dataclass(frozen=True, kw_only=True)
class LinearViewsConfig:
    """How a training picture is shown: a random crop, flipped half of the time."""

    min_crop_scale: float = 0.08
    """Smallest share of the picture's area in a crop; the largest is 1. MAE and MoCo v3."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        require(0.0 < self.min_crop_scale <= 1.0, "views.min_crop_scale", self.min_crop_scale, "above 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class FinetuneMethodConfig:
    """The head, and what it is asked to say."""

    pooling: Pooling = "mean"
    """What the head sees: `mean` of the patch tokens, under a norm of the head's own, or the model's own vector, `cls`.
    MAE and SimMIM: the mean. MAE's norm takes the place of the encoder's last one; ours comes after it, so that the
    encoder stays whole."""
    mixup: float = 0.8
    """Alpha of mixup, or 0 for none; half of the batches get it, the others cutmix. MAE and SimMIM."""
    cutmix: float = 1.0
    """Alpha of cutmix, or 0 for none. MAE and SimMIM."""
    smoothing: float = 0.1
    """Share of the target that is spread over all classes. MAE and SimMIM."""
    head_std: float = 2e-5
    """Standard deviation of the head's first weights, from a truncated normal. MAE."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("mixup", "cutmix", "head_std"):
            require(getattr(self, name) >= 0.0, f"method.{name}", getattr(self, name), "0 or more")
        require(0.0 <= self.smoothing < 1.0, "method.smoothing", self.smoothing, "a share below 1")


@dataclass(frozen=True, kw_only=True)
class LinearMethodConfig:
    """The head, over batch norm without weights of its own (MAE)."""

    pooling: Pooling = "mean"
    """What the head sees: `mean` of the patch tokens, or the model's own vector, `cls`. A run takes what the encoder's
    own loss trained, unless told otherwise."""
    head_std: float = 0.01
    """Standard deviation of the head's first weights, from a truncated normal. MAE."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        require(self.head_std >= 0.0, "method.head_std", self.head_std, "0 or more")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Encoder and head, trained together on labelled pictures."""

    backbone: BackboneConfig
    """The encoder's, but for `drop_path`; `image_size_px` may be another."""
    run: RunConfig
    optim: FinetuneOptimConfig = dataclasses.field(default_factory=FinetuneOptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Pictures to train on, in a folder for each class."""
    views: FinetuneViewsConfig = dataclasses.field(default_factory=FinetuneViewsConfig)
    method: FinetuneMethodConfig = dataclasses.field(default_factory=FinetuneMethodConfig)
    val: tuple[str, ...] = ()
    """Folders, picture files and plain tars with the pictures to measure on; the same classes."""
    encoder: str = ""
    """Where the encoder came from: a checkpoint folder, a file of published weights, `timm/NAME` or a folder of
    timm's."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """A linear layer on the frozen encoder."""

    backbone: BackboneConfig
    """The encoder's; `image_size_px` may be another."""
    run: RunConfig
    optim: LinearOptimConfig = dataclasses.field(default_factory=LinearOptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Pictures to train on, in a folder for each class."""
    views: LinearViewsConfig = dataclasses.field(default_factory=LinearViewsConfig)
    method: LinearMethodConfig = dataclasses.field(default_factory=LinearMethodConfig)
    val: tuple[str, ...] = ()
    """As in fine-tuning."""
    encoder: str = ""
    """As in fine-tuning."""


def finetune_preset(backbone: BackboneConfig) -> FinetuneConfig:
    """Fine-tuning for a backbone: MAE's values for ViT, SimMIM's for Swin, smaller ones for small inputs.

    Args:
        backbone: of the encoder.
    """
    if backbone.image_size_px < SMALL_PX:  # all of it our choice: minutes on two CPU cores
        return FinetuneConfig(
            backbone=backbone,
            run=RunConfig(epochs=30, global_batch_size=128),
            optim=FinetuneOptimConfig(base_lr=1e-3, layer_decay=0.75, warmup_epochs=3.0, min_lr=0.0, clip_norm=5.0),
            data=DataConfig(short_side_px=128),
            views=FinetuneViewsConfig(min_crop_scale=0.35, rand_augment="rand-m5-mstd0.5-inc1", erase=0.0),
            method=FinetuneMethodConfig(mixup=0.0, cutmix=0.0),
        )
    optim = FinetuneOptimConfig()
    if backbone.name.startswith("swin"):
        optim = FinetuneOptimConfig(
            base_lr=6.25e-4,  # SimMIM: 1.25e-3 per 512
            layer_decay=0.9,  # SimMIM, for Swin-B after 100 epochs
            warmup_epochs=20.0,  # SimMIM
            min_lr=1.25e-7,  # SimMIM: 2.5e-7 per 512
            clip_norm=5.0,  # SimMIM
        )
    return FinetuneConfig(
        backbone=dataclasses.replace(backbone, drop_path=0.1),  # MAE and SimMIM
        run=RunConfig(epochs=100, global_batch_size=1024),  # MAE; SimMIM's batch is 2048
        optim=optim,
        data=DataConfig(workers=8),  # our choice
    )


def linear_preset(backbone: BackboneConfig) -> LinearConfig:
    """The linear probe for a backbone.

    Args:
        backbone: of the encoder.
    """
    if backbone.image_size_px < SMALL_PX:  # all of it our choice
        return LinearConfig(
            backbone=backbone,
            run=RunConfig(epochs=30, global_batch_size=256),
            data=DataConfig(short_side_px=128),
            views=LinearViewsConfig(min_crop_scale=0.35),
        )
    return LinearConfig(
        backbone=backbone,
        run=RunConfig(epochs=90, global_batch_size=1024),  # MAE's epochs, MoCo v3's batch
        data=DataConfig(workers=8),  # our choice
    )
