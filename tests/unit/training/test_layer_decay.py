"""Layer-wise learning rates: against the tables of MAE's and SimMIM's code, and what they must be anywhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.classifier import FineTuned
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.finetune_config import FinetuneMethodConfig, finetune_preset
from mimco_deploy.training.layer_decay import decayed_groups, layer_numbers
from mimco_deploy.training.method_config import Pooling
from mimco_deploy.training.presets import vit_small
from tests.unit.training.small import BACKBONE, SWIN

Table = dict[str, tuple[float, float]]
"""Parameter → lr scale and weight decay."""


def fine_tuned(backbone: BackboneConfig, pooling: Pooling = "mean", classes: int = 10) -> FineTuned:
    config = dataclasses.replace(finetune_preset(backbone), method=FinetuneMethodConfig(pooling=pooling))
    return FineTuned(Backbone(backbone), config, classes)


def table_of(method: nn.Module, layer_decay: float, weight_decay: float = 0.05) -> Table:
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups = decayed_groups(method, layer_decay, weight_decay)
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def official(path: Path) -> tuple[dict[str, Any], Table]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return document, {name: (row["lr_scale"], row["weight_decay"]) for name, row in document["params"].items()}


def assert_same(ours: Table, theirs: Table) -> None:
    assert ours.keys() == theirs.keys()
    for name, row in theirs.items():
        assert ours[name] == pytest.approx(row), name


@pytest.mark.golden("mae/lrd_vit_small_ld065_*.json")
def test_a_vit_has_the_rates_and_decay_of_maes_code(golden_file: Path) -> None:
    document, theirs = official(golden_file)
    pooling: Pooling = "mean" if document["global_pool"] else "cls"
    ours = table_of(fine_tuned(vit_small().stage2.backbone, pooling), document["layer_decay"])
    mapped = {}
    for name, row in theirs.items():
        ahead = name.startswith(("head.", "fc_norm."))
        mapped[name.replace("fc_norm.", "norm.") if ahead else f"encoder.body.{name}"] = row
    if pooling == "mean":  # MAE's norm of the mean takes the place of the encoder's last one, which ours keeps
        assert {ours.pop(f"encoder.body.norm.{kind}") for kind in ("weight", "bias")} == {(1.0, 0.0)}
    assert_same(ours, mapped)


@pytest.mark.golden("simmim/finetune_groups_swin_base_ld09.json")
def test_a_swin_has_the_rates_and_decay_of_simmims_code(golden_file: Path) -> None:
    document, theirs = official(golden_file)
    backbone = BackboneConfig(name="swin_base_patch4_window7_224", image_size_px=224)
    ours = table_of(fine_tuned(backbone), document["layer_decay"])
    mapped = {}
    for name, row in theirs.items():
        stage, downsample = name.split(".")[1], ".downsample." in name
        name = name.replace(f"layers.{stage}.downsample", f"layers.{int(stage) + 1}.downsample") if downsample else name
        mapped[name if name.startswith("head.") else f"encoder.body.{name}"] = row
    assert {ours.pop(f"norm.{kind}") for kind in ("weight", "bias")} == {(1.0, 0.0)}  # the head's own; theirs has none
    assert_same(ours, mapped)


@pytest.mark.golden("simmim/finetune_groups_vit_base_ld065.json")
def test_simmims_vit_has_the_rates_of_its_code_and_spares_the_tables(golden_file: Path) -> None:
    """Its code lets relative-position tables decay in a ViT and not in a Swin; ours in neither."""
    document, theirs = official(golden_file)
    ours = table_of(fine_tuned(BackboneConfig(name="beit_base_patch16_224", image_size_px=224)), 0.65)
    assert document["layer_decay"] == 0.65
    mapped = {}
    for name, row in theirs.items():
        ahead = name.startswith(("head.", "fc_norm."))
        mapped[name.replace("fc_norm.", "norm.") if ahead else f"encoder.body.{name}"] = row
    tables = {name for name in ours if name.endswith("relative_position_bias_table")}
    assert len(tables) == 12
    assert {mapped[name][1] for name in tables} == {0.05}
    assert {ours[name][1] for name in tables} == {0.0}
    decaying = {name: (row[0], 0.05 if name in tables else row[1]) for name, row in ours.items()}
    assert {decaying.pop(f"encoder.body.norm.{kind}") for kind in ("weight", "bias")} == {(1.0, 0.0)}
    assert_same(decaying, mapped)


@pytest.mark.parametrize("backbone", [BACKBONE, SWIN], ids=["ViT", "Swin"])
def test_every_trained_parameter_is_in_one_group(backbone: BackboneConfig) -> None:
    method = fine_tuned(backbone)
    listed = [parameter for group in decayed_groups(method, 0.5, 0.05) for parameter in group["params"]]
    assert len(listed) == len({id(parameter) for parameter in listed}) == len(list(method.parameters()))
    assert all(parameter.requires_grad for parameter in method.parameters())


@pytest.mark.parametrize("backbone", [BACKBONE, SWIN], ids=["ViT", "Swin"])
def test_a_layer_decay_of_one_is_none(backbone: BackboneConfig) -> None:
    assert {scale for scale, _ in table_of(fine_tuned(backbone), 1.0).values()} == {1.0}


def test_merging_of_patches_belongs_to_the_last_block_before_it() -> None:
    names = [name for name, _ in Backbone(SWIN).body.named_parameters()]
    numbers = layer_numbers(names)
    assert numbers["patch_embed.proj.weight"] == 0
    assert numbers["layers.0.blocks.0.attn.qkv.weight"] == numbers["layers.1.downsample.reduction.weight"] == 1
    assert [numbers[f"layers.1.blocks.{block}.norm1.weight"] for block in (0, 1)] == [2, 3]
    assert numbers["norm.weight"] == 4


def test_what_norms_the_tokens_before_the_blocks_goes_with_their_embedding() -> None:
    body = timm.create_model("vit_base_patch32_clip_224", embed_dim=16, depth=2, num_heads=2, num_classes=0)
    numbers = layer_numbers(name for name, _ in body.named_parameters())
    assert {numbers[name] for name in ("norm_pre.weight", "norm_pre.bias", "cls_token", "patch_embed.proj.weight")} == {
        0
    }
    assert (numbers["blocks.1.mlp.fc1.bias"], numbers["norm.weight"]) == (2, 3)


def test_layers_of_a_model_without_blocks_are_refused_but_at_one() -> None:
    method = fine_tuned(BackboneConfig(name="resnet18", image_size_px=64))
    with pytest.raises(ConfigError, match=r"layer_decay 0\.5 for resnet18; expected a ViT, BEiT or Swin, or --set"):
        decayed_groups(method, 0.5, 0.05)
    assert {scale for scale, _ in table_of(method, 1.0).values()} == {1.0}


def test_adamw_moves_a_layer_by_its_own_rate() -> None:
    """timm's schedule multiplies each group's rate by `lr_scale`."""
    from mimco_deploy.training.schedules import lr_schedule
    from mimco_deploy.training.supervised import build_optimizer, schedule_of

    method = fine_tuned(BACKBONE)
    config = finetune_preset(BACKBONE)
    optimizer = build_optimizer(method, config)
    schedule = lr_schedule(optimizer, schedule_of(config), steps_per_epoch=10, epochs=30, global_batch_size=256)
    schedule.step_update(30)  # where the warm-up ends
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([1e-3 * 0.75**power for power in (3, 2, 1, 0)])
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: float((value.detach() - before[name]).abs().max()) for name, value in method.named_parameters()}
    assert moved["encoder.body.blocks.0.norm1.bias"] == pytest.approx(1e-3 * 0.75**2, rel=1e-3)
    assert moved["head.bias"] == pytest.approx(1e-3, rel=1e-3)
