"""Training that goes on from weights that are there: whose, in what size, and what is told of them afterwards."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from mimco_deploy.errors import CheckpointError, ConfigError
from mimco_deploy.export.card import bundle_licence
from mimco_deploy.export.pipeline import ExportOptions, export_encoder
from mimco_deploy.export.student import from_checkpoint
from mimco_deploy.serving.encoders import load_encoder as load_bundle
from mimco_deploy.training.checkpoint import load_encoder, read_checkpoint
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.method_config import MimCoConfig, SimMIMConfig
from mimco_deploy.training.presets import vit_tiny_debug
from mimco_deploy.training.published import load_teacher
from mimco_deploy.training.runs import Request, open_stage1, open_stage2
from mimco_deploy.training.stages import train_stage2
from tests.unit.training.small import BACKBONE, draw_photos, every_method, stage1_config, stage2_config, train_any

NC = "cc-by-nc-4.0"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("start") / "photos")


def write_vit(folder: Path, licence: str = NC, **sizes: Any) -> Path:
    """A ViT of timm's as others publish one; of the sizes of `BACKBONE` but for those given."""
    torch.manual_seed(7)
    known = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, **sizes}
    body = timm.create_model("vit_tiny_patch16_224", num_classes=0, **known)
    save_for_hf(body, str(folder), model_args=known, safe_serialization=True)
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    document["pretrained_cfg"].update(license=licence, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def stands_still(config: Stage1Config | Stage2Config, start: Path, **backbone: Any) -> Stage1Config | Stage2Config:
    """The run at a learning rate of 0: what it ends with is what it started with."""
    optim = dataclasses.replace(config.optim, base_lr=0.0, warmup_epochs=0.0)
    sizes = dataclasses.replace(config.backbone, **backbone)
    return dataclasses.replace(config, backbone=sizes, optim=optim, start_from=str(start))


SAME: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize("name", ["mocov3", "moby-vit", "mimco", "fd", "simmim", "mae", "joint"])
def test_every_method_starts_with_the_weights_that_it_is_given(tmp_path: Path, photos: Path, name: str) -> None:
    start = write_vit(tmp_path / "start")
    train_any(stage1_config(photos, epochs=1), tmp_path / "teacher")
    config = every_method(photos, tmp_path / "teacher" / "last")[name]
    if isinstance(config.method, MimCoConfig):  # so is a teacher that normalises as the student does
        config = dataclasses.replace(config, teacher=str(start))
    train_any(stands_still(config, start, **SAME), tmp_path / "run")
    state = read_checkpoint(tmp_path / "run" / "last").load_model()
    given = load_teacher(str(start))[0].state_dict()
    prefixes = ["encoder."] + ["momentum_encoder."] * any(key.startswith("momentum_encoder.") for key in state)
    assert len(prefixes) == (2 if name in ("mocov3", "moby-vit", "joint") else 1)
    for prefix in prefixes:
        for key, value in given.items():
            assert torch.equal(state[f"{prefix}{key}"], value), (prefix, key)


def test_a_start_of_another_size_is_interpolated(tmp_path: Path, photos: Path) -> None:
    start = write_vit(tmp_path / "start", img_size=32)
    config = dataclasses.replace(stage2_config(photos, tmp_path), method=SimMIMConfig(), teacher="")
    train_any(stands_still(config, start, **SAME), tmp_path / "run")
    backbone, _ = load_encoder(read_checkpoint(tmp_path / "run" / "last"))
    wanted = load_teacher(str(start))[0]
    assert wanted.body.pos_embed.shape[1] == 1 + 64
    wanted.resize(16)
    assert torch.equal(backbone.body.pos_embed, wanted.body.pos_embed)


def test_a_run_takes_the_shape_of_its_start_where_no_preset_is_named(tmp_path: Path, photos: Path) -> None:
    start = write_vit(tmp_path / "start", img_size=32)
    shape = dict(image_size_px=32, patch_size_px=4, embed_dim=24, depth=(2,), num_heads=(2,), **SAME)
    request = Request(data=(photos,), start_from=str(start))
    config, _ = open_stage1(tmp_path / "stage1", request)
    assert config.start_from == str(start)
    assert {name: getattr(config.backbone, name) for name in shape} == shape
    second, _ = open_stage2(tmp_path / "stage2", tmp_path / "stage1", dataclasses.replace(request, method="simmim"))
    assert second.start_from == str(start)
    assert {name: getattr(second.backbone, name) for name in shape} == shape
    named, _ = open_stage1(tmp_path / "stage1", dataclasses.replace(request, preset="vit_tiny_debug"))
    assert named.backbone == vit_tiny_debug().stage1.backbone


def test_a_student_starts_with_other_weights_than_its_teachers(tmp_path: Path, photos: Path) -> None:
    teacher, start = write_vit(tmp_path / "teacher", depth=1), write_vit(tmp_path / "start")
    request = Request(data=(photos,), teacher=str(teacher), start_from=str(start))
    config, _ = open_stage2(tmp_path / "stage2", tmp_path / "stage1", request)
    assert isinstance(config.method, MimCoConfig)
    assert not config.method.init_from_teacher, "which presets ask for"
    assert config.backbone.depth == (2,)
    with pytest.raises(ConfigError, match="--start-from with --init-from-teacher"):
        open_stage2(tmp_path / "stage2", tmp_path, dataclasses.replace(request, init_from_teacher=True))


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"embed_dim": 48}, r"--start-from with backbone\.embed_dim 48; expected 24, as vit_tiny_patch16_224 has"),
        ({"mean": (0.1, 0.1, 0.1)}, r"--start-from with backbone\.mean \(0\.1.*expected \(0\.5"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_moved_aside(
    tmp_path: Path, photos: Path, changed: dict[str, Any], wanted: str
) -> None:
    start = write_vit(tmp_path / "start")
    config = stands_still(stage1_config(photos, epochs=1), start, **{**SAME, **changed})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").touch()
    with pytest.raises(ConfigError, match=wanted):
        train_any(config, tmp_path / "run")
    assert (tmp_path / "run" / "kept").exists()


def test_a_missing_start_is_an_error(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        open_stage1(tmp_path / "stage1", Request(data=(photos,), start_from=str(tmp_path / "nowhere")))


def test_a_checkpoint_tells_what_it_started_as_and_goes_on_without_it(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = write_vit(tmp_path / "start")
    train_any(stage1_config(photos, epochs=1), tmp_path / "teacher")
    config = stage2_config(photos, tmp_path / "teacher" / "last", epochs=1)
    config = dataclasses.replace(config, backbone=dataclasses.replace(BACKBONE, **SAME), start_from=str(start))
    train_stage2(config, tmp_path / "run")
    kept = read_checkpoint(tmp_path / "run" / "last")
    assert kept.start is not None
    assert kept.start.licence == NC
    assert kept.start.weights.startswith("vit_tiny_patch16_224, weights with SHA-256 ")
    shutil.rmtree(tmp_path / "start")
    train_stage2(config, tmp_path / "run", resume=kept)
    again = read_checkpoint(tmp_path / "run" / "last")
    assert again.start == kept.start
    source = from_checkpoint(again)
    assert source.start == kept.start.weights
    with caplog.at_level(logging.WARNING):
        export_encoder(source, tmp_path / "encoder", ExportOptions(licence="MIT"))
    spec = load_bundle(tmp_path / "encoder").spec
    assert spec.licence.startswith(f"unstated and {NC}, by the teacher (")
    assert spec.licence.endswith(f"what it started as ({kept.start.weights}); stated for the rest: MIT")
    assert "so is the bundle" in caplog.text
    card = (tmp_path / "encoder" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"- **Started as**: {kept.start.weights}" in card
    assert f"- **Licence of the weights behind it**: unstated and {NC}" in card


def test_a_start_under_a_free_licence_binds_nothing(tmp_path: Path, photos: Path) -> None:
    start = write_vit(tmp_path / "start", licence="apache-2.0")
    config = dataclasses.replace(stage2_config(photos, tmp_path), method=SimMIMConfig(), teacher="")
    train_any(stands_still(config, start, **SAME), tmp_path / "run")
    source = from_checkpoint(read_checkpoint(tmp_path / "run" / "last"))
    assert source.backbone.licence == "apache-2.0"
    assert bundle_licence(source, None) == "unstated"
    assert bundle_licence(source, "MIT") == "MIT"


def test_a_checkpoint_of_the_version_before_started_with_nothing(tmp_path: Path, photos: Path) -> None:
    train_any(stage1_config(photos, epochs=1), tmp_path / "run")
    last = tmp_path / "run" / "last"
    now = read_checkpoint(last)
    document = json.loads((last / "config.json").read_text(encoding="utf-8"))
    document["format_version"] = 3
    del document["start"], document["config"]["start_from"]
    (last / "config.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_checkpoint(last) == now
    assert now.start is None
    assert now.config.start_from == ""


def test_a_run_goes_on_from_a_checkpoint_of_ours(tmp_path: Path, photos: Path) -> None:
    train_any(stage1_config(photos, epochs=1), tmp_path / "first")
    last = tmp_path / "first" / "last"
    request = Request(data=(photos,), start_from=str(last), method="simmim", epochs=1, batch_size=8)
    settings = ("optim.base_lr=0", "optim.warmup_epochs=0", "mask.mask_patch_size_px=4", "run.precision=fp32")
    config, _ = open_stage2(tmp_path / "stage2", tmp_path / "x", dataclasses.replace(request, settings=settings))
    train_stage2(config, tmp_path / "stage2")
    ours = load_encoder(read_checkpoint(tmp_path / "stage2" / "last"))[0].state_dict()
    theirs = load_encoder(read_checkpoint(last))[0].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_folder_for_timm_tells_all_licences_behind_the_weights(photos: Path, tmp_path: Path) -> None:
    """It is what others load, and what a next run starts from: a permissive start does not free a bound teacher's."""
    teacher, start = write_vit(tmp_path / "nc"), write_vit(tmp_path / "free", "apache-2.0")
    config = dataclasses.replace(stage2_config(photos, teacher), start_from=str(start))
    backbone = dataclasses.replace(config.backbone, **SAME)
    train_stage2(dataclasses.replace(config, backbone=backbone), tmp_path / "run")
    document = json.loads((tmp_path / "run" / "last" / "timm" / "config.json").read_text(encoding="utf-8"))
    assert document["pretrained_cfg"]["license"] == f"{NC} and apache-2.0"
    again, _ = load_teacher(str(tmp_path / "run" / "last" / "timm"))
    assert again.licence == f"{NC} and apache-2.0"


def test_a_start_that_is_asked_for_twice_is_refused(photos: Path, tmp_path: Path) -> None:
    start = str(write_vit(tmp_path / "nc"))
    shared: dict[str, Any] = {"data": (photos,), "teacher": start, "start_from": start}
    for flag, name in ((True, "--init-from-teacher"), (False, "--init-at-random")):
        with pytest.raises(ConfigError, match=rf"--start-from with {name}; expected one of them"):
            open_stage2(tmp_path / "2", tmp_path / "1", Request(**shared, init_from_teacher=flag))
    with pytest.raises(ConfigError, match=r"--start-from with method.init_from_teacher"):
        open_stage2(tmp_path / "2", tmp_path / "1", Request(**shared, settings=("method.init_from_teacher=true",)))


def test_a_flag_of_mimcos_is_named_where_another_method_has_no_use_for_it(photos: Path, tmp_path: Path) -> None:
    request = Request(data=(photos,), teacher=str(write_vit(tmp_path / "nc")), method="fd", init_from_teacher=False)
    with pytest.raises(ConfigError, match=r"--init-at-random with --method fd; expected --method mimco"):
        open_stage2(tmp_path / "2", tmp_path / "1", request)


def test_a_student_can_start_as_a_teacher_with_another_normalisation(photos: Path, tmp_path: Path) -> None:
    """As most published ones have, and what presets for small machines do unasked."""
    request = Request(data=(photos,), teacher=str(write_vit(tmp_path / "nc")), init_from_teacher=True, epochs=1)
    config, _ = open_stage2(tmp_path / "2", tmp_path / "1", request)
    assert (config.backbone.mean, config.backbone.std) == (SAME["mean"], SAME["std"])
    mask = dataclasses.replace(config.mask, mask_patch_size_px=4)
    train_stage2(dataclasses.replace(config, mask=mask), tmp_path / "2")
    encoder, _ = load_encoder(read_checkpoint(tmp_path / "2" / "last"))
    assert encoder.config.mean == SAME["mean"]
