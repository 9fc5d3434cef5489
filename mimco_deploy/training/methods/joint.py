"""Both pretexts at once, in one stage: the naive multi-task training that MimCo's two stages replace. A control.

MoCo v3's contrastive loss, whose query sees a masked view, plus MimCo's patch level against the momentum encoder's
tokens of the same view. One kind of augmentation has to do for both; that is the point (arXiv 2209.03063, abstract).
The form is our choice: the paper's own, if it has one, was not at hand. Must not import export, serving or evaluation.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mimco_deploy.training.backbone import Backbone, Features
from mimco_deploy.training.config import BackboneConfig, MaskConfig
from mimco_deploy.training.distributed import gather_rows, rank
from mimco_deploy.training.heads import mocov3_mlp
from mimco_deploy.training.masking import mask_shape
from mimco_deploy.training.method_config import JointConfig
from mimco_deploy.training.methods.mimco import PatchLevel, check_unit, masked_positions
from mimco_deploy.training.methods.mocov3 import contrastive_loss
from mimco_deploy.training.momentum import ema_update
from mimco_deploy.training.monitor import spread
from mimco_deploy.training.schedules import momentum_at


class Joint(nn.Module):
    """Encoder, its momentum copy, and the sum of both losses.

    Args:
        backbone: of both encoders.
        mask: unit and ratio.
        config: the two losses.

    Raises:
        ConfigError: the mask does not fit the backbone.
    """

    def __init__(self, backbone: BackboneConfig, mask: MaskConfig, config: JointConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Backbone(backbone)
        self.mask_token = self.encoder.new_mask_token()
        self.mask_shape = mask_shape(backbone.image_size_px, self.encoder.patch_px, mask)
        check_unit(self.encoder, mask)
        width, heads = self.encoder.width, config.contrastive
        self.projector = mocov3_mlp(3, width, heads.hidden_dim, heads.projection_dim)
        self.predictor = mocov3_mlp(2, heads.projection_dim, heads.hidden_dim, heads.projection_dim)
        self.patch_level = PatchLevel(width, width, config.patch)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def start_step(self, progress: float) -> None:
        """Move the momentum encoder, once before an optimiser step's forward passes.

        Args:
            progress: share of the run done, in [0, 1].
        """
        momentum = momentum_at(progress, self.config.contrastive.momentum)
        ema_update(self.momentum_encoder, self.encoder, momentum)
        ema_update(self.momentum_projector, self.projector, momentum)

    def forward(self, view1: Tensor, mask1: Tensor, view2: Tensor, mask2: Tensor) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            view1: [B, 3, H, W]
            mask1: [B, h, w] bool, True = masked.
            view2: [B, 3, H, W], another augmentation of the same images.
            mask2: [B, h, w]

        Returns:
            `loss` and its parts, and for the log `feature_spread` and what `PatchLevel` gives.
        """
        with torch.no_grad():
            target1, target2 = self.momentum_encoder(view1), self.momentum_encoder(view2)
            key1, key2 = (gather_rows(self.momentum_projector(target.own)) for target in (target1, target2))  # [N, P]
        student1 = self.encoder(view1, mask1, self.mask_token)
        student2 = self.encoder(view2, mask2, self.mask_token)
        query1, query2 = (self.predictor(self.projector(student.own)) for student in (student1, student2))  # [B, P]
        tau, own = self.config.contrastive.temperature, rank() * len(view1)
        contrastive = contrastive_loss(query1, key2, tau, own) + contrastive_loss(query2, key1, tau, own)
        parts = self._patch_level(student1, target1, mask1)
        other = self._patch_level(student2, target2, mask2)
        self.patch_level.remember(torch.cat([target1.patches, target2.patches], dim=1))
        parts = {name: (value + other[name]) / 2.0 for name, value in parts.items()}
        loss = self.config.contrastive_weight * contrastive + self.config.patch.weight * parts["patch_loss"]
        return {
            "loss": loss,
            "contrastive_loss": contrastive.detach(),
            **{name: value.detach() for name, value in parts.items()},
            "feature_spread": spread(student1.own),
        }

    def _patch_level(self, student: Features, target: Features, mask: Tensor) -> dict[str, Tensor]:
        positions = masked_positions(mask, self.encoder, self.mask_shape)
        parts: dict[str, Tensor] = self.patch_level(student.patches, target.patches, positions)
        return parts
