"""Both stages and the export on a CUDA device."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mimco_deploy.drawings import draw_gallery
from mimco_deploy.export.pipeline import export_encoder
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.presets import vit_tiny_debug
from mimco_deploy.training.settings import apply_settings
from mimco_deploy.training.stages import train_stage1, train_stage2

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
    report = export_encoder(read_checkpoint(run / "stage2/last"), tmp_path / "encoder", "CC0-1.0")
    assert report.passed
    encoder = load_encoder(tmp_path / "encoder")
    embeddings = encoder.embed(np.zeros((2, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-5)
