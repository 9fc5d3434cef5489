"""The frozen teacher, as a student needs it: in the student's grid, whatever its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone, Features
from mimco_deploy.training.method_config import Pooling


class Teacher(nn.Module):
    """A backbone that never changes: no gradient, always in eval mode, so without drop path.

    Args:
        backbone: trained.
        pooling: how it was trained to give one vector an image: `cls` or `mean`.
        student: its grid is the one that patches are given in.
        image_size_px: side of the images that the teacher takes, resized from the student's; 0 takes them as they are.

    Raises:
        ConfigError: the teacher's grid is no whole multiple of the student's; names both.
    """

    def __init__(self, backbone: Backbone, pooling: Pooling, student: Backbone, image_size_px: int = 0) -> None:
        super().__init__()
        self.built_as = backbone.config
        backbone.resize(image_size_px or student.config.image_size_px)
        if backbone.grid % student.grid:
            wanted = student.grid * backbone.stride_px
            raise ConfigError(
                f"a teacher grid of {backbone.grid}×{backbone.grid} tokens ({backbone.config.name} at "
                f"{backbone.config.image_size_px} px) for a student grid of {student.grid}×{student.grid} "
                f"({student.config.name} at {student.config.image_size_px} px)",
                expected=f"a whole multiple of the student's, such as by --set method.teacher_image_size_px={wanted}",
            )
        self.backbone = backbone.requires_grad_(False)
        self.pooling: Pooling = pooling
        self.width, self.own_width = backbone.width, backbone.own_width if pooling == "cls" else backbone.width
        self._ratio = backbone.grid // student.grid
        self._given = student.config
        self.eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stay in eval mode, whatever the rest is in."""
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Encode [B, 3, H, W]; `patches` are in the student's grid, each the mean of the teacher's tokens there."""
        features = self.backbone(self._as_own_input(images))
        return self._in_students_grid(features)

    @torch.no_grad()
    def attend(self, images: Tensor) -> tuple[Features, Tensor]:
        """The same, and [B, L] attention scores in the teacher's own grid; see `Backbone.attend`."""
        features, scores = self.backbone.attend(self._as_own_input(images))
        return self._in_students_grid(features), scores

    def _as_own_input(self, images: Tensor) -> Tensor:
        """The student's input in the teacher's size and normalisation."""
        given, own = self._given, self.backbone.config
        if images.shape[-1] != own.image_size_px:
            images = F.interpolate(images, (own.image_size_px,) * 2, mode="bilinear", antialias=True)
        if (given.mean, given.std) == (own.mean, own.std):
            return images
        (mean, std), (own_mean, own_std) = (
            (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (config.mean, config.std))
            for config in (given, own)
        )
        return (images * std + mean - own_mean) / own_std

    def _in_students_grid(self, features: Features) -> Features:
        if self._ratio == 1:
            return features
        side = math.isqrt(features.patches.shape[1])
        grid = features.patches.mT.reshape(len(features.patches), -1, side, side)  # [B, P, h, w]
        return Features(features.own, F.avg_pool2d(grid, self._ratio).flatten(2).mT)
