"""The plan of a run: what is reckoned from two small steps, and the micro-batches that fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mimco_deploy.cli import main
from mimco_deploy.errors import ConfigError, DataError, MimcoError, TrainingInterrupted
from mimco_deploy.training import plan as planning
from mimco_deploy.training.plan import MIB, DoesNotFitError, Plan, fit_accumulation, fit_to_memory, plan_run
from mimco_deploy.training.stages import train_stage1, train_stage2
from tests.unit.training.small import BACKBONE, draw_photos, every_method, stage1_config, stage2_config, stop_at

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("plan") / "photos")


def test_a_plan_counts_what_the_run_will_do(photos: Path) -> None:
    plan = plan_run(stage1_config(photos))
    assert (plan.pictures, plan.steps, plan.micro_batch, plan.accumulate) == (24, 6, 8, 1)
    assert plan.encoder_parameters < plan.trained_parameters
    assert plan.step_mib == pytest.approx(plan.fixed_mib + 8 * plan.image_mib)
    assert plan.hours == pytest.approx(48 / plan.images_per_s / 3600)
    assert plan.largest_micro_batch > 1000
    assert plan.disk_mib > 2 * 4 * plan.trained_parameters / MIB


@pytest.mark.parametrize(
    ("image_s", "taken"),
    [(0.01, [2, 6, 16]), (0.3, [2, 6, 14]), (1.0, [2, 6])],
    ids=["the run's own size", "as many as take some seconds", "too slow for more"],
)
def test_the_rate_is_that_of_the_largest_step_that_patience_allows(
    photos: Path, monkeypatch: pytest.MonkeyPatch, image_s: float, taken: list[int]
) -> None:
    sizes: list[int] = []

    def probe(_: Any, views: Any) -> Any:
        count = len(views[0])
        sizes.append(count)
        return planning._Probe(count, count * MIB, 0.2 + image_s * count)

    monkeypatch.setattr(planning, "_probe", probe)
    plan = plan_run(stage1_config(photos, global_batch_size=16))
    assert sizes == taken
    assert plan.images_per_s == pytest.approx(taken[-1] / (0.2 + image_s * taken[-1]))


@pytest.mark.parametrize("name", ["moby", "simmim", "mae", "joint"])
def test_every_method_without_a_teachers_run_can_be_planned(photos: Path, name: str) -> None:
    assert plan_run(every_method(photos, Path())[name]).image_mib > 0


def test_activations_computed_again_take_less_memory(photos: Path) -> None:
    deep = dataclasses.replace(BACKBONE, depth=(6,))
    config = dataclasses.replace(stage1_config(photos), backbone=deep)
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, grad_checkpointing=True))
    assert plan_run(again).image_mib < 0.5 * plan_run(config).image_mib


def test_what_the_run_would_refuse_the_plan_refuses(photos: Path) -> None:
    config = stage1_config(photos, accumulate=3)
    with pytest.raises(ConfigError, match=r"run.global_batch_size 8 over 1 processes × 3 micro-batches"):
        plan_run(config)
    config = dataclasses.replace(stage1_config(photos), start_from=str(photos / "nowhere"))
    with pytest.raises(MimcoError, match="nowhere"):
        plan_run(config)


def test_a_run_that_is_there_is_not_in_the_way_of_a_plan(photos: Path, tmp_path: Path) -> None:
    train_stage1(stage1_config(photos, epochs=1), tmp_path / "space" / "stage1")
    before = sorted(path.name for path in (tmp_path / "space").iterdir())
    options = ["--data", str(photos), "--preset", "vit_tiny_debug", "--batch-size", "8", "--grad-accum", "auto"]
    shown = CliRunner().invoke(main, ["--workspace", str(tmp_path / "space"), "train", "stage1", *options, "--plan"])
    assert shown.exit_code == 0, shown.output
    assert "micro-batch  8 images × 1" in shown.output
    assert sorted(path.name for path in (tmp_path / "space").iterdir()) == before


def test_the_plan_of_a_resumed_run_is_of_what_is_left_and_needs_no_teacher_elsewhere(
    photos: Path, tmp_path: Path
) -> None:
    space = tmp_path / "space"
    train_stage1(stage1_config(photos, epochs=1), space / "stage1")
    with pytest.raises(TrainingInterrupted):
        train_stage2(stage2_config(photos, space / "stage1" / "last"), space / "stage2", on_step=stop_at(4))
    (space / "stage1").rename(tmp_path / "elsewhere")
    command = ["--workspace", str(space), "train", "stage2", "--resume", "--plan"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "2 steps left over 24 pictures" in shown.output


def test_a_plan_writes_nothing_and_wants_pictures(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no picture in"):
        plan_run(stage1_config(empty))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def some_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Plan)), 1)
    return Plan(**{**values, **changes})


@pytest.mark.parametrize(("largest", "accumulate"), [(64, 1), (100, 1), (63, 2), (16, 4), (15, 8), (2, 32)])
def test_a_batch_is_divided_as_little_as_memory_asks(largest: int, accumulate: int) -> None:
    assert fit_accumulation(some_plan(largest_micro_batch=largest), 64) == accumulate


@pytest.mark.parametrize("largest", [0, 1])
def test_memory_for_not_even_two_images_is_refused(largest: int) -> None:
    with pytest.raises(ConfigError, match="MiB of memory are free; two images need"):
        fit_accumulation(some_plan(largest_micro_batch=largest), 64)


def test_what_is_made_once_is_no_share_of_an_image(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's state is made in the first step of all; measured with the first probe it hid the images'."""
    born: list[int] = []

    def peak(stepper: Any, views: Any) -> int:
        before = len(stepper.optimizer.state)
        stepper.take(0, lambda: views)
        born.append(len(stepper.optimizer.state) - before)
        return len(views[0]) * 1000

    monkeypatch.setattr(planning, "_kept_on_cpu", peak)
    assert plan_run(stage1_config(photos)).image_mib == 1000 / MIB
    assert born == [0, 0, 0]


def test_where_a_step_does_not_fit_smaller_ones_are_measured(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PROBES", {"cpu": ((4, 12), (2, 6))})
    config, tried = stage1_config(photos), []

    def peak(_: Any, views: Any) -> int:
        tried.append(len(views[0]))
        if len(views[0]) > most or not may:
            raise torch.OutOfMemoryError
        return len(views[0]) * 1000

    monkeypatch.setattr(planning, "_kept_on_cpu", peak)
    most, may = 6, True
    assert plan_run(config).image_mib == 1000 / MIB
    assert tried == [4, 12, 2, 6, 8]  # the last for the rate alone, and in vain
    may = False
    with pytest.raises(DoesNotFitError, match=r"not even a step of 6 images fits into the .* MiB that are free"):
        plan_run(config)
    with pytest.raises(DoesNotFitError):
        fit_to_memory(config)  # computing again was tried as well
    assert tried[5:] == [4, 2] * 3


def test_free_memory_is_what_the_machine_and_its_group_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_GROUP", tmp_path)
    free = planning.free_memory(torch.device("cpu"))
    assert free > 100 * MIB
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("1000\n", encoding="ascii")
    assert planning.free_memory(torch.device("cpu")) == pytest.approx(free, rel=0.3)
    (tmp_path / "memory.max").write_text(f"{50 * MIB}\n", encoding="ascii")
    assert planning.free_memory(torch.device("cpu")) == 50 * MIB - 1000
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 600\nactive_file 5\n", encoding="ascii")
    assert planning.free_memory(torch.device("cpu")) == 50 * MIB - 400


def test_a_run_is_fitted_first_by_computing_again_and_then_by_dividing(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = stage1_config(photos, global_batch_size=16)

    def fitted(free_mib: float) -> tuple[bool, int]:
        monkeypatch.setattr(planning, "free_memory", lambda _: int(free_mib * MIB))
        run = fit_to_memory(config).run
        return run.grad_checkpointing, run.accumulate

    plain = plan_run(config)
    again = plan_run(dataclasses.replace(config, run=dataclasses.replace(config.run, grad_checkpointing=True)))
    half = 2.0  # a step may fill half of what is free
    assert fitted(half * (plain.step_mib + 1)) == (False, 1)
    assert fitted(half * (again.fixed_mib + 17 * again.image_mib)) == (True, 1)
    assert not caplog.messages
    assert fitted(half * (again.fixed_mib + 5 * again.image_mib)) == (True, 4)
    assert "4 micro-batches of 4" in caplog.text


@pytest.mark.parametrize("option", [("--plan",), ("--grad-accum", "auto")])
def test_several_processes_measure_nothing_together(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["--workspace", str(tmp_path), "train", "stage1", "--preset", "vit_tiny_debug", "--batch-size", "8"]
    done = CliRunner().invoke(main, [*arguments, "--data", str(photos), *option])
    assert done.exit_code == 1
    assert f"{' '.join(option)} in several processes" in done.output
