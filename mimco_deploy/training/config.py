"""What a run is made of: frozen dataclasses.

`presets.py` has values for whole runs; variants by `dataclasses.replace` or, from the command line, by
`--set section.field=value` (`settings.py`). What a method adds is in `method_config.py`. Where a paper's value is
unknown, the field says "our choice" and why. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mimco_deploy.training.method_config import MimCoConfig, MoCoV3Config, Stage1Method, Stage2Method, require


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A model of timm. Sizes that are 0 or empty are those that timm gives the architecture.

    Transformers (ViT, BEiT, Swin) can be trained and take other sizes. Any other model of timm can be a teacher.
    """

    name: str
    """timm's name of the architecture."""
    image_size_px: int
    """Side of the square input."""
    patch_size_px: int = 0
    """Side of a patch: of the first, before any merging, in a Swin."""
    embed_dim: int = 0
    """Width D; in a Swin that of the first stage, which doubles with each further one."""
    depth: tuple[int, ...] = ()
    """Number of blocks: one number, in a Swin one for each stage."""
    num_heads: tuple[int, ...] = ()
    """Attention heads: one number, in a Swin one for each stage. MoCo v3's ViT-S has 12, timm's and DeiT's has 6."""
    window: int = 0
    """Patches along the side of a Swin's window."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the last block, rising linearly from 0 at the first."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the input's channels, in [0, 1]: ImageNet's, the field's convention."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Of the input's channels, likewise."""
    global_pool: str = ""
    """How timm pools the model's output, for teachers that timm publishes; empty takes the tokens after the last norm,
    and their CLS token or mean."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        require(self.image_size_px >= 1, "backbone.image_size_px", self.image_size_px, "at least 1")
        for name in ("patch_size_px", "embed_dim", "window"):
            require(getattr(self, name) >= 0, f"backbone.{name}", getattr(self, name), "0 for timm's, or more")
        for name in ("depth", "num_heads"):
            require(all(n >= 1 for n in getattr(self, name)), f"backbone.{name}", getattr(self, name), "at least 1")
        require(all(value > 0 for value in self.std), "backbone.std", self.std, "three values above 0")
        require(0.0 <= self.drop_path < 1.0, "backbone.drop_path", self.drop_path, "a rate from 0 to below 1")


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
        require(self.memory_mib >= 0, "data.memory_mib", self.memory_mib, "0 or more")
        require(self.short_side_px >= 1, "data.short_side_px", self.short_side_px, "at least 1")
        require(0.0 <= self.max_bad_share < 1.0, "data.max_bad_share", self.max_bad_share, "a share below 1")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, and a learning rate that warms up linearly and falls by a cosine, step by step."""

    base_lr: float
    """Learning rate per 256 images; lr = base_lr · global_batch_size / 256."""
    weight_decay: float
    """Decoupled weight decay."""
    decay: Literal["all", "matrices", "weights"]
    """What is decayed: `all` parameters (MoCo v3's code); `matrices`, everything of two dimensions or more, so tokens
    and relative-position tables but no bias and no norm (MoBY's and MAE's code); or `weights`, which spares the tokens
    too (SimMIM's code for Swin; its ViT differs from it in the mask token alone)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    cosine_from_start: bool = False
    """Whether the cosine counts from step 0 and the warm-up hides its beginning, as in MoBY's and SimMIM's code, or
    starts where the warm-up ends, as in MoCo v3's and MAE's. MoBY's and SimMIM's code also sets each step's rate one
    step late; ours does not, for nothing is gained by it."""
    warmup_lr: float = 0.0
    """Where the warm-up starts, per 256 images."""
    min_lr: float = 0.0
    """Where the cosine ends, per 256 images."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("base_lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "clip_norm"):
            require(getattr(self, name) >= 0.0, f"optim.{name}", getattr(self, name), "0 or more")
        require(all(0.0 <= beta < 1.0 for beta in self.betas), "optim.betas", self.betas, "two values in [0, 1)")


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
    """`auto` is bf16 autocast where the device computes in it and the backbone is wide enough to gain by it; else
    fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch compiles the backbones; `auto` does so on GPUs. The first step then takes minutes; on a CPU it
    needs a C++ compiler and gains little."""
    grad_checkpointing: bool = False
    """Compute the encoder's activations again in the backward pass instead of keeping them: about a tenth more time
    for ViT-S on a CPU, and an eighth of the memory an image. Results stay the same."""
    seed: int = 0
    """Everything random is a function of this, the step and the position in the batch."""
    log_every_steps: int = 10
    """Steps between two lines of the log; NaN and collapse are looked for at the same time."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        for name in ("epochs", "global_batch_size", "accumulate", "log_every_steps", "checkpoint_every_steps"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "0 or more, below 2**63")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """What a method sees of a picture: two augmented views (MoCo v3, MoBY, joint training) or one crop (all others)."""

    min_crop_scale: float
    """Smallest share of the picture's area in a crop; the largest is 1."""
    blur_radius_px: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation in augmented views, for 224 px; scaled with the image size, which is
    our choice: the paper trains at 224 only."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        least, most = self.blur_radius_px
        require(0.0 <= least <= most, "views.blur_radius_px", self.blur_radius_px, "two values from 0 on, lower first")
        require(0.0 < self.min_crop_scale <= 1.0, "views.min_crop_scale", self.min_crop_scale, "above 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Masks. Their unit is masked as a whole, and every image has the same number of masked units."""

    kind: Literal["random", "rectangles", "attention", "attention_hints"] = "random"
    """Which units are masked: drawn one by one (SimMIM, arXiv 2111.09886), in rectangles (BEiT, arXiv 2106.08254),
    those that the teacher attends to most, or those with a few left visible as hints (AttMask, arXiv 2203.12719)."""
    mask_patch_size_px: int = 32
    """Side of the unit; a multiple of the backbone's patch."""
    mask_ratio: float = 0.6
    """Share of units masked, rounded up. SimMIM's value; MimCo's is unknown."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        require(self.mask_patch_size_px >= 1, "mask.mask_patch_size_px", self.mask_patch_size_px, "at least 1")
        require(0.0 < self.mask_ratio <= 1.0, "mask.mask_ratio", self.mask_ratio, "a share above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Stage 1: the contrastive teacher."""

    backbone: BackboneConfig
    run: RunConfig
    optim: OptimConfig
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=lambda: ViewsConfig(min_crop_scale=0.08))
    method: Stage1Method = field(default_factory=MoCoV3Config)
    start_from: str = ""
    """Whose weights the encoder starts with: a source as of `Stage2Config.teacher`. Empty starts at random."""


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """Stage 2: the student, against the frozen teacher; or one of the controls, some of which have no teacher."""

    backbone: BackboneConfig
    run: RunConfig
    optim: OptimConfig
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=lambda: ViewsConfig(min_crop_scale=0.67))
    mask: MaskConfig = field(default_factory=MaskConfig)
    method: Stage2Method = field(default_factory=MimCoConfig)
    teacher: str = ""
    """Where the teacher came from: a checkpoint folder, a file of published weights, `timm/NAME` or a folder of timm's.
    Empty for methods without one."""
    start_from: str = ""
    """Whose weights the student starts with: a source likewise. Empty starts at random, or as the teacher where
    `method.init_from_teacher` says so."""
