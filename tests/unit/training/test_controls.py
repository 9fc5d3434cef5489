"""MoBY, the controls and MimCo's variants as modules: who gets gradients, what moves, what each loss is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import MaskConfig
from mimco_deploy.training.losses import first_of, regression
from mimco_deploy.training.method_config import (
    FDConfig,
    JointConfig,
    MAEConfig,
    MimCoConfig,
    MoBYConfig,
    MoCoV3Config,
    PatchLossConfig,
)
from mimco_deploy.training.methods.fd import FD
from mimco_deploy.training.methods.joint import Joint
from mimco_deploy.training.methods.mae import MAE
from mimco_deploy.training.methods.mimco import MimCo
from mimco_deploy.training.methods.moby import MoBY
from mimco_deploy.training.methods.mocov3 import MoCoV3
from mimco_deploy.training.methods.simmim import SimMIM
from mimco_deploy.training.presets import (
    PRESETS,
    STAGE1_METHODS,
    STAGE2_METHODS,
    with_stage1_method,
    with_stage2_method,
)
from mimco_deploy.training.settings import from_document, to_document
from mimco_deploy.training.stages import build_stage2
from tests.unit.training.small import BACKBONE, MASK, SWIN, stage2_config

MOBY = MoBYConfig(hidden_dim=32, projection_dim=16, queue_size=20)
JOINT = JointConfig(
    patch=PatchLossConfig(batch_keys=32), contrastive=MoCoV3Config(hidden_dim=32, projection_dim=16, momentum=0.5)
)


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def mask(count: int = 4) -> Tensor:
    units = torch.zeros(count, 16, dtype=torch.bool)
    units[:, :10] = True
    return units.view(count, 4, 4)


def without_gradient(method: nn.Module) -> list[str]:
    return [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


# -------------------------------------------------------------------------------------------------------------- MoBY


@pytest.mark.parametrize("backbone", [BACKBONE, SWIN], ids=["vit", "swin"])
def test_moby_trains_the_online_side_alone(backbone: Any) -> None:
    method = MoBY(backbone, MOBY).train()
    method(images(), images(seed=1))["loss"].backward()
    assert set(without_gradient(method)) <= {
        "projector.0.bias",
        "projector.3.bias",
        "predictor.0.bias",
        "encoder.body.norm.bias",  # a batch norm follows
    }
    frozen = [*method.momentum_encoder.parameters(), *method.momentum_projector.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)


def test_mobys_momentum_encoder_starts_as_the_online_one_and_drops_no_path() -> None:
    method = MoBY(dataclasses.replace(SWIN, drop_path=0.5), MOBY)
    online, slow = method.encoder.state_dict(), method.momentum_encoder.state_dict()
    assert all(torch.equal(online[name], slow[name]) for name in online)
    rates = [
        [float(str(m.drop_prob)) for m in encoder.modules() if type(m).__name__ == "DropPath"]
        for encoder in (method.encoder, method.momentum_encoder)
    ]
    assert max(rates[0]) == 0.5
    assert not rates[1]


@pytest.mark.parametrize(("momentum", "moved"), [(1.0, 0.0), (0.0, 1.0), (0.75, 0.25)])
def test_mobys_momentum_encoder_moves_towards_the_online_one(momentum: float, moved: float) -> None:
    method = MoBY(SWIN, MOBY)
    with torch.no_grad():
        for parameter in (*method.encoder.parameters(), *method.projector.parameters()):
            parameter.add_(1.0)
    method.update_momentum_encoder(momentum)
    pairs = [(method.encoder, method.momentum_encoder), (method.projector, method.momentum_projector)]
    for online, slow in pairs:
        for new, old in zip(online.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(new - old, torch.full_like(new, 1.0 - moved))


def test_mobys_keys_enter_the_queues_after_the_loss() -> None:
    method = MoBY(SWIN, MOBY).train()
    assert method(images(), images())["loss"].item() < 2 * (math.log(21) + 2)
    for queue in (method.queue1, method.queue2):
        assert int(queue.pushed) == 4
    with torch.no_grad():
        key = nn.functional.normalize(method.momentum_projector(method.momentum_encoder(images(seed=5)).own), dim=1)
        method(images(seed=5), images(seed=6))
    torch.testing.assert_close(method.queue1.rows[4:8], key)
    assert not torch.allclose(method.queue2.rows[4:8], key)  # of view 2


def test_mocov3_sends_swins_to_moby() -> None:
    with pytest.raises(ConfigError, match=r"MoCo v3 with swin_tiny.*--method moby"):
        MoCoV3(SWIN, MoCoV3Config())


# ------------------------------------------------------------------------------------------------------------ losses

Kind = Literal["l1", "l1_normalised", "smooth_l1", "cosine"]


def regression_in_loops(predicted: Any, target: Any, kind: Kind, beta: float) -> float:
    total = []
    for p, t in zip(predicted, target, strict=True):
        if kind == "cosine":
            total.append(1 - sum(p * t) / math.sqrt(sum(p * p) * sum(t * t)))
            continue
        if kind != "l1":
            mean = sum(t) / len(t)
            t = (t - mean) / math.sqrt(sum((t - mean) ** 2) / len(t) + 1e-5)
        for a, b in zip(p, t, strict=True):
            d = abs(a - b)
            total.append((d * d / (2 * beta) if d < beta else d - beta / 2) if kind == "smooth_l1" else d)
    return float(sum(total) / len(total))


@pytest.mark.parametrize("kind", ["l1", "l1_normalised", "smooth_l1", "cosine"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_regressions_are_their_definitions_in_plain_loops(kind: Kind, beta: float) -> None:
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(5, 7)) * 3, rng.normal(size=(5, 7)) * 2 + 1
    ours = regression(torch.from_numpy(predicted), torch.from_numpy(target), kind, beta)
    assert ours.item() == pytest.approx(regression_in_loops(predicted, target, kind, beta), rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "l1_normalised", "smooth_l1", "cosine"])
def test_regressions_vanish_where_they_agree_and_send_the_target_nothing(kind: Kind) -> None:
    target = torch.randn(3, 8, requires_grad=True)
    agreed = target.detach() if kind in ("l1", "cosine") else nn.functional.layer_norm(target.detach(), (8,))
    predicted = agreed.clone().requires_grad_()
    assert regression(predicted, target, kind).item() == pytest.approx(0.0, abs=1e-6)
    regression(torch.randn(3, 8, requires_grad=True), target, kind).backward()  # type: ignore[no-untyped-call]
    assert target.grad is None


def test_the_first_column_against_all_is_log_of_their_number_where_equal() -> None:
    assert first_of(torch.ones(4, 10), 0.2).item() == pytest.approx(math.log(10), rel=1e-6)


@pytest.mark.parametrize("kind", ["l1", "l1_normalised", "smooth_l1", "cosine"])
def test_mimcos_regressions_are_of_masked_tokens_alone(kind: Kind) -> None:
    torch.manual_seed(0)
    config = MimCoConfig(patch=PatchLossConfig(kind=kind))
    method = MimCo(BACKBONE, Backbone(BACKBONE), "cls", MASK, config).eval()
    assert method.patch_level is not None
    assert method.patch_level.queue is None
    target = torch.randn(4, 16, 24)
    student = torch.randn(4, 16, 24)
    positions = torch.arange(10).expand(4, 10)
    row = method.patch_level(student, target, positions)
    elsewhere = student.clone()
    elsewhere[:, 10:] = 99.0
    assert method.patch_level(elsewhere, target, positions)["patch_loss"] == row["patch_loss"]
    predicted = method.patch_level.head(student[:, :10])
    torch.testing.assert_close(row["patch_loss"], regression(predicted, target[:, :10], kind))
    assert "patch_accuracy" not in row


@pytest.mark.parametrize("left_out", ["patch", "image"])
def test_a_level_of_weight_0_is_not_there(left_out: str) -> None:
    config = dataclasses.replace(
        MimCoConfig(), **{left_out: dataclasses.replace(getattr(MimCoConfig(), left_out), weight=0.0)}
    )
    method = MimCo(BACKBONE, Backbone(BACKBONE), "cls", MASK, config).train()
    row = method(images(), mask())
    row["loss"].backward()
    assert f"{left_out}_loss" not in row
    assert {"patch": method.patch_level, "image": method.image_head}[left_out] is None
    assert set(without_gradient(method)) <= {"image_head.0.bias"}


def test_both_levels_of_weight_0_are_refused() -> None:
    zero = dataclasses.replace(MimCoConfig().image, weight=0.0)
    with pytest.raises(ConfigError, match="at least one above 0"):
        MimCoConfig(patch=PatchLossConfig(weight=0.0), image=zero)


# ---------------------------------------------------------------------------------------------------------- controls


def test_fd_distils_all_tokens_and_sees_all_of_the_image() -> None:
    torch.manual_seed(0)
    teacher = Backbone(BACKBONE)
    method = FD(BACKBONE, teacher, "cls", FDConfig()).train()
    row = method(images())
    row["loss"].backward()
    assert not without_gradient(method)
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    with torch.no_grad():
        student, target = method.encoder(images()), method.teacher(images())
        tokens = [torch.cat([f.own.unsqueeze(1), f.patches], dim=1) for f in (student, target)]
    torch.testing.assert_close(
        row["loss"].detach(), regression(method.head(tokens[0]), tokens[1], "smooth_l1", 2.0).detach()
    )


def test_fd_between_families_leaves_the_cls_token_out() -> None:
    torch.manual_seed(0)
    method = FD(SWIN, Backbone(BACKBONE), "cls", FDConfig())
    assert method(images())["loss"].isfinite()


@pytest.mark.parametrize("backbone", [BACKBONE, SWIN], ids=["vit", "swin"])
def test_simmim_reconstructs_pixels_under_the_mask(backbone: Any) -> None:
    torch.manual_seed(0)
    method = SimMIM(backbone, MASK).train()
    hidden = method.mask_shape.to_patches(mask().flatten(1))
    predicted = method.reconstruct(images(), hidden)
    assert predicted.shape == (4, 3, 16, 16)
    method(images(), hidden)["loss"].backward()
    assert method.mask_token.grad is not None
    unseen = without_gradient(method)
    assert unseen in ([], ["encoder.body.cls_token"]) or all(".bias" in name for name in unseen)


def test_a_token_draws_the_pixels_of_its_own_place() -> None:
    """The head alone: one token's features light up its square."""
    method = SimMIM(BACKBONE, MASK).eval()
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.zero_()
        method.head.weight[:, 0] = 1.0
    tokens = torch.zeros(1, 16, 24)
    tokens[0, 6, 0] = 1.0  # second row, third column

    class Fixed(nn.Module):
        grid, stride_px = 4, 4

        def forward(self, *_: Tensor) -> Any:
            return type("Features", (), {"patches": tokens})

    method.encoder = Fixed()  # type: ignore[assignment]
    picture = method.reconstruct(images(1), mask(1))
    lit = torch.zeros(1, 3, 16, 16)
    lit[:, :, 4:8, 8:12] = 1.0
    assert torch.equal(picture, lit)


def test_mae_needs_a_vit() -> None:
    with pytest.raises(ConfigError, match=r"MAE with swin_tiny.*expected a ViT"):
        MAE(SWIN, MASK, MAEConfig())
    with pytest.raises(ConfigError, match="a width of 32; expected a multiple of its 5 heads"):
        MAE(BACKBONE, MASK, MAEConfig(decoder_dim=32, decoder_heads=5))
    with pytest.raises(ConfigError, match=r"mask\.mask_ratio 1\.0 hides every patch"):
        MAE(BACKBONE, MaskConfig(mask_patch_size_px=4, mask_ratio=1.0), MAEConfig())


def test_mae_never_sees_what_is_masked() -> None:
    torch.manual_seed(0)
    method = MAE(BACKBONE, MASK, MAEConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2)).eval()
    pixels = mask().repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    other = torch.where(pixels, images(seed=9), images())
    with torch.no_grad():
        a, b = (method.reconstruct(batch, mask().flatten(1)) for batch in (images(), other))
    assert torch.equal(a, b)
    assert a.shape == (4, 16, 48)


def test_joint_training_moves_the_momentum_encoder_and_both_losses_count() -> None:
    torch.manual_seed(0)
    method = Joint(BACKBONE, MASK, JOINT).train()
    row = method(images(), mask(), images(seed=1), mask())
    torch.testing.assert_close(row["loss"].detach(), row["contrastive_loss"] + row["patch_loss"])
    row["loss"].backward()
    assert set(without_gradient(method)) <= {"encoder.body.norm.bias"}
    assert all(parameter.grad is None for parameter in method.momentum_encoder.parameters())
    with torch.no_grad():
        method.encoder.body.norm.weight += 1.0
    method.start_step(0.0)
    torch.testing.assert_close(method.momentum_encoder.body.norm.weight, torch.full((24,), 1.5))
    method.start_step(1.0)
    torch.testing.assert_close(method.momentum_encoder.body.norm.weight, torch.full((24,), 1.5))


@pytest.mark.parametrize("kind", ["attention", "attention_hints"])
@pytest.mark.parametrize("method", ["fd", "simmim", "mae", "joint"])
def test_attention_masks_need_mimcos_teacher(kind: Any, method: str) -> None:
    recipe = PRESETS["vit_tiny_debug"]()
    config = with_stage2_method(recipe, method)
    config = dataclasses.replace(config, mask=dataclasses.replace(config.mask, kind=kind))
    with pytest.raises(ConfigError, match=f"mask.kind {kind} for {method}; expected random or rectangles"):
        build_stage2(config, (Backbone(config.backbone), "cls"))


# ----------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("method", STAGE2_METHODS)
def test_every_preset_has_every_method_of_stage_2(preset: str, method: str) -> None:
    recipe = PRESETS[preset]()
    config = with_stage2_method(recipe, method)
    assert config.method.name == method
    assert (config.run, config.optim.base_lr) == (recipe.stage2.run, recipe.stage2.optim.base_lr)  # at equal cost
    assert from_document(type(config), to_document(config)) == config
    if preset == "vit_tiny_debug":
        built, views = build_stage2(config, (Backbone(config.backbone), "cls"))
        assert callable(views)
        assert isinstance(built, nn.Module)


@pytest.mark.parametrize("method", STAGE1_METHODS)
def test_stage_1s_methods_come_with_their_optimiser(method: str) -> None:
    config = with_stage1_method(PRESETS["vit_small"]().stage1, method)
    assert config.method.name == method
    assert (config.optim.decay, config.backbone.drop_path) == {"mocov3": ("all", 0.0), "moby": ("matrices", 0.2)}[
        method
    ]
    assert with_stage1_method(config, method) == config


def test_unknown_methods_are_answered_with_all() -> None:
    recipe = PRESETS["vit_small"]()
    with pytest.raises(ConfigError, match="no method dino in stage 1; expected mocov3 or moby"):
        with_stage1_method(recipe.stage1, "dino")
    with pytest.raises(ConfigError, match="no method dino in stage 2; expected mimco, fd, simmim, mae or joint"):
        with_stage2_method(recipe, "dino")


def test_a_documents_method_is_read_by_its_name() -> None:
    config = stage2_config(Path("x"), Path("y"))
    document = to_document(config)
    document["method"]["name"] = "dino"
    with pytest.raises(ConfigError, match="method dino; expected one of fd, joint, mae, mimco, simmim"):
        from_document(type(config), document)
