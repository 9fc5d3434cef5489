"""From a checkpoint to an eval module that takes pixels and gives embeddings: everything that the graph will hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.training.augment import ToInput
from mimco_deploy.training.backbone import CROP_SHARE, Backbone


class EncoderModule(nn.Module):
    """Normalisation, backbone, pooling and L2, in eval mode and float32.

    Args:
        backbone: trained.
        pooling: `mean` or `cls`, as its loss trained it.
    """

    def __init__(self, backbone: Backbone, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone.float()
        self.to_input = ToInput(backbone.config)
        self.pooling = pooling
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [batch, H, W, 3] → float32 [batch, D], L2-normalised."""
        features = self.backbone(self.to_input(image.permute(0, 3, 1, 2)))
        return F.normalize(features.pooled(self.pooling), dim=1)


def fingerprint(module: EncoderModule) -> str:
    """SHA-256 over all that decides an embedding: weights, architecture, pooling and geometry."""
    contract = {**asdict(module.backbone.config), "crop_share": CROP_SHARE, "pooling": module.pooling}
    weights = weights_hash(module.backbone.state_dict())
    return hashlib.sha256(f"{json.dumps(contract, sort_keys=True)}\n{weights}".encode()).hexdigest()


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
