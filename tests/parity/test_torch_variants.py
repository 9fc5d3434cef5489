"""Torch as rows of the bench: the same encoder, or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from mimco_deploy.bundle import read_bundle
from mimco_deploy.errors import ConfigError
from mimco_deploy.export.pipeline import ExportOptions, export_encoder
from mimco_deploy.export.student import from_model
from mimco_deploy.export.torch_variants import torch_variants
from mimco_deploy.serving.encoders import load_encoder


def weights(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=48, depth=1, num_heads=3)
    args = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}
    save_for_hf(model, str(folder), model_args=args)
    return str(folder)


def test_torch_runs_the_bundles_encoder_at_its_size(tmp_path: Path) -> None:
    source = weights(tmp_path / "timm", 0)
    export_encoder(from_model(source), tmp_path / "encoder", ExportOptions(image_size_px=48))
    spec = read_bundle(tmp_path / "encoder").spec
    eager, compiled = torch_variants(spec, source, "cpu")
    assert (eager.precision, compiled.precision, eager.in_bundle) == ("fp32", "fp32", False)
    embed, provider = eager.load(*eager.arguments)
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    np.testing.assert_allclose(embed(images), load_encoder(tmp_path / "encoder").embed(images), atol=1e-5)
    assert provider == f"torch {torch.__version__}, cpu"


def test_other_weights_are_no_row(tmp_path: Path) -> None:
    export_encoder(from_model(weights(tmp_path / "timm", 0)), tmp_path / "encoder")
    spec = read_bundle(tmp_path / "encoder").spec
    with pytest.raises(ConfigError, match=f"expected {spec.fingerprint[:12]}, that of the bundle"):
        torch_variants(spec, weights(tmp_path / "other", 1), "cpu")
