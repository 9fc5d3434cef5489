"""What a run is made of: frozen dataclasses.

`presets.py` has values for whole runs; variants by `dataclasses.replace` or, from the command line, by
`--set section.field=value` (`settings.py`). Where a paper's value is unknown, the field says "our choice" and why.
Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mimco_deploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A timm vision transformer, its sizes open to change."""

    name: str
    """timm's name of the architecture."""
    image_size_px: int
    """Side of the square input."""
    patch_size_px: int
    """Side of a patch."""
    embed_dim: int
    """Width D."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads. MoCo v3's ViT-S has 12 where timm's and DeiT's has 6."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the last block, rising linearly from 0 at the first."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("image_size_px", "patch_size_px", "embed_dim", "depth", "num_heads"):
            _require(getattr(self, name) >= 1, f"backbone.{name}", getattr(self, name), "at least 1")
        _require(self.embed_dim % self.num_heads == 0, "backbone.embed_dim", self.embed_dim, "a multiple of num_heads")
        _require(0.0 <= self.drop_path < 1.0, "backbone.drop_path", self.drop_path, "a rate from 0 to below 1")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size_px // self.patch_size_px


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures come from and how they are held."""

    sources: tuple[str, ...] = ()
    """Folders, picture files and plain tars, in any mix."""
    memory_mib: int = 2048
    """Budget for holding the whole corpus decoded as uint8; a corpus that does not fit is decoded at each use."""
    short_side_px: int = 512
    """Pictures are reduced to this short side when decoded, before any view is taken; smaller ones stay as they are.
    Our choice: about ImageNet's size, at which views of 224 px are usually taken; phone photos cost 50 times that."""
    max_bad_share: float = 0.05
    """Share of undecodable pictures above which the run is refused. Our choice: more than a few in a hundred is a
    wrong folder or a broken disk rather than bad luck."""
    workers: int = 1
    """Data-loading processes for each training process; 0 loads in the training process itself."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        _require(self.memory_mib >= 0, "data.memory_mib", self.memory_mib, "0 or more")
        _require(self.short_side_px >= 1, "data.short_side_px", self.short_side_px, "at least 1")
        _require(0.0 <= self.max_bad_share < 1.0, "data.max_bad_share", self.max_bad_share, "a share below 1")
        _require(self.workers >= 0, "data.workers", self.workers, "0 or more")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, and a learning rate that warms up linearly and falls by a cosine, step by step."""

    base_lr: float
    """Learning rate per 256 images; lr = base_lr · global_batch_size / 256."""
    weight_decay: float
    """Decoupled weight decay."""
    decay_everything: bool
    """True decays biases, norms and tokens as well (MoCo v3's code); False spares all of them (SimMIM's recipe)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    warmup_lr: float = 0.0
    """Where the warm-up starts, per 256 images."""
    min_lr: float = 0.0
    """Where the cosine ends, per 256 images."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("base_lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "clip_norm"):
            _require(getattr(self, name) >= 0.0, f"optim.{name}", getattr(self, name), "0 or more")
        _require(all(0.0 <= beta < 1.0 for beta in self.betas), "optim.betas", self.betas, "two values in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how many at once, how exactly."""

    epochs: int
    """Passes over the corpus."""
    global_batch_size: int
    """Images in one optimiser step, over all processes and accumulation."""
    accumulate: int = 1
    """Micro-batches in one optimiser step. Contrastive terms see the negatives of their own micro-batch only."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 autocast where the device computes in it, else fp32."""
    seed: int = 0
    """Everything random is a function of this, the step and the position in the batch."""
    log_every_steps: int = 10
    """Steps between two lines of the log; NaN and collapse are looked for at the same time."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("epochs", "global_batch_size", "accumulate", "log_every_steps", "checkpoint_every_steps"):
            _require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")
        _require(self.seed >= 0, "run.seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Stage 1's two augmented views (MoCo v3)."""

    min_crop_scale: float = 0.08
    """Smallest share of the picture's area in a crop; the largest is 1."""
    blur_radius_px: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation, for 224 px; scaled with the image size, which is our choice: the
    paper trains at 224 only."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        _require(0.0 < self.min_crop_scale <= 1.0, "views.min_crop_scale", self.min_crop_scale, "above 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class MoCoV3Config:
    """MoCo v3 for ViT (arXiv 2104.02057)."""

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
        _require(self.temperature > 0.0, "method.temperature", self.temperature, "above 0")
        _require(0.0 <= self.momentum <= 1.0, "method.momentum", self.momentum, "a value from 0 to 1")
        for name in ("hidden_dim", "projection_dim"):
            _require(getattr(self, name) >= 1, f"method.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """SimMIM's random masks (arXiv 2111.09886)."""

    mask_patch_size_px: int = 32
    """Side of the unit that is masked as a whole; a multiple of the backbone's patch."""
    mask_ratio: float = 0.6
    """Share of units masked, rounded up. SimMIM's value; MimCo's is unknown."""
    min_crop_scale: float = 0.67
    """Smallest share of the picture's area in the one crop that student and teacher see (SimMIM)."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        _require(0.0 < self.min_crop_scale <= 1.0, "mask.min_crop_scale", self.min_crop_scale, "above 0, up to 1")


Dictionary = Literal["intra", "batch", "queue"]


@dataclass(frozen=True, kw_only=True)
class MimCoConfig:
    """MimCo (arXiv 2209.03063). We had the abstract, not its values: each field is our choice, with the reason."""

    dictionaries: tuple[Dictionary, ...] = ("intra", "batch")
    """Where the patch loss takes negatives: the same image, other images of the batch, a queue of past teacher tokens.
    Our choice is the first two: a contrastive teacher's tokens are alike within an image, so negatives from it alone
    say little, and the batch's add meaning for no further teacher pass."""
    batch_keys: int = 4096
    """Most tokens drawn from the batch as negatives. Our choice: logits grow with masked tokens times this."""
    queue_size: int = 4096
    """K, tokens in the queue. Our choice; entries never go stale, because the teacher is frozen."""
    patch_temperature: float = 0.2
    """τ of the patch loss. Our choice: MoCo v3's and MoBY's value."""
    image_temperature: float = 0.2
    """τ of the image loss. Our choice, likewise."""
    patch_weight: float = 1.0
    """λ of the patch loss. Our choice: the plain sum."""
    image_weight: float = 1.0
    """λ of the image loss. Our choice, likewise."""
    hidden_dim: int = 4096
    """Hidden width of the image head. Our choice: MoCo v3's."""
    pooling: Literal["mean", "cls"] = "mean"
    """What the image loss trains and the encoder exports. Our choice: the mean uses every token that the patch loss
    shapes, and exists for backbones without a CLS token."""
    init_from_teacher: bool = False
    """Start the student from the teacher's weights instead of at random. Our choice is off, as the plain reading of the
    abstract; on keeps the teacher's quality from the first step (measured in docs/decisions.md)."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("patch_temperature", "image_temperature", "batch_keys", "queue_size", "hidden_dim"):
            _require(getattr(self, name) > 0, f"method.{name}", getattr(self, name), "above 0")


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Stage 1: the contrastive teacher."""

    backbone: BackboneConfig
    run: RunConfig
    optim: OptimConfig
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    method: MoCoV3Config = field(default_factory=MoCoV3Config)


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """Stage 2: the student, against the frozen teacher."""

    backbone: BackboneConfig
    run: RunConfig
    optim: OptimConfig
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    method: MimCoConfig = field(default_factory=MimCoConfig)
    teacher: str = ""
    """Checkpoint folder of the teacher; empty takes the workspace's stage 1."""


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key} {value}", expected=expected)
