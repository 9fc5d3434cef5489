"""Runs that can no longer learn: they end with a TrainingError, and the checkpoint on disk stays a good one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimco_deploy.errors import TrainingError
from mimco_deploy.training.augment import OneCrop
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.loop import train
from mimco_deploy.training.masking import mask_shape
from mimco_deploy.training.monitor import COLLAPSED, EQUAL, RunLog, check_alive, collapse_limit, spread
from mimco_deploy.training.probe import read_sights
from mimco_deploy.training.stages import train_stage1
from tests.unit.training.small import MASK, Stub, draw_photos, rows_of, stage1_config

Rows = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("alarms") / "photos")


class Faulty(Stub):
    """The stub, with something done to its answer from a given step on."""

    def __init__(self, step: int, fault: Callable[[Faulty, Rows], Rows]) -> None:
        super().__init__()
        self.step, self.fault = step, fault

    def forward(self, view: Tensor, *views: Tensor) -> Rows:
        row = super().forward(view, *views)
        return self.fault(self, row) if len(self.progress) > self.step else row


def run(method: Stub, photos: Path, folder: Path, **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    config = stage1_config(photos, **settings)
    train(method, config, load_corpus(config.data), OneCrop(16, config.views, mask_shape(16, 4, MASK)), folder)


def assert_healthy(folder: Path, step: int) -> None:
    checkpoint = read_checkpoint(folder / "last")
    assert checkpoint.step == step
    assert all(value.isfinite().all() for value in checkpoint.load_model().values())
    moments = [m for state in checkpoint.load_optimizer()["state"].values() for m in state.values()]
    assert moments
    assert all(moment.isfinite().all() for moment in moments)


def nan_loss(_: Faulty, row: Rows) -> Rows:
    return {**row, "loss": row["loss"] * math.nan}


def infinite_loss(_: Faulty, row: Rows) -> Rows:
    return {**row, "loss": row["loss"] + math.inf}


def nan_gradient(method: Faulty, row: Rows) -> Rows:
    """The loss itself is finite: the root of 0 is 0, and its slope is not."""
    zero = (method.head.bias - method.head.bias.detach()).square().sum()
    return {**row, "loss": row["loss"] + zero.sqrt() * 0}


def collapsed(_: Faulty, row: Rows) -> Rows:
    return {**row, "feature_spread": row["feature_spread"] * 1e-6}


@pytest.mark.parametrize("log_every", [1, 4, 100])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (nan_loss, "step 3: loss is nan"),
        (infinite_loss, "step 3: loss is inf"),
        (collapsed, "step 3: features collapsed"),
    ],
)
def test_a_run_that_goes_wrong_names_the_step_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, photos: Path, fault: Callable[[Faulty, Rows], Rows], message: str, log_every: int
) -> None:
    with pytest.raises(TrainingError, match=message):
        run(Faulty(2, fault), photos, tmp_path / "run", log_every_steps=log_every, checkpoint_every_steps=2)
    assert_healthy(tmp_path / "run", 2)
    assert all(row["step"] <= 2 and all(map(math.isfinite, row.values())) for row in rows_of(tmp_path / "run"))


def test_a_run_that_collapses_before_its_first_checkpoint_shows_what_it_became(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(TrainingError, match="step 3: features collapsed"):
        run(Faulty(2, collapsed), photos, tmp_path, log_every_steps=1, checkpoint_every_steps=100)
    assert [sight.step for sight in read_sights(tmp_path, 100)] == [1, 3]


@pytest.mark.parametrize("step", [1, 5])
def test_a_gradient_that_is_no_number_reaches_no_checkpoint(tmp_path: Path, photos: Path, step: int) -> None:
    """Even in the last step, whose weights no further loss would judge."""
    with pytest.raises(TrainingError):
        run(Faulty(step, nan_gradient), photos, tmp_path / "run", checkpoint_every_steps=1)
    assert_healthy(tmp_path / "run", step)


def test_nan_in_a_micro_batch_that_is_not_the_last_reaches_no_checkpoint(tmp_path: Path, photos: Path) -> None:
    calls: list[int] = []

    def first_of_two(_: Faulty, row: Rows) -> Rows:
        calls.append(1)
        return nan_loss(_, row) if len(calls) % 2 else row

    with pytest.raises(TrainingError):
        run(Faulty(3, first_of_two), photos, tmp_path / "run", checkpoint_every_steps=1, accumulate=2)
    assert_healthy(tmp_path / "run", 3)


@pytest.mark.parametrize("base_lr", [1e12, 1e37])
def test_a_learning_rate_far_too_high_is_an_error_and_not_a_result(
    tmp_path: Path, photos: Path, base_lr: float
) -> None:
    config = stage1_config(photos, checkpoint_every_steps=1)
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, base_lr=base_lr, warmup_epochs=0.0, clip_norm=0.0)
    )
    with pytest.raises(TrainingError, match=r"step \d+.*(finite|collapsed)"):
        train_stage1(config, tmp_path / "run")
    if (tmp_path / "run" / "last").exists():
        state = read_checkpoint(tmp_path / "run" / "last").load_model()
        assert all(value.isfinite().all() for value in state.values())


def test_any_number_of_the_log_that_is_not_finite_is_an_alarm() -> None:
    check_alive(0, {"loss": 1.0, "feature_spread": 0.5})
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(TrainingError, match="step 8: patch_loss is") as error:
            check_alive(7, {"loss": 1.0, "patch_loss": bad, "feature_spread": 0.5})
        assert "optim.base_lr" in error.value.expected


def test_collapse_is_a_spread_below_the_limit() -> None:
    check_alive(0, {"feature_spread": COLLAPSED * 1.01})
    with pytest.raises(TrainingError, match="step 4: features collapsed, spread"):
        check_alive(3, {"feature_spread": COLLAPSED * 0.99})


@pytest.mark.parametrize(
    ("first", "limit"), [(0.3, COLLAPSED), (0.04, COLLAPSED), (0.006, 0.0015), (0.0, EQUAL), (math.nan, COLLAPSED)]
)
def test_the_limit_is_a_quarter_of_a_small_first_spread(first: float, limit: float) -> None:
    """Untrained encoders see little of dark pictures; features that are all equal are collapsed for any run."""
    assert collapse_limit(first) == pytest.approx(limit)


def test_a_resumed_run_is_compared_with_its_first_step(tmp_path: Path, photos: Path) -> None:
    """And not with the step that it goes on from, which may be near a collapse by then."""

    def fading(method: Faulty, row: Rows) -> Rows:
        return {**row, "feature_spread": torch.tensor([0.3, 0.011, 0.009][min(len(method.progress) - 1, 2)])}

    for resume in (False, True):
        checkpoint = read_checkpoint(tmp_path / "last") if resume else None
        method = Faulty(0, fading)
        method.progress += [0.0] * (2 if resume else 0)
        config = stage1_config(photos, checkpoint_every_steps=2, log_every_steps=100)
        views = OneCrop(16, config.views, mask_shape(16, 4, MASK))
        with pytest.raises(TrainingError, match="step 3: features collapsed"):
            train(method, config, load_corpus(config.data), views, tmp_path, resume=checkpoint)


@pytest.mark.parametrize(("later", "message"), [(0.5, ""), (0.2, "step 3: features collapsed, spread")])
def test_a_run_on_pictures_that_hardly_differ_begins(tmp_path: Path, photos: Path, later: float, message: str) -> None:
    def faint(method: Faulty, row: Rows) -> Rows:
        share = 1.0 if len(method.progress) <= 2 else later
        return {**row, "feature_spread": torch.tensor(0.004) * share}

    with pytest.raises(TrainingError, match=message) if message else contextlib.nullcontext():
        run(Faulty(0, faint), photos, tmp_path / "run")


def test_spread_is_0_for_equal_features_and_1_on_the_sphere() -> None:
    torch.manual_seed(0)
    assert spread(torch.randn(1, 32).expand(16, 32) * torch.rand(16, 1)).item() == pytest.approx(0.0, abs=1e-6)
    assert spread(torch.randn(4000, 64) * 7).item() == pytest.approx(1.0, abs=0.02)
    features = torch.randn(6, 4, dtype=torch.float64)
    unit = features / features.norm(dim=1, keepdim=True)
    by_hand = sum(((unit[:, c] - unit[:, c].mean()) ** 2).mean().sqrt() for c in range(4)) / 4 * 2
    assert spread(features).item() == pytest.approx(float(by_hand), rel=1e-5)


def test_the_log_keeps_rows_before_the_first_step_and_drops_the_others(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in range(5):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 0.1')
    log = RunLog(tmp_path, 3)
    log.write(3, {"loss": 30.0})
    log.close()
    assert rows_of(tmp_path) == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]
    assert len(list(tmp_path.glob("events.*"))) == 2
