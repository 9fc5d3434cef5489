"""From the options of a command to the run: presets, resuming, starting anew, what stage 2 takes from its teacher."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mimco_deploy.errors import CheckpointError, ConfigError, DataError, MimcoError, TrainingInterrupted, WorkspaceError
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.method_config import MimCoConfig
from mimco_deploy.training.presets import PRESETS, vit_small, vit_tiny_debug
from mimco_deploy.training.runs import Request, open_stage1, open_stage2, recipe_for
from mimco_deploy.training.stages import train_stage1, train_stage2
from tests.unit.training.small import STEPS, draw_photos, stage1_config, stage2_config, stop_at

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("runs") / "photos")


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "stage1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        train_stage1(stage1_config(photos), folder)
    return folder


@pytest.fixture
def stage1(finished: Path, tmp_path: Path) -> Path:
    """A finished stage-1 run to do things to."""
    return Path(shutil.copytree(finished, tmp_path / "stage1"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_has_the_presets_settings_and_the_options(tmp_path: Path, photos: Path) -> None:
    request = Request(
        data=(photos, tmp_path / "more"), epochs=5, batch_size=12, settings=("optim.weight_decay=0.3", "run.seed=8")
    )
    config, resume = open_stage1(tmp_path / "stage1", request)
    preset = vit_tiny_debug().stage1
    assert resume is None
    assert config == dataclasses.replace(
        preset,
        run=dataclasses.replace(preset.run, epochs=5, global_batch_size=12, seed=8),
        # 5 epochs of the preset's 20: the warm-up keeps its share
        optim=dataclasses.replace(preset.optim, weight_decay=0.3, warmup_epochs=preset.optim.warmup_epochs / 4),
        data=dataclasses.replace(preset.data, sources=(str(photos), str(tmp_path / "more"))),
    )
    assert not (tmp_path / "stage1").exists()


def test_settings_come_after_options(tmp_path: Path, photos: Path) -> None:
    config, _ = open_stage1(tmp_path / "stage1", Request(data=(photos,), epochs=5, settings=("run.epochs=6",)))
    assert config.run.epochs == 6


def test_sources_are_whole_paths_whatever_is_in_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Rome, 2019", "a=b", " spaced ", "ünï"]
    for name in names:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    config, _ = open_stage1(tmp_path / "stage1", Request(data=tuple(map(Path, names))))
    assert config.data.sources == tuple(str(tmp_path / name) for name in names)


def test_the_preset_goes_by_the_machine_unless_it_is_named(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backbone(**options: Any) -> Any:
        return open_stage1(tmp_path / "stage1", Request(data=(photos,), **options))[0].backbone

    assert backbone() == vit_tiny_debug().stage1.backbone
    assert backbone(preset="vit_small") == vit_small().stage1.backbone
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backbone() == vit_small().stage1.backbone
    assert backbone(preset="vit_tiny_debug") == vit_tiny_debug().stage1.backbone


def test_an_unknown_preset_is_answered_with_all(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ConfigError, match=f"no preset vit_huge; expected one of {', '.join(sorted(PRESETS))}"):
        open_stage1(tmp_path / "stage1", Request(data=(photos,), preset="vit_huge"))


def test_a_new_run_needs_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no pictures to train on; run: mimco train stage1 --data DIR"):
        open_stage1(tmp_path / "stage1", Request())


def test_a_run_is_not_overwritten(stage1: Path, photos: Path) -> None:
    before = contents(stage1)
    with pytest.raises(
        CheckpointError, match="already holds a run; expected --resume to go on or --fresh to start anew"
    ):
        open_stage1(stage1, Request(data=(photos,)))
    assert contents(stage1) == before


def test_a_run_whose_checkpoint_a_crash_left_between_two_names_is_not_overwritten(stage1: Path, photos: Path) -> None:
    before = contents(stage1 / "last")
    (stage1 / "last").rename(stage1 / "last.old")
    with pytest.raises(CheckpointError, match="already holds a run"):
        open_stage1(stage1, Request(data=(photos,)))
    assert contents(stage1 / "last.old") == before


def test_a_run_whose_checkpoint_a_crash_left_between_two_names_is_resumed(stage1: Path) -> None:
    (stage1 / "last").rename(stage1 / "last.old")
    _, checkpoint = open_stage1(stage1, Request(resume=True))
    assert checkpoint is not None
    assert checkpoint.step == STEPS


def test_a_teacher_whose_checkpoint_a_crash_left_between_two_names_is_found(stage1: Path, tmp_path: Path) -> None:
    (stage1 / "last").rename(stage1 / "last.old")
    config, _ = open_stage2(tmp_path / "stage2", stage1, Request())
    assert read_checkpoint(Path(config.teacher)).step == STEPS


def test_fresh_moves_the_run_aside_and_starts_anew(
    stage1: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(stage1)
    config, resume = open_stage1(
        stage1,
        Request(data=(photos,), fresh=True, epochs=1, batch_size=12, settings=("run.seed=5", "optim.warmup_epochs=0")),
    )
    assert resume is None
    with caplog.at_level(logging.WARNING):
        train_stage1(config, stage1)
    aside = stage1.with_name("stage1-1")
    assert contents(aside) == before
    assert read_checkpoint(stage1 / "last").config.run.seed == 5
    assert any(str(stage1) in message and str(aside) in message for message in caplog.messages)


@pytest.mark.parametrize(
    "mistake",
    [
        {},
        {"data": (Path("/nowhere"),)},
        {"settings": ("run.epoch=3",)},
        {"settings": ("backbone.num_heads=(7,)",)},
        {"settings": ("optim.warmup_epochs=100",)},
        {"preset": "vit_huge"},
        {"settings": ("run.accumulate=7",)},
        {"settings": ("run.compile=on",)},  # without a compiler
    ],
    ids=str,
)
def test_fresh_with_a_mistake_leaves_the_run_where_it_is(
    stage1: Path, photos: Path, mistake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    before = contents(stage1)
    options = {"data": (photos,), "epochs": 1, "batch_size": 8, **mistake}
    if not mistake:
        options["data"] = ()

    def start() -> None:
        config, _ = open_stage1(stage1, Request(fresh=True, **options))
        train_stage1(config, stage1)

    with pytest.raises(MimcoError):
        start()
    assert contents(stage1) == before
    assert [path.name for path in stage1.parent.iterdir() if not path.name.endswith(".lock")] == ["stage1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": (Path("/x"),)}, r"data\.sources \('/x',\), where the run has"),
        ({"preset": "vit_small"}, r"backbone\.name vit_small_patch16_224, where the run has vit_tiny_patch16_224"),
        ({"method": "moby"}, r"method\.name moby, where the run has mocov3"),
        ({"epochs": 3}, r"run\.epochs 3, where the run has 2"),
        ({"batch_size": 4}, r"run\.global_batch_size 4, where the run has 8"),
        ({"settings": ("run.seed=1",)}, r"run\.seed 1, where the run has 3"),
        ({"settings": ("optim.weight_decay=0.2",)}, r"optim\.weight_decay 0\.2, where the run has 0\.1"),
        ({"settings": ("optim.min_lr=0.2",)}, r"optim\.min_lr 0\.2, where the run has 0\.0"),
        ({"start_from": "elsewhere"}, r"start_from .*elsewhere, where the run has none"),
        ({"fresh": True}, "--resume with --fresh; expected one of them"),
    ],
    ids=str,
)
def test_resuming_with_a_changed_setting_is_refused_with_both_values(
    stage1: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_stage1(stage1, Request(resume=True, **options))


def test_resuming_a_run_that_was_fitted_to_memory_keeps_the_fit(stage1: Path) -> None:
    path = stage1 / "last" / "config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["config"]["run"] |= {"accumulate": 2, "grad_checkpointing": True}
    path.write_text(json.dumps(document), encoding="utf-8")
    config, checkpoint = open_stage1(stage1, Request(resume=True, grad_accum="auto", batch_size=8))
    assert checkpoint is not None
    assert config == checkpoint.config
    with pytest.raises(ConfigError, match=r"run\.accumulate 4, where the run has 2"):
        open_stage1(stage1, Request(resume=True, grad_accum="4"))


def test_resuming_with_another_teacher_is_refused(stage1: Path, tmp_path: Path, photos: Path) -> None:
    train_stage2(stage2_config(photos, stage1 / "last", epochs=1), tmp_path / "stage2")
    same = Request(resume=True, teacher=str(stage1 / "last"))
    assert open_stage2(tmp_path / "stage2", stage1, same)[1] is not None
    with pytest.raises(ConfigError, match=f"teacher timm/x, where the run has {stage1 / 'last'}"):
        open_stage2(tmp_path / "stage2", stage1, Request(resume=True, teacher="timm/x"))


def test_resuming_with_the_same_settings_or_with_what_changes_no_result_is_allowed(stage1: Path, photos: Path) -> None:
    settings = ("data.workers=1", "run.checkpoint_every_steps=7", "run.seed=3")
    config, checkpoint = open_stage1(stage1, Request(resume=True, data=(photos,), batch_size=8, settings=settings))
    assert checkpoint is not None
    assert (config.data.workers, config.run.checkpoint_every_steps) == (1, 7)
    assert config.optim == checkpoint.config.optim


def test_resuming_takes_the_checkpoints_settings(stage1: Path, photos: Path) -> None:
    config, checkpoint = open_stage1(stage1, Request(resume=True))
    assert checkpoint is not None
    assert config == checkpoint.config == stage1_config(photos)


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stage1"):
        open_stage1(tmp_path / "stage1", Request(resume=True))
    with pytest.raises(CheckpointError, match="stage2"):
        open_stage2(tmp_path / "stage2", tmp_path / "stage1", Request(resume=True))


def test_a_run_of_the_other_stage_is_not_resumed(stage1: Path) -> None:
    with pytest.raises(CheckpointError, match="is of stage1; expected stage2"):
        open_stage2(stage1, stage1, Request(resume=True))


def test_stage_2_takes_pictures_and_backbone_of_its_teacher(stage1: Path, tmp_path: Path, photos: Path) -> None:
    config, resume = open_stage2(tmp_path / "stage2", stage1, Request())
    trained = read_checkpoint(stage1 / "last").config
    preset = vit_tiny_debug().stage2
    assert resume is None
    assert config.backbone == trained.backbone != preset.backbone
    assert config.data == trained.data
    assert config.data.sources == (str(photos),)
    assert config.teacher == str(stage1 / "last")
    assert (config.optim, config.run, config.method) == (preset.optim, preset.run, preset.method)


def test_stage_2_takes_what_it_is_given_instead(stage1: Path, tmp_path: Path) -> None:
    moved = stage1.rename(tmp_path / "elsewhere")
    request = Request(
        data=(tmp_path / "others",),
        teacher=str(moved / "last"),
        init_from_teacher=False,
        settings=("backbone.depth=1",),
    )
    config, _ = open_stage2(tmp_path / "stage2", tmp_path / "stage1", request)
    assert config.data.sources == (str(tmp_path / "others"),)
    assert config.teacher == str(moved / "last")
    assert isinstance(config.method, MimCoConfig)
    assert not config.method.init_from_teacher
    assert config.backbone.depth == (1,)


def test_feature_distillation_takes_no_mask(stage1: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a mask with --method fd; expected another method"):
        open_stage2(tmp_path / "stage2", stage1, Request(method="fd", settings=("mask.mask_ratio=0.1",)))


def test_stage_2_without_a_teacher_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"no teacher in .*stage1/last.*run: mimco train stage1 --data DIR"):
        open_stage2(tmp_path / "stage2", tmp_path / "stage1", Request())


def test_stage_2_trains_on_what_stage_1_left(stage1: Path, tmp_path: Path) -> None:
    settings = (
        "run.precision=fp32",
        "mask.mask_patch_size_px=4",
        "method.image.hidden_dim=16",
        "optim.warmup_epochs=0",
    )
    request = Request(epochs=1, batch_size=8, settings=settings)
    folder = tmp_path / "stage2"
    config, _ = open_stage2(folder, stage1, request)
    with pytest.raises(TrainingInterrupted, match="run: mimco train stage2 --resume"):
        train_stage2(
            dataclasses.replace(config, run=dataclasses.replace(config.run, log_every_steps=1)),
            folder,
            on_step=stop_at(2),
        )
    config, resume = open_stage2(folder, stage1, Request(resume=True))
    train_stage2(config, folder, resume=resume)
    checkpoint = read_checkpoint(folder / "last")
    assert (checkpoint.stage, checkpoint.step) == ("stage2", 3)
    teacher = read_checkpoint(stage1 / "last").load_model()
    kept = checkpoint.load_model()
    for name, value in kept.items():
        if name.startswith("teacher."):
            assert torch.equal(value, teacher[name.replace("teacher.backbone.", "encoder.", 1)]), name


def test_a_stage_2_checkpoint_as_teacher_is_pooled_as_it_was_trained(
    stage1: Path, photos: Path, tmp_path: Path
) -> None:
    train_stage2(stage2_config(photos, stage1 / "last", epochs=1), tmp_path / "stage2")
    config = stage2_config(photos, tmp_path / "stage2" / "last", epochs=1)
    train_stage2(config, tmp_path / "again")
    kept, teacher = (read_checkpoint(tmp_path / name / "last").load_model() for name in ("again", "stage2"))
    assert torch.equal(kept["teacher.backbone.body.norm.weight"], teacher["encoder.body.norm.weight"])


def test_no_pictures_in_the_data_is_an_error_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config, _ = open_stage1(tmp_path / "stage1", Request(data=(tmp_path / "empty",)))
    with pytest.raises(DataError, match="no picture in"):
        train_stage1(config, tmp_path / "stage1")
    assert not (tmp_path / "stage1").exists()


def test_the_command_that_started_a_run_resumes_it(tmp_path: Path, photos: Path) -> None:
    """Epochs scale the warm-up, the batch is cut to the corpus, a preset is named: none of it is a change."""
    folder = tmp_path / "stage1"
    request = Request(
        data=(photos,), preset="vit_tiny_debug", epochs=13, batch_size=256, settings=("run.log_every_steps=1",)
    )
    config, _ = open_stage1(folder, request)
    with pytest.raises(TrainingInterrupted):
        train_stage1(config, folder, on_step=stop_at(2))
    again, checkpoint = open_stage1(folder, dataclasses.replace(request, resume=True))
    assert checkpoint is not None
    assert again == checkpoint.config == config


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_epochs_that_are_asked_for_twice_change_nothing(preset: str) -> None:
    for epochs in range(1, 301):
        once = Request(epochs=epochs).apply(PRESETS[preset]().stage1)
        assert Request(epochs=epochs).apply(once) == once


def test_a_batch_of_ones_own_keeps_the_micro_batch() -> None:
    config = Request(batch_size=256).apply(PRESETS["vit_base"]().stage2)
    assert (config.run.global_batch_size, config.run.accumulate) == (256, 1)
    config = Request(batch_size=4096).apply(PRESETS["vit_base"]().stage2)
    assert (config.run.global_batch_size, config.run.accumulate) == (4096, 16)


def test_methods_without_a_teacher_refuse_one_and_read_no_stage_1_that_they_do_not_need(
    tmp_path: Path, photos: Path
) -> None:
    with pytest.raises(ConfigError, match="--teacher with --method simmim; expected --method mimco or fd"):
        open_stage2(tmp_path / "stage2", tmp_path / "stage1", Request(method="simmim", teacher="timm/x"))
    last = tmp_path / "stage1" / "last"
    last.mkdir(parents=True)
    (last / "config.json").write_text('{"format_version": 1, "stage": "stage1"}', encoding="utf-8")
    request = Request(method="simmim", preset="vit_tiny_64", data=(photos,))
    assert open_stage2(tmp_path / "stage2", tmp_path / "stage1", request)[0].data.sources == (str(photos),)
    with pytest.raises(CheckpointError, match="format version 1; expected 4; run: mimco train stage1 --fresh"):
        open_stage2(tmp_path / "stage2", tmp_path / "stage1", Request(method="simmim"))


@pytest.mark.parametrize(
    ("name", "size", "patch", "width", "preset", "unit"),
    [
        ("vit_tiny_patch16_224", 224, 16, 192, "vit_small", 32),
        ("vit_small_patch16_224", 384, 16, 384, "vit_small", 32),
        ("vit_base_patch16_224", 224, 16, 768, "vit_base", 32),
        ("vit_small_patch14_dinov2", 224, 14, 384, "vit_small", 28),
        ("vit_small_patch16_224", 64, 8, 384, "vit_small_64", 16),
        ("swin_base_patch4_window7_224", 224, 4, 128, "swin_tiny", 32),
    ],
)
def test_a_foreign_teacher_gets_the_nearest_preset_with_masks_that_fit(
    name: str, size: int, patch: int, width: int, preset: str, unit: int
) -> None:
    teacher = BackboneConfig(name=name, image_size_px=size, patch_size_px=patch, embed_dim=width)
    recipe = recipe_for(teacher)
    assert recipe.stage2.backbone.image_size_px == size
    assert recipe.stage1 == PRESETS[preset]().stage1
    assert recipe.stage2.mask.mask_patch_size_px == unit


def test_a_preset_brings_its_own_data_settings_and_the_teachers_pictures(
    stage1: Path, tmp_path: Path, photos: Path
) -> None:
    config, _ = open_stage2(tmp_path / "stage2", stage1, Request(preset="swin_tiny"))
    assert config.data == dataclasses.replace(PRESETS["swin_tiny"]().stage2.data, sources=(str(photos),))
