"""What training with labels is made of: heads, mixed pictures and targets, classes, measuring, values."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import mimco_deploy
from mimco_deploy.drawings import draw
from mimco_deploy.errors import ConfigError, DataError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.classifier import FineTuned, LinearProbe, build_classifier
from mimco_deploy.training.config import BackboneConfig, DataConfig
from mimco_deploy.training.finetune_config import (
    FinetuneMethodConfig,
    FinetuneViewsConfig,
    finetune_preset,
    linear_preset,
)
from mimco_deploy.training.labelled import LabelledViews, Validation, accuracy, load_labelled
from mimco_deploy.training.presets import swin_tiny, vit_small, vit_tiny_debug
from mimco_deploy.training.published import load_teacher
from mimco_deploy.training.settings import apply_settings, leaves
from mimco_deploy.training.supervised import make_views, train_with_labels
from tests.unit.training.labelled import (
    BOTH,
    CONFIGS,
    KINDS,
    draw_classes,
    finetune_config,
    linear_config,
)
from tests.unit.training.small import BACKBONE, SWIN, run_config

pytestmark = pytest.mark.usefixtures("on_cpu")


# --- what trains and what does not ------------------------------------------------------------------------------------


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
