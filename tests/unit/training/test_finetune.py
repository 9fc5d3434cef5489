"""Training with labels: fine-tuning and the linear probe, from the command line to bits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from timm.models import save_for_hf

import mimco_deploy
from mimco_deploy.cli import main
from mimco_deploy.drawings import draw
from mimco_deploy.errors import CheckpointError, ConfigError, DataError, TrainingError, TrainingInterrupted
from mimco_deploy.export.student import EncoderModule, from_model
from mimco_deploy.training.augment import ToInput
from mimco_deploy.training.backbone import Backbone, save_as_timm
from mimco_deploy.training.classifier import FineTuned, LinearProbe, build_classifier, draws_follow_torch
from mimco_deploy.training.config import BackboneConfig, DataConfig
from mimco_deploy.training.distributed import process_group
from mimco_deploy.training.finetune_config import (
    FinetuneConfig,
    FinetuneMethodConfig,
    FinetuneOptimConfig,
    FinetuneViewsConfig,
    LinearConfig,
    LinearOptimConfig,
    LinearViewsConfig,
    finetune_preset,
    linear_preset,
)
from mimco_deploy.training.labelled import LabelledViews, Validation, accuracy, load_labelled
from mimco_deploy.training.presets import swin_tiny, vit_small, vit_tiny_debug
from mimco_deploy.training.published import load_teacher
from mimco_deploy.training.settings import apply_settings, leaves
from mimco_deploy.training.supervised import make_views, train_with_labels
from mimco_deploy.training.supervised_checkpoint import Progress, read_run
from tests.unit.training.small import BACKBONE, SWIN, assert_same_state, run_config, stop_at

KINDS = ("checks", "rings")
STEPS = 9
"""24 pictures, 8 a step, 3 epochs."""
Config = FinetuneConfig | LinearConfig
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def draw_classes(folder: Path, per_kind: int, first: int = 0) -> Path:
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for number in range(first, first + per_kind):
            draw(kind, number, 24).save(folder / kind / f"{number}.png")
    return folder


def save_encoder(folder: Path, backbone: BackboneConfig = BACKBONE) -> Path:
    torch.manual_seed(5)
    save_as_timm(Backbone(backbone), folder, "unstated")
    return folder


def draw_labelled(folder: Path) -> Path:
    """A folder with train, val and an encoder of random weights."""
    draw_classes(folder / "train", 12)
    draw_classes(folder / "val", 5, first=100)
    save_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_labelled(tmp_path_factory.mktemp("labelled"))


def finetune_config(here: Path, **run: Any) -> FinetuneConfig:
    """With all that draws random numbers."""
    return FinetuneConfig(
        backbone=dataclasses.replace(BACKBONE, drop_path=0.2),
        run=run_config(epochs=3, **run),
        optim=FinetuneOptimConfig(base_lr=0.03, layer_decay=0.75, warmup_epochs=0.5, clip_norm=5.0),
        data=DataConfig(sources=(str(here / "train"),), workers=0, short_side_px=24),
        val=(str(here / "val"),),
        encoder=str(here / "encoder"),
    )


def linear_config(here: Path, **run: Any) -> LinearConfig:
    return LinearConfig(
        backbone=BACKBONE,
        run=run_config(epochs=3, **run),
        optim=LinearOptimConfig(base_lr=3.0),
        data=DataConfig(sources=(str(here / "train"),), workers=0, short_side_px=24),
        val=(str(here / "val"),),
        encoder=str(here / "encoder"),
    )


CONFIGS: dict[str, Callable[..., Config]] = {"finetune": finetune_config, "linear": linear_config}
BOTH = pytest.mark.parametrize("kind", ["finetune", "linear"])


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The log, without what is timed."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def optimizer_of(folder: Path) -> Any:
    return torch.load(folder / "last/optimizer.pt", weights_only=True)


def assert_same_run(ours: Path, theirs: Path, kind: str) -> None:
    a, b = read_run(ours / "last", kind), read_run(theirs / "last", kind)
    assert (a.progress.step, a.progress.total_steps, a.classes) == (b.progress.step, b.progress.total_steps, b.classes)
    assert_same_state(a.load_model(), b.load_model())
    assert_same_state(optimizer_of(ours), optimizer_of(theirs))
    assert rows_of(ours) == rows_of(theirs)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one whole run of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for kind, make in CONFIGS.items():
            train_with_labels(make(here), folder / kind)
    return folder


@BOTH
def test_a_run_leaves_a_row_for_each_epoch_and_a_checkpoint(whole: Path, kind: str) -> None:
    rows = [json.loads(line) for line in (whole / kind / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row.keys() == {"epoch", "loss", "lr", "val_top1", "val_top5", "seconds"}
        assert row["loss"] > 0
        assert row["seconds"] > 0
        assert 0 <= row["val_top1"] <= row["val_top5"] == 1  # of two classes
    assert rows[0]["lr"] > rows[-1]["lr"]
    assert json.loads((whole / kind / "last/classes.json").read_text(encoding="utf-8")) == list(KINDS)
    assert read_run(whole / kind / "last", kind).progress.step == STEPS
    assert (whole / kind / "last/timm").is_dir() == (kind == "finetune")
    assert {path.name for path in (whole / kind).iterdir()} == {"last", "log.jsonl", "report.html"}


@BOTH
@pytest.mark.parametrize("stops", [(3,), (4,), (2, 7)], ids=["epoch's end", "mid-epoch", "twice"])
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, here: Path, whole: Path, kind: str, stops: tuple[int, ...]
) -> None:
    config, resume = CONFIGS[kind](here), None
    for stop in stops:
        with pytest.raises(TrainingInterrupted, match=rf"stopped after step {stop} of 9.*mimco train {kind} --resume"):
            train_with_labels(config, tmp_path / "run", resume=resume, on_step=stop_at(stop))
        resume = read_run(tmp_path / "run/last", kind)
        assert resume.progress.step == stop
        assert resume.config == config
        torch.manual_seed(stop)  # whatever else the process drew
    train_with_labels(config, tmp_path / "run", resume=resume)
    assert_same_run(tmp_path / "run", whole / kind, kind)


@BOTH
def test_a_crashed_run_goes_on_from_its_last_checkpoint_without_the_encoder(
    tmp_path: Path, here: Path, whole: Path, kind: str
) -> None:
    config = CONFIGS[kind](here, checkpoint_every_steps=4)
    moved = dataclasses.replace(config, encoder=str(shutil.copytree(here / "encoder", tmp_path / "encoder")))

    def crash(report: Any) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with_labels(moved, tmp_path / "run", on_step=crash)
    shutil.rmtree(tmp_path / "encoder")
    saved = read_run(tmp_path / "run/last", kind)
    assert saved.progress.step == 4
    train_with_labels(moved, tmp_path / "run", resume=saved)
    assert_same_run(tmp_path / "run", whole / kind, kind)


@BOTH
def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path, whole: Path, kind: str) -> None:
    run = Path(shutil.copytree(whole / kind, tmp_path / "run"))
    saved = read_run(run / "last", kind)
    train_with_labels(saved.config, run, resume=saved)
    assert_same_run(run, whole / kind, kind)


def test_worker_processes_change_nothing(tmp_path: Path, here: Path, whole: Path) -> None:
    config = finetune_config(here)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1))
    train_with_labels(config, tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(whole / "finetune")


def test_the_global_generators_of_python_and_numpy_are_left_alone() -> None:
    state = str(np.random.get_state())  # noqa: NPY002 - what must stay
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        with draws_follow_torch():
            drawn.append(np.random.rand())  # noqa: NPY002 - what timm does
    assert drawn[0] == drawn[1]
    assert str(np.random.get_state()) == state  # noqa: NPY002 - what must stay


def test_resuming_on_other_pictures_is_refused(tmp_path: Path, whole: Path) -> None:
    saved = read_run(whole / "linear/last", "linear")
    draw_classes(tmp_path / "others", 12, first=50)
    config = dataclasses.replace(
        saved.config, data=dataclasses.replace(saved.config.data, sources=(str(tmp_path / "others"),))
    )
    with pytest.raises(CheckpointError, match="another corpus than these 24 pictures"):
        train_with_labels(config, tmp_path / "run", resume=saved)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path, here: Path) -> None:
    config = finetune_config(here, checkpoint_every_steps=1)
    wild = dataclasses.replace(
        config, optim=FinetuneOptimConfig(base_lr=1e30, warmup_epochs=2.0, layer_decay=1.0), backbone=BACKBONE
    )
    with pytest.raises(TrainingError):
        train_with_labels(wild, tmp_path / "run")
    assert "role='alert'" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    state = read_run(tmp_path / "run/last", "finetune").load_model()
    assert all(torch.isfinite(value).all() for value in state.values())


# --- what trains and what does not ------------------------------------------------------------------------------------


def test_a_linear_probe_leaves_the_encoder_bit_equal(here: Path, whole: Path) -> None:
    config = linear_config(here)
    fresh = build_classifier(config, 2).encoder.state_dict()
    trained = read_run(whole / "linear/last", "linear").load_model()
    assert_same_state({name: trained[f"encoder.{name}"] for name in fresh}, fresh)
    assert not torch.equal(trained["head.weight"], torch.zeros_like(trained["head.weight"]))
    assert (trained["norm.running_mean"] != 0).any()


def test_an_encoder_that_changes_under_a_linear_probe_is_noticed(here: Path) -> None:
    probe = build_classifier(linear_config(here), 2)
    assert isinstance(probe, LinearProbe)
    probe.check()
    probe.check()
    with torch.no_grad():
        next(probe.encoder.parameters()).add_(1e-3)
    with pytest.raises(AssertionError, match="the encoder changed"):
        probe.check()


def test_a_probed_encoder_stays_in_eval_mode_and_gets_no_gradient(here: Path) -> None:
    probe = build_classifier(linear_config(here), 2).train()
    assert probe.head.training
    assert not any(module.training for module in probe.encoder.modules())
    probe(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])).backward()
    assert all(parameter.grad is None for parameter in probe.encoder.parameters())
    assert probe.head.weight.grad is not None


def test_fine_tuning_moves_every_parameter_but_what_a_softmax_does_not_see(here: Path, whole: Path) -> None:
    fresh = build_classifier(finetune_config(here), 2).state_dict()
    trained = read_run(whole / "finetune/last", "finetune").load_model()
    still = {name for name in fresh if torch.equal(fresh[name], trained[name])}
    assert still == set()  # positions and the patch embedding too, which pre-training may keep


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("backbone", [BACKBONE, SWIN], ids=["ViT", "Swin"])
def test_every_trained_parameter_gets_a_gradient(backbone: BackboneConfig, pooling: Any) -> None:
    """As several processes need it."""
    config = dataclasses.replace(finetune_preset(backbone), method=FinetuneMethodConfig(pooling=pooling, head_std=0.02))
    method = FineTuned(Backbone(backbone), config, 3)
    method(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 1])).backward()
    assert [name for name, value in method.named_parameters() if value.requires_grad and value.grad is None] == []


def test_the_first_head_says_nearly_nothing(here: Path) -> None:
    method = build_classifier(finetune_config(here), 1000)
    assert float(method.head.weight.detach().abs().max()) <= 4 * 2e-5 + 1e-9 or method.head.weight.std() < 3e-5
    assert method.head.bias.abs().max() == 0
    assert torch.allclose(method.classify(torch.randn(2, 3, 16, 16)), torch.zeros(()), atol=1e-3)


# --- mixing, erasing, views -------------------------------------------------------------------------------------------


def mixing(backbone: BackboneConfig = BACKBONE, **method: float) -> FineTuned:
    config = dataclasses.replace(
        finetune_preset(backbone),
        method=FinetuneMethodConfig(**method),  # type: ignore[arg-type]
        views=FinetuneViewsConfig(erase=0.0),
    )
    return FineTuned(Backbone(backbone), config, 5)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_targets_sum_to_one(mixup: float, cutmix: float) -> None:
    method, labels = mixing(mixup=mixup, cutmix=cutmix), torch.tensor([0, 1, 2, 3, 4, 0])
    for seed in range(5):
        torch.manual_seed(seed)
        shown, targets = method.show(torch.randn(6, 3, 16, 16), labels)
        assert shown.shape == (6, 3, 16, 16)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        assert targets.min() >= 0.1 / 5 - 1e-6


def test_without_mixing_only_the_labels_are_smoothed() -> None:
    method = mixing(mixup=0.0, cutmix=0.0, smoothing=0.1)
    images = torch.randn(3, 3, 16, 16)
    shown, targets = method.show(images.clone(), torch.tensor([4, 0, 1]))
    assert torch.equal(shown, images)
    torch.testing.assert_close(targets[0], torch.tensor([0.02, 0.02, 0.02, 0.02, 0.92]))


def test_mixing_is_the_same_for_the_same_seed() -> None:
    method, images, labels = mixing(), torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    shown = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        shown.append(method.show(images.clone(), labels)[0])
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])


def test_erasing_turns_a_rectangle_into_noise() -> None:
    config = dataclasses.replace(
        finetune_preset(BACKBONE),
        method=FinetuneMethodConfig(mixup=0.0, cutmix=0.0),
        views=FinetuneViewsConfig(erase=1.0),
    )
    images = torch.full((4, 3, 16, 16), 7.0)
    shown, _ = FineTuned(Backbone(BACKBONE), config, 5).show(images, torch.zeros(4, dtype=torch.int64))
    share = (shown != 7.0).float().mean(dim=(1, 2, 3))
    assert ((share > 0) & (share < 0.5)).all()


@BOTH
def test_a_view_is_a_function_of_the_seed_and_carries_its_class(here: Path, kind: str) -> None:
    config = CONFIGS[kind](here)
    corpus, _ = load_labelled(config.data, config.val, 16)
    views = make_views(config)
    torch.manual_seed(1)
    pixels, label = views(corpus.get(23)[0])
    torch.manual_seed(1)
    again, _ = views(corpus.get(23)[0])
    assert (pixels.dtype, pixels.shape, int(label)) == (torch.uint8, (3, 16, 16), 1)
    assert torch.equal(pixels, again)
    assert int(views(corpus.get(0)[0])[1]) == 0


def test_a_picture_that_stands_in_for_a_broken_one_keeps_its_own_class(tmp_path: Path) -> None:
    draw_classes(tmp_path / "train", 2)
    draw_classes(tmp_path / "val", 1)
    (tmp_path / "train/checks/1.png").write_bytes(b"no picture")
    data = DataConfig(sources=(str(tmp_path / "train"),), memory_mib=0, max_bad_share=0.5)
    corpus, _ = load_labelled(data, (str(tmp_path / "val"),), 16)
    assert [picture.label for picture in corpus.pictures] == ["checks", "checks", "rings", "rings"]
    picture, refused = corpus.get(1)
    assert len(refused) == 1
    assert int(LabelledViews(16, 0.5)(picture)[1]) == 1


# --- measuring --------------------------------------------------------------------------------------------------------


def test_accuracy_counts_over_all_pictures_and_a_broken_one_is_a_miss(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"val/class{number}").mkdir(parents=True)
        Image.new("RGB", (20, 20), (30 * number, 0, 0)).save(tmp_path / f"val/class{number}/one.png")
    (tmp_path / "val/class6/broken.png").write_bytes(b"no picture")
    shutil.copytree(tmp_path / "val", tmp_path / "train")
    data = DataConfig(sources=(str(tmp_path / "train"),), max_bad_share=0.5)
    corpus, validation = load_labelled(data, (str(tmp_path / "val"),), 8)
    assert len(corpus.classes) == 7
    assert len(validation.pictures) == 8

    def by_red(pixels: torch.Tensor) -> torch.Tensor:  # right, but that 6 comes last wherever it is not first
        red = pixels[:, 0].float().mean(dim=(1, 2)) / 30
        logits = -(torch.arange(7.0) - red.unsqueeze(1)).abs()
        return torch.where(red.unsqueeze(1) == 6, -logits, logits)

    top1, top5 = accuracy(by_red, validation, 3, torch.device("cpu"))
    assert (top1, top5) == (6 / 8, 6 / 8)
    assert len(validation.bad) == 1


def test_a_picture_is_measured_as_the_encoder_will_see_it(here: Path) -> None:
    """Resize and centre crop by `preprocess`, whatever size it has."""
    from mimco_deploy.preprocess import read_pixels

    config = linear_config(here)
    _, validation = load_labelled(config.data, config.val, 16)
    images, labels = next(validation.batches(10))
    first = validation.pictures[0]
    assert torch.equal(images[0].permute(1, 2, 0), torch.from_numpy(read_pixels(first.file, 16, 0.875, "bicubic")))
    assert labels.tolist() == [0] * 5 + [1] * 5


def test_a_validation_of_no_whole_batches_is_read_to_its_end(here: Path) -> None:
    _, validation = load_labelled(linear_config(here).data, (str(here / "val"),), 16)
    assert [len(labels) for _, labels in validation.batches(4)] == [4, 4, 2]
    assert list(Validation([], [], 16).batches(4)) == []


# --- what is refused --------------------------------------------------------------------------------------------------


def refuse(train: Path, val: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_labelled(DataConfig(sources=(str(train),)), (str(val),), 16)
    assert "\n" not in str(caught.value)


def test_classes_that_differ_are_refused_with_one_line(tmp_path: Path, here: Path) -> None:
    for name, kinds in (("more", (*KINDS, "dots")), ("fewer", ("rings",))):
        for kind in kinds:
            (tmp_path / name / kind).mkdir(parents=True)
            draw(kind, 1, 24).save(tmp_path / name / kind / "1.png")
    refuse(
        here / "train", tmp_path / "more", "--val has classes that --data has not: 1, such as dots; expected the same"
    )
    refuse(here / "train", tmp_path / "fewer", "--val lacks classes of --data: 1, such as checks")
    refuse(tmp_path / "fewer", tmp_path / "fewer", "--data has one class, rings; expected two")


def test_pictures_on_both_sides_are_refused_however_they_are_named(tmp_path: Path, here: Path) -> None:
    (tmp_path / "link").symlink_to(here / "train")
    refuse(here / "train", tmp_path / "link", r"24 pictures are in --data and in --val, such as one in .*/train/")


def test_an_augmentation_that_timm_would_silently_make_another_is_refused() -> None:
    for name in ("rand-bogus", "rand-m9-mstd", "auto-m9"):
        with pytest.raises(ConfigError, match=f"views.rand_augment {name}; expected timm's name of one"):
            FinetuneViewsConfig(rand_augment=name)
    for name in ("", "rand-m9-mstd0.5-inc1", "rand-m6-n4-mstd1.0", "rand-mstd1-tweights"):
        FinetuneViewsConfig(rand_augment=name)


def test_pictures_without_a_class_are_refused_with_one_line(tmp_path: Path, here: Path) -> None:
    draw_classes(tmp_path / "some", 1)
    draw("dots", 1, 24).save(tmp_path / "some/alone.png")
    refuse(tmp_path / "some", here / "val", r"--data: 1 of 3 pictures lie in no folder of a class, such as .*alone")
    refuse(here / "train", tmp_path / "some", r"--val: 1 of 3 pictures lie in no folder of a class")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 8, "accumulate": 3}, "8 over 1 processes × 3 micro-batches"),
        ({"global_batch_size": 8, "accumulate": 8}, "at least 2 pictures in each"),
        ({"global_batch_size": 9}, "pairs of them, to mix"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(
    tmp_path: Path, here: Path, changes: dict[str, int], message: str
) -> None:
    config = finetune_config(here)
    config = dataclasses.replace(config, run=run_config(epochs=3, **changes))
    with pytest.raises(ConfigError, match=message):
        train_with_labels(config, tmp_path / "run")


def test_another_architecture_than_the_encoders_is_refused(tmp_path: Path, here: Path) -> None:
    config = dataclasses.replace(finetune_config(here), backbone=dataclasses.replace(BACKBONE, depth=(3,)))
    with pytest.raises(ConfigError, match=r"settings of backbone that are not the encoder's; .* drop_path alone"):
        train_with_labels(config, tmp_path / "run")


def test_a_head_that_gives_the_tokens_is_trained() -> None:
    """As in SelecSLS, of whose convolutions most are called so."""
    encoder = Backbone(BACKBONE)
    encoder.body.head = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
    config = finetune_preset(encoder.config)
    FineTuned(encoder, dataclasses.replace(config, method=dataclasses.replace(config.method, pooling="mean")), 3)
    assert all(value.requires_grad for value in encoder.body.head.parameters())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "global_pool": "map"}),
    ],
)
def test_everything_that_is_trained_gets_a_gradient(tmp_path: Path, name: str, shape: dict[str, Any]) -> None:
    """Several processes wait for the gradient of each parameter; a model's own pooling has none by the mean."""
    model = timm.create_model(name, num_classes=0, **shape)
    cfg = {"input_size": (3, 32, 32)}
    save_for_hf(model, str(tmp_path), model_config={"pretrained_cfg": cfg}, model_args=shape)
    encoder, _ = load_teacher(str(tmp_path))
    config = finetune_preset(encoder.config)
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, pooling="mean"))
    method = FineTuned(encoder, config, 3)
    method(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])).backward()
    without = [name for name, value in method.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.layerdecay=0.7", r"no setting optim\.layerdecay; .* nearest optim\.layer_decay"),
        ("optim.layer_decay=1.5", "above 0, up to 1"),
        ("optim.layer_decay=0", "above 0, up to 1"),
        ("views.rand_augment=m9", "timm's name of one"),
        ("views.erase=2", "a share"),
        ("method.smoothing=1", "a share below 1"),
        ("method.mixup=-1", "0 or more"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_settings(finetune_preset(BACKBONE), [setting])


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_follow_the_backbone() -> None:
    vit, swin, tiny = (finetune_preset(make().stage2.backbone) for make in (vit_small, swin_tiny, vit_tiny_debug))
    assert (vit.run.epochs, vit.run.global_batch_size, vit.optim.layer_decay) == (100, 1024, 0.65)
    assert vit.optim.base_lr * 1024 / 256 == pytest.approx(2e-3)
    assert vit.optim.min_lr * 1024 / 256 == pytest.approx(1e-6)
    assert (vit.method.mixup, vit.method.cutmix, vit.views.erase, vit.backbone.drop_path) == (0.8, 1.0, 0.25, 0.1)
    assert (swin.optim.layer_decay, swin.optim.base_lr) == (0.9, 6.25e-4)
    assert tiny.run.epochs < vit.run.epochs
    probe = linear_preset(vit_small().stage2.backbone)
    assert (probe.run.epochs, probe.run.global_batch_size, probe.optim.base_lr) == (90, 1024, 0.1)
    assert (probe.optim.momentum, probe.optim.weight_decay) == (0.9, 0.0)


@BOTH
def test_every_setting_is_read_somewhere(kind: str) -> None:
    presets = {"finetune": finetune_preset, "linear": linear_preset}
    names = {key.rpartition(".")[2] for key, _ in leaves(presets[kind](BACKBONE))}
    root = Path(mimco_deploy.__file__).parent / "training"
    code = "\n".join(path.read_text(encoding="utf-8") for path in root.glob("*.py") if path.stem != "finetune_config")
    assert {name for name in names if not re.search(rf"\.{name}\b", code)} == set()


# --- learning ---------------------------------------------------------------------------------------------------------


def test_both_learn_two_kinds_of_drawings(tmp_path: Path) -> None:
    """Rings and checks in free colours: a half is chance, of 60 pictures 0.63 would be two standard errors above it."""
    draw_classes(tmp_path / "train", 40)
    draw_classes(tmp_path / "val", 30, first=1000)
    backbone = dataclasses.replace(BACKBONE, image_size_px=24, embed_dim=48, num_heads=(3,))
    save_encoder(tmp_path / "encoder", backbone)
    data = DataConfig(sources=(str(tmp_path / "train"),), workers=0, short_side_px=24)
    shared: dict[str, Any] = {"data": data, "val": (str(tmp_path / "val"),), "encoder": str(tmp_path / "encoder")}
    run = run_config(epochs=15, global_batch_size=20)
    tuned = dataclasses.replace(
        finetune_preset(backbone),
        run=run,
        optim=FinetuneOptimConfig(base_lr=0.02, layer_decay=0.9, warmup_epochs=2.0, clip_norm=5.0),
        **shared,
    )
    probed = dataclasses.replace(
        linear_preset(backbone),
        run=run,
        optim=LinearOptimConfig(base_lr=1.0),
        views=LinearViewsConfig(min_crop_scale=0.5),
        **shared,
    )
    for name, config in (("tuned", tuned), ("probed", probed)):
        train_with_labels(config, tmp_path / name)
        rows = rows_of(tmp_path / name)
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert max(rows[-1]["val_top1"], rows[-2]["val_top1"]) > (0.75 if name == "tuned" else 0.65), name


# --- the encoder afterwards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("backbone", [BACKBONE, SWIN], ids=["ViT", "Swin"])
def test_the_fine_tuned_encoder_exports_with_the_pooling_of_its_head(
    tmp_path: Path, here: Path, backbone: BackboneConfig, pooling: Any
) -> None:
    save_encoder(tmp_path / "encoder", backbone)
    config = dataclasses.replace(
        finetune_config(here, checkpoint_every_steps=1000),
        encoder=str(tmp_path / "encoder"),
        backbone=backbone,
        method=FinetuneMethodConfig(pooling=pooling),
    )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, epochs=1))
    train_with_labels(config, tmp_path / "run")
    saved = read_run(tmp_path / "run/last", "finetune")
    method = build_classifier(config, 2, saved).eval()
    source = from_model(str(tmp_path / "run/last/timm"))
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        embedding = EncoderModule(source.backbone, source.pooling)(pixels)
        inputs = ToInput(backbone)(pixels.permute(0, 3, 1, 2))
        wanted = torch.nn.functional.normalize(method.encoder(inputs).pooled(pooling), dim=1)
    assert isinstance(embedding, torch.Tensor)
    torch.testing.assert_close(embedding, wanted)


def test_an_encoder_is_fine_tuned_at_another_size(tmp_path: Path, here: Path) -> None:
    config = finetune_config(here)
    config = dataclasses.replace(
        config, backbone=dataclasses.replace(BACKBONE, image_size_px=24), run=dataclasses.replace(config.run, epochs=1)
    )
    train_with_labels(config, tmp_path / "run")
    saved = read_run(tmp_path / "run/last", "finetune")
    assert saved.load_model()["encoder.body.pos_embed"].shape == (1, 37, 24)
    assert build_classifier(config, 2, saved).encoder.config.image_size_px == 24


# --- the command line -------------------------------------------------------------------------------------------------


def mimco(workspace: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), *map(str, arguments)])


@BOTH
def test_the_command_trains_measures_and_resumes(tmp_path: Path, here: Path, kind: str) -> None:
    """A tiny ViT at 32 px with the values that follow from it."""
    save_encoder(tmp_path / "encoder", dataclasses.replace(BACKBONE, image_size_px=32))
    train = ("train", kind, "--from", tmp_path / "encoder", "--data", here / "train", "--val", here / "val")
    few = ("--epochs", "2", "--batch-size", "8", "--set", "data.workers=0")
    done = mimco(tmp_path / "w", *train, *few, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["classes"], said["epoch"]) == (2, 2)
    assert said["val_top5"] == 1.0
    assert Path(said["checkpoint"]) == tmp_path / "w" / kind / "last"

    again = mimco(tmp_path / "w", *train, *few)
    assert again.exit_code == 1
    assert "already holds a run; expected --resume to go on or --fresh" in again.output
    changed = mimco(tmp_path / "w", "train", kind, "--resume", "--epochs", "5")
    assert changed.exit_code == 1
    assert "--resume with run.epochs 5, where the run has 2" in changed.output
    assert mimco(tmp_path / "w", "train", kind, "--resume", "--fresh").exit_code == 1
    resumed = mimco(tmp_path / "w", "train", kind, "--resume", "--set", "data.workers=1")
    assert resumed.exit_code == 0, resumed.output
    assert re.search(rf"^{kind}: top-1 \d+\.\d\d%, top-5 100\.00% after 2 epochs, 2 classes", resumed.output, re.M)
    fresh = mimco(tmp_path / "w", *train, *few, "--fresh")
    assert fresh.exit_code == 0, fresh.output
    assert (tmp_path / "w" / f"{kind}-1" / "last").is_dir()


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"no pictures to train on; run: mimco train KIND --data DIR --val DIR"),
        (("--data", "train"), "no pictures to measure on"),
        (
            ("--data", "train", "--val", "val"),
            r"no encoder in .*stage2.last; expected a checkpoint, .*run: mimco train stage2",
        ),
        (("--resume",), "no run in .* to resume; run: mimco train KIND"),
        (("--data", "train", "--val", "val", "--from", "nothing"), "no file .*nothing"),
    ],
)
def test_what_is_missing_is_said_with_the_next_command(
    tmp_path: Path, kind: str, arguments: tuple[str, ...], message: str
) -> None:
    done = mimco(tmp_path / "w", "train", kind, *arguments)
    assert done.exit_code == 1
    assert re.search(message.replace("KIND", kind), done.output), done.output
    assert done.output.count("\n") == 1


def test_the_students_checkpoint_is_the_encoder_where_none_is_named(tmp_path: Path, here: Path) -> None:
    """And a linear probe pools as its loss did."""
    from mimco_deploy.training.stages import train_stage1
    from mimco_deploy.training.supervised_runs import LabelledRequest, open_finetune, open_linear
    from tests.unit.training.small import stage1_config

    train_stage1(stage1_config(here / "train"), tmp_path / "student")
    request = LabelledRequest(data=(here / "train",), val=(here / "val",), settings=("data.workers=0",), epochs=1)
    last = tmp_path / "student/last"
    tuned, _ = open_finetune(tmp_path / "finetune", last, request)
    probed, _ = open_linear(tmp_path / "linear", last, request)
    assert tuned.encoder == probed.encoder == str(last)
    assert (tuned.method.pooling, probed.method.pooling) == ("mean", "cls")
    assert tuned.run.epochs == 1
    assert tuned.optim.warmup_epochs == pytest.approx(0.1)
    train_with_labels(probed, tmp_path / "linear")
    assert len(rows_of(tmp_path / "linear")) == 1


def test_a_broken_checkpoint_is_refused_with_one_line(tmp_path: Path, whole: Path) -> None:
    last = Path(shutil.copytree(whole / "linear/last", tmp_path / "last"))
    with pytest.raises(CheckpointError, match="is linear, version 1; expected finetune, 1"):
        read_run(last, "finetune")
    (last / "optimizer.pt").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read"):
        read_run(last, "linear").restore_optimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    (last / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_run(last, "linear").load_model()
    (last / "state.json").write_text('{"format_version": 1, "kind": "linear"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_run(last, "linear")
    with pytest.raises(CheckpointError, match="no run in"):
        read_run(tmp_path / "nothing", "linear")
    assert Progress(total_steps=1, corpus="", licence="").rows == []


# --- two processes ----------------------------------------------------------------------------------------------------


def plain(here: Path) -> FinetuneConfig:
    """Without what a process draws for itself."""
    return dataclasses.replace(
        finetune_config(here),
        backbone=BACKBONE,
        method=FinetuneMethodConfig(mixup=0.0, cutmix=0.0),
        views=FinetuneViewsConfig(erase=0.0),
    )


if __name__ == "__main__":
    with process_group():  # once: the address cannot be bound again at once
        train_with_labels(plain(Path(sys.argv[1])), Path(sys.argv[2]) / "finetune")
        train_with_labels(linear_config(Path(sys.argv[1])), Path(sys.argv[2]) / "linear")


@contextlib.contextmanager
def two_processes(*arguments: Path) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""},
        **{"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, *map(str, arguments)],
            cwd=REPOSITORY,
            env={**environment, "RANK": number, "LOCAL_RANK": number},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in ("0", "1")
    ]
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.wait()


def test_two_processes_train_as_one_does(tmp_path: Path, here: Path, whole: Path) -> None:
    with two_processes(here, tmp_path / "two") as runs:
        said = [run.communicate(timeout=120)[0] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    train_with_labels(plain(here), tmp_path / "one")
    for kind, one in (("finetune", tmp_path / "one"), ("linear", whole / "linear")):
        ours, theirs = (read_run(folder / "last", kind).load_model() for folder in (tmp_path / "two" / kind, one))
        for name, value in ours.items():
            if not name.endswith("qkv.bias"):  # the keys' part gets no gradient but rounding
                torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
        two, single = rows_of(tmp_path / "two" / kind), rows_of(one)
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in single], rel=1e-4)
        assert [row["epoch"] for row in two] == [1, 2, 3]
        assert [row["val_top1"] for row in two] == pytest.approx([row["val_top1"] for row in single], abs=0.11)
