"""MimCo: masked image modelling with a contrastive teacher (Zhou et al., 2022, arXiv 2209.03063). Stage 2.

The student sees a masked image, the frozen teacher sees all of it. Two losses, both contrastive: each masked patch must
find the teacher's token of the same place (patch level), and the pooled image must find the teacher's feature of the
same image (image level). We had the paper's abstract and a review of it, which says that both losses are contrastive;
heads, negatives and temperatures are our choice, and `MimCoConfig` says why. Must not import export, serving or
evaluation.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import BackboneConfig, MimCoConfig
from mimco_deploy.training.distributed import gather_rows, rank
from mimco_deploy.training.heads import image_mlp
from mimco_deploy.training.losses import info_nce
from mimco_deploy.training.monitor import spread

_QUEUE_LASTS = 4
"""Micro-batches that a token stays in the queue, at least."""


def patch_logits(
    queries: Tensor, tokens: Tensor, positions: Tensor, *, intra: bool, batch_draw: Tensor | None, queue: Tensor | None
) -> Tensor:
    """Cosines of each masked patch with its positive and its negatives.

    Args:
        queries: [B, M, P] student's predictions at the masked positions, not normalised.
        tokens: [B, L, P] teacher's tokens of the whole image, not normalised; no gradient is sent to them.
        positions: [B, M] int64, which of the L tokens each query stands for.
        intra: take the other tokens of the same image as negatives.
        batch_draw: [K] int64 indices into the batch's B · L tokens to take as negatives, those of the query's own image
            left out; or None.
        queue: [K, P] L2-normalised tokens of earlier batches, or None.

    Returns:
        [B, M, 1 + negatives]. Column 0 is the positive; −inf stands where there is no negative.
    """
    queries, tokens = F.normalize(queries, dim=2), F.normalize(tokens.detach(), dim=2)
    own = queries @ tokens.mT  # [B, M, L]
    place = positions.unsqueeze(2)
    logits = [own.gather(2, place)]
    if intra:
        logits.append(own.scatter(2, place, -torch.inf))
    if batch_draw is not None:
        others = queries @ tokens.flatten(0, 1)[batch_draw].T  # [B, M, K]
        image_of_key = batch_draw // tokens.shape[1]
        same_image = image_of_key == torch.arange(len(tokens), device=tokens.device).unsqueeze(1)  # [B, K]
        logits.append(others.masked_fill(same_image.unsqueeze(1), -torch.inf))
    if queue is not None:
        logits.append(queries @ queue.to(queries.dtype).T)
    return torch.cat(logits, dim=2)


def patch_loss(logits: Tensor, temperature: float) -> Tensor:
    """Contrastive reconstruction of the masked patches: mean over them of −log softmax(logits/τ)[positive].

    Args:
        logits: [B, M, 1 + negatives] from `patch_logits`.
        temperature: τ

    Returns:
        Scalar, near log(1 + negatives) by chance.
    """
    flat = logits.flatten(0, 1).float() / temperature
    return F.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.int64, device=flat.device))


def image_loss(queries: Tensor, keys: Tensor, temperature: float, first_positive: int = 0) -> Tensor:
    """Contrastive reconstruction of the whole image: InfoNCE against the teacher's image features.

    Args:
        queries: [B, P] image head of the student's pooled features.
        keys: [N, P] teacher's features of all processes' images, in rank order.
        temperature: τ
        first_positive: index of the key of this process's first query.

    Returns:
        Scalar, near log N by chance.
    """
    return info_nce(queries, keys, temperature, first_positive)


class TokenQueue(nn.Module):
    """First-in first-out store of L2-normalised teacher tokens; part of the checkpoint. Starts with random directions.

    Args:
        size: K
        dim: P
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self.rows: Tensor
        self.pushed: Tensor

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Overwrite the oldest rows by `rows` [n, P]; the last K of them where n > K."""
        size = len(self.rows)
        rows = F.normalize(rows[-size:].to(self.rows.dtype), dim=1)
        at = (self.pushed + torch.arange(len(rows), device=rows.device)) % size
        self.rows[at] = rows
        self.pushed += len(rows)


class MimCo(nn.Module):
    """Student encoder, frozen teacher, and the two losses.

    Args:
        backbone: of the student.
        teacher: frozen here; it stays in eval mode whatever the rest is in. Its grid must be the student's.
        teacher_pooling: how the teacher was trained to give one vector an image: `cls` for MoCo v3.
        masked_tokens: M, masked patches an image.
        config: losses and heads.

    Raises:
        ConfigError: the grids differ, or the student cannot start from this teacher.
    """

    def __init__(
        self, backbone: BackboneConfig, teacher: Backbone, teacher_pooling: str, masked_tokens: int, config: MimCoConfig
    ) -> None:
        super().__init__()
        _check(backbone, teacher.config, config)
        self.config = config
        self.masked_tokens = masked_tokens
        self.teacher = teacher.requires_grad_(False).eval()
        self.teacher_pooling = teacher_pooling
        self.encoder = Backbone(backbone)
        if config.init_from_teacher:
            self.encoder.load_state_dict(teacher.state_dict())
        width, target = backbone.embed_dim, teacher.config.embed_dim
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.patch_head = nn.Linear(width, target)
        self.image_head = image_mlp(width, config.hidden_dim, target)
        self.queue = TokenQueue(config.queue_size, target) if "queue" in config.dictionaries else None

    def train(self, mode: bool = True) -> MimCo:
        """Set the mode of everything but the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def start_step(self, progress: float) -> None:
        """Nothing moves with the schedule here: the teacher is frozen."""

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            images: [B, 3, H, W]
            mask: [B, h, w] bool, True = masked; M in each image.

        Returns:
            `loss` and its parts, and for the log `feature_spread`, `patch_accuracy` and `positive_similarity`.
        """
        with torch.no_grad():
            target = self.teacher(images)
        student = self.encoder(images, mask, self.mask_token)

        positions = (
            mask.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.masked_tokens]
        )
        rows = positions.unsqueeze(2).expand(-1, -1, student.patches.shape[2])
        queries = self.patch_head(student.patches.gather(1, rows))  # [B, M, P]
        logits = patch_logits(
            queries,
            target.patches,
            positions,
            intra="intra" in self.config.dictionaries,
            batch_draw=self._draw_from_batch(target.patches) if "batch" in self.config.dictionaries else None,
            queue=self.queue.rows.clone() if self.queue is not None else None,  # the push below comes before backward
        )
        patch = patch_loss(logits, self.config.patch_temperature)

        pooled = student.pooled(self.config.pooling)  # [B, D]
        keys = gather_rows(target.pooled(self.teacher_pooling))  # [N, P]
        image = image_loss(self.image_head(pooled), keys, self.config.image_temperature, rank() * len(images))

        if self.queue is not None:
            flat = target.patches.flatten(0, 1)
            share = max(1, len(self.queue.rows) // _QUEUE_LASTS)
            self.queue.push(flat[torch.randperm(len(flat), device=flat.device)[:share]])
        return {
            "loss": self.config.patch_weight * patch + self.config.image_weight * image,
            "patch_loss": patch.detach(),
            "image_loss": image.detach(),
            "patch_accuracy": (logits.detach().argmax(dim=2) == 0).float().mean(),
            "positive_similarity": logits.detach()[..., 0].float().mean(),
            "feature_spread": spread(pooled),
        }

    def _draw_from_batch(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[0] * tokens.shape[1]
        return torch.randperm(count, device=tokens.device)[: self.config.batch_keys]


def _check(student: BackboneConfig, teacher: BackboneConfig, config: MimCoConfig) -> None:
    known: Collection[str] = ("intra", "batch", "queue")
    if not config.dictionaries or not set(config.dictionaries) <= set(known):
        raise ConfigError(f"method.dictionaries {config.dictionaries}", expected=f"one or more of {', '.join(known)}")
    if (student.grid, student.image_size_px) != (teacher.grid, teacher.image_size_px):
        raise ConfigError(
            f"a student of {student.grid}×{student.grid} patches at {student.image_size_px} px",
            expected=f"the teacher's {teacher.grid}×{teacher.grid} at {teacher.image_size_px} px",
        )
    if config.init_from_teacher and student != teacher:
        raise ConfigError(f"init_from_teacher with a student {student}", expected=f"the teacher's backbone {teacher}")
