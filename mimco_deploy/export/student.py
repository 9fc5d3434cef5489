"""From a checkpoint to an eval module that takes pixels and gives embeddings: everything that the graph will hold."""

from __future__ import annotations

import hashlib
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.training.augment import to_input
from mimco_deploy.training.backbone import Backbone

CROP_SHARE = 0.875
"""Eval-time geometry: the centre crop's side over the resized short side, ImageNet's convention (224 of 256)."""


class EncoderModule(nn.Module):
    """Normalisation, backbone, pooling and L2, in eval mode and float32.

    Args:
        backbone: trained.
        pooling: `mean` or `cls`, as its loss trained it.
    """

    def __init__(self, backbone: Backbone, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone.float()
        self.pooling = pooling
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [batch, H, W, 3] → float32 [batch, D], L2-normalised."""
        features = self.backbone(to_input(image.permute(0, 3, 1, 2)))
        return F.normalize(features.pooled(self.pooling), dim=1)


def fingerprint(module: EncoderModule) -> str:
    """SHA-256 over all that decides an embedding: weights, architecture, pooling and geometry."""
    config = module.backbone.config
    digest = hashlib.sha256()
    contract = {"architecture": config.name, "image_size_px": config.image_size_px, "crop_share": CROP_SHARE}
    digest.update(json.dumps({**contract, "pooling": module.pooling}, sort_keys=True).encode())
    for name, value in sorted(module.backbone.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
