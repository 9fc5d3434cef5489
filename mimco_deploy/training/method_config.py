"""What each method adds to a run: temperatures, heads and losses, a frozen dataclass each. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mimco_deploy.errors import ConfigError


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Refuse a value of a setting.

    Raises:
        ConfigError: `holds` is false.
    """
    if not holds:
        raise ConfigError(f"{key} {value}", expected=expected)


@dataclass(frozen=True, kw_only=True)
class MoCoV3Config:
    """MoCo v3 for ViT (arXiv 2104.02057)."""

    name: Literal["mocov3"] = "mocov3"
    """The method."""
    temperature: float = 0.2
    """τ"""
    momentum: float = 0.99
    """m of the first step; rises to 1 by a cosine."""
    hidden_dim: int = 4096
    """Width of the heads' hidden layers."""
    projection_dim: int = 256
    """P, width of queries and keys."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        _check_momentum(self.momentum)
        _check_positive(self, "temperature", "hidden_dim", "projection_dim")


@dataclass(frozen=True, kw_only=True)
class MoBYConfig:
    """MoBY for Swin and ViT (arXiv 2105.04553)."""

    name: Literal["moby"] = "moby"
    """The method."""
    temperature: float = 0.2
    """τ"""
    momentum: float = 0.99
    """m of the first step; rises to 1 by a cosine."""
    hidden_dim: int = 4096
    """Width of the heads' hidden layers."""
    projection_dim: int = 256
    """P, width of queries and keys."""
    queue_size: int = 4096
    """K, keys in each of the two queues."""
    momentum_drop_path: float = 0.0
    """Stochastic depth in the momentum encoder, whose online twin has `backbone.drop_path` (0.2)."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        _check_momentum(self.momentum)
        _check_positive(self, "temperature", "hidden_dim", "projection_dim", "queue_size")
        rate = self.momentum_drop_path
        require(0.0 <= rate < 1.0, "method.momentum_drop_path", rate, "a rate from 0 to below 1")


Dictionary = Literal["intra", "batch", "queue"]
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, kw_only=True)
class PatchLossConfig:
    """MimCo's patch level, which joint training shares (arXiv 2209.03063). Each value is our choice."""

    kind: Literal["contrastive", "l1", "l1_normalised", "smooth_l1", "cosine"] = "contrastive"
    """The loss: contrastive as in the paper, or a regression to compare it with: L1 on the teacher's tokens as they
    are, L1 or smooth L1 (β = 2) on tokens that a layer norm without parameters whitens, or 1 − cosine."""
    weight: float = 1.0
    """λ; 0 leaves the loss out. Our choice: the plain sum of both levels."""
    temperature: float = 0.2
    """τ of the contrastive loss. Our choice: MoCo v3's and MoBY's value."""
    dictionaries: tuple[Dictionary, ...] = ("intra", "batch")
    """Where negatives come from: the same image, other images of the batch, a queue of past teacher tokens.
    Our choice is the first two: a contrastive teacher's tokens are alike within an image, so negatives from it alone
    say little, and the batch's add meaning for no further teacher pass."""
    batch_keys: int = 4096
    """Most tokens drawn from the batch as negatives. Our choice: logits grow with masked tokens times this."""
    queue_size: int = 4096
    """K, tokens in the queue. Our choice; a frozen teacher's entries never go stale."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("temperature", "batch_keys", "queue_size"):
            require(getattr(self, name) > 0, f"method.patch.{name}", getattr(self, name), "above 0")
        require(self.weight >= 0.0, "method.patch.weight", self.weight, "0 or more")
        require(bool(self.dictionaries), "method.patch.dictionaries", "()", "one or more of intra, batch, queue")


@dataclass(frozen=True, kw_only=True)
class ImageLossConfig:
    """MimCo's image level. Each value is our choice."""

    weight: float = 1.0
    """λ; 0 leaves the loss out. Our choice: the plain sum of both levels."""
    temperature: float = 0.2
    """τ. Our choice: MoCo v3's and MoBY's value."""
    hidden_dim: int = 4096
    """Hidden width of the image head. Our choice: MoCo v3's."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("temperature", "hidden_dim"):
            require(getattr(self, name) > 0, f"method.image.{name}", getattr(self, name), "above 0")
        require(self.weight >= 0.0, "method.image.weight", self.weight, "0 or more")


@dataclass(frozen=True, kw_only=True)
class MimCoConfig:
    """MimCo (arXiv 2209.03063). We had the abstract, not its values: each is our choice, with the reason."""

    name: Literal["mimco"] = "mimco"
    """The method."""
    patch: PatchLossConfig = field(default_factory=PatchLossConfig)
    """Patch level."""
    image: ImageLossConfig = field(default_factory=ImageLossConfig)
    """Image level."""
    pooling: Pooling = "mean"
    """What the image loss trains and the encoder exports. Our choice: the mean uses every token that the patch loss
    shapes, and exists for backbones without a CLS token."""
    init_from_teacher: bool = False
    """Start the student from the teacher's weights instead of at random. Our choice is off, as the plain reading of the
    abstract; on keeps the teacher's quality from the first step (measured in docs/decisions.md)."""
    teacher_image_size_px: int = 0
    """Side of the teacher's input, where its patches need another than the student's for the grids to match; 0 takes
    the student's."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        require(self.patch.weight + self.image.weight > 0.0, "both losses' weights", 0, "at least one above 0")


@dataclass(frozen=True, kw_only=True)
class FDConfig:
    """Feature distillation without masks (arXiv 2205.14141), the control that shows what masking adds."""

    name: Literal["fd"] = "fd"
    """The method."""
    beta: float = 2.0
    """Where the smooth L1 turns from a square to a line."""
    pooling: Pooling = "mean"
    """What the encoder exports. Our choice: as MimCo's, to compare."""
    teacher_image_size_px: int = 0
    """As in MimCo."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        _check_positive(self, "beta")


@dataclass(frozen=True, kw_only=True)
class SimMIMConfig:
    """SimMIM: pixels of masked units (arXiv 2111.09886). No teacher."""

    name: Literal["simmim"] = "simmim"
    """The method."""
    pooling: Pooling = "mean"
    """What the encoder exports: the mean, as SimMIM's fine-tuning; its loss does not train the CLS token."""


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Masked autoencoder (arXiv 2111.06377), for ViT. No teacher."""

    name: Literal["mae"] = "mae"
    """The method."""
    decoder_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    normalised_pixels: bool = True
    """Whether each patch is standardised before it is the target; the paper's better variant."""
    pooling: Pooling = "mean"
    """What the encoder exports: the mean, as MAE's fine-tuning; its loss does not train the CLS token."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        _check_positive(self, "decoder_dim", "decoder_depth", "decoder_heads")


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Both pretexts at once against a momentum encoder: the one-stage training that MimCo argues against."""

    name: Literal["joint"] = "joint"
    """The method."""
    patch: PatchLossConfig = field(default_factory=PatchLossConfig)
    """Masked patches against the momentum encoder's tokens of the same view; MimCo's patch level."""
    contrastive: MoCoV3Config = field(default_factory=MoCoV3Config)
    """The other view's image; MoCo v3, with a masked view as query."""
    contrastive_weight: float = 1.0
    """λ of the contrastive part. Our choice: the plain sum."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        require(self.contrastive_weight > 0.0, "method.contrastive_weight", self.contrastive_weight, "above 0")


Stage1Method = MoCoV3Config | MoBYConfig
Stage2Method = MimCoConfig | FDConfig | SimMIMConfig | MAEConfig | JointConfig


def pooling_of(method: Stage1Method | Stage2Method, own: Pooling) -> Pooling:
    """The pooling that a method's loss trains.

    Args:
        method: settings.
        own: how the backbone's own vector is pooled, which contrastive losses of whole images train.
    """
    return own if isinstance(method, MoCoV3Config | MoBYConfig | JointConfig) else method.pooling


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, f"method.{name}", getattr(config, name), "above 0")


def _check_momentum(momentum: float) -> None:
    require(0.0 <= momentum <= 1.0, "method.momentum", momentum, "a value from 0 to 1")
