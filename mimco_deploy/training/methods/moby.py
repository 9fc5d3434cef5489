"""MoBY: MoCo v2's queues and BYOL's asymmetry, made for Swin (Xie et al., 2021, arXiv 2105.04553). Stage 1.

Two views of an image; the online encoder's query of one must find the momentum encoder's key of the other among the
keys of earlier batches. Written from the paper; must not import export, serving or evaluation.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.distributed import gather_rows
from mimco_deploy.training.heads import moby_mlp
from mimco_deploy.training.losses import first_of, retrieval
from mimco_deploy.training.method_config import MoBYConfig
from mimco_deploy.training.momentum import KeyQueue, ema_update
from mimco_deploy.training.monitor import spread
from mimco_deploy.training.schedules import momentum_at


def contrastive_loss(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """One direction of MoBY's loss: each query's own key against a queue.

    Args:
        queries: [B, P], L2-normalised.
        keys: [B, P], L2-normalised; row i is query i's positive.
        queue: [K, P], L2-normalised negatives.
        temperature: τ

    Returns:
        Scalar. Equal embeddings give log(1 + K).

    Source: section 3, equation 1.
    """
    positives = (queries * keys).sum(dim=1, keepdim=True)  # [B, 1]
    return first_of(torch.cat([positives, queries @ queue.to(queries.dtype).T], dim=1), temperature)


class MoBY(nn.Module):
    """Online encoder with drop path, its momentum copy without, two queues, and the symmetric loss.

    Args:
        backbone: of both encoders, with the online one's drop path.
        config: temperature, momentum, queues and head sizes.
    """

    def __init__(self, backbone: BackboneConfig, config: MoBYConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Backbone(backbone)
        hidden, out = config.hidden_dim, config.projection_dim
        self.projector = moby_mlp(self.encoder.own_width, hidden, out)
        self.predictor = moby_mlp(out, hidden, out)
        steady = Backbone(dataclasses.replace(backbone, drop_path=config.momentum_drop_path))
        steady.load_state_dict(self.encoder.state_dict())
        self.momentum_encoder = steady.requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.queue1 = KeyQueue(config.queue_size, out)
        self.queue2 = KeyQueue(config.queue_size, out)

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
        """The loss of one micro-batch, whose keys then enter the queues.

        Args:
            view1: [B, 3, H, W]
            view2: [B, 3, H, W], another augmentation of the same images.

        Returns:
            `loss`, and for the log `feature_spread`, `positive_similarity` and `image_accuracy`.
        """
        features1, features2 = self.encoder(view1).own, self.encoder(view2).own  # [B, D]
        query1 = F.normalize(self.predictor(self.projector(features1)), dim=1)  # [B, P]
        query2 = F.normalize(self.predictor(self.projector(features2)), dim=1)
        with torch.no_grad():
            key1 = F.normalize(self.momentum_projector(self.momentum_encoder(view1).own), dim=1)
            key2 = F.normalize(self.momentum_projector(self.momentum_encoder(view2).own), dim=1)
        # copies, for the keys enter the queues before backward
        queue1, queue2 = self.queue1.rows.clone(), self.queue2.rows.clone()
        tau = self.config.temperature
        loss = contrastive_loss(query1, key2, queue2, tau) + contrastive_loss(query2, key1, queue1, tau)
        similarity, accuracy = retrieval(query1, torch.cat([key2, queue2.to(key2.dtype)]))
        self.queue1.push(gather_rows(key1))
        self.queue2.push(gather_rows(key2))
        return {
            "loss": loss,
            "feature_spread": spread(features1),
            "positive_similarity": similarity,
            "image_accuracy": accuracy,
        }
