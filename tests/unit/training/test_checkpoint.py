"""Checkpoints: what is written is read, what is broken is named, and nothing is a pickle of objects."""

from __future__ import annotations

import json
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mimco_deploy import atomic
from mimco_deploy.errors import CheckpointError, MimcoError
from mimco_deploy.training.augment import ToInput
from mimco_deploy.training.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    TeacherSpec,
    load_encoder,
    load_strictly,
    read_checkpoint,
    save_checkpoint,
)
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.method_config import MimCoConfig, MoCoV3Config
from mimco_deploy.training.methods.mimco import MimCo
from mimco_deploy.training.methods.mocov3 import MoCoV3
from mimco_deploy.training.optim import build_optimizer
from tests.unit.training.small import BACKBONE, assert_same_state, stage1_config, stage2_config

STATE = {"step": 3, "total_steps": 6, "corpus": "c" * 64}


def mocov3_of(config: Stage1Config) -> MoCoV3Config:
    assert isinstance(config.method, MoCoV3Config)
    return config.method


def stage1_parts(seed: int = 0) -> tuple[MoCoV3, torch.optim.Optimizer, Stage1Config]:
    """A method after one step, so that the optimiser has moments."""
    config = stage1_config(Path("/photos"))
    torch.manual_seed(seed)
    method = MoCoV3(config.backbone, mocov3_of(config)).train()
    optimizer = build_optimizer(method, config.optim)
    method(torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))["loss"].backward()
    optimizer.step()
    return method, optimizer, config


@pytest.fixture
def last(tmp_path: Path) -> Path:
    method, optimizer, config = stage1_parts()
    save_checkpoint(tmp_path / "last", method, optimizer, config, **STATE)
    return tmp_path / "last"


def test_a_stage_1_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    method, optimizer, config = stage1_parts()
    save_checkpoint(tmp_path / "last", method, optimizer, config, **STATE)
    checkpoint = read_checkpoint(tmp_path / "last")
    assert checkpoint == Checkpoint(tmp_path / "last", "stage1", 3, 6, "c" * 64, config, None, None)
    assert_same_state(checkpoint.load_model(), method.state_dict())
    assert_same_state(checkpoint.load_optimizer(), optimizer.state_dict())
    again = MoCoV3(config.backbone, mocov3_of(config))
    load_strictly(again, checkpoint.load_model(), checkpoint.path)
    restored = build_optimizer(again, config.optim)
    restored.load_state_dict(checkpoint.load_optimizer())
    assert_same_state(restored.state_dict(), optimizer.state_dict())


def test_a_stage_2_checkpoint_holds_teacher_queue_and_settings(tmp_path: Path, last: Path) -> None:
    config = stage2_config(tmp_path, last, dictionaries=("intra", "queue"))
    assert isinstance(config.method, MimCoConfig)
    teacher, pooling = load_encoder(read_checkpoint(last))
    assert pooling == "cls"
    method = MimCo(config.backbone, teacher, pooling, config.mask, config.method)
    save_checkpoint(tmp_path / "student", method, build_optimizer(method, config.optim), config, **STATE)
    checkpoint = read_checkpoint(tmp_path / "student")
    assert (checkpoint.stage, checkpoint.config) == ("stage2", config)
    assert isinstance(checkpoint.config, Stage2Config)
    state = checkpoint.load_model()
    assert_same_state(state, method.state_dict())
    assert {"patch_level.queue.rows", "mask_token", "teacher.backbone.body.norm.weight"} <= state.keys()
    assert checkpoint.teacher == TeacherSpec(backbone=teacher.config, pooling="cls", licence="unstated")
    encoder, pooling = load_encoder(checkpoint)
    assert pooling == "mean"
    assert_same_state(encoder.state_dict(), method.encoder.state_dict())


def test_the_encoder_of_stage_1_is_the_online_one(tmp_path: Path) -> None:
    method, optimizer, config = stage1_parts()
    save_checkpoint(tmp_path / "last", method, optimizer, config, **STATE)
    encoder, _ = load_encoder(read_checkpoint(tmp_path / "last"))
    assert_same_state(encoder.state_dict(), method.encoder.state_dict())
    slow = method.momentum_encoder.state_dict()
    assert any(not torch.equal(slow[name], value) for name, value in encoder.state_dict().items())


def test_plain_timm_loads_the_encoder_and_gives_the_same_features(last: Path) -> None:
    ours, _ = load_encoder(read_checkpoint(last))
    theirs: Any = timm.create_model(f"local-dir:{last / 'timm'}", pretrained=True)
    torch.manual_seed(0)
    images = ToInput(BACKBONE)(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8))
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        features = ours(images)
        tokens = theirs.forward_features(images)
    assert torch.equal(tokens[:, 0], features.own)
    assert torch.equal(tokens[:, 1:], features.patches)
    assert set(theirs.state_dict()) == {name.removeprefix("body.") for name in ours.state_dict()}


def test_no_file_is_a_pickle_of_objects(last: Path) -> None:
    files = sorted(path.relative_to(last).as_posix() for path in last.rglob("*") if path.is_file())
    assert files == ["config.json", "model.safetensors", "optimizer.pt", "timm/config.json", "timm/model.safetensors"]
    state = torch.load(last / "optimizer.pt", weights_only=True)
    assert set(state) == {"state", "param_groups"}
    with zipfile.ZipFile(last / "optimizer.pt") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        named = {text for code, text, _ in pickletools.genops(archive.read(name)) if code.name == "GLOBAL"}
    assert named <= {"collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"}


def test_the_document_says_format_stage_and_step(last: Path) -> None:
    document = json.loads((last / "config.json").read_text(encoding="utf-8"))
    assert {name: document[name] for name in ("format_version", "stage", "step", "total_steps", "corpus")} == {
        "format_version": FORMAT_VERSION,
        "stage": "stage1",
        **STATE,
    }


def change_document(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(document) or document), encoding="utf-8")


def test_another_format_version_is_refused(last: Path) -> None:
    change_document(last, lambda document: document.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}; expected {FORMAT_VERSION}"):
        read_checkpoint(last)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(stage="stage3"),
        lambda document: document.pop("stage") and None,
        lambda document: document.pop("format_version") and None,
        lambda document: document.pop("corpus") and None,
        lambda document: document.update(extra=1),
        lambda document: document["config"].update(extra=1),
        lambda document: document["config"]["run"].pop("epochs") and None,
        lambda document: document.update(config=None),
        lambda document: document.update(config=[]),
        lambda document: [document],
        lambda _: "text",
        lambda _: 5,
    ],
)
def test_a_document_of_another_shape_is_refused(last: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    change_document(last, change)
    with pytest.raises(MimcoError):
        read_checkpoint(last)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[1, 2"])
def test_a_broken_document_is_refused_by_name(last: Path, content: bytes) -> None:
    (last / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_checkpoint(last)


def test_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}/nothing"):
        read_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        read_checkpoint(tmp_path / "empty")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_file_that_is_cut_short_is_named(last: Path, name: str, share: float) -> None:
    content = (last / name).read_bytes()
    (last / name).write_bytes(content[: int(len(content) * share)])
    checkpoint = read_checkpoint(last)
    with pytest.raises(CheckpointError, match=name) as error:
        (checkpoint.load_model if name.startswith("model") else checkpoint.load_optimizer)()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"text", b"\0" * 500, b"\x80\x02}q\x00.", b"PK\x03\x04 and so on"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_file_of_something_else_is_named(last: Path, name: str, content: bytes) -> None:
    (last / name).write_bytes(content)
    checkpoint = read_checkpoint(last)
    with pytest.raises(CheckpointError, match=name) as error:
        (checkpoint.load_model if name.startswith("model") else checkpoint.load_optimizer)()
    assert "\n" not in str(error.value)


def test_an_optimizer_file_with_objects_in_it_is_not_run(last: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (Path.touch, (ran,))

    torch.save(Harmful(), last / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        read_checkpoint(last).load_optimizer()
    assert not ran.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_missing_file_is_named(last: Path, name: str) -> None:
    (last / name).unlink()
    checkpoint = read_checkpoint(last)
    with pytest.raises(CheckpointError, match=name):
        (checkpoint.load_model if name.startswith("model") else checkpoint.load_optimizer)()


def test_missing_surplus_and_misshapen_weights_are_named(last: Path) -> None:
    state = load_file(last / "model.safetensors")
    name = "encoder.body.norm.weight"
    for changed, wanted in (
        ({key: value for key, value in state.items() if key != name}, r"Missing key.*body\.norm\.weight"),
        ({**state, "encoder.body.surplus": torch.ones(1)}, r"Unexpected key.*body\.surplus"),
        ({**state, name: torch.ones(5)}, r"size mismatch for body\.norm\.weight"),
    ):
        save_file(changed, last / "model.safetensors")
        with pytest.raises(CheckpointError, match=wanted) as error:
            load_encoder(read_checkpoint(last))
        assert str(last) in error.value.found
        assert "\n" not in str(error.value)


def test_a_checkpoint_is_replaced_as_a_whole(last: Path) -> None:
    (last / "left over").touch()
    method, optimizer, config = stage1_parts(seed=1)
    save_checkpoint(last, method, optimizer, config, **{**STATE, "step": 4})
    assert read_checkpoint(last).step == 4
    assert not (last / "left over").exists()
    assert [path.name for path in last.parent.iterdir()] == ["last"]


def test_a_crash_while_writing_keeps_the_old_checkpoint(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_checkpoint(last).load_model()
    method, optimizer, config = stage1_parts(seed=1)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(last, method, optimizer, config, **{**STATE, "step": 4})
    assert read_checkpoint(last).step == 3
    assert_same_state(read_checkpoint(last).load_model(), before)
    assert [path.name for path in last.parent.iterdir()] == ["last"]


def test_a_crash_between_the_two_renames_is_undone_on_reading(last: Path) -> None:
    before = read_checkpoint(last).load_model()
    shutil.copytree(last, last.with_name(".last.staging"))
    last.rename(last.with_name("last.old"))
    checkpoint = read_checkpoint(last)
    assert checkpoint.step == 3
    assert_same_state(checkpoint.load_model(), before)
    method, optimizer, config = stage1_parts(seed=1)
    save_checkpoint(last, method, optimizer, config, **{**STATE, "step": 4})
    assert read_checkpoint(last).step == 4
    assert [path.name for path in last.parent.iterdir()] == ["last"]


def test_a_crash_after_the_second_rename_keeps_the_new_checkpoint(last: Path) -> None:
    shutil.copytree(last, last.with_name("last.old"))
    change_document(last, lambda document: document.update(step=5))
    atomic.recover(last)
    assert read_checkpoint(last).step == 5
    assert not last.with_name("last.old").exists()
