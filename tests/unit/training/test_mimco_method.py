"""MimCo as a module: the frozen teacher, the mask, the acceptance checks of a re-implementation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import BackboneConfig, MaskConfig, OptimConfig
from mimco_deploy.training.masking import draw_mask, mask_shape
from mimco_deploy.training.method_config import Dictionary, ImageLossConfig, MimCoConfig, PatchLossConfig, Pooling
from mimco_deploy.training.methods import mimco
from mimco_deploy.training.methods.mimco import MimCo, image_loss, patch_logits, share_won
from mimco_deploy.training.optim import build_optimizer
from tests.unit.training.small import BACKBONE, MASK

PartT = TypeVar("PartT")
SHAPE = mask_shape(BACKBONE.image_size_px, BACKBONE.patch_size_px, MASK)


def make_teacher(config: BackboneConfig = BACKBONE) -> Backbone:
    torch.manual_seed(7)
    return Backbone(config)


def make_method(
    dictionaries: tuple[Dictionary, ...] = ("intra", "batch"),
    backbone: BackboneConfig = BACKBONE,
    teacher: Backbone | None = None,
    teacher_pooling: Pooling = "cls",
    mask: MaskConfig = MASK,
    **settings: Any,
) -> MimCo:
    """Settings of the two levels start with `patch_` and `image_`."""
    teacher = teacher or make_teacher()
    levels: dict[str, dict[str, Any]] = {
        level: {name.removeprefix(f"{level}_"): settings.pop(name) for name in list(settings) if name.startswith(level)}
        for level in ("patch", "image")
    }
    torch.manual_seed(0)
    config = MimCoConfig(
        patch=PatchLossConfig(dictionaries=dictionaries, batch_keys=48, queue_size=64, **levels["patch"]),
        image=ImageLossConfig(hidden_dim=16, **levels["image"]),
        **settings,
    )
    return MimCo(backbone, teacher, teacher_pooling, mask, config)


def only(part: PartT | None) -> PartT:
    """A part that this method has."""
    assert part is not None
    return part


def make_batch(images: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    masks = torch.stack([draw_mask(SHAPE) for _ in range(images)])
    return torch.randn(images, 3, 16, 16), masks


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_teacher_features_are_the_same_at_every_call() -> None:
    teacher = make_teacher(dataclasses.replace(BACKBONE, drop_path=0.5))
    method = make_method(teacher=teacher)
    images, _ = make_batch(4)
    with torch.no_grad():
        method.eval()
        first = method.teacher(images)
        method.train()
        second = method.teacher(images)
        nn.Module.train(method.encoder)
        third = method.train(True).teacher(images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert not any(module.training for module in method.teacher.modules())
    assert method.encoder.training
    assert only(method.image_head).training


def test_train_returns_the_method_and_eval_leaves_training() -> None:
    method = make_method()
    assert method.train() is method
    assert method.eval() is method
    assert not method.training
    assert not method.encoder.training


@pytest.mark.parametrize("dictionaries", [("intra",), ("batch",), ("intra", "batch", "queue")], ids="+".join)
def test_teacher_receives_no_gradient_and_never_changes(dictionaries: tuple[Dictionary, ...]) -> None:
    method = make_method(dictionaries).train()
    before, student_before = state_of(method.teacher), state_of(method.encoder)
    config = OptimConfig(base_lr=1.0, weight_decay=0.5, decay="all")
    optimizer = build_optimizer(method, config)
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        method.start_step(step / 2)
        method(*make_batch(4, seed=step))["loss"].backward()
        optimizer.step()
        assert all(parameter.grad is None for parameter in method.teacher.parameters())
        optimizer.zero_grad()
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in method.teacher.parameters()}
    assert all(torch.equal(before[name], value) for name, value in method.teacher.state_dict().items())
    assert any(not torch.equal(student_before[name], value) for name, value in method.encoder.state_dict().items())


def test_everything_that_trains_receives_gradient() -> None:
    method = make_method().train()
    method(*make_batch(4))["loss"].backward()
    without = [
        name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # a bias before a batch norm, and that of the keys before a softmax, change nothing
    assert without in ([], ["image_head.0.bias"])
    assert method.mask_token.grad is not None
    assert method.mask_token.grad.abs().sum() > 0


def test_a_student_that_is_its_teacher_retrieves_every_patch() -> None:
    teacher = make_teacher()
    method = make_method(teacher=teacher, init_from_teacher=True).eval()
    images, _ = make_batch(6)
    with torch.no_grad():
        target, student = method.teacher(images), method.encoder(images)
    positions = torch.arange(16).expand(6, 16)
    everything = torch.arange(6 * 16)
    logits = patch_logits(
        student.patches, target.patches, positions, intra=True, batch=(target.patches.flatten(0, 1), everything // 16)
    )
    assert (logits.argmax(dim=2) == 0).all()
    assert (logits[..., 0] > logits[..., 1:].amax(dim=2)).all()
    torch.testing.assert_close(logits[..., 0], torch.ones(6, 16))


def test_a_tie_is_not_won() -> None:
    """As in bfloat16 where all tokens of an image are alike: column 0 came first, and all seemed to be won."""
    logits = torch.tensor([[[0.5, 0.5, 0.5], [0.6, 0.5, 0.5], [0.4, 0.5, 0.3], [0.7, 0.1, 0.2]]])
    assert share_won(logits).item() == 0.5
    alike = F.normalize(torch.randn(1, 40, 64) * 0.02 + 1.0, dim=2).bfloat16()
    scores = patch_logits(torch.ones(1, 40, 64).bfloat16(), alike, torch.arange(40)[None], intra=True)
    assert share_won(scores).item() < 0.2


def test_a_student_that_is_its_teacher_and_sees_everything_scores_full_accuracy() -> None:
    """The same through `forward`: the mask token is replaced by what it masks by masking nothing that is looked at."""
    method = make_method(teacher=make_teacher(), init_from_teacher=True).eval()
    with torch.no_grad():
        only(method.patch_level).head.weight.copy_(torch.eye(24))
        only(method.patch_level).head.bias.zero_()
    images, masks = make_batch(6)
    with torch.no_grad():
        row = method(images, torch.zeros_like(masks))
    assert row["patch_accuracy"].item() == 1.0
    assert row["positive_similarity"].item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("dictionaries", "candidates"),
    [(("intra",), 16), (("batch",), 1 + 48 * 7 / 8), (("intra", "batch"), 16 + 48 * 7 / 8)],
    ids=["intra", "batch", "intra+batch"],
)
def test_loss_starts_near_chance(dictionaries: tuple[Dictionary, ...], candidates: float) -> None:
    wide = dataclasses.replace(BACKBONE, embed_dim=192, num_heads=(3,))
    losses = []
    for seed in range(5):
        method = make_method(dictionaries, wide, make_teacher(wide)).train()
        losses.append(method(*make_batch(8, seed=seed)))
    patch = sum(row["patch_loss"].item() for row in losses) / 5
    image = sum(row["image_loss"].item() for row in losses) / 5
    assert patch == pytest.approx(math.log(candidates), abs=0.25)
    assert image == pytest.approx(math.log(8), abs=0.35)


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    batch = make_batch(4)
    for patch_weight, image_weight in ((1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)):
        method = make_method(patch_weight=patch_weight, image_weight=image_weight).train()
        torch.manual_seed(5)
        row = method(*batch)
        expected = patch_weight * row.get("patch_loss", 0.0) + image_weight * row.get("image_loss", 0.0)
        torch.testing.assert_close(row["loss"].detach(), expected)
        assert ("patch_loss" in row, "image_loss" in row) == (patch_weight > 0, image_weight > 0)
        assert not any(value.requires_grad for name, value in row.items() if name != "loss")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("teacher_pooling", ["mean", "cls"])
def test_the_image_loss_is_of_the_asked_poolings(
    monkeypatch: pytest.MonkeyPatch, pooling: Literal["mean", "cls"], teacher_pooling: Pooling
) -> None:
    asked: list[tuple[Tensor, Tensor, float, int]] = []

    def spy(queries: Tensor, keys: Tensor, temperature: float, first: int) -> Tensor:
        asked.append((queries, keys, temperature, first))
        return image_loss(queries, keys, temperature, first)

    monkeypatch.setattr(mimco, "image_loss", spy)
    method = make_method(pooling=pooling, teacher_pooling=teacher_pooling, image_temperature=0.3).eval()
    images, masks = make_batch(4)
    with torch.no_grad():
        method(images, masks)
        ((queries, keys, temperature, first),) = asked
        pooled = method.encoder(images, masks, method.mask_token).pooled(pooling)
        torch.testing.assert_close(queries, only(method.image_head)(pooled))
        torch.testing.assert_close(keys, method.teacher(images).pooled(teacher_pooling))
        assert (temperature, first) == (0.3, 0)


def test_a_process_finds_its_positives_among_the_keys_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process's keys come after the first's; for which of the two it is, the loss is the same."""
    images, masks = make_batch(4)
    others = torch.randn(4, 24)

    def loss(rank: int) -> float:
        monkeypatch.setattr(mimco, "rank", lambda: rank)
        monkeypatch.setattr(mimco, "gather_rows", lambda rows: torch.cat([others, rows] if rank else [rows, others]))
        return float(make_method(("intra",)).train()(images, masks)["image_loss"])

    assert loss(1) == pytest.approx(loss(0), rel=1e-5)


def test_each_temperature_is_that_of_its_own_loss() -> None:
    batch = make_batch(4)

    def parts(**config: Any) -> tuple[float, float]:
        method = make_method(("intra",), **config).train()
        row = method(*batch)
        return row["patch_loss"].item(), row["image_loss"].item()

    patch, image = parts()
    assert parts(patch_temperature=0.05)[1] == image
    assert parts(patch_temperature=0.05)[0] != patch
    assert parts(image_temperature=0.05)[0] == patch
    assert parts(image_temperature=0.05)[1] != image


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_student_cannot_see_what_is_masked(pooling: str) -> None:
    method = make_method().eval()
    images, masks = make_batch(3)
    pixels = masks.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)  # [B, 1, H, W]
    assert pixels.shape[2:] == images.shape[2:]
    other = torch.randn(images.shape)
    with torch.no_grad():
        seen = method.encoder(images, masks, method.mask_token)
        under = method.encoder(torch.where(pixels, other, images), masks, method.mask_token)
        around = method.encoder(torch.where(pixels, images, other), masks, method.mask_token)
    assert torch.equal(seen.patches, under.patches)
    assert torch.equal(seen.pooled(pooling), under.pooled(pooling))
    assert not torch.allclose(seen.pooled(pooling), around.pooled(pooling))
    assert (seen.patches - around.patches).abs().amax(dim=2).gt(1e-6).all()


def test_masked_patches_are_replaced_by_the_mask_token_before_positions_are_added() -> None:
    method = make_method().eval()
    images, masks = make_batch(2)
    with torch.no_grad():
        before = method.encoder(images, masks, method.mask_token).patches
        after = method.encoder(images, masks, method.mask_token + 1).patches
        unmasked = method.encoder(images, torch.zeros_like(masks), method.mask_token + 1)
        everything = method.encoder(images, torch.ones_like(masks), method.mask_token)
    assert not torch.allclose(before, after)
    assert torch.equal(unmasked.patches, method.encoder(images).patches)
    assert torch.equal(everything.patches[0], everything.patches[1])  # nothing of the images is left
    assert not torch.allclose(everything.patches[0, 0], everything.patches[0, 1])  # but places are


def test_the_queries_are_the_masked_positions_in_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []

    def spy(queries: Tensor, tokens: Tensor, positions: Tensor, **rest: Any) -> Tensor:
        asked.append(positions)
        return patch_logits(queries, tokens, positions, **rest)

    monkeypatch.setattr(mimco, "patch_logits", spy)
    images, masks = make_batch(5)
    make_method().train()(images, masks)
    (positions,) = asked
    assert positions.shape == (5, SHAPE.masked_patches)
    for row, mask in zip(positions, masks, strict=True):
        assert sorted(row.tolist()) == mask.flatten().nonzero().flatten().tolist()


def test_only_masked_positions_are_reconstructed() -> None:
    """Gradient with respect to the student's tokens before the head is zero at visible positions."""
    method = make_method(("intra",), image_weight=0.0).train()
    images, masks = make_batch(3)
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        output.patches.retain_grad()
        kept.append(output.patches)

    method.encoder.register_forward_hook(keep)
    method(images, masks)["loss"].backward()
    gradient = kept[0].grad
    assert gradient is not None
    assert torch.equal(gradient.abs().sum(dim=2) > 0, masks.flatten(1))


@pytest.mark.parametrize(
    "dictionaries", [("intra",), ("batch",), ("queue",), ("intra", "batch", "queue")], ids="+".join
)
def test_a_batch_of_two_trains(dictionaries: tuple[Dictionary, ...]) -> None:
    method = make_method(dictionaries).train()
    for step in range(3):
        row = method(*make_batch(2, seed=step))
        row["loss"].backward()
        assert all(value.isfinite() for value in row.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_the_order_of_images_leaves_the_loss_unchanged() -> None:
    images, masks = make_batch(6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    rows = [make_method(("intra",)).train()(*batch) for batch in ((images, masks), (images[order], masks[order]))]
    for name in rows[0]:
        assert rows[0][name].item() == pytest.approx(rows[1][name].item(), rel=1e-5), name


def test_the_queue_fills_with_teacher_tokens_and_is_part_of_the_state() -> None:
    method = make_method(("queue",)).train()
    queue = only(only(method.patch_level).queue)
    images, masks = make_batch(4)
    method(images, masks)
    rows = queue.rows[:16]
    assert int(queue.pushed) == 64 // 4
    with torch.no_grad():
        tokens = nn.functional.normalize(method.teacher(images).patches.flatten(0, 1), dim=1)
    assert torch.allclose((rows @ tokens.T).amax(dim=1), torch.ones(16))
    assert len({tuple(row.tolist()) for row in rows}) == 16
    assert {"patch_level.queue.rows", "patch_level.queue.pushed"} <= method.state_dict().keys()
    for step in range(4):
        method(*make_batch(4, seed=step))
    assert int(queue.pushed) == 5 * 16
    assert only(make_method(("intra",)).patch_level).queue is None


def test_this_batchs_tokens_are_no_negatives_from_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """They enter it after the loss, in which it is still as the batch before left it."""
    asked: list[Tensor] = []

    def spy(*arguments: Tensor, queue: Tensor, **rest: Any) -> Tensor:
        asked.append(queue)
        return patch_logits(*arguments, queue=queue, **rest)

    monkeypatch.setattr(mimco, "patch_logits", spy)
    method = make_method(("queue",)).train()
    queue = only(only(method.patch_level).queue)
    before = queue.rows.clone()
    method(*make_batch(4))["loss"].backward()
    assert torch.equal(asked[0], before)
    assert not torch.equal(queue.rows, before)


def test_a_student_of_another_width_learns_from_any_teacher() -> None:
    student = dataclasses.replace(BACKBONE, embed_dim=48, depth=(1,))
    row = make_method(backbone=student).train()(*make_batch(4))
    assert row["loss"].isfinite()


def test_a_student_that_cannot_start_from_its_teacher_is_refused() -> None:
    student = dataclasses.replace(BACKBONE, embed_dim=48)
    with pytest.raises(ConfigError) as error:
        make_method(backbone=student, init_from_teacher=True)
    assert "init_from_teacher" in error.value.found
    assert "embed_dim 48" in error.value.found
    assert error.value.expected == "24, as vit_tiny_patch16_224 has"


def test_init_from_teacher_copies_and_does_not_share() -> None:
    method = make_method(init_from_teacher=True)
    teacher = dict(method.teacher.backbone.named_parameters())
    for name, parameter in method.encoder.named_parameters():
        assert torch.equal(parameter, teacher[name])
        assert parameter.data_ptr() != teacher[name].data_ptr()
        assert parameter.requires_grad == (name != "body.pos_embed")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(make_method().encoder.parameters(), method.teacher.backbone.parameters(), strict=True)
    )


def test_no_dictionaries_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.patch\.dictionaries .*expected one or more of intra, batch, queue"):
        make_method(())
