"""Feature distillation without masks (Wei et al., 2022, arXiv 2205.14141). A control: what does masking add?

The student sees what the teacher sees and regresses all its whitened tokens. Written from the paper; must not import
export, serving or evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimco_deploy.training.backbone import Backbone, Features
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.losses import regression
from mimco_deploy.training.method_config import FDConfig, Pooling
from mimco_deploy.training.monitor import spread
from mimco_deploy.training.teacher import Teacher


class FD(nn.Module):
    """Student encoder, frozen teacher, and a smooth L1 between all their tokens, the CLS token among them.

    Args:
        backbone: of the student.
        teacher: frozen here.
        teacher_pooling: how the teacher was trained to give one vector an image.
        config: of the loss.

    Raises:
        ConfigError: the grids differ.
    """

    def __init__(self, backbone: BackboneConfig, teacher: Backbone, teacher_pooling: Pooling, config: FDConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Backbone(backbone)
        self.teacher = Teacher(teacher, teacher_pooling, self.encoder, config.teacher_image_size_px)
        self.head = nn.Linear(self.encoder.width, self.teacher.width)
        self._with_cls = self.encoder.has_cls and teacher.has_cls and teacher.config.global_pool in ("", "token")

    def start_step(self, progress: float) -> None:
        """Nothing moves with the schedule here: the teacher is frozen."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            images: [B, 3, H, W]

        Returns:
            `loss`, and for the log `feature_spread`.
        """
        student, target = self.encoder(images), self.teacher(images)
        loss = regression(
            self.head(self._tokens(student)), self._tokens(target), kind="smooth_l1", beta=self.config.beta
        )
        return {"loss": loss, "feature_spread": spread(student.pooled(self.config.pooling))}

    def _tokens(self, features: Features) -> Tensor:
        """[B, L, D], or [B, 1 + L, D] where both sides have a CLS token."""
        if not self._with_cls:
            return features.patches
        return torch.cat([features.own.unsqueeze(1), features.patches], dim=1)
