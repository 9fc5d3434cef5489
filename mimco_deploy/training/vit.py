"""What MoCo v3 and MAE fix of a plain ViT: positions, initialisation, and the blocks of MAE's decoder."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError


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


def vit_blocks(width: int, depth: int, heads: int) -> nn.Sequential:
    """Pre-norm transformer blocks as in timm's ViT, [B, N, width] → the same, initialised as in MoCo v3 and MAE.

    Raises:
        ConfigError: the heads do not divide the width.
    """
    if width % heads:
        raise ConfigError(f"a width of {width}", expected=f"a multiple of its {heads} heads")
    norm: Any = functools.partial(nn.LayerNorm, eps=1e-6)
    blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
    init_linears(blocks)
    return blocks


@torch.no_grad()
def init_linears(module: nn.Module) -> None:
    """Xavier-uniform linears, q, k and v as three matrices; zero biases (MoCo v3)."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            for matrix in part.weight.chunk(3) if name.endswith("qkv") else (part.weight,):
                nn.init.xavier_uniform_(matrix)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@torch.no_grad()
def init_as_mocov3(body: VisionTransformer) -> None:
    """MoCo v3's linears; a uniform patch projection; a CLS token near zero; fixed positions."""
    init_linears(body)
    projection = body.patch_embed.proj
    bound = math.sqrt(6.0 / (math.prod(projection.weight.shape[1:]) + projection.weight.shape[0]))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    assert body.cls_token is not None, "called for transformers with one"
    nn.init.normal_(body.cls_token, std=1e-6)
    positions = sincos_positions(body.embed_dim, body.patch_embed.grid_size[0])
    body.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
