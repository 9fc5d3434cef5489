"""Teachers from anywhere: files in the published layouts, built here key by key, and models of timm."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimco_deploy.errors import CheckpointError, ConfigError, WorkspaceError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import BackboneConfig, MaskConfig
from mimco_deploy.training.method_config import MimCoConfig
from mimco_deploy.training.methods.mimco import MimCo
from mimco_deploy.training.presets import swin_tiny, vit_small
from mimco_deploy.training.published import load_from_timm, load_published, load_teacher
from mimco_deploy.training.runs import Request, open_stage2
from mimco_deploy.training.stages import train_stage1, train_stage2
from mimco_deploy.training.teacher import Teacher
from tests.unit.training.small import BACKBONE, SWIN, assert_same_state, draw_photos, stage1_config, stage2_config


def filled(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A state dict with the listed keys, shapes and types, and random numbers."""
    generator = torch.Generator().manual_seed(0)
    return {
        row["key"]: torch.randn(row["shape"], generator=generator)
        if row["dtype"].startswith("float")
        else torch.zeros(row["shape"], dtype=torch.int64)
        for row in rows
    }


def rows_of(golden: Path, file: str, key: str = "model") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((golden / file).read_text(encoding="utf-8"))[key]
    return rows


def vit_state(depth: int = 1) -> dict[str, Tensor]:
    """Flat keys of a ViT of ViT-Ti's width at 32 px, as DINO, MAE and DeiT write them."""
    torch.manual_seed(3)
    body = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, num_classes=0)
    return {key: value.clone() for key, value in body.state_dict().items()}


# ------------------------------------------------------------------------------------------------- published layouts


def test_mocov3s_file_is_a_vit_of_12_heads(golden: Path, tmp_path: Path) -> None:
    state = filled(rows_of(golden, "moco-v3/checkpoint_vit_small.json", "state_dict"))
    path = tmp_path / "vit-s-300ep.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}, "scaler": {}}, path)
    backbone, pooling = load_teacher(str(path))
    assert backbone.config == vit_small().stage1.backbone
    assert backbone.body.blocks[0].attn.num_heads == 12
    assert pooling == "cls"
    prefix = "module.base_encoder."  # the online encoder, not the momentum copy
    for name, value in backbone.body.state_dict().items():
        assert torch.equal(value, state[prefix + name]), name


def yacs_node(fields: dict[str, Any]) -> Any:
    """What a yacs config pickles as: a dict subclass of the module `yacs.config` with attributes of its own."""
    module = sys.modules["yacs.config"]
    node = module.CfgNode(fields)
    node.__dict__["__immutable__"] = True
    node.__dict__["__deprecated_keys__"] = {"OLD"}
    return node


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for yacs that says when its class is made use of; gone again before anything is loaded."""
    used: list[str] = []
    module = types.ModuleType("yacs.config")

    class CfgNode(dict[str, Any]):
        def __setstate__(self, state: dict[str, Any]) -> None:
            used.append("setstate")

        def __init__(self, *arguments: Any) -> None:
            used.append("init")
            super().__init__(*arguments)

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return used


def test_mobys_file_is_loaded_without_executing_the_config_in_it(
    golden: Path, tmp_path: Path, yacs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = filled(rows_of(golden, "moby/checkpoint_swin_tiny.json"))
    config = yacs_node({"MODEL": yacs_node({"NAME": "moby", "DEPTHS": [2, 2, 6, 2]}), "BASE": [""]})
    path = tmp_path / "moby_swin_t_300ep_pretrained.pth"
    torch.save({"model": state, "optimizer": {}, "max_accuracy": 0.0, "epoch": 299, "config": config}, path)
    yacs.clear()
    backbone, pooling = load_teacher(str(path))
    assert not yacs
    monkeypatch.delitem(sys.modules, "yacs.config")
    load_teacher(str(path))  # nor is yacs needed
    assert backbone.config == swin_tiny().stage2.backbone
    assert pooling == "mean"
    weights = backbone.body.state_dict()
    assert torch.equal(weights["layers.1.downsample.norm.bias"], state["encoder.layers.0.downsample.norm.bias"])
    table = "layers.2.blocks.5.attn.relative_position_bias_table"
    assert torch.equal(weights[table], state[f"encoder.{table}"])
    assert torch.equal(weights["norm.weight"], state["encoder.norm.weight"])


def test_simmims_swin_is_of_its_own_size_and_window(golden: Path, tmp_path: Path) -> None:
    state = filled(rows_of(golden, "simmim/checkpoint_swin_base_192w6.json"))
    torch.save({"model": state}, tmp_path / "simmim.pth")
    config = load_published(tmp_path / "simmim.pth").config
    assert (config.image_size_px, config.window, config.embed_dim) == (192, 6, 128)
    assert (config.depth, config.num_heads) == ((2, 2, 18, 2), (4, 8, 16, 32))


def test_maes_file_with_its_decoder_gives_the_encoder(golden: Path, tmp_path: Path) -> None:
    state = filled(rows_of(golden, "mae/checkpoint_mae_vit_base.json"))
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3, resume=""), "epoch": 799}, tmp_path / "mae.pth")
    backbone = load_published(tmp_path / "mae.pth")
    assert (backbone.config.embed_dim, backbone.config.depth, backbone.config.num_heads) == (768, (12,), (12,))
    assert torch.equal(backbone.body.state_dict()["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}], ids=["flat", "model", "state_dict"]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_flat_file_is_a_vit_of_64_channels_a_head(
    tmp_path: Path, suffix: str, wrap: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    state = {**vit_state(depth=2), "head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    path = tmp_path / f"deit{suffix}"
    if suffix == ".pth":
        torch.save(wrap(state), path)
    else:
        save_file(state, path)
    backbone = load_published(path)
    assert backbone.config == BackboneConfig(
        name="vit_tiny_patch16_224", image_size_px=32, patch_size_px=16, embed_dim=192, depth=(2,), num_heads=(3,)
    )
    assert_same_state(backbone.body.state_dict(), vit_state(depth=2))


def test_dinos_full_file_gives_its_teacher(tmp_path: Path) -> None:
    teacher = {f"backbone.{key}": value for key, value in vit_state().items()}
    heads = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2)}
    student = {f"module.{key}": value * 2 for key, value in teacher.items()}
    document = {"student": student, "teacher": teacher | heads, "args": argparse.Namespace(arch="vit_tiny")}
    torch.save(document, tmp_path / "dino.pth")
    assert_same_state(load_published(tmp_path / "dino.pth").body.state_dict(), vit_state())


def test_a_file_of_torchs_old_format_is_read(tmp_path: Path) -> None:
    torch.save({"model": vit_state()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_state(load_published(tmp_path / "old.pth").body.state_dict(), vit_state())


# ------------------------------------------------------------------------------------------------- what is refused


def changed(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    state = vit_state()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(lambda s: s.pop("blocks.0.mlp.fc1.bias")), r'Missing key\(s\).*"blocks\.0\.mlp\.fc1\.bias"'),
        (changed(lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(192)})), r'Unexpected.*"blocks\.0\.ls1\.gamma"'),
        (changed(lambda s: s.update({"norm.weight": torch.ones(5)})), r"norm\.weight.*torch\.Size\(\[5\]\)"),
        (changed(lambda s: s.pop("patch_embed.proj.weight")), r"'patch_embed\.proj\.weight'; expected a ViT or Swin"),
        ({f"encoder.{k}": v for k, v in vit_state().items()} | {"other.x": torch.ones(1)}, r"surplus keys other\.x"),
        ({"conv1.weight": torch.ones(64, 3, 7, 7)}, "expected a ViT or Swin"),
        ({"weights": 3}, "holds no weights"),
        ({}, "holds no weights"),
        (changed(lambda s: s.update({"patch_embed.proj.weight": torch.ones(192, 3, 2, 16, 16)})), "expected a ViT or"),
        (changed(lambda s: s.update({"patch_embed.proj.weight": torch.ones(192, 768)})), "expected a ViT or Swin"),
        (changed(lambda s: s.update({"pos_embed": torch.ones(4)})), "expected a ViT or Swin"),
        ({1: torch.ones(2)}, "holds no weights"),
        (
            changed(lambda s: s.update({"blocks.999.norm1.weight": torch.ones(192)})),
            r"blocks \[0, .*… 999; expected one",
        ),
        (changed(lambda s: s.update({"norm.bias": torch.ones(1).expand(192)})), "tensors that repeat themselves"),
    ],
    ids=[
        *("missing", "surplus", "shape", "no patches", "foreign", "resnet", "no tensors", "empty"),
        *("video", "flat patches", "no positions", "numbers as keys", "a gap", "a stride of 0"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "teacher.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        load_teacher(str(tmp_path / "teacher.pth"))
    assert "\n" not in str(error.value)


def test_a_width_that_does_not_tell_the_heads_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save(Backbone(BACKBONE).body.state_dict(), tmp_path / "odd.pth")
    with pytest.raises(
        CheckpointError, match=r"width of 24 does not tell the number of attention heads.*folder of timm"
    ):
        load_published(tmp_path / "odd.pth")


class Evil:
    """Unpickled, it calls what an attacker chose."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "evil",
    [
        Evil(subprocess.getoutput, ("touch evil-was-here",)),  # becomes an empty dictionary
        Evil(Path.touch, (Path("evil-was-here"),)),  # a call of what is no class: refused
        Evil(os.system, ("touch evil-was-here",)),  # refused by torch, whatever is allowed
    ],
    ids=["function", "method", "system"],
)
def test_a_file_that_would_run_code_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: Evil) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": vit_state(), "config": evil}, "evil.pth")
    with contextlib.suppress(CheckpointError):
        load_published(Path("evil.pth"))
    assert not Path("evil-was-here").exists()
    pickle.loads(pickle.dumps(evil))  # and it would have
    assert Path("evil-was-here").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"], ids=["empty", "text", "zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"teacher{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        load_teacher(str(path))
    assert "\n" not in str(error.value)


def test_a_teacher_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file .*nowhere.*timm/NAME"):
        load_teacher(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------- timm


def write_timm_folder(folder: Path, name: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(5)
    body = timm.create_model(name, pretrained=False, **sizes)
    timm.models.save_for_hf(body, str(folder), model_args=sizes, safe_serialization=True)
    return body


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 5}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "num_heads": 12, "global_pool": "avg"}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 1}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "embed_dim": 12, "depths": [1, 2], "window_size": 4, "num_heads": [2, 2]},
        ),
        ("resnet10t", {}),
        ("convnext_atto", {}),
        ("mobilenetv3_small_050", {}),
    ],
    ids=["vit", "vit-avg", "dinov2-registers", "swin", "resnet", "convnext", "mobilenet"],
)
def test_a_folder_of_timms_gives_what_timm_gives(tmp_path: Path, name: str, sizes: dict[str, Any]) -> None:
    write_timm_folder(tmp_path, name, **sizes)
    backbone, pooling = load_teacher(str(tmp_path))
    theirs: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    backbone.eval()
    images = torch.randn(2, 3, backbone.config.image_size_px, backbone.config.image_size_px)
    with torch.no_grad():
        features, pooled = backbone(images), theirs(images)
    assert pooling == "cls"
    torch.testing.assert_close(features.pooled(pooling), pooled)
    assert features.patches.shape == (2, backbone.grid**2, backbone.width)
    cfg = theirs.pretrained_cfg
    assert (backbone.config.mean, backbone.config.std) == (tuple(cfg["mean"]), tuple(cfg["std"]))


SMALL = BackboneConfig(name="vit_tiny_patch16_224", image_size_px=224, patch_size_px=32, depth=(1,))


@pytest.mark.parametrize("name", ["mixer_s32_224", "resmlp_12_224"])
def test_families_that_describe_themselves_otherwise_are_teachers_too(tmp_path: Path, name: str) -> None:
    write_timm_folder(tmp_path, name)
    backbone, pooling = load_teacher(str(tmp_path))
    features = Teacher(backbone, pooling, Backbone(SMALL))(torch.zeros(1, 3, 224, 224))
    assert features.patches.shape == (1, 49, backbone.width)


VIT = {"img_size": 32, "depth": 1, "num_classes": 0}


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ({}, {"architecture": None}, r"config\.json names no architecture; expected a folder that timm wrote"),
        ({}, {"architecture": "vit_tiny_patch16_22"}, "names the architecture .*, such as vit_tiny_patch16_224"),
        ({}, {"model_args": {"nonsense": 3}}, "nonsense.*; expected a config.json and whole weights of one model"),
        (
            {"depth": 3},
            {"model_args": {**VIT, "depth": 3, "features_only": True}},
            "gives several maps; expected .*without features_only",
        ),
        ({}, {"crop_pct": 1.2}, "has a crop_pct of 1.2 in its config; expected a share above 0, at most 1"),
        ({}, {"mean": [0.5, 0.4]}, r"has 2 values of mean; expected 1, or 3 \(RGB\)"),
        ({"in_chans": 1}, {}, r"takes 1 channel; expected 3 \(RGB\)"),
        ({"in_chans": 4}, {}, r"takes 4 channels; expected 3 \(RGB\)"),
        ({"img_size": [32, 48]}, {}, "takes pictures of 48 × 32 px; expected square ones"),
    ],
)
def test_what_is_wrong_in_a_folder_of_timms_is_said_once(
    tmp_path: Path, sizes: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    write_timm_folder(tmp_path, "vit_tiny_patch16_224", **(VIT | sizes))
    change_config(tmp_path, changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load_teacher(str(tmp_path), to_train=False)
    assert str(error.value).count("; expected") == 1
    assert "local-dir" not in str(error.value)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        (document if name in document else document["pretrained_cfg"])[name] = value
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")


def test_a_config_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no .*config\.json; expected a folder that timm wrote"):
        load_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architecture": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: .*; expected JSON, as timm writes it"):
        load_teacher(str(tmp_path))


def test_one_value_of_a_statistic_is_meant_for_all_channels(tmp_path: Path) -> None:
    write_timm_folder(tmp_path, "vit_tiny_patch16_224", **VIT)
    change_config(tmp_path, {"mean": [0.5], "std": [0.25]})
    config = load_teacher(str(tmp_path))[0].config
    assert (config.mean, config.std) == ((0.5,) * 3, (0.25,) * 3)


def test_a_geometry_that_mimco_has_not_is_told_as_the_configs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_timm_folder(tmp_path, "vit_tiny_patch16_224", **VIT)
    change_config(tmp_path, {"interpolation": "bogus", "crop_mode": "border"})
    geometry = load_teacher(str(tmp_path))[0].geometry
    assert geometry[1:] == ("bicubic", "center")
    assert f"the config of {tmp_path} says interpolation bogus; mimco resizes by bicubic" in caplog.messages
    assert f"the config of {tmp_path} says crop_mode border; mimco crops the centre" in caplog.messages


def test_a_file_beside_timms_config_is_answered_with_the_folder(tmp_path: Path) -> None:
    write_timm_folder(tmp_path, "resnet10t")
    with pytest.raises(CheckpointError, match=f"no 'patch_embed.proj.weight'; expected {tmp_path}, the folder"):
        load_teacher(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10t", "no file resnet10t; expected timm/resnet10t, if timm's model is meant"),
        ("timm/resnet10zz", "expected a model that timm has weights of, such as resnet10t"),
        ("timm/vit_small_patch16_224.dinoo", "expected .*, such as vit_small_patch16_224.dino,"),
    ],
)
def test_a_name_that_timm_has_not_is_answered_with_near_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_teacher(name)


def test_only_keys_that_matter_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A class head with a norm of its own is left aside in silence; what is missing, or surplus elsewhere, is not."""
    write_timm_folder(tmp_path, "efficientvit_m0")
    load_teacher(str(tmp_path), to_train=False)
    assert caplog.messages == []
    state = load_file(tmp_path / "model.safetensors")
    state["patch_embed.other"] = state.pop("patch_embed.conv1.conv.weight")
    save_file(state, tmp_path / "model.safetensors")
    load_teacher(str(tmp_path), to_train=False)
    assert "there are no weights for patch_embed.conv1.conv.weight, which stay random" in caplog.messages
    assert "Unexpected keys" in caplog.text


def test_a_teacher_whose_map_is_not_what_it_describes_is_refused_in_a_line(tmp_path: Path) -> None:
    write_timm_folder(tmp_path, "inception_v3")
    backbone, pooling = load_teacher(str(tmp_path))
    with pytest.raises(ConfigError, match=r"7×7.*it gives 25 tokens") as error:
        Teacher(backbone, pooling, Backbone(SMALL))
    assert "\n" not in str(error.value)


def test_a_teacher_that_cannot_start_a_student_is_refused_in_a_line(tmp_path: Path) -> None:
    """timm's mean-pooled ViT has its last norm behind the pooling."""
    write_timm_folder(tmp_path, "vit_tiny_patch16_224", img_size=32, depth=1, global_pool="avg", num_classes=0)
    backbone, pooling = load_teacher(str(tmp_path))
    student = dataclasses.replace(backbone.config, global_pool="", mean=BACKBONE.mean, std=BACKBONE.std)
    mask = MaskConfig(mask_patch_size_px=16)
    with pytest.raises(ConfigError, match=r"init_from_teacher.*(norm|mean)"):
        MimCo(student, backbone, pooling, mask, MimCoConfig(init_from_teacher=True))


def test_a_checkpoints_own_timm_folder_is_a_teacher(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos")
    train_stage1(stage1_config(photos, epochs=1), tmp_path / "stage1")
    backbone, pooling = load_teacher(str(tmp_path / "stage1/last/timm"))
    same, own = load_teacher(str(tmp_path / "stage1/last"))
    assert pooling == own == "cls"
    assert_same_state(backbone.state_dict(), same.state_dict())


def test_a_model_of_the_hub_is_loaded_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own code, offline, on a cache laid out as the hub's client lays it."""
    name = "vit_tiny_patch16_224.augreg_in21k"
    snapshot = tmp_path / f"models--timm--{name}" / "snapshots" / "0"
    body = write_timm_folder(snapshot, "vit_tiny_patch16_224", num_classes=0)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = load_from_timm(name)
    assert_same_state(backbone.body.state_dict(), body.state_dict())


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("timm/vit_small_patch16_224.dino", "timm/vit_of_nobody"):
        with pytest.raises(CheckpointError, match=f"timm cannot load {name[5:]}: .*expected a model") as error:
            load_teacher(name)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- as a command asks


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_photos(tmp_path / "photos")


def test_a_published_file_trains_a_student_of_its_own_shape(golden: Path, tmp_path: Path, photos: Path) -> None:
    state = filled(rows_of(golden, "moco-v3/checkpoint_vit_small.json", "state_dict"))
    path = tmp_path / "vit-s-300ep.pth.tar"
    torch.save({"arch": "vit_small", "state_dict": state}, path)
    config, _ = open_stage2(tmp_path / "stage2", tmp_path / "stage1", Request(teacher=str(path), data=(photos,)))
    assert config == Request(data=(photos,)).apply(type(config)(**{**vars(vit_small().stage2), "teacher": str(path)}))


def test_a_foreign_teacher_needs_pictures(tmp_path: Path) -> None:
    torch.save(vit_state(), tmp_path / "deit.pth")
    with pytest.raises(ConfigError, match="no pictures to train on; run: mimco train stage2 --data DIR"):
        open_stage2(tmp_path / "stage2", tmp_path / "stage1", Request(teacher=str(tmp_path / "deit.pth")))


def test_a_teacher_of_another_family_needs_a_preset_for_the_student(tmp_path: Path, photos: Path) -> None:
    write_timm_folder(tmp_path / "resnet", "resnet10t")
    request = Request(teacher=str(tmp_path / "resnet"), data=(photos,))
    with pytest.raises(ConfigError, match=r"no preset for resnet10t, for .*: --preset swin_tiny or"):
        open_stage2(tmp_path / "stage2", tmp_path / "stage1", request)
    request = Request(teacher=str(tmp_path / "resnet"), data=(photos,), preset="swin_tiny")
    config, _ = open_stage2(tmp_path / "stage2", tmp_path / "stage1", request)
    assert config.backbone == swin_tiny().stage2.backbone


def test_a_preset_that_is_named_is_the_students(tmp_path: Path, photos: Path) -> None:
    train_stage1(stage1_config(photos, epochs=1), tmp_path / "stage1")
    config, _ = open_stage2(tmp_path / "stage2", tmp_path / "stage1", Request(preset="swin_tiny"))
    assert config.backbone == swin_tiny().stage2.backbone
    assert config.data.sources == (str(photos),)


@pytest.mark.parametrize("method", ["simmim", "mae", "joint"])
def test_methods_without_a_teacher_need_none(tmp_path: Path, photos: Path, method: str) -> None:
    stage1 = tmp_path / "stage1"
    config, _ = open_stage2(tmp_path / "stage2", stage1, Request(method=method, data=(photos,), preset="vit_tiny_64"))
    assert config.teacher == ""
    assert config.method.name == method
    train_stage1(stage1_config(photos, epochs=1), stage1)
    config, _ = open_stage2(tmp_path / "stage2", stage1, Request(method=method))
    assert config.backbone == BACKBONE  # of the stage-1 run, to compare
    assert config.data.sources == (str(photos),)


@pytest.mark.parametrize("method", ["mimco", "fd"])
def test_methods_with_a_teacher_ask_for_one(tmp_path: Path, photos: Path, method: str) -> None:
    with pytest.raises(WorkspaceError, match="no teacher in"):
        open_stage2(tmp_path / "stage2", tmp_path / "stage1", Request(method=method, data=(photos,)))


def test_a_run_against_a_published_file_resumes_without_it(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_timm_folder(tmp_path / "teacher", "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1, num_classes=0)
    config = stage2_config(photos, tmp_path / "teacher", epochs=1, checkpoint_every_steps=2)
    with caplog.at_level(logging.ERROR):
        train_stage2(config, tmp_path / "whole")
    kept = read_checkpoint(tmp_path / "whole" / "last")
    assert kept.teacher is not None
    assert (kept.teacher.backbone.embed_dim, kept.teacher.pooling) == (192, "cls")
    shutil.rmtree(tmp_path / "teacher")
    train_stage2(config, tmp_path / "whole", resume=kept)


def test_a_convolutional_teacher_lies_channels_last_and_in_checkpoints(tmp_path: Path, photos: Path) -> None:
    write_timm_folder(tmp_path / "teacher", "resnet10t")
    config = stage2_config(photos, tmp_path / "teacher", epochs=1)
    assert isinstance(config.method, MimCoConfig)
    method = dataclasses.replace(config.method, teacher_image_size_px=128, init_from_teacher=False)
    config = dataclasses.replace(config, method=method)
    train_stage2(config, tmp_path / "run")
    kept = read_checkpoint(tmp_path / "run" / "last")
    shutil.rmtree(tmp_path / "teacher")
    train_stage2(config, tmp_path / "run", resume=kept)
    assert kept.teacher is not None
    backbone = Backbone(kept.teacher.backbone)
    teacher = Teacher(backbone, "mean", Backbone(BACKBONE), 128)
    weight = teacher.backbone.body.conv1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_student_can_start_as_a_swin_teacher(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(1)
    body = Backbone(SWIN).body
    state = {f"encoder.{key}": value for key, value in body.state_dict().items()}
    state["encoder.layers.1.blocks.1.attn_mask"] = body.layers[1].blocks[1].attn_mask
    torch.save({"model": state}, tmp_path / "swin.pth")
    request = Request(
        teacher=str(tmp_path / "swin.pth"),
        data=(photos,),
        init_from_teacher=True,
        settings=("mask.mask_patch_size_px=4",),
    )
    config, _ = open_stage2(tmp_path / "stage2", tmp_path / "stage1", request)
    assert isinstance(config.method, MimCoConfig)
    assert config.method.init_from_teacher
    assert config.backbone == SWIN
