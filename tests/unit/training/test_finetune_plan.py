"""Runs with labels: what they will take, the micro-batches that fit, the report, and how pictures are measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mimco_deploy.cli import main
from mimco_deploy.errors import ConfigError, DataError, TrainingInterrupted
from mimco_deploy.preprocess import decode_pixels
from mimco_deploy.training import labelled
from mimco_deploy.training import plan as planning
from mimco_deploy.training.finetune_config import finetune_preset, linear_preset
from mimco_deploy.training.plan import fit_to_memory, plan_run
from mimco_deploy.training.supervised import train_with_labels
from mimco_deploy.training.supervised_checkpoint import read_run
from tests.unit.training.labelled import BOTH, CONFIGS, finetune_config, save_encoder
from tests.unit.training.small import BACKBONE, stop_at

pytestmark = pytest.mark.usefixtures("on_cpu")


@BOTH
def test_a_plan_counts_what_the_run_will_do(here: Path, kind: str) -> None:
    plan = plan_run(CONFIGS[kind](here))
    assert (plan.pictures, plan.steps, plan.micro_batch, plan.accumulate) == (24, 9, 8, 1)
    if kind == "finetune":
        assert plan.encoder_parameters < plan.trained_parameters
    else:
        assert plan.trained_parameters == 2 * BACKBONE.embed_dim + 2
    assert plan.step_mib == pytest.approx(plan.fixed_mib + 8 * plan.image_mib)
    assert plan.hours == pytest.approx(72 / plan.images_per_s / 3600)


def test_a_frozen_encoder_keeps_little_of_each_image(here: Path) -> None:
    assert plan_run(CONFIGS["linear"](here)).image_mib < 0.2 * plan_run(CONFIGS["finetune"](here)).image_mib


def test_pictures_that_are_mixed_can_be_planned(here: Path) -> None:
    config = dataclasses.replace(finetune_config(here), method=finetune_preset(BACKBONE).method)
    mixing = dataclasses.replace(config, method=dataclasses.replace(config.method, mixup=0.8, cutmix=1.0))
    assert plan_run(mixing).image_mib > 0


def test_as_few_micro_batches_as_fit_are_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = finetune_config(here)
    assert fit_to_memory(config).run == config.run
    three = dataclasses.replace(plan_run(config), largest_micro_batch=3)
    monkeypatch.setattr(planning, "plan_run", lambda _: three)
    fitted = fit_to_memory(config).run
    assert (fitted.accumulate, fitted.grad_checkpointing) == (4, True)


def test_pictures_that_are_mixed_stay_in_pairs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = finetune_config(here)
    mixing = dataclasses.replace(config, method=dataclasses.replace(config.method, mixup=0.8))
    mixing = dataclasses.replace(mixing, run=dataclasses.replace(mixing.run, global_batch_size=20))
    six = dataclasses.replace(plan_run(mixing), largest_micro_batch=6)
    monkeypatch.setattr(planning, "plan_run", lambda _: six)
    assert fit_to_memory(mixing).run.accumulate == 5
    train_with_labels(fit_to_memory(mixing), here / "mixed")


@BOTH
def test_what_cannot_be_trained_cannot_be_planned(here: Path, kind: str) -> None:
    config = CONFIGS[kind](here)
    with pytest.raises(DataError, match="--val"):
        plan_run(dataclasses.replace(config, val=(str(here / "train/rings"),)))
    with pytest.raises(ConfigError, match="micro-batches"):
        plan_run(dataclasses.replace(config, run=dataclasses.replace(config.run, accumulate=3)))


@BOTH
def test_the_command_plans_and_writes_nothing(here: Path, tmp_path: Path, kind: str) -> None:
    arguments = ["--workspace", str(tmp_path / "w"), "train", kind, "--from", str(here / "encoder")]
    arguments += ["--data", str(here / "train"), "--val", str(here / "val"), "--batch-size", "8"]
    result = CliRunner().invoke(main, [*arguments, "--plan", "--json"])
    assert result.exit_code == 0, result.output
    preset = finetune_preset(BACKBONE) if kind == "finetune" else linear_preset(BACKBONE)
    assert json.loads(result.stdout)["steps"] == 3 * preset.run.epochs
    assert "images/s" in CliRunner().invoke(main, [*arguments, "--plan"]).output
    assert not (tmp_path / "w").exists()


def test_the_command_takes_micro_batches(here: Path, tmp_path: Path) -> None:
    arguments = ["--workspace", str(tmp_path / "w"), "train", "finetune", "--from", str(here / "encoder"), "--json"]
    arguments += ["--data", str(here / "train"), "--val", str(here / "val"), "--batch-size", "8", "--epochs", "1"]
    for given, accumulate in (("2", 2), ("auto", 1)):
        result = CliRunner().invoke(main, [*arguments, "--grad-accum", given, "--fresh"])
        assert result.exit_code == 0, result.output
        state = json.loads((tmp_path / "w/finetune/last/state.json").read_text(encoding="utf-8"))
        assert state["config"]["run"]["accumulate"] == accumulate


@BOTH
def test_the_report_grows_with_the_epochs(here: Path, tmp_path: Path, kind: str) -> None:
    train_with_labels(CONFIGS[kind](here), tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "Step 9 of 9, 2 classes" in page
    for name in ("loss", "val_top1", "val_top5"):
        assert f"<figcaption>{name}<b>" in page
    assert "at epoch 3" in page
    assert "role='alert'" not in page


@BOTH
def test_pictures_are_measured_with_the_encoders_own_geometry_and_after_resuming_too(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    described = json.loads((save_encoder(tmp_path / "encoder") / "config.json").read_text(encoding="utf-8"))
    described["pretrained_cfg"] |= {"crop_pct": 0.5, "interpolation": "bilinear", "crop_mode": "squash"}
    (tmp_path / "encoder/config.json").write_text(json.dumps(described), encoding="utf-8")
    seen = set()

    def decode(content: bytes, name: str, *geometry: Any) -> Any:
        seen.add(geometry)
        return decode_pixels(content, name, *geometry)

    monkeypatch.setattr(labelled, "decode_pixels", decode)
    config = dataclasses.replace(CONFIGS[kind](here), encoder=str(tmp_path / "encoder"))
    with pytest.raises(TrainingInterrupted):
        train_with_labels(config, tmp_path / "run", on_step=stop_at(4))
    assert seen == {(BACKBONE.image_size_px, 0.5, "bilinear", "squash")}
    shutil.rmtree(tmp_path / "encoder")
    saved = read_run(tmp_path / "run/last", kind)
    train_with_labels(saved.config, tmp_path / "run", resume=saved)
    assert len(seen) == 1
    if kind == "finetune":
        kept = json.loads((tmp_path / "run/last/timm/config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
        assert (kept["crop_pct"], kept["interpolation"], kept["crop_mode"]) == (0.5, "bilinear", "squash")
