"""Engines really built, by TensorRT for RTX on a machine without a GPU; and what is said where it is not there."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from onnx import TensorProto
from timm.models import save_for_hf

from mimco_deploy.bundle import Precision, read_bundle, write_contract
from mimco_deploy.cli import main
from mimco_deploy.errors import BundleError, ConfigError, EngineError, MissingExtraError
from mimco_deploy.export import to_tensorrt
from mimco_deploy.export.engines import bundle_is_current
from mimco_deploy.export.pipeline import ExportOptions, export_encoder
from mimco_deploy.export.student import from_model
from mimco_deploy.export.to_tensorrt import EngineOptions, ensure_engine, plan_engine
from mimco_deploy.export.triton import write_repository
from mimco_deploy.serving import trt as trt_module
from mimco_deploy.serving.engine_types import check_built_types
from mimco_deploy.serving.engines import Engine, EngineSpec, differences, model_hash, read_engine
from mimco_deploy.serving.trt import Gpu, gpu_here, has_rtx, load_trt

MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},
    "resnet10t": {},
}
RTX = pytest.mark.skipif(not has_rtx(), reason='no TensorRT for RTX: pip install "mimco-deploy[tensorrt-rtx]"')
AHEAD = EngineOptions(precision="fp16", profile=(1, 4, 8), compute_capabilities=(89, 120))


def bundle_of(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **MODELS[name])
    cfg = {"input_size": (3, MODELS[name].get("img_size", 64), MODELS[name].get("img_size", 64))}
    save_for_hf(model, str(folder / "timm"), model_config={"pretrained_cfg": cfg}, model_args=MODELS[name])
    options = ExportOptions(precisions=("fp16", "bf16"))
    export_encoder(from_model(str(folder / "timm")), folder / "encoder", options)
    return folder / "encoder"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("vit_tiny_patch16_224", tmp_path_factory.mktemp("vit"))


@pytest.fixture
def folder(vit: Path, tmp_path: Path) -> Path:
    shutil.copytree(vit, tmp_path / "encoder")
    return tmp_path / "encoder"


def built(folder: Path, options: EngineOptions = AHEAD) -> Any:
    trt, bundle = load_trt("tensorrt-rtx"), read_bundle(folder)
    return ensure_engine(trt, bundle, plan_engine(trt, "tensorrt-rtx", bundle, options))


def export(*arguments: object, workspace: Path) -> Any:
    return CliRunner().invoke(main, ["--workspace", str(workspace), "export", *map(str, arguments)])


@RTX
@pytest.mark.parametrize("name", MODELS)
def test_every_family_becomes_an_engine_of_the_types_asked_for(name: str, tmp_path: Path) -> None:
    folder = bundle_of(name, tmp_path)
    kinds: dict[Precision, str] = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
    for precision, kind in kinds.items():
        options = dataclasses.replace(AHEAD, precision=precision)
        engine, is_new = built(folder, options)
        assert is_new
        products = {layer for layer in engine.layers if layer.split()[0] in ("MATRIX_MULTIPLY", "CONVOLUTION")}
        assert {layer.split()[1] for layer in products} == {kind}
        assert engine.plan.read_bytes()[:4] == b"vtrt"  # a plain plan, with nothing in front
        assert engine.layers.get("SOFTMAX FLOAT", 0) == sum(
            count for layer, count in engine.layers.items() if layer.startswith("SOFTMAX")
        )


@RTX
def test_an_engine_is_built_once_and_again_where_it_is_stale(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first, is_new = built(folder)
    assert is_new
    assert built(folder) == (first, False)
    monkeypatch.setattr(load_trt("tensorrt-rtx"), "__version__", "0.9")
    monkeypatch.setattr(trt_module, "_check_same_version", lambda *_: None)
    again, is_new = built(folder)
    assert is_new
    assert again.spec.version == "0.9"
    assert f"version {first.spec.version}, not 0.9" in caplog.text


@RTX
@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_damaged_engine_is_built_again(folder: Path, suffix: str) -> None:
    engine, _ = built(folder)
    path = engine.plan.with_suffix(suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError):
        read_engine(engine.plan)
    again, is_new = built(folder)
    assert is_new
    assert read_engine(again.plan).spec == engine.spec


@RTX
def test_a_changed_graph_is_refused_before_anything_is_built(folder: Path) -> None:
    before = built(folder)[0].spec
    path = folder / "model.fp16.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        built(folder)
    write_contract(folder, read_bundle_unchecked(folder))  # another graph, said to be the bundle's
    now = dataclasses.replace(before, model_sha256=model_hash(read_bundle(folder), "fp16"))
    (difference,) = differences(before, now)
    assert difference.startswith("model_sha256 ")


def read_bundle_unchecked(folder: Path) -> Any:
    document = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    for name in ("format_version", "defaults", "files", "checksum"):
        document.pop(name)
    from mimco_deploy.bundle import EncoderSpec

    return EncoderSpec(**document)


@RTX
def test_types_that_are_not_those_asked_for_are_an_error_with_the_layers(folder: Path) -> None:
    """The fp32 graph under fp16's name: what other exporters ship with a warning."""
    shutil.copyfile(folder / "model.onnx", folder / "model.fp16.onnx")
    write_contract(folder, read_bundle_unchecked(folder))
    with pytest.raises(EngineError, match=r"asked for fp16, but \S+ is FLOAT, .* and \d+ more; expected HALF"):
        built(folder)
    assert not list((folder / "engines").glob("*"))


@RTX
def test_a_graph_that_tensorrt_cannot_read_is_told_with_its_reason(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    transposed = next(node for node in model.graph.node if node.op_type == "Cast")
    transposed.op_type = "NoSuchOperator"
    del transposed.attribute[:]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    write_contract(folder, read_bundle_unchecked(folder))
    with pytest.raises(EngineError, match=r"cannot read the graph: .*NoSuchOperator"):
        built(folder, dataclasses.replace(AHEAD, precision="fp32"))


@RTX
def test_gpus_that_cannot_be_built_for_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"compute capability 33; expected one that .* supports: 75, "):
        built(folder, dataclasses.replace(AHEAD, compute_capabilities=(33,)))
    monkeypatch.setattr(to_tensorrt, "gpu_here", lambda: Gpu("NVIDIA H200", 90))  # what it said there, after building
    with pytest.raises(ConfigError, match=r"compute capability 90 of NVIDIA H200; expected one that .* supports: 75, "):
        built(folder, dataclasses.replace(AHEAD, compute_capabilities=()))
    monkeypatch.setattr(to_tensorrt, "gpu_here", lambda: None)
    with pytest.raises(ConfigError, match=r"no GPU to build for; expected --compute-capability, such as 89,120"):
        built(folder, dataclasses.replace(AHEAD, compute_capabilities=()))


@RTX
def test_what_differs_by_flavour_is_in_the_plan_of_the_build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt, bundle = load_trt("tensorrt-rtx"), read_bundle(folder)
    monkeypatch.setattr(to_tensorrt, "gpu_here", lambda: Gpu("NVIDIA L4", 89))
    here = plan_engine(trt, "tensorrt", bundle, EngineOptions(profile=(1, 4, 8)))
    assert (here.gpu, here.compute_capabilities) == ("NVIDIA L4", (89,))
    ahead = plan_engine(trt, "tensorrt-rtx", bundle, AHEAD)
    assert (ahead.gpu, ahead.compute_capabilities) == ("", (89, 120))
    with pytest.raises(ConfigError, match="expected --format tensorrt-rtx"):
        plan_engine(trt, "tensorrt", bundle, AHEAD)


@pytest.mark.parametrize("profile", [(0, 1, 2), (4, 2, 8), (1, 9, 8)])
def test_a_profile_out_of_order_is_refused(profile: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="largest batch"):
        EngineOptions(profile=profile)


def test_int8_is_no_engine() -> None:
    with pytest.raises(ConfigError, match="an engine in int8; expected --precision fp32 or fp16 or bf16"):
        EngineOptions(precision="int8")


@RTX
def test_the_command_builds_and_says_so(folder: Path, tmp_path: Path) -> None:
    options = ("--format", "tensorrt-rtx", "--compute-capability", "89", "--profile", "1,2,4", "--output", folder)
    done = export(*options, "--json", workspace=tmp_path / "ws")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["built"], document["precision"], document["compute_capabilities"]) == (True, "fp16", [89])
    assert document["layers"]["SOFTMAX FLOAT"] == 2
    assert "up to date" in export(*options, workspace=tmp_path / "ws").stdout


def test_triton_gets_a_plan_and_what_it_takes(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "a.plan").write_bytes(b"a plan")
    model = write_repository(tmp_path / "repository", read_bundle(vit), tmp_path / "a.plan", 4)
    assert (model / "1/model.plan").read_bytes() == b"a plan"
    config = (model / "config.pbtxt").read_text(encoding="utf-8")
    assert 'platform: "tensorrt_plan"\nmax_batch_size: 4\n' in config
    assert 'input [ { name: "image" data_type: TYPE_UINT8 dims: [ 64, 64, 3 ] } ]' in config


@RTX
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # timing caches do nothing there
def test_an_engine_built_on_a_gpu_counts_only_once_it_ran(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's own flavour, with the library for RTX and a stand-in for the GPU."""
    trt, bundle = load_trt("tensorrt-rtx"), read_bundle(folder)
    monkeypatch.setattr(to_tensorrt, "gpu_here", lambda: Gpu("NVIDIA L4", 89))
    spec = plan_engine(trt, "tensorrt", bundle, EngineOptions(profile=(1, 4, 8)))
    done: list[str] = []

    class Encoder:
        def __init__(self, _: object, engine: Engine, *__: object) -> None:
            assert engine.plan.is_file()
            assert not engine.plan.with_suffix(".json").exists()

        def check_types(self) -> None:
            done.append("types")

        def prove(self) -> None:
            done.append("proved")
            if done.count("proved") == 1:
                raise BundleError("it is not what its golden embeddings say")

    monkeypatch.setattr(to_tensorrt, "TensorRTEncoder", Encoder)
    with pytest.raises(BundleError, match="golden"):
        ensure_engine(trt, bundle, spec)
    assert list((folder / "engines").glob("*.json")) == []
    engine, is_new = ensure_engine(trt, bundle, spec)
    assert is_new
    assert done == ["types", "proved", "types", "proved"]
    assert read_engine(engine.plan).spec == spec
    assert ensure_engine(trt, bundle, spec) == (engine, False)
    assert done == ["types", "proved", "types", "proved"]


class FakeConfig:
    """Keeps to what the bindings say of timing caches."""

    def __init__(self, fits: bool) -> None:
        self.fits = fits
        self.cache: Any = None

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        taken = self.fits or not cache
        self.cache = cache if taken else self.cache
        return taken


def test_timings_of_another_gpu_are_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = engine_spec(gpu="NVIDIA L4")
    path = to_tensorrt._use_timing_cache(FakeConfig(fits=True), read_bundle(folder), spec)
    assert path.name == "timing-11.4.0-nvidia-l4.cache"
    path.parent.mkdir()
    path.write_bytes(b"measured")
    for fits, cache in ((True, b"measured"), (False, b"")):
        config = FakeConfig(fits)
        assert to_tensorrt._use_timing_cache(config, read_bundle(folder), spec) == path
        assert config.cache == cache
    assert "is of another GPU or driver: measuring anew" in caplog.text


def engine_spec(**changes: Any) -> EngineSpec:
    fields: dict[str, Any] = {
        **{"flavour": "tensorrt", "version": "11.4.0", "model_sha256": "a" * 64, "precision": "fp16"},
        **{"min_batch": 1, "opt_batch": 4, "max_batch": 8, "workspace_mib": 0, "settings": "", "platform": ""},
        **{"gpu": "", "compute_capabilities": (89,)},
    }
    return EngineSpec(**{**fields, **changes})


def test_the_command_of_an_engine_builds_that_engine(tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    spec = engine_spec(workspace_mib=512, flavour="tensorrt-rtx", compute_capabilities=(89, 120))
    words = shlex.split(spec.command(folder))
    assert words[:2] == ["mimco", "export"]
    assert words[2:] == [
        *("--format", "tensorrt-rtx", "--precision", "fp16", "--profile", "1,4,8", "--workspace-mib", "512"),
        *("--compute-capability", "89,120", "--output", str(folder)),
    ]
    with pytest.raises(EngineError) as raised:  # whose sidecar is gone: its name says as much
        read_engine(folder / "engines" / f"{spec.name}.plan")
    assert shlex.split(raised.value.command) == [word for word in words if word not in ("--workspace-mib", "512")]


@RTX
def test_ctrl_c_ends_a_build_and_leaves_nothing(folder: Path) -> None:
    words = ["export", "--format", "tensorrt-rtx", "--output", str(folder), "--compute-capability", "89"]
    hook = (
        "import sys, time\n"
        "from mimco_deploy.export import to_tensorrt\n"
        "real = to_tensorrt._monitor\n"
        "def slow(trt, stop, show):\n"
        "    def told(*step):\n"
        "        print('step', flush=True); time.sleep(0.05)\n"
        "    return real(trt, stop, told)\n"
        "to_tensorrt._monitor = slow\n"
        "from mimco_deploy.cli import main\n"
        f"main({words!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", hook], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 1
    assert err.strip() == "Aborted!"
    assert list((folder / "engines").glob("*")) == []


def test_without_tensorrt_the_briefs_line_says_what_is_missing(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "onnx", "torch", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("mimco_deploy.export")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match="tensorrt cannot be imported"):
        load_trt("tensorrt")
    done = export("--format", "tensorrt", "--output", vit, workspace=tmp_path / "ws")
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert 'run: pip install "mimco-deploy[tensorrt]"' in done.output
    assert ("mimco export --format tensorrt-rtx --compute-capability 89" in done.output) == has_rtx()


def test_trtexecs_command_is_printed_without_tensorrt(vit: Path, tmp_path: Path) -> None:
    done = export("--format", "tensorrt", "--emit-trtexec", "--output", vit, workspace=tmp_path / "ws")
    assert done.exit_code == 0, done.output
    words = shlex.split(done.stdout)
    assert words[:3] == ["trtexec", f"--onnx={vit / 'model.fp16.onnx'}", "--stronglyTyped"]
    assert "--maxShapes=image:256x64x64x3" in words


def test_a_precision_that_the_bundle_has_not_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "model.bf16.onnx").unlink()
    write_contract(folder, read_bundle_unchecked(folder))
    arguments = ("--format", "tensorrt", "--emit-trtexec", "--precision", "bf16", "--output", folder)
    done = export(*arguments, workspace=tmp_path / "ws")
    assert done.exit_code == 1
    assert "has no bf16; expected --precision fp32 or fp16, or where its weights are" in done.output


def test_onnx_alone_goes_to_triton_too(vit: Path, tmp_path: Path) -> None:
    source = vit.parent / "timm"
    arguments = ("--format", "onnx", "--model", source, "--output", tmp_path / "e", "--triton", tmp_path / "r")
    done = export(*arguments, workspace=tmp_path / "ws")
    assert done.exit_code == 0, done.output
    model = onnx.load(tmp_path / "r/mimco_encoder/1/model.onnx")
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert 'platform: "onnxruntime_onnx"' in (tmp_path / "r/mimco_encoder/config.pbtxt").read_text(encoding="utf-8")


def test_a_gpu_is_told_by_cuda_which_counts_as_a_program_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name=b"NVIDIA A100\0\0", major=8, minor=0)
    cuda = SimpleNamespace(cudaGetDevice=lambda: (0, 1))
    cuda.cudaGetDeviceProperties = lambda which: (which - 1, properties)
    monkeypatch.setattr(trt_module, "load_cuda", lambda: cuda)
    assert gpu_here() == Gpu("NVIDIA A100", 80)
    cuda.cudaGetDevice = lambda: (100, None)
    assert gpu_here() is None


def test_without_cuda_python_a_gpu_is_told_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed() -> Any:
        raise MissingExtraError("no cuda-python")

    monkeypatch.setattr(trt_module, "load_cuda", not_installed)
    done = subprocess.CompletedProcess[str]([], 0, "NVIDIA GeForce RTX 4090, 8.9\nNVIDIA L4, 8.9\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert gpu_here() == Gpu("NVIDIA GeForce RTX 4090", 89)

    def missing(*_: object, **__: object) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert gpu_here() is None


def told(*layers: tuple[str, str, str]) -> str:
    """What an engine inspector says in detail."""
    listed = [{"Name": name, "LayerType": kind, "Outputs": [{"Format/Datatype": text}]} for name, kind, text in layers]
    return json.dumps({"Layers": listed, "Bindings": ["image", "embedding"]})


def test_types_of_a_built_engine_are_read_layer_by_layer() -> None:
    sound = told(("block", "Myelin", "Row major linear FP16 format"), ("fc", "gemm", "FP16"), ("norm", "kgen", "FP32"))
    check_built_types(sound, "fp16")
    with pytest.raises(EngineError, match=r"asked for fp16, but in the built engine fc_half is fp32; expected HALF"):
        check_built_types(told(("fc_half", "gemm", "FP32"), ("cast", "reformat", "FP16")), "fp16")
    with pytest.raises(EngineError, match=r"asked for bf16, but in the built engine none of 2 layers is"):
        check_built_types(told(("a BF16 name", "kgen", "FP32"), ("b", "kgen", "Half")), "bf16")


def test_a_product_goes_by_what_it_multiplies() -> None:
    """A conversion that follows may be part of it."""

    def layers(taken: str, given: str) -> str:
        product = {
            "Name": "qk",
            "LayerType": "gemm",
            "Inputs": [{"Format/Datatype": taken}, {"Format/Datatype": "Int32"}],
            "Outputs": [{"Format/Datatype": given}],
        }
        other = {"Name": "norm", "LayerType": "kgen", "Outputs": [{"Format/Datatype": "Half"}]}
        return json.dumps({"Layers": [product, other]})

    check_built_types(layers("Half", "Float"), "fp16")
    with pytest.raises(EngineError, match="qk is float"):
        check_built_types(layers("Float", "Half"), "fp16")


def test_a_library_of_another_version_than_its_bindings_is_not_loaded() -> None:
    trt_module._check_same_version("1.7.1.116", ["1", "1.7.1"])
    trt_module._check_same_version("1.7.1.116", [])
    with pytest.raises(ImportError, match=r"its bindings are of 1\.7\.1\.116 and its libraries of 1\.8\.0"):
        trt_module._check_same_version("1.7.1.116", ["1", "1.8.0"])


@RTX
def test_a_bundle_that_is_not_the_students_is_not_replaced_by_it(folder: Path, tmp_path: Path) -> None:
    (folder / "model.bf16.onnx").unlink()
    write_contract(folder, read_bundle_unchecked(folder))
    student = tmp_path / "ws/stage2/last"
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}", encoding="utf-8")
    arguments = ("--format", "tensorrt-rtx", "--compute-capability", "89", "--precision", "bf16", "--output", folder)
    done = export(*arguments, workspace=tmp_path / "ws")
    assert done.exit_code == 1
    assert "has no bf16; expected --precision fp32 or fp16, or where its weights are" in done.output
    assert read_bundle(folder).spec.weights_source == "timm"


def test_a_default_that_was_picked_makes_no_bundle_newer_than_its_student(folder: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(read_bundle_unchecked(folder), weights_source="mimco stage2, step 4 of 4")
    write_contract(folder, spec)
    student = tmp_path / "last"
    student.mkdir()
    (student / "config.json").write_text("{}", encoding="utf-8")
    assert not bundle_is_current(folder, ["fp16"], student)
    write_contract(folder, spec, {"cpu": "fp16"})
    assert not bundle_is_current(folder, ["fp16"], student)
    (folder / "model.onnx").touch()
    assert bundle_is_current(folder, ["fp16"], student)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        pytest.param(
            ("--format", "tensorrt-rtx", "--compute-capability", "999"), 1, "compute capability 999", marks=RTX
        ),
        (("--format", "tensorrt-rtx", "--workspace-mib", "99999999999999"), 1, "a workspace of"),
        (("--format", "tensorrt-rtx", "--profile", "1,1,999999999999999999999999"), 1, "a largest batch of"),
        (("--format", "tensorrt-rtx", "--compute-capability", "89", "--triton", "t"), 2, "--triton serves plans of"),
        (("--format", "tensorrt", "--profile", "2,4,8", "--triton", "t"), 2, "whose least batch is 1"),
        (("--format", "tensorrt-rtx", "--compute-capability", "²"), 2, "numbers with commas"),
        (("--format", "tensorrt-rtx", "--emit-trtexec"), 2, "goes with --format tensorrt"),
        (("--format", "onnx", "--compute-capability", "89"), 2, "Options of engines"),
        (("--format", "onnx", "--output", "e.zip", "--triton", "t"), 2, "takes a folder"),
        (("--format", "onnx", "--profile", "1,32,256"), 2, "or with --triton"),
        (("--format", "onnx", "--profile", "9,2,4", "--triton", "t"), 1, "profile 9,2,4; expected 1 ≤ least"),
        (("--format", "tensorrt", "--output", "e.zip", "--model", "m"), 1, "an engine in the archive e.zip"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_first(
    tmp_path: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = export(*arguments, workspace=tmp_path / "ws")
    assert (done.exit_code, told in done.output) == (code, True), done.output


def test_triton_keeps_other_versions_and_knows_the_width_of_patches(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "r/mimco_encoder/7").mkdir(parents=True)
    (tmp_path / "r/mimco_encoder/config.pbtxt").write_text("", encoding="utf-8")
    source = ("--model", vit.parent / "timm", "--with-patches")
    done = export(
        "--format", "onnx", *source, "--output", tmp_path / "e", "--triton", tmp_path / "r", workspace=tmp_path
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r/mimco_encoder/7").is_dir()
    assert 'name: "patches" data_type: TYPE_FP32 dims: [ 16, 96 ]' in (
        tmp_path / "r/mimco_encoder/config.pbtxt"
    ).read_text(encoding="utf-8")
    (tmp_path / "other/mimco_encoder").mkdir(parents=True)
    (tmp_path / "other/mimco_encoder/mine").write_text("mine", encoding="utf-8")
    refused = export(
        "--format", "onnx", *source, "--output", tmp_path / "e", "--triton", tmp_path / "other", workspace=tmp_path
    )
    assert "is no model of Triton's" in refused.output
