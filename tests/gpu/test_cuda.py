"""Both stages and the export on a CUDA device."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mimco_deploy.drawings import draw, draw_gallery
from mimco_deploy.export.pipeline import export_encoder
from mimco_deploy.export.student import from_checkpoint
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.plan import plan_run
from mimco_deploy.training.presets import vit_tiny_debug
from mimco_deploy.training.settings import apply_settings
from mimco_deploy.training.stages import build_stage1, build_stage2, train_stage1, train_stage2
from mimco_deploy.training.step import Stepper
from tests.unit.training.small import BACKBONE, draw_photos, every_method, rows_of, stage1_config, train_any

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages on drawn pictures, in the precision that the device offers."""
    home = tmp_path_factory.mktemp("cuda")
    draw_gallery(home / "images", per_kind=8, size_px=48)
    settings = [f"data.sources={home / 'images'}", "data.workers=0", "run.epochs=4", "run.global_batch_size=32"]
    stage1: Stage1Config = apply_settings(vit_tiny_debug().stage1, settings)
    train_stage1(stage1, home / "stage1")
    stage2: Stage2Config = apply_settings(vit_tiny_debug().stage2, [*settings, f"teacher={home / 'stage1/last'}"])
    train_stage2(stage2, home / "stage2")
    return home


def test_losses_stay_finite_to_the_last_step(run: Path) -> None:
    for stage in ("stage1", "stage2"):
        rows = [json.loads(line) for line in (run / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert rows[-1]["step"] == 11


def test_export_of_weights_trained_on_cuda_proves_itself_on_the_cpu(run: Path, tmp_path: Path) -> None:
    export_encoder(from_checkpoint(read_checkpoint(run / "stage2/last")), tmp_path / "encoder")
    encoder = load_encoder(tmp_path / "encoder")
    embeddings = encoder.embed(np.zeros((2, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-5)


NAMES = sorted(every_method(Path(), Path()))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_compiled_in_bf16(tmp_path: Path, name: str) -> None:
    photos = draw_photos(tmp_path / "photos")
    train_stage1(stage1_config(photos, epochs=1), tmp_path / "stage1")
    config = every_method(photos, tmp_path / "stage1" / "last")[name]
    fast = dataclasses.replace(config.run, precision="auto", compile="auto", epochs=1)
    train_any(dataclasses.replace(config, run=fast), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(tmp_path: Path, name: str) -> None:
    photos = draw_photos(tmp_path / "photos")
    config = every_method(photos, tmp_path)[name]
    torch.manual_seed(0)
    if isinstance(config, Stage1Config):
        method, make_views = build_stage1(config)
    else:
        method, make_views = build_stage2(config, (Backbone(BACKBONE), "cls"))
    stepper = Stepper(method.cuda(), config, 100)
    picture = draw("rings", 0, 48)
    views = tuple(torch.stack(column).cuda() for column in zip(*(make_views(picture) for _ in range(8)), strict=True))
    stepper.take(0, lambda: views)  # what is made once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            stepper.take(step, lambda: views)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_plan_says_what_the_allocator_says(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos")
    config = dataclasses.replace(stage1_config(photos), backbone=dataclasses.replace(BACKBONE, embed_dim=192))
    plan = plan_run(config)
    method, make_views = build_stage1(config)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stepper = Stepper(method.cuda(), config, 100)
    views = tuple(torch.stack(c) for c in zip(*(make_views(draw("rings", 0, 48)) for _ in range(64)), strict=True))
    stepper.take(0, lambda: views)
    used = (torch.cuda.max_memory_allocated() - before) / 2**20
    assert plan.fixed_mib + 64 * plan.image_mib == pytest.approx(used, rel=0.25)
