"""The backbone: the only file that touches timm's models.

A timm vision transformer with MoCo v3's fixed positions and initialisation, and SimMIM's mask-token path. Its
parameters keep timm's names under `body.`, so that a trained one loads into plain timm.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.config import BackboneConfig

# ImageNet's channel statistics in [0, 1], the field's convention: of training's input and of the exported graph.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CROP_SHARE = 0.875
"""Eval-time geometry: the centre crop's side over the resized short side, ImageNet's convention (224 of 256)."""


class Features(NamedTuple):
    """What a backbone gives, after its last norm; not normalised."""

    cls: Tensor
    """[B, D]"""
    patches: Tensor
    """[B, L, D], row by row"""

    def pooled(self, pooling: str) -> Tensor:
        """One vector an image, [B, D]: the mean of the patch tokens, or the CLS token."""
        return self.patches.mean(dim=1) if pooling == "mean" else self.cls


class Backbone(nn.Module):
    """A vision transformer that gives all its tokens, and takes a mask.

    Args:
        config: architecture and sizes.
        frozen_patch_embed: keep the patch embedding as the random projection it starts as (MoCo v3, section 4.2).

    Raises:
        ConfigError: timm does not know the architecture, it is no ViT, or the patches do not tile the image.
    """

    def __init__(self, config: BackboneConfig, *, frozen_patch_embed: bool = False) -> None:
        super().__init__()
        if config.image_size_px % config.patch_size_px:
            raise ConfigError(
                f"image_size_px {config.image_size_px} with patch_size_px {config.patch_size_px}",
                expected="a whole number of patches",
            )
        try:
            body = timm.create_model(
                config.name, pretrained=False, drop_path_rate=config.drop_path, **timm_args(config)
            )
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"backbone {config.name}: {error}", expected="a timm ViT, such as vit_small_patch16_224"
            ) from error
        if not isinstance(body, VisionTransformer) or body.num_prefix_tokens != 1 or body.no_embed_class:
            raise ConfigError(f"backbone {config.name}", expected="a timm ViT with one CLS token that has a position")
        self.config = config
        self.body = body
        _init_as_mocov3(body)
        body.patch_embed.requires_grad_(not frozen_patch_embed)

    def forward(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Features:
        """Encode.

        Args:
            images: [B, 3, H, W], normalised.
            mask: [B, h, w] bool, True = masked, or None.
            mask_token: [1, 1, D], stands in for masked patch tokens before positions are added; given with `mask`.
        """
        tokens = self.body.patch_embed(images)  # [B, L, D]
        if mask is not None:
            assert mask_token is not None, "a mask comes with its token"
            tokens = torch.where(mask.flatten(1).unsqueeze(2), mask_token.to(tokens.dtype), tokens)
        tokens = self.body.norm_pre(self.body._pos_embed(tokens))  # [B, 1 + L, D]
        tokens = self.body.norm(self.body.blocks(tokens))
        return Features(cls=tokens[:, 0], patches=tokens[:, 1:])


def timm_args(config: BackboneConfig) -> dict[str, Any]:
    """Arguments that make `timm.create_model(config.name, …)` build this backbone."""
    return {
        "img_size": config.image_size_px,
        "patch_size": config.patch_size_px,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "num_classes": 0,
        "global_pool": "",
    }


def save_as_timm(backbone: Backbone, folder: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads.

    timm fills its config from the architecture's published weights; what describes those and not ours is replaced.
    """
    ours = {
        "tag": "",
        "license": "unstated",
        "mean": MEAN,
        "std": STD,
        "crop_pct": CROP_SHARE,
        "interpolation": "bicubic",
    }
    save_for_hf(
        backbone.body,
        str(folder),
        model_config={"pretrained_cfg": ours},
        model_args=timm_args(backbone.config),
        safe_serialization=True,
    )


def sincos_positions(embed_dim: int, grid: int) -> Tensor:
    """MoCo v3's fixed position embedding.

    Args:
        embed_dim: D, a multiple of 4.
        grid: patches along one side.

    Returns:
        [1 + grid², D] float32. Row 0, the CLS token's, is zero; the first half of the channels holds the sines and then
        the cosines of the patch's row, the second half those of its column.

    Raises:
        ConfigError: D is not a multiple of 4.

    Source: MoCo v3, section 4; the order of the halves as in the authors' published weights.
    """
    if embed_dim % 4:
        raise ConfigError(f"embed_dim {embed_dim}", expected="a multiple of 4 for sin-cos positions")
    quarter = embed_dim // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64).unsqueeze(1) * frequencies  # [grid, D/4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, D/2]
    rows = line.repeat_interleave(grid, dim=0)
    columns = line.repeat(grid, 1)
    patches = torch.cat([rows, columns], dim=1)  # [grid², D]
    return torch.cat([torch.zeros(1, embed_dim, dtype=torch.float64), patches]).float()


@torch.no_grad()
def _init_as_mocov3(body: VisionTransformer) -> None:
    """Xavier-uniform linears, q, k and v as three matrices; zero biases; a CLS token near zero; fixed positions."""
    for name, module in body.named_modules():
        if isinstance(module, nn.Linear):
            parts = module.weight.chunk(3) if name.endswith("qkv") else (module.weight,)
            for part in parts:
                nn.init.xavier_uniform_(part)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = body.patch_embed.proj
    bound = math.sqrt(6.0 / (math.prod(projection.weight.shape[1:]) + projection.weight.shape[0]))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    assert body.cls_token is not None, "Backbone takes only transformers with one"
    nn.init.normal_(body.cls_token, std=1e-6)
    positions = sincos_positions(body.embed_dim, body.patch_embed.grid_size[0])
    body.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
