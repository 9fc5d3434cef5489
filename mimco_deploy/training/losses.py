"""The losses that methods share, as pure functions: no device, no rank, no state.

The caller gathers keys over processes. Each method's own use of them is in its file under `methods/`.
"""

from __future__ import annotations

from typing import Literal

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
    return F.cross_entropy(scaled(cosines, temperature), positives)


@torch.no_grad()
def retrieval(queries: Tensor, keys: Tensor, first_positive: int = 0) -> tuple[Tensor, Tensor]:
    """How well queries find their keys, for the log.

    Args:
        queries: [Q, P], not yet normalised.
        keys: [K, P], not yet normalised.
        first_positive: index of query 0's key.

    Returns:
        Mean cosine of a query with its own key, and the share of queries whose own key is nearest.
    """
    cosines = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T  # [Q, K]
    own = torch.arange(len(queries), device=queries.device) + first_positive
    return cosines.gather(1, own.unsqueeze(1)).mean(), (cosines.argmax(dim=1) == own).float().mean()


def first_of(logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy where column 0 is the positive of each row.

    Args:
        logits: [Q, 1 + negatives] cosines; −inf where there is no negative.
        temperature: τ > 0.

    Returns:
        Scalar, mean over rows of −log softmax(logits/τ)[0].
    """
    return F.cross_entropy(
        scaled(logits, temperature), torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    )


def regression(
    predicted: Tensor, target: Tensor, kind: Literal["l1", "l1_normalised", "smooth_l1", "cosine"], beta: float = 2.0
) -> Tensor:
    """Distance of predicted from target features, the alternative to a contrastive loss.

    Args:
        predicted: [..., P]
        target: [..., P]; no gradient is sent to it.
        kind: `l1` on the target as it is; `l1_normalised` and `smooth_l1` on the target whitened by a layer norm
            without parameters (arXiv 2205.14141, section 3); `cosine` is 1 − cosine (arXiv 2211.07636).
        beta: where the smooth L1 turns from a square to a line.

    Returns:
        Scalar, mean over everything; 0 where they agree.
    """
    predicted, target = predicted.float(), target.detach().float()
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(predicted, target, dim=-1).mean()
    if kind == "l1":
        return F.l1_loss(predicted, target)
    target = F.layer_norm(target, target.shape[-1:])
    return F.l1_loss(predicted, target) if kind == "l1_normalised" else F.smooth_l1_loss(predicted, target, beta=beta)


def scaled(cosines: Tensor, temperature: float) -> Tensor:
    """Divide by τ after leaving bf16, which would round a logit of 5 to steps of 0.03; float64 stays."""
    return (cosines if cosines.dtype == torch.float64 else cosines.float()) / temperature
