from __future__ import annotations

import importlib.machinery
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from mimco_deploy.bundle import GOLDEN_FILE, MODEL_FILES, Golden, read_bundle, write_contract
from mimco_deploy.errors import BundleError, MissingExtraError, ProviderError
from mimco_deploy.serving.encoders import Device, load_encoder
from mimco_deploy.serving.encoders.onnx import OnnxEncoder, has_tensorrt_provider
from mimco_deploy.serving.trt import RTX_PLUGIN
from tests.helpers import DIM, SIDE, Images, golden_images, tiny_bundle, tiny_embed, tiny_graph, tiny_spec


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_any_batch_size_gives_the_embeddings_of_the_graph(tmp_path: Path, batch: int) -> None:
    encoder = load_encoder(tiny_bundle(tmp_path / "encoder"))
    images = golden_images(batch)
    embeddings = encoder.embed(images)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (batch, DIM)
    np.testing.assert_allclose(embeddings, tiny_embed(images), atol=1e-6)


def test_the_provider_is_what_the_session_reports(tmp_path: Path) -> None:
    encoder = load_encoder(tiny_bundle(tmp_path / "encoder"))
    assert encoder.provider in {"CPUExecutionProvider", "CUDAExecutionProvider"}
    assert encoder.spec == tiny_spec()


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((0, SIDE, SIDE, 3), np.uint8),
        np.zeros((SIDE, SIDE, 3), np.uint8),
        np.zeros((1, SIDE, SIDE + 1, 3), np.uint8),
        np.zeros((1, 3, SIDE, SIDE), np.uint8),
        np.zeros((1, SIDE, SIDE, 3), np.float32),
    ],
)
def test_another_shape_or_type_is_refused(tmp_path: Path, images: Images) -> None:
    encoder = load_encoder(tiny_bundle(tmp_path / "encoder"))
    with pytest.raises(ValueError, match=r"expected uint8 \[B, 32, 32, 3\]"):
        encoder.embed(images)


def test_pictures_that_are_not_contiguous_are_embedded_alike(tmp_path: Path) -> None:
    encoder = load_encoder(tiny_bundle(tmp_path / "encoder"))
    mirrored = golden_images(3)[:, :, ::-1]
    np.testing.assert_array_equal(encoder.embed(mirrored), encoder.embed(np.ascontiguousarray(mirrored)))


def test_a_missing_bundle_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="mimco export --format onnx"):
        load_encoder(tmp_path / "encoder")


@pytest.mark.parametrize("name", [MODEL_FILES["fp32"], GOLDEN_FILE])
def test_a_tampered_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tiny_bundle(tmp_path / "encoder")
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        load_encoder(path)


def test_other_weights_under_the_same_contract_are_refused_with_the_distance(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "encoder", seed=0, graph=tiny_graph(seed=1))
    with pytest.raises(
        BundleError, match=r"model.onnx is not what .* differs by \d\.\d\de\S+ \(at most 1e-04\).*; run: mimco export"
    ):
        load_encoder(path)


def test_golden_embeddings_of_another_encoder_are_refused(tmp_path: Path) -> None:
    images = golden_images()
    path = tiny_bundle(tmp_path / "encoder", golden=Golden(images, tiny_embed(images, seed=5)))
    with pytest.raises(BundleError, match="not what its golden embeddings say"):
        load_encoder(path)


def test_golden_embeddings_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    images = golden_images()
    path = tiny_bundle(tmp_path / "encoder", golden=Golden(images, np.full((4, DIM), np.nan, np.float32)))
    with pytest.raises(BundleError, match="not what its golden embeddings say"):
        load_encoder(path)


@pytest.mark.parametrize(
    "golden",
    [
        Golden(golden_images()[:0], np.zeros((0, DIM), np.float32)),
        Golden(golden_images(), np.zeros((4, DIM + 1), np.float32)),
        Golden(golden_images()[:, :-1], np.zeros((4, DIM), np.float32)),
    ],
)
def test_golden_pictures_that_prove_nothing_are_refused(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(BundleError, match="holds golden images"):
        load_encoder(tiny_bundle(tmp_path / "encoder", golden=golden))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x09" + bytes(200)])
def test_a_model_that_is_no_graph_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    path = tiny_bundle(tmp_path / "encoder")
    (path / MODEL_FILES["fp32"]).write_bytes(content)
    write_contract(path, tiny_spec())  # hashes that fit
    with pytest.raises(BundleError, match="mimco export --format onnx"):
        load_encoder(path)


def test_a_graph_that_was_cut_short_is_a_bundle_error(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "encoder")
    content = (path / MODEL_FILES["fp32"]).read_bytes()
    (path / MODEL_FILES["fp32"]).write_bytes(content[: len(content) // 2])
    write_contract(path, tiny_spec())
    with pytest.raises(BundleError, match="cannot be loaded"):
        load_encoder(path)


def test_a_graph_with_another_input_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has pixels where image belongs"):
        load_encoder(tiny_bundle(tmp_path / "encoder", graph=tiny_graph(input_name="pixels")))


def test_a_graph_for_one_batch_size_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has image tensor\(uint8\) \[2, 32, 32, 3\]; expected image .*\[batch, 32"):
        load_encoder(tiny_bundle(tmp_path / "encoder", graph=tiny_graph(batch=2)))


def test_a_graph_of_another_embedding_size_is_refused(tmp_path: Path) -> None:
    graph = tiny_graph()
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("embedding", 1, ["batch", DIM + 1]))
    with pytest.raises(BundleError, match="mimco export"):
        load_encoder(tiny_bundle(tmp_path / "encoder", graph=graph))


@pytest.mark.parametrize("found", [None, types.ModuleType("onnxruntime")], ids=["none", "an empty folder"])
def test_without_onnxruntime_the_install_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: types.ModuleType | None
) -> None:
    path = tiny_bundle(tmp_path / "encoder")
    monkeypatch.setitem(sys.modules, "onnxruntime", found)
    with pytest.raises(MissingExtraError, match=r'pip install "mimco-deploy\[cpu\]"'):
        load_encoder(path)


def test_a_folder_whose_name_is_no_text_is_as_good(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / os.fsdecode(b"b\xff"))
    images = golden_images(2)
    np.testing.assert_allclose(load_encoder(path).embed(images), tiny_embed(images), atol=1e-6)


def test_cuda_that_is_offered_but_does_not_start_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = onnxruntime.InferenceSession
    asked: list[object] = []

    def without_cuda(path: Path, sess_options: object, providers: list[object], **_: object) -> object:
        asked.append(providers[0])
        return real(path, sess_options=sess_options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    with caplog.at_level(logging.WARNING):
        encoder = load_encoder(tiny_bundle(tmp_path / "encoder"))
    assert encoder.provider == "CPUExecutionProvider"
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    assert "could not start it" in caplog.text
    with pytest.raises(ProviderError, match="could not start it; expected --device auto, since --strict"):
        load_encoder(tmp_path / "encoder", strict=True)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_not_there_is_said_and_an_error_where_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, device: Device
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    path = tiny_bundle(tmp_path / "encoder")
    with caplog.at_level(logging.WARNING):
        assert load_encoder(path, device).provider == "CPUExecutionProvider"
    assert "mimco doctor" in caplog.text
    with pytest.raises(ProviderError, match=f"expected --device {device}, since --strict is set; run: mimco doctor"):
        load_encoder(path, device, strict=True)


class Plugin:
    """What ONNX Runtime's plug-in of TensorRT for RTX does: registered once, it names GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, loads: bool = True, starts: bool = True) -> None:
        self.loads, self.starts = loads, starts
        self.registered: list[tuple[str, str]] = []
        real = onnxruntime.InferenceSession
        module = types.ModuleType(RTX_PLUGIN)
        module.__spec__ = importlib.machinery.ModuleSpec(RTX_PLUGIN, None)
        vars(module).update(get_ep_name=lambda: "Rtx", get_library_path=lambda: "/rtx.so")

        def session(path: Path, sess_options: object, providers: object, **_: object) -> object:
            found = real(path, providers=["CPUExecutionProvider"])
            if isinstance(sess_options, Options) and sess_options.devices:
                assert providers is None
                return Session(found, "Rtx" if self.starts else "CPUExecutionProvider")
            return found

        class Session:
            def __init__(self, found: Any, first: str) -> None:
                self.found, self.first = found, first

            def get_providers(self) -> list[str]:
                return [self.first, "CPUExecutionProvider"]

            def __getattr__(self, name: str) -> Any:
                return getattr(self.found, name)

        class Options:
            devices: tuple[Any, ...] = ()

            def add_session_config_entry(self, *_: str) -> None:
                pass

            def add_provider_for_devices(self, devices: Any, options: dict[str, str]) -> None:
                assert options == {}
                self.devices = tuple(devices)

        monkeypatch.setitem(sys.modules, RTX_PLUGIN, module)
        monkeypatch.setattr(onnxruntime, "get_ep_devices", self.devices)
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", self.register)
        monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)

    def register(self, name: str, path: str) -> None:
        if not self.loads:
            raise RuntimeError("Failed to load library with error: libcuda.so.1: cannot open shared object file")
        self.registered.append((name, path))

    def devices(self) -> list[Any]:
        gpus = [types.SimpleNamespace(ep_name="Rtx")] if self.registered else []
        return [types.SimpleNamespace(ep_name="CPUExecutionProvider"), *gpus]


def test_tensorrt_for_rtx_runs_by_its_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin(monkeypatch)
    bundle = read_bundle(tiny_bundle(tmp_path / "encoder"))
    for _ in range(2):
        encoder = OnnxEncoder(bundle, device="tensorrt", strict=True)
        assert encoder.provider == "Rtx"
        encoder.prove()
    assert plugin.registered == [("Rtx", "/rtx.so")]
    assert has_tensorrt_provider()


@pytest.mark.parametrize("broken", ["loads", "starts"])
def test_a_plug_in_that_does_not_start_is_no_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    Plugin(monkeypatch, **{broken: False})
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    bundle = read_bundle(tiny_bundle(tmp_path / "encoder"))
    assert OnnxEncoder(bundle, device="tensorrt").provider == "CPUExecutionProvider"
    with pytest.raises(ProviderError, match="--strict"):
        OnnxEncoder(bundle, device="tensorrt", strict=True)
    assert has_tensorrt_provider() == (broken == "starts")


def test_the_cpu_that_was_asked_for_is_no_fallback(tmp_path: Path) -> None:
    assert load_encoder(tiny_bundle(tmp_path / "encoder"), "cpu", strict=True).provider == "CPUExecutionProvider"


def test_the_bundles_default_for_a_device_is_what_runs(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "encoder")
    (path / MODEL_FILES["int8"]).write_bytes((path / MODEL_FILES["fp32"]).read_bytes())
    write_contract(path, tiny_spec(), {"cpu": "int8"})
    assert load_encoder(path, "cpu").precision == "int8"
    assert load_encoder(path, "cpu", precision="fp32").precision == "fp32"
    with pytest.raises(BundleError, match=r"has no bf16; expected fp32 or int8; run: .*--precision bf16"):
        load_encoder(path, precision="bf16")


def test_without_patches_in_the_graph_none_are_given(tmp_path: Path) -> None:
    encoder = load_encoder(tiny_bundle(tmp_path / "encoder"))
    assert isinstance(encoder, OnnxEncoder)
    with pytest.raises(BundleError, match="has no patch tokens; expected an export --with-patches"):
        encoder.embed_with_patches(golden_images())
