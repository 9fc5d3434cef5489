"""How a step computes: in which precision, compiled or not; and that neither changes what is learned."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mimco_deploy.errors import ConfigError
from mimco_deploy.training import step as stepping
from mimco_deploy.training.config import Stage2Config
from mimco_deploy.training.stages import train_stage1
from mimco_deploy.training.step import WIDE, check_compiler, compiles, uses_bf16
from tests.unit.training.small import (
    BACKBONE,
    assert_close_weights,
    draw_photos,
    every_method,
    rows_of,
    run_config,
    stage1_config,
    train_any,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("precision", "width", "device", "capable", "expected"),
    [
        ("auto", WIDE, CPU, True, True),
        ("auto", WIDE - 1, CPU, True, False),
        ("auto", WIDE, CPU, False, False),
        ("auto", 24, GPU, True, True),
        ("auto", 384, GPU, False, False),
        ("bf16", 24, CPU, False, True),
        ("fp32", 768, GPU, True, False),
    ],
)
def test_bf16_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, precision: Any, width: int, device: torch.device, capable: bool, expected: bool
) -> None:
    monkeypatch.setattr(stepping, "computes_bf16", lambda _: capable)
    assert uses_bf16(run_config(precision=precision), width, device) == expected


@pytest.mark.parametrize(
    ("asked", "device", "expected"), [("auto", CPU, False), ("auto", GPU, True), ("on", CPU, True), ("off", GPU, False)]
)
def test_backbones_are_compiled_on_gpus_or_where_asked(
    asked: Any, device: torch.device, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert compiles(run_config(compile=asked), device) == expected


def test_without_a_compiler_nothing_is_compiled_unless_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not compiles(run_config(compile="auto"), GPU)
    assert "no C compiler" in caplog.text
    for device, name in ((GPU, "cc"), (CPU, r"c\+\+")):
        with pytest.raises(ConfigError, match=rf"run\.compile on without a compiler; expected {name}"):
            check_compiler(run_config(compile="on"), device)
        check_compiler(run_config(compile="auto"), device)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU by g++")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    photos = draw_photos(tmp_path / "photos")
    train_stage1(stage1_config(photos, epochs=1), tmp_path / "stage1")
    config = every_method(photos, tmp_path / "stage1" / "last")["mimco"]
    assert isinstance(config, Stage2Config)
    for compiled in ("off", "on"):
        run = dataclasses.replace(config.run, epochs=1, compile=compiled)
        train_any(dataclasses.replace(config, backbone=BACKBONE, run=run), tmp_path / compiled)
    plain, fast = ([row["loss"] for row in rows_of(tmp_path / name)] for name in ("off", "on"))
    assert fast == pytest.approx(plain, rel=1e-4)


def test_on_a_cpu_attention_is_written_out_and_learns_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    photos = draw_photos(tmp_path / "photos")
    config = stage1_config(photos, epochs=1)
    calls: list[int] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return fused(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    train_any(config, tmp_path / "ours")
    assert not calls
    monkeypatch.setattr(stepping, "write_attention_out", lambda _: None)
    train_any(config, tmp_path / "fused")
    assert calls
    assert_close_weights(tmp_path / "ours", tmp_path / "fused")
