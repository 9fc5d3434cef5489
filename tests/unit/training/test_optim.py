"""What AdamW decays, how gradients are clipped, and the bounds of the schedules."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import OptimConfig
from mimco_deploy.training.method_config import ImageLossConfig, MimCoConfig, MoBYConfig
from mimco_deploy.training.methods.mimco import MimCo
from mimco_deploy.training.methods.moby import MoBY
from mimco_deploy.training.optim import build_optimizer, clip_gradients
from mimco_deploy.training.schedules import lr_schedule, momentum_at
from tests.unit.training.small import BACKBONE, MASK, SWIN


def config(decay: Literal["all", "matrices", "weights"] = "weights", **changes: float) -> OptimConfig:
    values = {"base_lr": 0.1, "weight_decay": 0.3, **changes}
    return OptimConfig(decay=decay, **values)  # type: ignore[arg-type]


def make_method() -> MimCo:
    torch.manual_seed(0)
    return MimCo(BACKBONE, Backbone(BACKBONE), "cls", MASK, MimCoConfig(image=ImageLossConfig(hidden_dim=16)))


def names_in(group: dict[str, object], method: nn.Module) -> set[str]:
    of = {id(parameter): name for name, parameter in method.named_parameters()}
    params = group["params"]
    assert isinstance(params, list)
    return {of[id(parameter)] for parameter in params}


def test_biases_norms_and_tokens_are_spared_the_decay() -> None:
    method = make_method()
    decayed, spared = build_optimizer(method, config()).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert names_in(spared, method) >= {
        "mask_token",
        "encoder.body.cls_token",
        "encoder.body.blocks.0.norm1.weight",
        "encoder.body.blocks.0.attn.qkv.bias",
        "encoder.body.patch_embed.proj.bias",
        "encoder.body.norm.bias",
        "patch_level.head.bias",
        "image_head.1.weight",
        "image_head.1.bias",
    }
    of = dict(method.named_parameters())
    assert all(of[name].ndim <= 1 or name.endswith("_token") for name in names_in(spared, method))
    assert all(of[name].ndim > 1 and not name.endswith("_token") for name in names_in(decayed, method))
    assert "encoder.body.blocks.1.mlp.fc1.weight" in names_in(decayed, method)


def test_everything_is_decayed_where_asked() -> None:
    method = make_method()
    (group,) = build_optimizer(method, config(decay="all")).param_groups
    assert group["weight_decay"] == 0.3
    assert "mask_token" in names_in(group, method)


def test_matrices_include_tokens_and_position_tables_but_no_bias_and_no_norm() -> None:
    method = MoBY(SWIN, MoBYConfig(hidden_dim=16, projection_dim=8, queue_size=16))
    decayed, spared = (names_in(group, method) for group in build_optimizer(method, config("matrices")).param_groups)
    assert "encoder.body.layers.0.blocks.0.attn.relative_position_bias_table" in decayed
    assert {"encoder.body.norm.weight", "projector.1.weight", "projector.0.bias"} <= spared
    student = make_method()
    decayed, _ = (names_in(group, student) for group in build_optimizer(student, config("matrices")).param_groups)
    assert {"mask_token", "encoder.body.cls_token"} <= decayed


@pytest.mark.parametrize("decay", ["all", "matrices", "weights"])
def test_each_trained_parameter_is_in_one_group_and_no_frozen_one(
    decay: Literal["all", "matrices", "weights"],
) -> None:
    method = make_method()
    groups = build_optimizer(method, config(decay)).param_groups
    names = [name for group in groups for name in names_in(group, method)]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("teacher.") or name.endswith("pos_embed") for name in names)


def test_betas_are_the_configs() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(base_lr=1, weight_decay=0, decay="all", betas=(0.8, 0.95)))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    module = nn.Linear(3, 2)
    for norm, expected in ((0.5, 0.5), (0.0, 5.0), (50.0, 5.0)):
        module.weight.grad, module.bias.grad = torch.zeros(2, 3), torch.zeros(2)
        module.weight.grad[0, 0], module.bias.grad[1] = 3.0, -4.0
        clip_gradients(module, norm)
        assert math.hypot(*module.weight.grad.flatten(), *module.bias.grad) == pytest.approx(expected, rel=1e-5)
        assert module.weight.grad[0, 0] / module.bias.grad[1] == pytest.approx(-0.75)


def rates(optim: OptimConfig, steps_per_epoch: int, epochs: int, batch: int = 256) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    schedule = lr_schedule(optimizer, optim, steps_per_epoch=steps_per_epoch, epochs=epochs, global_batch_size=batch)
    found = []
    for step in range(steps_per_epoch * epochs + 1):
        schedule.step_update(step)
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


@given(
    steps_per_epoch=st.integers(1, 40),
    epochs=st.integers(1, 12),
    warmup=st.floats(0, 1, exclude_max=True),
    base=st.floats(1e-5, 1.0),
    low=st.floats(0, 1),
    first=st.floats(0, 1),
    batch=st.sampled_from([8, 256, 4096]),
)
@settings(deadline=None)
def test_the_rate_rises_to_the_base_rate_and_falls_to_the_least(
    steps_per_epoch: int, epochs: int, warmup: float, base: float, low: float, first: float, batch: int
) -> None:
    """Whenever the warm-up is shorter than the run: the schedule exists, and keeps its bounds."""
    optim = config(base_lr=base, min_lr=low * base, warmup_lr=first * base, warmup_epochs=warmup * epochs)
    found = rates(optim, steps_per_epoch, epochs, batch)
    scale = batch / 256
    top, warmup_steps = base * scale, min(round(warmup * epochs * steps_per_epoch), epochs * steps_per_epoch - 1)
    slack = 1e-9 * top
    assert all(min(low, first) * top - slack <= rate <= top + slack for rate in found)
    rising, falling = found[: warmup_steps + 1], found[warmup_steps:]
    assert all(a <= b + slack for a, b in itertools.pairwise(rising))
    assert all(a >= b - slack for a, b in itertools.pairwise(falling))
    assert found[-1] == pytest.approx(low * top, rel=1e-6, abs=slack)
    assert found[warmup_steps] == pytest.approx(top, rel=1e-6)


def test_the_warm_up_is_linear_from_its_first_rate() -> None:
    found = rates(config(base_lr=1.0, warmup_lr=0.2, warmup_epochs=2), steps_per_epoch=4, epochs=4)
    assert found[:9] == pytest.approx([0.2 + 0.1 * step for step in range(9)])


def test_the_cosine_is_half_way_in_the_middle() -> None:
    found = rates(config(base_lr=1.0, min_lr=0.2), steps_per_epoch=10, epochs=2)
    assert found[10] == pytest.approx(0.6)
    assert found[5] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("batch", [8, 256, 4096])
def test_the_rate_is_per_256_images(batch: int) -> None:
    assert rates(config(base_lr=0.1), 4, 2, batch)[0] == pytest.approx(0.1 * batch / 256)


@pytest.mark.parametrize("warmup", [3.0, 3.5, 40.0])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup: float) -> None:
    with pytest.raises(ConfigError, match=f"optim.warmup_epochs {warmup}; expected less than run.epochs, 3"):
        rates(config(warmup_epochs=warmup), 10, 3)


def test_a_resumed_optimizer_takes_the_same_rates() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter])
    lr_schedule(optimizer, config(warmup_epochs=1), steps_per_epoch=5, epochs=3, global_batch_size=256).step_update(7)
    resumed = torch.optim.AdamW([parameter])
    resumed.load_state_dict(optimizer.state_dict())
    schedule = lr_schedule(resumed, config(warmup_epochs=1), steps_per_epoch=5, epochs=3, global_batch_size=256)
    whole = rates(config(warmup_epochs=1), 5, 3)
    for step in (8, 9, 14):
        schedule.step_update(step)
        assert resumed.param_groups[0]["lr"] == whole[step]


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_momentum_rises_from_its_start_to_1(start: float, a: float, b: float) -> None:
    assert momentum_at(0.0, start) == pytest.approx(start)
    assert momentum_at(1.0, start) == pytest.approx(1.0)
    low, high = sorted((a, b))
    assert start - 1e-12 <= momentum_at(low, start) <= momentum_at(high, start) + 1e-12 <= 1 + 2e-12
