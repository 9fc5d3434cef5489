"""MoCo v3's moving parts: the momentum encoder, the frozen patch embedding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mimco_deploy.training.config import OptimConfig
from mimco_deploy.training.method_config import MoCoV3Config
from mimco_deploy.training.methods import mocov3
from mimco_deploy.training.methods.mocov3 import MoCoV3
from mimco_deploy.training.optim import build_optimizer
from mimco_deploy.training.schedules import momentum_at
from tests.unit.training.small import BACKBONE

CONFIG = MoCoV3Config(hidden_dim=16, projection_dim=8)


def make_method(config: MoCoV3Config = CONFIG) -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(BACKBONE, config).train()


def views(images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, 16, 16, generator=generator), torch.randn(images, 3, 16, 16, generator=generator)


def momentum_parameters(method: MoCoV3) -> dict[str, Tensor]:
    return {name: value for name, value in method.named_parameters() if name.startswith("momentum_")}


def shift_online(method: MoCoV3) -> None:
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if not name.startswith("momentum_"):
                parameter.add_(torch.randn(parameter.shape))


def test_momentum_1_freezes_the_momentum_encoder() -> None:
    method = make_method()
    before = {name: value.clone() for name, value in momentum_parameters(method).items()}
    shift_online(method)
    method.update_momentum_encoder(1.0)
    assert all(torch.equal(before[name], value) for name, value in momentum_parameters(method).items())


def test_momentum_0_copies_the_online_encoder() -> None:
    method = make_method()
    shift_online(method)
    method.update_momentum_encoder(0.0)
    online = dict(method.named_parameters())
    slow = momentum_parameters(method)
    assert {name.removeprefix("momentum_") for name in slow} == {
        name for name in online if name.startswith(("encoder.", "projector."))
    }
    for name, value in slow.items():
        assert torch.equal(value, online[name.removeprefix("momentum_")]), name
        assert value.data_ptr() != online[name.removeprefix("momentum_")].data_ptr()


def test_momentum_between_is_the_weighted_mean() -> None:
    method = make_method()
    old = {name: value.clone() for name, value in momentum_parameters(method).items()}
    shift_online(method)
    online = dict(method.named_parameters())
    method.update_momentum_encoder(0.75)
    for name, value in momentum_parameters(method).items():
        expected = 0.75 * old[name] + 0.25 * online[name.removeprefix("momentum_")].detach()
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_a_step_starts_with_the_momentum_of_the_schedule(progress: float) -> None:
    stepped, by_hand = make_method(), make_method()
    for method in (stepped, by_hand):
        torch.manual_seed(1)
        shift_online(method)
    stepped.start_step(progress)
    by_hand.update_momentum_encoder(momentum_at(progress, CONFIG.momentum))
    for name, value in momentum_parameters(stepped).items():
        assert torch.equal(value, momentum_parameters(by_hand)[name])


def test_momentum_parameters_and_patch_embedding_take_no_gradient_and_no_step() -> None:
    method = make_method()
    frozen = {
        name: value.clone()
        for name, value in method.named_parameters()
        if name.startswith("momentum_") or ".patch_embed." in name or name.endswith("pos_embed")
    }
    assert any(".patch_embed." in name and not name.startswith("momentum_") for name in frozen)
    optimizer = build_optimizer(method, OptimConfig(base_lr=1.0, weight_decay=0.5, decay="all"))
    method(*views(4))["loss"].backward()
    for name, parameter in method.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
    optimizer.step()
    now = dict(method.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())


def test_both_encoders_start_alike() -> None:
    method = make_method()
    online = dict(method.named_parameters())
    assert all(torch.equal(v, online[n.removeprefix("momentum_")]) for n, v in momentum_parameters(method).items())


def test_the_loss_is_symmetric_in_the_views() -> None:
    view1, view2 = views(6)
    forth, back = make_method()(view1, view2)["loss"].item(), make_method()(view2, view1)["loss"].item()
    assert forth == pytest.approx(back, rel=1e-6)


def test_a_process_finds_its_positives_among_the_keys_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process's keys come after the first's; for which of the two it is, the loss is the same."""
    others = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))

    def loss(rank: int) -> float:
        monkeypatch.setattr(mocov3, "rank", lambda: rank)
        monkeypatch.setattr(mocov3, "gather_rows", lambda rows: torch.cat([others, rows] if rank else [rows, others]))
        return float(make_method()(*views(4))["loss"].item())

    assert loss(1) == pytest.approx(loss(0), rel=1e-5)


def test_momentum_batch_norms_keep_their_own_statistics() -> None:
    method = make_method()
    before = {name: value.clone() for name, value in method.momentum_projector.named_buffers()}
    method(*views(8))
    now = dict(method.momentum_projector.named_buffers())
    assert any(not torch.equal(before[name], now[name]) for name in before)
    means = {name: value.clone() for name, value in now.items()}
    method.update_momentum_encoder(0.0)
    assert all(torch.equal(means[name], value) for name, value in method.momentum_projector.named_buffers())


def test_a_batch_of_two_trains() -> None:
    method = make_method()
    row = method(*views(2))
    row["loss"].backward()
    assert row["loss"].isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_a_larger_temperature_gives_another_loss() -> None:
    rows = [make_method(dataclasses.replace(CONFIG, temperature=t))(*views(4))["loss"].item() for t in (0.2, 1.0)]
    assert rows[0] != pytest.approx(rows[1])
