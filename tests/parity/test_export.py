"""The proof of an export: passes for what is right, and cannot be passed by what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from mimco_deploy.bundle import MODEL_FILES, Bundle, read_bundle, write_contract
from mimco_deploy.cli import main
from mimco_deploy.errors import BundleError, CheckpointError, ConfigError, MimcoError, ParityError
from mimco_deploy.export import pipeline, student
from mimco_deploy.export.parity import Pictures, check_parity, read_parity, write_parity
from mimco_deploy.export.pipeline import ExportOptions, export_encoder
from mimco_deploy.export.student import EncoderModule, from_checkpoint, from_model
from mimco_deploy.export.to_onnx import convert
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.encoders.onnx import OnnxEncoder
from mimco_deploy.training.backbone import Backbone, Geometry
from mimco_deploy.training.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from mimco_deploy.training.checkpoint import load_encoder as load_trained
from mimco_deploy.training.config import BackboneConfig, OptimConfig, RunConfig, Stage1Config, Stage2Config
from mimco_deploy.training.optim import build_optimizer

BACKBONE = BackboneConfig(
    name="vit_tiny_patch16_224", image_size_px=32, patch_size_px=8, embed_dim=24, depth=(2,), num_heads=(3,)
)
OPTIM = OptimConfig(base_lr=1e-3, weight_decay=0.05, decay="weights")


class _Method(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Backbone(BACKBONE)


def untrained(folder: Path, config: Stage1Config | Stage2Config) -> Checkpoint:
    torch.manual_seed(0)
    method = _Method()
    save_checkpoint(folder, method, build_optimizer(method, OPTIM), config, step=0, total_steps=1, corpus="none")
    return read_checkpoint(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    run = RunConfig(epochs=1, global_batch_size=2)
    config = Stage2Config(backbone=BACKBONE, run=run, optim=OPTIM, teacher="a-teacher")
    return untrained(tmp_path_factory.mktemp("run") / "last", config)


@pytest.fixture
def bundle(checkpoint: Checkpoint, tmp_path: Path) -> Bundle:
    export_encoder(from_checkpoint(checkpoint), tmp_path / "encoder")
    return read_bundle(tmp_path / "encoder")


def test_report_covers_the_batch_sizes_and_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (proof,) = export_encoder(from_checkpoint(checkpoint), tmp_path / "encoder").artefacts
    assert [batch.batch_size for batch in proof.batches] == [1, 2, 5]
    assert (proof.pictures_from, proof.neighbours.pictures) == ("drawn", 48)
    assert proof.max_abs < 1e-5
    assert read_parity(tmp_path / "encoder/parity.json") == (proof,)


def test_any_batch_size_gives_what_torch_gives(checkpoint: Checkpoint, bundle: Bundle) -> None:
    backbone, pooling = load_trained(checkpoint)
    module = EncoderModule(backbone, pooling)
    images = np.random.default_rng(0).integers(0, 256, (33, 32, 32, 3), dtype=np.uint8)
    encoder = load_encoder(bundle.path)
    with torch.inference_mode():
        expected = module(torch.from_numpy(images)).numpy()
    for count in (1, 2, 5, 33):
        np.testing.assert_allclose(encoder.embed(images[:count]), expected[:count], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1.0, atol=1e-6)


def test_a_stage1_run_exports_its_teacher_by_the_cls_token(tmp_path: Path) -> None:
    config = Stage1Config(backbone=BACKBONE, run=RunConfig(epochs=1, global_batch_size=2), optim=OPTIM)
    export_encoder(from_checkpoint(untrained(tmp_path / "last", config)), tmp_path / "encoder")
    assert read_bundle(tmp_path / "encoder").spec.pooling == "cls"


def test_what_lies_in_a_checkpoint_is_exported_from_the_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its `timm/` tells neither the teacher, nor which licence comes from it, nor what the loss trained."""
    with pytest.raises(CheckpointError, match=r"lies in a checkpoint of mimco's; expected --checkpoint .*last"):
        from_model(str(checkpoint.path / "timm"))
    shutil.copytree(checkpoint.path / "timm", tmp_path / "mine")
    assert from_model(str(tmp_path / "mine")).teacher == "none"


def test_fingerprint_follows_weights_pooling_and_geometry(checkpoint: Checkpoint) -> None:
    backbone, _ = load_trained(checkpoint)
    prints = {student.fingerprint(EncoderModule(backbone, pooling)) for pooling in ("mean", "cls")}
    for geometry in (Geometry(1.0), Geometry(interpolation="bilinear")):
        backbone.geometry = geometry
        prints.add(student.fingerprint(EncoderModule(backbone, "mean")))
    backbone.geometry = Geometry()
    with torch.no_grad():
        backbone.body.cls_token += 1e-3
    prints.add(student.fingerprint(EncoderModule(backbone, "mean")))
    assert len(prints) == 5


def changed_weight(model: onnx.ModelProto) -> None:
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = numpy_helper.to_array(largest).copy()
    array.flat[0] += 1.0
    largest.CopyFrom(numpy_helper.from_array(array, largest.name))


def swapped_normalisation(model: onnx.ModelProto) -> None:
    swapped = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.size == 3 and array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.flip(array)), tensor.name))
            swapped += 1
    assert swapped, "the graph holds the channel statistics"


def dropped_l2(model: onnx.ModelProto) -> None:
    (division,) = (node for node in model.graph.node if "embedding" in node.output)
    assert division.op_type == "Div"
    identity = onnx.helper.make_node("Identity", [division.input[0]], ["embedding"])
    model.graph.node.remove(division)
    model.graph.node.append(identity)


@pytest.mark.parametrize("damage", [changed_weight, swapped_normalisation, dropped_l2])
def test_a_damaged_graph_is_refused_at_export_and_at_load(bundle: Bundle, damage: object) -> None:
    assert callable(damage)
    model = onnx.load(bundle.model("fp32"))
    damage(model)
    (bundle.path / MODEL_FILES["fp32"]).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="SHA-256"):
        load_encoder(bundle.path)

    write_contract(bundle.path, bundle.spec)  # as if the exporter itself had been wrong: the hashes agree
    damaged = OnnxEncoder(read_bundle(bundle.path))
    pictures = Pictures("drawn", bundle.golden.images, bundle.golden.embeddings)
    with pytest.raises(ParityError, match="not what torch computes"):
        check_parity(damaged, bundle.golden, pictures)
    with pytest.raises(BundleError, match="golden"):
        load_encoder(bundle.path)


def test_an_export_that_fails_its_proof_leaves_the_old_bundle(
    checkpoint: Checkpoint, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle.path / "encoder.json").read_bytes()

    def wrong(module: EncoderModule) -> onnx.ModelProto:
        return convert(EncoderModule(module.backbone, "cls"))  # another pooling than the golden embeddings have

    monkeypatch.setattr(pipeline, "convert", wrong)
    with pytest.raises(MimcoError, match="not what torch computes"):
        export_encoder(from_checkpoint(checkpoint), bundle.path)
    assert (bundle.path / "encoder.json").read_bytes() == before
    assert load_encoder(bundle.path).spec == bundle.spec
    assert sorted(path.name for path in bundle.path.parent.iterdir()) == [bundle.path.name]


EXPORTS = """
import sys
from pathlib import Path
from mimco_deploy.atomic import only_writer
from mimco_deploy.errors import ConfigError
with only_writer(Path(sys.argv[1]), ConfigError("held")):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["encoder", "encoder.zip"])
def test_a_second_export_to_one_place_is_refused(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", EXPORTS, str(tmp_path / name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"another export writes .*{name}; expected one at a time"):
            export_encoder(from_checkpoint(checkpoint), tmp_path / name)
        other.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_was_not_proved_is_not_in_the_contract(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, artefacts: list[Any]) -> None:
        write_parity(path, artefacts)
        (path.parent / MODEL_FILES["bf16"]).write_bytes(b"of somebody else")

    monkeypatch.setattr(pipeline, "write_parity", write)
    export_encoder(from_checkpoint(checkpoint), tmp_path / "encoder")
    assert read_bundle(tmp_path / "encoder").precisions == ("fp32",)


@pytest.mark.parametrize("name", ["encoder", "encoder.zip"])
def test_a_link_as_output_stays_one(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    link, place = tmp_path / name, tmp_path / "disk" / name
    place.parent.mkdir()
    link.symlink_to(place)
    source = from_checkpoint(checkpoint)
    for licence in ("first", "second"):
        export_encoder(source, link, ExportOptions(licence=licence))
        assert link.readlink() == place
        assert read_bundle(place).spec.licence == licence
    assert {path.name for path in (tmp_path, place.parent) for path in path.iterdir()} == {name, "disk"}


def test_weights_that_do_not_fit_are_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    document = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    document["config"]["backbone"]["depth"] = [3]
    other = tmp_path / "last"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(document), encoding="utf-8")
    (other / "model.safetensors").write_bytes((checkpoint.path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"blocks\.2"):
        export_encoder(from_checkpoint(read_checkpoint(other)), tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize("broken", range(8))
def test_a_number_that_is_none_in_any_golden_embedding_fails_the_proof(bundle: Bundle, broken: int) -> None:
    golden = bundle.golden
    found = golden.embeddings.copy()
    found[broken, 3] = np.nan

    class Encoder:
        provider, precision, spec = "stand-in", "fp32", bundle.spec

        def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            matches = (images[:, None] == golden.images[None]).all(axis=(2, 3, 4)).argmax(axis=1)
            return np.asarray(found[matches], np.float32)

    encoder: Any = Encoder()
    sound = [number for number in range(8) if number != broken]
    pictures = Pictures("drawn", golden.images[sound], golden.embeddings[sound])
    with pytest.raises(ParityError, match=r"differs by nan.*; 1 of 15 pictures by more than 1e-04"):
        check_parity(encoder, golden, pictures)


@pytest.mark.parametrize("name", ["a folder", "a file", "a.zip", "here", "above"])
def test_nothing_but_a_bundle_is_replaced(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a folder/deeper").mkdir(parents=True)
    for path in ("a folder/mine.txt", "a file", "a.zip"):
        (tmp_path / path).write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "a folder/deeper")
    target = {"here": Path(), "above": Path("..")}.get(name, tmp_path / name)
    with pytest.raises(ConfigError, match="expected a new name, or a bundle to replace"):
        export_encoder(from_checkpoint(checkpoint), target)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        *("a folder/mine.txt", "a file", "a.zip"),
    }
    assert (tmp_path / "a.zip").read_text(encoding="utf-8") == "mine"


def test_an_archive_keeps_other_precisions_and_a_folder_its_engines(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, archive, folder = from_checkpoint(checkpoint), tmp_path / "e.zip", tmp_path / "e"
    export_encoder(source, archive, ExportOptions(precisions=("fp16",)))
    export_encoder(source, archive)
    assert read_bundle(archive).precisions == ("fp32", "fp16")
    export_encoder(source, folder)
    (folder / "engines").mkdir()
    (folder / "engines/x.plan").write_bytes(b"a plan")
    export_encoder(source, folder)
    assert (folder / "engines/x.plan").read_bytes() == b"a plan"


@pytest.mark.parametrize("arguments", [("--model", ""), ("--image-size", "2049")])
def test_a_model_without_a_name_and_a_size_that_no_encoder_has_are_refused(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(main, ["export", "--format", "onnx", *arguments]).exit_code == 2


def test_patch_tokens_are_proved_too(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_encoder(from_checkpoint(checkpoint), tmp_path / "e", ExportOptions(with_patches=True))

    def wrong(module: EncoderModule) -> onnx.ModelProto:
        model = convert(module)
        (made,) = (node for node in model.graph.node if "patches" in node.output)
        made.output[list(made.output).index("patches")] = "sound"
        for node in model.graph.node:
            for number, name in enumerate(node.input):
                if name == "patches":
                    node.input[number] = "sound"
        model.graph.node.append(onnx.helper.make_node("Neg", ["sound"], ["patches"]))
        return model

    monkeypatch.setattr(pipeline, "convert", wrong)
    with pytest.raises(ParityError, match=r"patch tokens have cosine -1\.0"):
        export_encoder(from_checkpoint(checkpoint), tmp_path / "other", ExportOptions(with_patches=True))
