"""fp16, bf16 and int8: what the graphs hold, and that no wrong one passes."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, numpy_helper
from timm.models import save_for_hf

from mimco_deploy.bundle import MODEL_FILES, Bundle, Precision, read_bundle, write_contract
from mimco_deploy.drawings import draw_gallery
from mimco_deploy.errors import BundleError, ConfigError, ParityError
from mimco_deploy.export import pipeline
from mimco_deploy.export.half import IN_FP32, PRODUCTS, TYPES, Half, in_fp32, to_half
from mimco_deploy.export.parity import Pictures, check_half_without_gpu, check_parity, read_parity
from mimco_deploy.export.pipeline import ExportOptions, export_encoder
from mimco_deploy.export.quantize import quantize
from mimco_deploy.export.student import EncoderModule, from_model
from mimco_deploy.export.to_onnx import convert
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.encoders.onnx import OnnxEncoder
from mimco_deploy.serving.sample import draw_pictures
from mimco_deploy.training.backbone import Geometry
from tests.parity.test_export import dropped_l2

HALVES: list[Half] = ["fp16", "bf16"]
ARGS: dict[str, Any] = {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw_gallery(folder, 8, 96)
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT large enough for int8 to be faster, whose embeddings differ from picture to picture."""
    folder = tmp_path_factory.mktemp("weights") / "timm"
    torch.manual_seed(0)
    args: dict[str, Any] = {"img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3.0
    save_for_hf(model, str(folder), model_args=args)
    return folder


@pytest.fixture(scope="module")
def everything(weights: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("bundle") / "encoder"
    options = ExportOptions(precisions=("fp16", "bf16", "int8"), check=photos)
    exported = export_encoder(from_model(str(weights)), target, options)
    assert exported.refused == ()
    return read_bundle(target)


@pytest.fixture
def bundle(everything: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(everything.path, tmp_path / "encoder")
    return dataclasses.replace(everything, path=tmp_path / "encoder")


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def test_all_four_are_there_with_their_proofs(everything: Bundle) -> None:
    assert everything.precisions == ("fp32", "fp16", "bf16", "int8")
    proofs = read_parity(everything.path / "parity.json")
    assert [proof.precision for proof in proofs] == list(everything.precisions)
    for proof in proofs:
        assert proof.pictures_from == "folder"
        assert proof.neighbours.overlap is not None
        assert proof.breaches() == []
    assert (proofs[3].speed_against_fp32 or 0.0) > 1.0
    sizes = {precision: everything.model(precision).stat().st_size for precision in everything.precisions}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["int8"] < 0.5 * sizes["fp32"]


@pytest.mark.parametrize("precision", HALVES)
def test_every_type_is_in_the_graph(everything: Bundle, precision: Half) -> None:
    model = onnx.load(everything.model(precision))
    types = types_of(model)
    half = TYPES[precision]
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        kinds = {types[name] for name in [*node.input, *node.output] if types.get(name) in (TensorProto.FLOAT, half)}
        if node.op_type in PRODUCTS:
            assert kinds == {half}, node.op_type
        elif node.op_type in IN_FP32:
            assert kinds == {TensorProto.FLOAT}, node.op_type
        elif node.op_type != "Cast":
            assert len(kinds) <= 1, f"{node.op_type} mixes types"
        seen[node.op_type] += 1
    assert seen["Softmax"] == 4
    assert seen["LayerNormalization"] == 9
    assert seen["ReduceL2"] == 1
    assert [types[output.name] for output in model.graph.output] == [TensorProto.FLOAT]


@pytest.mark.parametrize("precision", HALVES)
def test_rounding_in_fp32_is_rounding_to_the_type(precision: Half) -> None:
    """One product, by hand: inputs and output rounded, the sum exact."""
    weight = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    import onnxruntime

    emulated = in_fp32(to_half(model, precision)).SerializeToString()
    (found,) = onnxruntime.InferenceSession(emulated, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    rounded = torch.from_numpy(x).to(kind).float() @ torch.from_numpy(weight).to(kind).float()
    np.testing.assert_array_equal(found, rounded.to(kind).float().numpy())
    assert np.abs(found - x @ weight).max() > 0


@pytest.mark.parametrize("precision", HALVES)
def test_an_input_that_is_fp32_alone_stays_so(precision: Half) -> None:
    """The scales of a Resize, in a network that brings maps to one size."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)
    scales = np.array([1, 1, 2, 2], np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w"], ["map"]),
            onnx.helper.make_node("Resize", ["map", "", "scales"], ["y"], mode="nearest"),
        ],
        "two",
        [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 8, 8])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scales, "scales")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    half = to_half(model, precision)
    types = types_of(half)
    (resize,) = (node for node in half.graph.node if node.op_type == "Resize")
    assert [types[resize.input[number]] for number in (0, 2)] == [TYPES[precision], TensorProto.FLOAT]
    import onnxruntime

    session = onnxruntime.InferenceSession(in_fp32(half).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.ones((1, 3, 4, 4), np.float32)})
    np.testing.assert_allclose(found[0, :, 0, 0], weight.sum(axis=(1, 2, 3)), rtol=0.05, atol=0.02)


def overflowing(folder: Path) -> str:
    """A product beyond fp16, of weights within it, which the last norm brings back."""
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **ARGS)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(3e5)
    save_for_hf(model, str(folder), model_args=ARGS)
    return str(folder)


def test_an_activation_beyond_fp16_is_refused_on_a_cpu_too(tmp_path: Path) -> None:
    options = ExportOptions(precisions=("fp16", "bf16"))
    exported = export_encoder(from_model(overflowing(tmp_path / "timm")), tmp_path / "encoder", options)
    assert [artefact.precision for artefact in exported.artefacts] == ["fp32", "bf16"]
    (error,) = exported.refused
    assert "the fp16 graph is not what torch computes" in str(error)
    assert not (tmp_path / "encoder/model.fp16.onnx").exists()
    assert load_encoder(tmp_path / "encoder").precision == "fp32"


def perturbed(model: onnx.ModelProto) -> None:
    """One weight matrix of a block, by its own spread."""
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = numpy_helper.to_array(tensor)
    wide = array.astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(array.shape) * max(1.0, float(wide.std()))
    tensor.raw_data = (wide + noise).astype(array.dtype).tobytes()


def swapped_normalisation(model: onnx.ModelProto) -> None:
    """Red and blue, or another scale of the input."""
    changed = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.size == 3 and array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array * 0 + 0.9), tensor.name))
            changed += 1
    assert changed


@pytest.mark.parametrize("damage", [perturbed, swapped_normalisation, dropped_l2])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_damaged_graph_passes_in_no_precision(bundle: Bundle, precision: Precision, damage: Any) -> None:
    model = onnx.load(bundle.model(precision))
    damage(model)
    bundle.model(precision).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="SHA-256"):
        read_bundle(bundle.path)
    write_contract(bundle.path, bundle.spec)  # as if the exporter had been wrong: the hashes agree
    pictures = draw_pictures(40, 64, *Geometry(), seed=5)
    references = Pictures("drawn", pictures, OnnxEncoder(bundle, "fp16").embed(pictures))
    if precision == "fp16":
        references = Pictures("drawn", pictures, OnnxEncoder(bundle, "fp32").embed(pictures))

    def check() -> None:
        if precision == "bf16":
            check_half_without_gpu(bundle, precision, bundle.golden, references)
        else:
            check_parity(OnnxEncoder(bundle, precision), bundle.golden, references)

    with pytest.raises(ParityError, match=f"the {precision} graph is not what torch computes"):
        check()
    if precision != "bf16":
        with pytest.raises(BundleError, match="is not what its golden embeddings say"):
            load_encoder(bundle.path, "cpu", precision=precision)


def test_bf16_on_a_cpu_is_refused_by_name(everything: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no bf16 on CPUs; expected fp32, fp16 or int8"):
        load_encoder(everything.path, "cpu", precision="bf16")


@pytest.mark.parametrize("way", ["dynamic", "static"])
def test_int8_is_made_in_a_folder_whose_name_is_no_text(everything: Bundle, tmp_path: Path, way: str) -> None:
    folder = tmp_path / os.fsdecode(b"b\xff")
    folder.mkdir()
    model = Path(shutil.copyfile(everything.model("fp32"), folder / "model.onnx"))
    calibration = everything.golden.images if way == "static" else None
    assert quantize(model, tmp_path / "made.onnx", calibration) == way


def test_int8_that_is_no_faster_does_not_ship(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_speed_ratio", lambda *_: 0.97)
    options = ExportOptions(precisions=("int8",), check=photos)
    exported = export_encoder(from_model(str(weights)), tmp_path / "encoder", options)
    (error,) = exported.refused
    assert str(error).count("0.97 times as fast as fp32, top-10 overlap") == 2  # dynamic and static, two numbers each
    assert read_bundle(tmp_path / "encoder").precisions == ("fp32",)


def test_what_was_refused_just_now_is_not_taken_from_the_bundle_before(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, source = tmp_path / "encoder", from_model(str(weights))
    monkeypatch.setattr(pipeline, "_speed_ratio", lambda *_: 1.5)
    export_encoder(source, target, ExportOptions(precisions=("int8",), check=photos))
    write_contract(target, read_bundle(target).spec, {"cpu": "int8"})
    monkeypatch.setattr(pipeline, "_speed_ratio", lambda *_: 0.5)
    exported = export_encoder(source, target, ExportOptions(precisions=("int8", "fp16"), check=photos))
    assert len(exported.refused) == 1
    bundle = read_bundle(target)
    assert bundle.precisions == ("fp32", "fp16")
    assert dict(bundle.defaults) == {}
    with pytest.raises(ParityError, match="int8 is not worth it"):
        exported.check()


def test_other_words_on_the_weights_cost_no_precision(weights: Path, tmp_path: Path) -> None:
    target, source = tmp_path / "encoder", from_model(str(weights))
    export_encoder(source, target, ExportOptions(precisions=("fp16",)))
    export_encoder(source, target, ExportOptions(licence="MIT"))
    bundle = read_bundle(target)
    assert (bundle.precisions, bundle.spec.licence) == (("fp32", "fp16"), "MIT")


@pytest.mark.parametrize("place", ["quantize", "to_half"])
def test_a_graph_that_cannot_be_had_costs_the_others_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(pipeline, place, broken)
    monkeypatch.setattr(pipeline, "_speed_ratio", lambda *_: 1.5)
    exported = export_encoder(
        from_model(str(weights)), tmp_path / "encoder", ExportOptions(precisions=("fp16", "int8"))
    )
    (error,) = exported.refused
    assert "cannot be made or does not run: no such operator" in str(error)
    assert "and more" not in str(error)
    other = "fp16" if place == "quantize" else "int8"
    assert read_bundle(tmp_path / "encoder").precisions == ("fp32", other)


def test_on_a_gpu_a_half_graph_that_does_not_start_there_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime would run it on the CPU, in fp32."""
    asked: list[Any] = []

    class Session(OnnxEncoder):
        def __init__(
            self, bundle: Bundle, precision: Any = None, device: Any = "auto", *, strict: bool = False
        ) -> None:
            asked.append((precision, device, strict))
            super().__init__(bundle, precision, device, strict=strict)

        @property
        def provider(self) -> str:
            return "CUDAExecutionProvider"

    monkeypatch.setattr(pipeline, "OnnxEncoder", Session)
    exported = export_encoder(from_model(str(weights)), tmp_path / "encoder", ExportOptions(precisions=("fp16",)))
    assert ("fp16", "cuda", True) in asked
    assert "fp16 cannot be made or does not run" in str(exported.refused[0])


def test_pictures_too_few_to_prove_neighbours_on_are_refused(weights: Path, photos: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))[:20] or sorted(photos.rglob("*.png"))[:20]):
        shutil.copyfile(path, few / f"{number}{path.suffix}")
    with pytest.raises(ConfigError, match=r"20 pictures in .*few; expected at least 21"):
        export_encoder(from_model(str(weights)), tmp_path / "encoder", ExportOptions(check=few))


def test_weights_beside_the_graph_are_not_looked_for(bundle: Bundle) -> None:
    """They would be no part of what its hash says."""
    model = onnx.load(bundle.model("fp32"))
    onnx.save(model, bundle.model("fp32"), save_as_external_data=True, location="weights.bin", size_threshold=0)
    write_contract(bundle.path, bundle.spec)
    with pytest.raises(BundleError, match="cannot be loaded"):
        load_encoder(bundle.path, "cpu")


def test_the_faster_way_of_two_ships(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = iter([2.0, 3.0])
    monkeypatch.setattr(pipeline, "_speed_ratio", lambda *_: next(ratios))
    options = ExportOptions(precisions=("int8",), check=photos)
    exported = export_encoder(from_model(str(weights)), tmp_path / "encoder", options)
    assert exported.artefacts[-1].speed_against_fp32 == 3.0
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "encoder/model.int8.onnx").graph.node)
    assert operators["QuantizeLinear"] > 0  # static; the dynamic way has DynamicQuantizeLinear
    assert operators["DynamicQuantizeLinear"] == 0


def test_another_precision_is_added_to_the_bundle_that_is_there(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    export_encoder(from_model(str(weights)), target, ExportOptions(precisions=("fp16",)))
    write_contract(target, read_bundle(target).spec, {"cuda": "fp16"})
    before = (target / MODEL_FILES["fp16"]).read_bytes()
    exported = export_encoder(from_model(str(weights)), target, ExportOptions(precisions=("bf16",)))
    assert {artefact.precision for artefact in exported.artefacts} == {"fp32", "fp16", "bf16"}
    bundle = read_bundle(target)
    assert bundle.precisions == ("fp32", "fp16", "bf16")
    assert bundle.model("fp16").read_bytes() == before
    assert dict(bundle.defaults) == {"cuda": "fp16"}


def test_a_bundle_of_another_encoder_is_replaced_in_full(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    export_encoder(from_model(overflowing(tmp_path / "other")), target, ExportOptions(precisions=("bf16",)))
    export_encoder(from_model(str(weights)), target)
    assert read_bundle(target).precisions == ("fp32",)
    assert sorted(path.name for path in target.iterdir()) == [
        *("MODEL_CARD.md", "encoder.json", "golden.npz", "model.onnx", "parity.json"),
    ]


def test_an_archive_is_written_as_one_file(weights: Path, tmp_path: Path) -> None:
    export_encoder(from_model(str(weights)), tmp_path / "encoder.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.zip"]
    assert load_encoder(tmp_path / "encoder.zip").spec.architecture == "vit_tiny_patch16_224"


def test_l2_stays_in_fp32_where_half_features_reach_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_for_hf(timm.create_model("mobilenetv3_small_050", num_classes=0), str(tmp_path / "timm"))
    source = from_model(str(tmp_path / "timm"))
    model = to_half(convert(EncoderModule(source.backbone, source.pooling)), "fp16")
    types = types_of(model)
    (division,) = (node for node in model.graph.node if "embedding" in node.output)
    assert division.op_type == "Div"
    assert {types[name] for name in division.input} == {TensorProto.FLOAT}
