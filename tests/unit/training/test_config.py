"""Settings: presets, `--set`, JSON; no field that nobody reads."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mimco_deploy
from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import DataConfig, RunConfig, Stage1Config, Stage2Config
from mimco_deploy.training.masking import mask_shape
from mimco_deploy.training.method_config import MimCoConfig, MoCoV3Config
from mimco_deploy.training.methods.mimco import MimCo
from mimco_deploy.training.methods.mocov3 import MoCoV3
from mimco_deploy.training.presets import PRESETS, vit_small, vit_tiny_debug
from mimco_deploy.training.settings import apply_settings, from_document, to_document
from tests.unit.training.small import run_config

TINY1, TINY2 = vit_tiny_debug().stage1, vit_tiny_debug().stage2


def get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("run.epochs=7", 7),
        ("run.seed=0", 0),
        ("optim.weight_decay=0.25", 0.25),
        ("optim.base_lr=1e-4", 1e-4),
        ("optim.base_lr=3", 3.0),
        ("optim.decay=matrices", "matrices"),
        ("optim.cosine_from_start=false", False),
        ("optim.cosine_from_start=True", True),
        ("backbone.depth=3", (3,)),
        ("optim.betas=0.9,0.95", (0.9, 0.95)),
        ("run.precision=bf16", "bf16"),
        ("backbone.name=vit_base_patch16_224", "vit_base_patch16_224"),
        ("data.sources=/a,/b c", ("/a", "/b c")),
        ("data.sources=/a", ("/a",)),
        ("data.sources=", ()),
        ("method.patch.dictionaries=queue,intra", ("queue", "intra")),
        ("method.pooling=cls", "cls"),
        ("method.init_from_teacher=false", False),
        ("teacher=/runs/a=b", "/runs/a=b"),
    ],
)
def test_a_setting_is_read_as_its_fields_type(setting: str, value: Any) -> None:
    key = setting.partition("=")[0]
    changed = apply_settings(TINY2, [setting])
    assert get(changed, key) == value
    assert type(get(changed, key)) is type(value)
    assert apply_settings(changed, [setting]) == changed
    rest = {name: leaf for name, leaf in leaves(to_document(changed)).items() if name != key}
    assert rest == {name: leaf for name, leaf in leaves(to_document(TINY2)).items() if name != key}


def leaves(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in document.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_the_last_setting_wins() -> None:
    assert apply_settings(TINY1, ["run.epochs=3", "run.epochs=4"]).run.epochs == 4
    assert apply_settings(TINY1, []) is TINY1


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("run.epochs=many", "a whole number"),
        ("run.epochs=1.5", "a whole number"),
        ("run.epochs=", "a whole number"),
        ("optim.weight_decay=heavy", "a number"),
        ("optim.cosine_from_start=perhaps", "true or false"),
        ("optim.cosine_from_start=1", "true or false"),
        ("optim.betas=0.9,x", "a number"),
        ("optim.base_lr=inf", "a number"),
        ("optim.base_lr=nan", "a number"),
        ("method.image.temperature=1e999", "a number"),
        ("optim.betas=0.9", "2 values"),
        ("optim.betas=0.9,0.95,0.99", "2 values"),
        ("run.precision=fp16", "auto or fp32 or bf16"),
        ("method.patch.dictionaries=memory", "intra or batch or queue"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type_wanted(setting: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_settings(TINY2, [setting])
    assert setting.partition("=")[0] in error.value.found
    assert wanted in error.value.expected


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.weigth_decay", "optim.weight_decay"),
        ("optim.wd", "optim."),
        ("run.epoch", "run.epochs"),
        ("method.patch.dictionary", "method.patch.dictionaries"),
        ("backbone", "backbone."),
        ("teachr", "teacher"),
        ("mask.mask_ration", "mask.mask_ratio"),
        ("run.epochs.x", "run.epochs"),
        ("", ""),
        ("qqqq", ""),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_whole_key(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_settings(TINY2, [f"{key}=1"])
    assert error.value.found == f"no setting {key}"
    answered = error.value.expected.rpartition(" ")[2]
    assert answered.startswith(nearest)
    assert answered in leaves(to_document(TINY2))


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set run\.epochs; expected --set section\.field=value"):
        apply_settings(TINY1, ["run.epochs"])


@pytest.mark.parametrize(
    ("setting", "least"),
    [
        ("run.accumulate=0", "1"),
        ("run.accumulate=-2", "1"),
        ("run.log_every_steps=0", "1"),
        ("run.checkpoint_every_steps=0", "1"),
        ("run.epochs=0", "1"),
        ("run.global_batch_size=0", "1"),
        ("run.seed=-1", "0"),
        ("run.seed=99999999999999999999999", "0 or more, below"),
        ("backbone.std=0.2,0,0.2", "three values above 0"),
        ("views.blur_radius_px=-3,-1", "two values from 0 on, lower first"),
        ("views.blur_radius_px=2,0.1", "two values from 0 on, lower first"),
        ("data.workers=-1", "0"),
        ("data.short_side_px=0", "1"),
        ("data.memory_mib=-1", "0"),
        ("method.patch.queue_size=0", "0"),
        ("method.patch.batch_keys=0", "0"),
        ("method.patch.temperature=0", "0"),
        ("method.image.temperature=-1", "0"),
        ("views.min_crop_scale=0", "0"),
    ],
)
def test_numbers_that_cannot_be_run_are_refused(setting: str, least: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_settings(TINY2, [setting])
    assert error.value.found.startswith(setting.partition("=")[0])
    assert least in error.value.expected


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY1.run.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_survives_json(preset: str) -> None:
    recipe = PRESETS[preset]()
    for config in (recipe.stage1, recipe.stage2):
        document = json.loads(json.dumps(to_document(config)))
        again = from_document(type(config), document)
        assert again == config
        assert hash(again) == hash(config)  # no list hides in it


@given(
    epochs=st.integers(1, 1000),
    seed=st.integers(0, 2**63 - 1),
    precision=st.sampled_from(["auto", "fp32", "bf16"]),
    names=st.lists(st.text()),
)
@settings(deadline=None)
def test_any_config_survives_json(epochs: int, seed: int, precision: Any, names: list[str]) -> None:
    config = dataclasses.replace(
        TINY1,
        run=run_config(epochs=epochs, seed=seed, precision=precision),
        data=DataConfig(sources=tuple(names)),
    )
    assert from_document(Stage1Config, json.loads(json.dumps(to_document(config)))) == config


def test_a_document_with_missing_or_unknown_fields_is_refused() -> None:
    document = to_document(TINY1.run)
    with pytest.raises(ConfigError, match="RunConfig with"):
        from_document(RunConfig, {**document, "extra": 1})
    document.pop("seed")
    with pytest.raises(ConfigError, match="RunConfig with"):
        from_document(RunConfig, document)


def kinds(kind: Any) -> Iterator[Any]:
    yield kind
    for hint in typing.get_type_hints(kind).values():
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for member in filter(dataclasses.is_dataclass, members):
            yield from kinds(member)


FIELDS = sorted(
    {
        (kind.__name__, field.name)
        for config in (Stage1Config, Stage2Config)
        for kind in kinds(config)
        for field in dataclasses.fields(kind)
    }
)
TRAINING = Path(mimco_deploy.__file__).parent / "training"
CONFIGS = ("config.py", "method_config.py")


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_every_field_is_read_somewhere(kind: str, field: str) -> None:
    """Outside of the configs' own checks: as an attribute that is not assigned to."""
    root = Path(mimco_deploy.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py")) if path.name not in CONFIGS]
    owner = r"(config|run|optim|data|views|mask|method|backbone|patch|image|heads|contrastive|own|given|member)"
    read = re.compile(rf"{owner}\b\.{field}\b(?!\s*=[^=])")
    assert any(read.search(text) for text in texts), f"{kind}.{field} is read nowhere"


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_every_field_has_a_line_that_says_what_it_is(kind: str, field: str) -> None:
    source = "".join((TRAINING / name).read_text(encoding="utf-8") for name in CONFIGS)
    if kind in ("Stage1Config", "Stage2Config") and field != "teacher":
        return  # sections, which say it themselves
    body = source[source.index(f"class {kind}:") :]
    assert re.search(rf'\n    {field}: [^\n]+\n    """\S', body), f"{kind}.{field} has no docstring"


def test_the_debug_preset_builds_and_takes_a_step() -> None:
    recipe = vit_tiny_debug()
    assert isinstance(recipe.stage1.method, MoCoV3Config)
    torch.manual_seed(0)
    teacher = MoCoV3(recipe.stage1.backbone, recipe.stage1.method)
    student = recipe.stage2
    assert isinstance(student.method, MimCoConfig)
    method = MimCo(student.backbone, teacher.encoder, "cls", student.mask, student.method)
    masked = method.mask_shape.masked_patches
    assert sum(p.numel() for p in teacher.encoder.parameters()) == pytest.approx(1.2e6, rel=0.1)
    images = torch.randn(2, 3, 32, 32)
    assert teacher(images, images.flip(3))["loss"].isfinite()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :masked] = True
    assert method(images, mask.view(2, 4, 4))["loss"].isfinite()


def test_the_small_preset_is_the_papers() -> None:
    recipe = vit_small()
    backbone = recipe.stage1.backbone
    assert recipe.stage2.backbone == backbone
    assert (backbone.embed_dim, backbone.depth, backbone.num_heads) == (384, (12,), (12,))
    assert (backbone.image_size_px, backbone.patch_size_px) == (224, 16)
    assert (recipe.stage1.run.epochs, recipe.stage2.run.epochs) == (300, 100)
    assert recipe.stage1.optim.base_lr == 1.5e-4
    assert recipe.stage1.optim.weight_decay == 0.1
    assert recipe.stage1.optim.decay == "all"
    assert recipe.stage1.optim.warmup_epochs == 40
    assert (recipe.stage1.method.temperature, recipe.stage1.method.momentum) == (0.2, 0.99)
    assert mask_shape(224, 16, recipe.stage2.mask).masked_patches == 120
    # SimMIM's 2e-4 is for 512 images
    assert recipe.stage2.optim.base_lr == pytest.approx(2e-4 / 512 * 256)
    assert recipe.stage2.optim.weight_decay == 0.05
    assert recipe.stage2.optim.decay == "weights"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_of_nobody"}, "backbone vit_of_nobody"),
        ({"name": "resnet18"}, "backbone resnet18"),
        ({"patch_size_px": 5}, "vit_tiny_patch16_224 at 32 px, 5 px a token; expected a whole number of tokens"),
        ({"embed_dim": 30, "num_heads": (3,)}, "embed_dim 30"),
        ({"num_heads": (5,)}, "divisible by num_heads"),
        ({"depth": (0,)}, "backbone.depth"),
        ({"depth": (2, 2)}, "one number"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(dataclasses.replace(TINY1.backbone, **changes))


def test_a_backbone_whose_patch_embedding_has_no_bias_is_built() -> None:
    backbone = Backbone(dataclasses.replace(TINY1.backbone, name="vit_base_patch16_clip_224"))
    assert backbone.body.patch_embed.proj.bias is None
