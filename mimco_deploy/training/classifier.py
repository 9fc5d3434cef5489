"""An encoder with a head for classes: trained together (fine-tuning), or the head alone (linear probe).

Both take what the loop hands every method, a batch of normalised images and their labels, and give the loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone, Geometry
from mimco_deploy.training.checkpoint import load_strictly
from mimco_deploy.training.finetune_config import FinetuneConfig, LinearConfig
from mimco_deploy.training.published import load_teacher
from mimco_deploy.training.supervised_checkpoint import SavedRun

# timm's own have no types
_erasing: Callable[..., Callable[[Tensor], Tensor]] = RandomErasing
_mixing: Callable[..., Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = Mixup
_targets: Callable[..., Tensor] = mixup_target
_soft_loss: Callable[[], nn.Module] = SoftTargetCrossEntropy


@contextlib.contextmanager
def draws_follow_torch() -> Iterator[None]:
    """For what draws from Python's and NumPy's global generators, as timm does: seeded by torch's, restored after."""
    seed = int(torch.randint(2**32, ()))
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from it
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - likewise
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 - likewise


class FineTuned(nn.Module):
    """Encoder and head, trained together.

    Args:
        encoder: trained; all of it goes on training, positions included.
        config: of the run.
        classes: how many.

    Source: MAE (arXiv 2111.06377), appendix A.1; mixup (1710.09412), cutmix (1905.04899), random erasing (1708.04896).
    """

    def __init__(self, encoder: Backbone, config: FinetuneConfig, classes: int) -> None:
        super().__init__()
        method = config.method
        self.encoder = encoder.requires_grad_(True)
        self._pooling, self._classes, self._smoothing = method.pooling, classes, method.smoothing
        mean = method.pooling == "mean"
        width = encoder.width if mean else encoder.own_width
        for name in ("fc_norm", "attn_pool", "head") if mean else ():
            unused = getattr(encoder.body, name, None)
            # One of timm's layers, or a norm; a `head` of an architecture's own may be a part of what gives the tokens.
            if isinstance(unused, nn.Module) and (name != "head" or type(unused).__module__.startswith("timm.layers")):
                unused.requires_grad_(False)  # of the model's own vector, which nothing looks at
        self.norm = nn.LayerNorm(width, eps=1e-6) if mean else nn.Identity()
        self.head = _head(width, classes, method.head_std)
        self._erase = config.views.erase
        self._mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        if method.mixup or method.cutmix:
            self._mixup = _mixing(method.mixup, method.cutmix, label_smoothing=method.smoothing, num_classes=classes)
        self._loss: nn.Module = _soft_loss()

    def classify(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalised → logits [B, classes], float32."""
        logits: Tensor = self.head(self.norm(self.encoder(images).pooled(self._pooling).float()))
        return logits.float()

    def show(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erase and mix.

        Args:
            images: [B, 3, H, W], normalised; changed in place. B is even where pictures are mixed.
            labels: [B] int64.

        Returns:
            What the encoder sees, and targets [B, classes], of which each row sums to 1.
        """
        with draws_follow_torch():
            images = _erasing(self._erase, mode="pixel", device=str(images.device))(images)
            if self._mixup is not None:
                return self._mixup(images, labels)
        return images, _targets(labels, self._classes, smoothing=self._smoothing)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        shown, targets = self.show(images, labels)
        loss: Tensor = self._loss(self.classify(shown), targets)
        return loss

    def check(self) -> None:
        """Nothing is promised of the encoder here."""


class LinearProbe(nn.Module):
    """A linear layer on a frozen encoder, over batch norm without weights.

    Args:
        encoder: trained; stays in eval mode and as it is.
        config: of the run.
        classes: how many.

    Source: MAE (arXiv 2111.06377), appendix A.1.
    """

    def __init__(self, encoder: Backbone, config: LinearConfig, classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self._pooling = config.method.pooling
        width = encoder.width if self._pooling == "mean" else encoder.own_width
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = _head(width, classes, config.method.head_std)
        self._before: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> LinearProbe:
        """Never the encoder."""
        super().train(mode)
        self.encoder.eval()
        return self

    def classify(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalised → logits [B, classes], float32."""
        with torch.no_grad():
            features = self.encoder(images).pooled(self._pooling).float()
        logits: Tensor = self.head(self.norm(features))
        return logits.float()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        return F.cross_entropy(self.classify(images), labels)

    def check(self) -> None:
        """Hold the encoder to what it was at the first call."""
        now = {name: value.detach().cpu() for name, value in self.encoder.state_dict().items()}
        self._before = self._before or {name: value.clone() for name, value in now.items()}
        assert all(torch.equal(value, self._before[name]) for name, value in now.items()), "the encoder changed"


Classifier = FineTuned | LinearProbe
Config = FinetuneConfig | LinearConfig


def build_classifier(config: Config, classes: int, resume: SavedRun | None = None) -> Classifier:
    """The encoder that the settings name, or that a run to resume holds, with its head.

    Raises:
        CheckpointError: there is no such encoder, or its weights do not fit.
        ConfigError: `backbone` names another architecture.
    """
    wanted = config.backbone
    if resume is not None:
        encoder = Backbone(wanted)
        encoder.licence = resume.progress.licence
        encoder.geometry = Geometry(
            resume.progress.crop_share, resume.progress.interpolation, resume.progress.crop_mode
        )
    else:
        loaded, _ = load_teacher(config.encoder)
        encoder = Backbone(dataclasses.replace(loaded.config, drop_path=wanted.drop_path))
        load_strictly(encoder, loaded.state_dict(), Path(config.encoder))
        encoder.licence, encoder.geometry = loaded.licence, loaded.geometry
        encoder.resize(wanted.image_size_px)
        if encoder.config != wanted:
            expected = f"those of {config.encoder}; image_size_px and drop_path alone can change"
            raise ConfigError("settings of backbone that are not the encoder's", expected=expected)
    method: Classifier
    if isinstance(config, FinetuneConfig):
        method = FineTuned(encoder, config, classes)
    else:
        method = LinearProbe(encoder, config, classes)
    if resume is not None:
        load_strictly(method, resume.load_model(), resume.path)
    return method


def _head(width: int, classes: int, std: float) -> nn.Linear:
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=std) if std else nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
