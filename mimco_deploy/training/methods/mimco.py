"""MimCo: masked image modelling with a contrastive teacher (Zhou et al., 2022, arXiv 2209.03063). Stage 2.

The student sees a masked image, the frozen teacher sees all of it. Two losses, both contrastive: each masked patch must
find the teacher's token of the same place (patch level), and the pooled image must find the teacher's feature of the
same image (image level). We had the paper's abstract and a review of it, which says that both losses are contrastive;
heads, negatives and temperatures are our choice, and `MimCoConfig` says why. Must not import export, serving or
evaluation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone, Features
from mimco_deploy.training.config import BackboneConfig, MaskConfig
from mimco_deploy.training.distributed import draw_for_all, gather_rows, own_part, rank, rows_of_all, world_size
from mimco_deploy.training.heads import moby_mlp
from mimco_deploy.training.losses import first_of, info_nce, regression, retrieval
from mimco_deploy.training.masking import MaskShape, mask_attended, mask_shape
from mimco_deploy.training.method_config import MimCoConfig, PatchLossConfig, Pooling
from mimco_deploy.training.momentum import KeyQueue
from mimco_deploy.training.monitor import spread
from mimco_deploy.training.teacher import Teacher

_QUEUE_LASTS = 4
"""Micro-batches that a token stays in the queue, at least."""


def share_won(logits: Tensor) -> Tensor:
    """Share of queries whose positive, the first of logits [..., 1 + N], is above all negatives.

    A tie is none: in bfloat16 the tokens of an image tie by the hundred while a student knows nothing.
    """
    return (logits[..., 1:] < logits[..., :1]).all(dim=-1).float().mean()


def patch_logits(
    queries: Tensor,
    tokens: Tensor,
    positions: Tensor,
    *,
    intra: bool,
    batch: tuple[Tensor, Tensor] | None = None,
    queue: Tensor | None = None,
) -> Tensor:
    """Cosines of each masked patch with its positive and its negatives.

    Args:
        queries: [B, M, P] student's predictions at the masked positions, not normalised.
        tokens: [B, L, P] teacher's tokens of the whole image, not normalised; no gradient is sent to them.
        positions: [B, M] int64, which of the L tokens each query stands for.
        intra: take the other tokens of the same image as negatives.
        batch: [K, P] tokens of the batch, not normalised, to take as negatives, and [K] the image that each is of,
            counted from this process's first; a query's own image is left out. Or None.
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
    if batch is not None:
        keys, image_of_key = batch
        others = queries @ F.normalize(keys.detach(), dim=1).to(queries.dtype).T  # [B, M, K]
        same_image = image_of_key == torch.arange(len(tokens), device=tokens.device).unsqueeze(1)  # [B, K]
        logits.append(others.masked_fill(same_image.unsqueeze(1), -torch.inf))
    if queue is not None:
        logits.append(queries @ queue.to(queries.dtype).T)
    return torch.cat(logits, dim=2)


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


class PatchLevel(nn.Module):
    """The loss over masked patches: a linear head, and where negatives come from.

    Args:
        width: D of the student's tokens.
        target_width: P of the teacher's.
        config: kind of loss, temperature, dictionaries.
    """

    def __init__(self, width: int, target_width: int, config: PatchLossConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(width, target_width)
        wanted = config.kind == "contrastive" and "queue" in config.dictionaries
        self.queue = KeyQueue(config.queue_size, target_width) if wanted else None

    def forward(self, student: Tensor, target: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            student: [B, L, D] tokens of the masked image.
            target: [B, L, P] teacher's tokens of the whole image.
            positions: [B, M] int64, the masked ones.

        Returns:
            `patch_loss`, near log(1 + negatives) by chance where it is contrastive, and for the log
            `patch_accuracy` (of contrastive losses) and `positive_similarity`.
        """
        queries = self.head(_at(student, positions))  # [B, M, P]
        if self.config.kind != "contrastive":
            truth = _at(target, positions)
            similarity = F.cosine_similarity(queries.detach(), truth, dim=2)
            return {
                "patch_loss": regression(queries, truth, self.config.kind),
                "positive_similarity": similarity.float().mean(),
            }
        logits = patch_logits(
            queries,
            target,
            positions,
            intra="intra" in self.config.dictionaries,
            batch=self._draw_from_batch(target) if "batch" in self.config.dictionaries else None,
            queue=self.queue.rows.clone() if self.queue is not None else None,  # `remember` comes before backward
        )
        return {
            "patch_loss": first_of(logits.flatten(0, 1), self.config.temperature),
            "patch_accuracy": share_won(logits.detach()),
            "positive_similarity": logits.detach()[..., 0].float().mean(),
        }

    def remember(self, target: Tensor) -> None:
        """Put a share of a batch's tokens [B, L, P] into the queue, after all losses that they are positives of."""
        if self.queue is not None:
            share = max(1, len(self.queue.rows) // _QUEUE_LASTS)
            self.queue.push(self._draw(target, share)[0])

    def _draw_from_batch(self, target: Tensor) -> tuple[Tensor, Tensor]:
        keys, drawn = self._draw(target, self.config.batch_keys)
        return keys, drawn // target.shape[1] - rank() * len(target)

    def _draw(self, target: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Up to `count` tokens of all processes' images, the same in each, and their numbers among all."""
        tokens = target.flatten(0, 1)
        total = len(tokens) * world_size()
        drawn = draw_for_all(lambda: torch.randperm(total, device=tokens.device)[:count])
        return rows_of_all(tokens, drawn), drawn


class MimCo(nn.Module):
    """Student encoder, frozen teacher, and the two losses.

    Args:
        backbone: of the student.
        teacher: frozen here.
        teacher_pooling: how the teacher was trained to give one vector an image: `cls` for MoCo v3's ViT.
        mask: unit, ratio and kind.
        config: losses and heads.

    Raises:
        ConfigError: the grids differ, the mask does not fit, or the student cannot start from this teacher.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        teacher: Backbone,
        teacher_pooling: Pooling,
        mask: MaskConfig,
        config: MimCoConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = Backbone(backbone)
        self.mask_token = self.encoder.new_mask_token()
        self.mask_kind = mask.kind
        self.mask_shape = mask_shape(backbone.image_size_px, self.encoder.patch_px, mask)
        check_unit(self.encoder, mask)
        if config.init_from_teacher:
            self.encoder.start_as(teacher, "init_from_teacher")
        self.teacher = Teacher(teacher, teacher_pooling, self.encoder, config.teacher_image_size_px)
        width = self.encoder.width
        self.patch_level = PatchLevel(width, self.teacher.width, config.patch) if config.patch.weight else None
        self.image_head = (
            moby_mlp(width, config.image.hidden_dim, self.teacher.own_width) if config.image.weight else None
        )

    def start_step(self, progress: float) -> None:
        """Nothing moves with the schedule here: the teacher is frozen."""

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            images: [B, 3, H, W]
            mask: [B, h, w] bool, True = masked; as many in each image. Not read where the teacher's attention masks.

        Returns:
            `loss` and its parts, and for the log `feature_spread` and what `PatchLevel` gives.
        """
        target, mask = target_and_mask(self.teacher, images, mask, self.mask_kind, self.mask_shape)
        student = self.encoder(images, mask, self.mask_token)
        parts: dict[str, Tensor] = {}
        loss = torch.zeros((), device=images.device)
        if self.patch_level is not None:
            positions = masked_positions(mask, self.encoder, self.mask_shape)
            parts |= self.patch_level(student.patches, target.patches, positions)
            self.patch_level.remember(target.patches)
            loss = loss + self.config.patch.weight * parts["patch_loss"]
        pooled = student.pooled(self.config.pooling)  # [B, D]
        if self.image_head is not None:
            keys = gather_rows(target.pooled(self.teacher.pooling))  # [N, P]
            own = rank() * len(images)
            queries = self.image_head(pooled)
            parts["image_loss"] = image_loss(queries, keys, self.config.image.temperature, own)
            parts["image_accuracy"] = retrieval(queries, keys, own)[1]
            loss = loss + self.config.image.weight * parts["image_loss"]
        return {
            "loss": loss,
            **{name: value.detach() for name, value in parts.items()},
            "feature_spread": spread(pooled),
        }


def target_and_mask(
    teacher: Teacher, images: Tensor, mask: Tensor, kind: str, shape: MaskShape
) -> tuple[Features, Tensor]:
    """The teacher's features of whole images, and the mask: as drawn, or by the teacher's attention where `kind` asks.

    Args:
        teacher: frozen, or a momentum encoder.
        images: [B, 3, H, W]
        mask: [B, h, w] bool as drawn.
        kind: `mask.kind`
        shape: of the mask.
    """
    if not kind.startswith("attention"):
        return teacher(images), mask
    features, scores = teacher.attend(images)
    noise = None
    if kind == "attention_hints":
        count = len(images) * world_size()
        noise = own_part(draw_for_all(lambda: torch.rand(count, shape.side**2, device=images.device)))
    return features, mask_attended(shape, scores, noise)


def masked_positions(mask: Tensor, encoder: Backbone, shape: MaskShape) -> Tensor:
    """[B, h, w] bool over embedded patches → [B, M] int64, the masked ones among the encoder's L output tokens."""
    ratio = encoder.stride_px // encoder.patch_px  # patches merged into one token: 1 in a ViT
    hidden = mask[:, ::ratio, ::ratio].flatten(1)  # [B, L]
    order = hidden.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order[:, : shape.masked_patches // ratio**2]


def check_unit(encoder: Backbone, mask: MaskConfig) -> None:
    """Refuse a mask under which an output token would be masked in part.

    Raises:
        ConfigError: the mask's unit is no whole number of the encoder's output tokens.
    """
    if mask.mask_patch_size_px % encoder.stride_px:
        raise ConfigError(
            f"mask.mask_patch_size_px {mask.mask_patch_size_px} for tokens of {encoder.stride_px} px",
            expected=f"a multiple of {encoder.stride_px}, so that each token is masked as a whole or not at all",
        )


def _at(tokens: Tensor, positions: Tensor) -> Tensor:
    """Rows of [B, L, D] at positions [B, M] → [B, M, D]."""
    return tokens.gather(1, positions.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
