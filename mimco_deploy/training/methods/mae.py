"""MAE: a ViT that sees a quarter, and a decoder that draws the rest (He et al., 2021, arXiv 2111.06377). A control.

Written from the paper; must not import export, serving or evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import BackboneConfig, MaskConfig
from mimco_deploy.training.masking import mask_shape
from mimco_deploy.training.method_config import MAEConfig
from mimco_deploy.training.vit import init_linears, sincos_positions, vit_blocks


def to_patches(images: Tensor, patch_px: int) -> Tensor:
    """[B, C, H, W] → [B, L, patch² · C], patches row by row; in a patch row, column, channel."""
    grid = images.unfold(2, patch_px, patch_px).unfold(3, patch_px, patch_px)  # [B, C, h, w, p, p]
    return grid.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def patch_pixel_loss(predicted: Tensor, images: Tensor, mask: Tensor, patch_px: int, *, normalised: bool) -> Tensor:
    """Squared error on masked patches.

    Args:
        predicted: [B, L, patch² · C]
        images: [B, C, H, W]
        mask: [B, L] bool, True = masked.
        patch_px: side of a patch.
        normalised: standardise each target patch by its own mean and (unbiased) variance.

    Returns:
        Scalar, mean over the masked patches of the batch.

    Source: section 3, "Reconstruction target".
    """
    target = to_patches(images.float(), patch_px)
    if normalised:
        variance, mean = torch.var_mean(target, dim=2, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    error = (predicted.float() - target).square().mean(dim=2)  # [B, L]
    return (error * mask).sum() / mask.sum()


class MAE(nn.Module):
    """Encoder of the visible patches, and a narrow decoder of all.

    Args:
        backbone: a ViT.
        mask: ratio, and a unit of one patch as in the paper or larger.
        config: decoder and target.

    Raises:
        ConfigError: the backbone is no ViT with a CLS token, the mask does not fit it, or the decoder cannot be built.
    """

    def __init__(self, backbone: BackboneConfig, mask: MaskConfig, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Backbone(backbone)
        if not self.encoder.encodes_parts:
            raise ConfigError(f"MAE with {backbone.name}", expected="a ViT with a CLS token, which can encode a part")
        self.patch_px = self.encoder.patch_px
        self.mask_shape = mask_shape(backbone.image_size_px, self.patch_px, mask)
        if self.mask_shape.masked_patches == self.encoder.grid**2:
            raise ConfigError(f"mask.mask_ratio {mask.mask_ratio} hides every patch", expected="one visible at least")
        width = config.decoder_dim
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, width), std=0.02))
        positions = sincos_positions(width, self.encoder.grid).unsqueeze(0)
        self.decoder_positions = nn.Parameter(positions, requires_grad=False)
        self.decoder_embed = nn.Linear(self.encoder.width, width)
        self.decoder_blocks = vit_blocks(width, config.decoder_depth, config.decoder_heads)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, 3 * self.patch_px**2)
        init_linears(self.decoder_embed)
        init_linears(self.decoder_pred)

    def start_step(self, progress: float) -> None:
        """Nothing moves with the schedule here."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Pixels of all patches, [B, L, patch² · 3], from those that `mask` [B, L] leaves visible."""
        count = mask.shape[1] - self.mask_shape.masked_patches
        visible = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]  # [B, V]
        features = self.encoder(images, visible=visible)
        patches = self.decoder_embed(features.patches)  # [B, V, decoder]
        everywhere = self.mask_token.to(patches.dtype).expand(len(patches), mask.shape[1], -1)
        rows = visible.unsqueeze(2).expand(-1, -1, patches.shape[2])
        tokens = torch.cat([self.decoder_embed(features.own).unsqueeze(1), everywhere.scatter(1, rows, patches)], dim=1)
        tokens = self.decoder_norm(self.decoder_blocks(tokens + self.decoder_positions))
        pixels: Tensor = self.decoder_pred(tokens[:, 1:])
        return pixels

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            images: [B, 3, H, W], normalised.
            mask: [B, h, w] bool, True = masked; as many in each image.

        Returns:
            `loss`.
        """
        hidden = mask.flatten(1)  # [B, L]
        predicted = self.reconstruct(images, hidden)
        normalised = self.config.normalised_pixels
        return {"loss": patch_pixel_loss(predicted, images, hidden, self.patch_px, normalised=normalised)}
