"""MoCo v3: a contrastive teacher without a queue (Chen, Xie, He, 2021, arXiv 2104.02057). Stage 1.

Two views of an image; the online encoder's query of one must find the momentum encoder's key of the other among the
keys of the whole global batch. Written from the paper; must not import export, serving or evaluation.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.distributed import gather_rows, rank
from mimco_deploy.training.heads import mocov3_mlp
from mimco_deploy.training.losses import info_nce, retrieval
from mimco_deploy.training.method_config import MoCoV3Config
from mimco_deploy.training.momentum import ema_update
from mimco_deploy.training.monitor import spread
from mimco_deploy.training.schedules import momentum_at


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float, first_positive: int = 0) -> Tensor:
    """One direction of MoCo v3's loss: 2τ · InfoNCE.

    Args:
        queries: [B, P] of this process.
        keys: [N, P] of all processes, in rank order.
        temperature: τ
        first_positive: index of the key of this process's first query.

    Returns:
        Scalar. Equal embeddings give 2τ · log N.

    Source: equation 1 and algorithm 1; the factor 2τ keeps the gradient's size when τ changes.
    """
    return 2.0 * temperature * info_nce(queries, keys, temperature, first_positive)


class MoCoV3(nn.Module):
    """Online encoder, its momentum copy, and the symmetric loss.

    Args:
        backbone: of both encoders, a ViT; the patch embedding stays the random projection it starts as.
        config: temperature, momentum and head sizes.

    Raises:
        ConfigError: the backbone has no CLS token.
    """

    def __init__(self, backbone: BackboneConfig, config: MoCoV3Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Backbone(backbone, frozen_patch_embed=True)
        if self.encoder.own_pooling != "cls":
            raise ConfigError(f"MoCo v3 with {backbone.name}", expected="a ViT with a CLS token, or --method moby")
        width, hidden, out = self.encoder.width, config.hidden_dim, config.projection_dim
        self.projector = mocov3_mlp(3, width, hidden, out)
        self.predictor = mocov3_mlp(2, out, hidden, out)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def start_step(self, progress: float) -> None:
        """Move the momentum encoder, once before an optimiser step's forward passes.

        Args:
            progress: share of the run done, in [0, 1].
        """
        self.update_momentum_encoder(momentum_at(progress, self.config.momentum))

    def update_momentum_encoder(self, momentum: float) -> None:
        """Move the momentum encoder and its projector towards the online ones."""
        ema_update(self.momentum_encoder, self.encoder, momentum)
        ema_update(self.momentum_projector, self.projector, momentum)

    def forward(self, view1: Tensor, view2: Tensor) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            view1: [B, 3, H, W]
            view2: [B, 3, H, W], another augmentation of the same images.

        Returns:
            `loss`, and for the log `feature_spread`, `positive_similarity` and `image_accuracy`.
        """
        features1, features2 = self.encoder(view1).own, self.encoder(view2).own  # [B, D]
        query1, query2 = self.predictor(self.projector(features1)), self.predictor(self.projector(features2))  # [B, P]
        with torch.no_grad():
            key1 = gather_rows(self.momentum_projector(self.momentum_encoder(view1).own))  # [N, P]
            key2 = gather_rows(self.momentum_projector(self.momentum_encoder(view2).own))
        own = rank() * len(view1)
        tau = self.config.temperature
        loss = contrastive_loss(query1, key2, tau, own) + contrastive_loss(query2, key1, tau, own)
        similarity, accuracy = retrieval(query1, key2, own)
        return {
            "loss": loss,
            "feature_spread": spread(features1),
            "positive_similarity": similarity,
            "image_accuracy": accuracy,
        }
