"""The frozen teacher, as a student needs it: in the student's grid, whatever its own."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.augment import ToInput
from mimco_deploy.training.backbone import Backbone, Features
from mimco_deploy.training.method_config import Pooling

logger = logging.getLogger(__name__)


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
        size = image_size_px or student.config.image_size_px
        if size != backbone.config.image_size_px and not image_size_px:
            logger.warning("the teacher, made for %d px, sees the student's %d px", backbone.config.image_size_px, size)
        try:
            backbone.resize(size)
        except ConfigError as error:
            raise _grids_differ(backbone, student, str(error)) from error
        if backbone.grid % student.grid:
            raise _grids_differ(backbone, student, "no whole multiple")
        self.backbone = backbone.requires_grad_(False)
        if not hasattr(backbone.body, "patch_embed"):  # convolutions: several times as fast so, on CPUs with bf16
            self.backbone.to(memory_format=torch.channels_last)
        self.pooling: Pooling = pooling
        self.width, self.own_width = backbone.width, backbone.own_width if pooling == "cls" else backbone.width
        self._ratio = backbone.grid // student.grid
        self._given, self._own = ToInput(student.config), ToInput(backbone.config)
        self._renormalises = student.config.mean != backbone.config.mean or student.config.std != backbone.config.std
        self.eval()
        self._try_out(student)

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
        side = self.backbone.config.image_size_px
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        if not self._renormalises:
            return images
        return (images * self._given.std + self._given.mean - self._own.mean) / self._own.std

    def _try_out(self, student: Backbone) -> None:
        """One black image: architectures of timm differ in more ways than their descriptions tell."""
        side = student.config.image_size_px
        name = self.backbone.config.name
        try:
            found = self(torch.zeros(1, 3, side, side)).patches.shape[1]
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{name} as a teacher: {error}", expected="a model that gives a square map") from error
        if found != student.grid**2:
            raise _grids_differ(self.backbone, student, f"it gives {found} tokens")

    def _in_students_grid(self, features: Features) -> Features:
        if self._ratio == 1:
            return features
        side = math.isqrt(features.patches.shape[1])
        grid = features.patches.mT.reshape(len(features.patches), -1, side, side)  # [B, P, h, w]
        return Features(features.own, F.avg_pool2d(grid, self._ratio).flatten(2).mT)


def _grids_differ(teacher: Backbone, student: Backbone, reason: str) -> ConfigError:
    wanted = student.grid * teacher.stride_px
    return ConfigError(
        f"a teacher grid of {teacher.grid}×{teacher.grid} tokens ({teacher.config.name} at "
        f"{teacher.config.image_size_px} px) for a student grid of {student.grid}×{student.grid} "
        f"({student.config.name} at {student.config.image_size_px} px): {reason}",
        expected=f"a whole multiple of the student's, such as by --set method.teacher_image_size_px={wanted}",
    )
