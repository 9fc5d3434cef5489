"""SimMIM: raw pixels of masked units, by one linear layer (Xie et al., 2021, arXiv 2111.09886). A control, no teacher.

Written from the paper; must not import export, serving or evaluation.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import BackboneConfig, MaskConfig
from mimco_deploy.training.masking import mask_shape


def pixel_loss(predicted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """L1 on masked pixels.

    Args:
        predicted: [B, C, H, W]
        images: [B, C, H, W], the normalised input.
        mask: [B, h, w] bool, True = masked; h divides H.

    Returns:
        Scalar, the mean over masked pixels and channels of the batch; 0 where nothing is masked.

    Source: section 3.4.
    """
    patch = images.shape[2] // mask.shape[1]
    pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1)  # [B, 1, H, W]
    distance = (predicted.float() - images.float()).abs() * pixels
    return distance.sum() / (pixels.sum() + 1e-5) / images.shape[1]


class SimMIM(nn.Module):
    """Encoder with a mask token, and a linear head to the pixels of each output token.

    Args:
        backbone: a ViT, BEiT or Swin.
        mask: unit and ratio.

    Raises:
        ConfigError: the backbone takes no masks, or the mask does not fit it.
    """

    def __init__(self, backbone: BackboneConfig, mask: MaskConfig) -> None:
        super().__init__()
        self.encoder = Backbone(backbone)
        self.mask_token = self.encoder.new_mask_token()
        self.mask_shape = mask_shape(backbone.image_size_px, self.encoder.patch_px, mask)
        self.head = nn.Linear(self.encoder.width, 3 * self.encoder.stride_px**2)

    def start_step(self, progress: float) -> None:
        """Nothing moves with the schedule here."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """All pixels [B, 3, H, W] of images of which `mask` hides a part."""
        patches = self.head(self.encoder(images, mask, self.mask_token).patches)  # [B, L, 3 · stride²]
        grid = self.encoder.grid
        return F.pixel_shuffle(patches.mT.reshape(len(patches), -1, grid, grid), self.encoder.stride_px)

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            images: [B, 3, H, W], normalised.
            mask: [B, h, w] bool, True = masked.

        Returns:
            `loss`.
        """
        return {"loss": pixel_loss(self.reconstruct(images, mask), images, mask)}
