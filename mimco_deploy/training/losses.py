"""The contrastive loss that both stages share, as a pure function: no device, no rank, no state.

The caller gathers keys over processes. Each method's own use of it is in its file: `methods/mocov3.py`,
`methods/mimco.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(queries: Tensor, keys: Tensor, temperature: float, first_positive: int = 0) -> Tensor:
    """InfoNCE with one dictionary for all queries; query i's positive is key `first_positive + i`.

    Args:
        queries: [Q, P], not yet normalised.
        keys: [K, P], not yet normalised; no gradient is sent to them.
        temperature: τ > 0.
        first_positive: index of query 0's key: this process's first row where keys were gathered over processes.

    Returns:
        Scalar, mean over queries of −log softmax(q·k/τ)[positive].

    Source: MoCo v3 (arXiv 2104.02057), equation 1, without its factor 2τ.
    """
    cosines = F.normalize(queries, dim=1) @ F.normalize(keys.detach(), dim=1).T  # [Q, K]
    positives = torch.arange(len(queries), device=queries.device) + first_positive
    return F.cross_entropy(_scaled(cosines, temperature), positives)


def _scaled(cosines: Tensor, temperature: float) -> Tensor:
    """Divide by τ after leaving bf16, which would round a logit of 5 to steps of 0.03; float64 stays."""
    return (cosines if cosines.dtype == torch.float64 else cosines.float()) / temperature
