"""Projectors and predictors. Each is a plain `nn.Sequential`, so that published weights map on by index."""

from __future__ import annotations

from torch import nn


def mocov3_mlp(layers: int, in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """MoCo v3's head: linear layers without bias, BN and ReLU between them, and a last BN without affine parameters.

    Args:
        layers: number of linear layers: 3 for the projector, 2 for the predictor.
        in_dim: width of the input.
        hidden_dim: width of the hidden layers.
        out_dim: P.

    Returns:
        [B, in_dim] → [B, out_dim], not normalised.

    Source: arXiv 2104.02057, section 4.3 and appendix.
    """
    modules: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        width_in, width_out = in_dim if layer == 0 else hidden_dim, out_dim if last else hidden_dim
        modules.append(nn.Linear(width_in, width_out, bias=False))
        modules.append(nn.BatchNorm1d(width_out, affine=not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def moby_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, BN, ReLU, linear: MoBY's projector and predictor, and as our choice MimCo's image head.

    Returns:
        [B, in_dim] → [B, out_dim], not normalised.

    Source: arXiv 2105.04553, section 3.
    """
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )
