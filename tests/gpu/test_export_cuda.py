"""Exported encoders on an NVIDIA GPU: CUDA by ONNX Runtime, engines by TensorRT, each against torch."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.models import save_for_hf

from mimco_deploy.bundle import TOLERANCES, Bundle, Precision, read_bundle
from mimco_deploy.export.engines import build_engine
from mimco_deploy.export.parity import EMULATED, read_parity
from mimco_deploy.export.pipeline import ExportOptions, export_encoder
from mimco_deploy.export.student import from_model
from mimco_deploy.export.to_tensorrt import EngineOptions
from mimco_deploy.serving.agreement import compare
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.sample import draw_pictures
from mimco_deploy.serving.trt import Flavour, gpu_here, has_rtx, load_trt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

HAS_CUDA_PROVIDER = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
CUDA = pytest.mark.skipif(not HAS_CUDA_PROVIDER, reason="needs onnxruntime-gpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("gpu")
    torch.manual_seed(0)
    save_for_hf(timm.create_model("vit_small_patch16_224", num_classes=0), str(folder / "timm"))
    export_encoder(from_model(str(folder / "timm")), folder / "encoder", ExportOptions(precisions=("fp16", "bf16")))
    return read_bundle(folder / "encoder")


def expected(bundle: Bundle, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, and what fp32 on the CPU makes of them."""
    spec = bundle.spec
    images = draw_pictures(count, *spec.geometry, seed=77)
    return images, load_encoder(bundle.path, "cpu", strict=True, precision="fp32").embed(images)


@CUDA
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda_runs_each_precision_within_its_tolerance(bundle: Bundle, precision: Precision) -> None:
    encoder = load_encoder(bundle.path, "cuda", strict=True, precision=precision)
    assert encoder.provider == "CUDAExecutionProvider"
    images, reference = expected(bundle, 40)
    for count in (1, 2, 5, 40):
        assert compare(encoder.embed(images[:count]), reference[:count]).breaches(TOLERANCES[precision]) == []


@CUDA
def test_half_types_are_proved_on_the_gpu_itself(bundle: Bundle) -> None:
    proofs = read_parity(bundle.path / "parity.json")
    assert {proof.precision: proof.provider for proof in proofs}["fp16"] == "CUDAExecutionProvider"
    assert not any(EMULATED in proof.provider for proof in proofs)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_built_here_runs_here_within_its_tolerance(
    bundle: Bundle, flavour: Flavour, precision: Precision
) -> None:
    if flavour == "tensorrt":
        pytest.importorskip("tensorrt", reason="no TensorRT")
    elif not has_rtx():
        pytest.skip("no TensorRT for RTX")
    trt, gpu = load_trt(flavour), gpu_here()
    assert gpu is not None
    if flavour == "tensorrt-rtx" and f"SM{gpu.compute_capability}" not in dir(trt.ComputeCapability):
        pytest.skip(f"TensorRT for RTX does not support {gpu.name}")
    for plan in (bundle.path / "engines").glob("*.plan"):
        plan.unlink()
    options = EngineOptions(precision=precision, profile=(1, 8, 32))
    assert build_engine(trt, flavour, bundle.path, options, None).is_new
    encoder = load_encoder(bundle.path, "tensorrt", strict=True, precision=precision)
    assert encoder.provider.startswith(flavour)
    images, reference = expected(bundle, 70)
    for count in (1, 2, 5, 8, 32, 70, 1, 8):
        assert compare(encoder.embed(images[:count]), reference[:count]).breaches(TOLERANCES[precision]) == []
