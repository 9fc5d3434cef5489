"""Backbones of many families, as their users get them: timm's folder in, embeddings of real files out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf

from mimco_deploy.bundle import read_bundle
from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.errors import CheckpointError, ConfigError
from mimco_deploy.export import pipeline
from mimco_deploy.export.pipeline import ExportOptions, export_encoder
from mimco_deploy.export.student import EncoderModule, fingerprint, from_model
from mimco_deploy.preprocess import preprocess, read_pixels
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.encoders.onnx import OnnxEncoder

SMALL_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 64, **SMALL_VIT},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, **SMALL_VIT},
    "vit_relpos_small_patch16_224": {"img_size": 64, **SMALL_VIT},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, **SMALL_VIT},
    "deit3_small_patch16_224": {"img_size": 64, **SMALL_VIT},
    "beit_base_patch16_224": {"img_size": 64, **SMALL_VIT},
    "eva02_tiny_patch14_224": {"img_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 4},
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "embed_dim": 24,
        "depths": (1, 2),
        "num_heads": (2, 4),
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},
    "resnet10t": {},
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "nest_tiny": {"img_size": 64},
}


def folder_of(name: str, folder: Path, **changes: Any) -> Any:
    """A model with weights drawn at random, written as timm writes its own."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **MODELS[name]).eval()
    for parameter in model.parameters():  # norms and biases that start as 1 and 0 would hide a mistake
        parameter.data += 0.02 * torch.randn_like(parameter)
    cfg = {"input_size": (3, side_of(name), side_of(name)), **changes}
    save_for_hf(model, str(folder), model_config={"pretrained_cfg": cfg}, model_args=MODELS[name])
    return model


def side_of(name: str) -> int:
    return int(MODELS[name].get("img_size", 64))


def as_timm_embeds(model: Any, side: int, paths: list[Path], **changes: Any) -> npt.NDArray[np.float32]:
    """By timm's own transform."""
    resolve: Any = resolve_data_config
    config = {**resolve({}, model=model), "input_size": (3, side, side), **changes}
    transform: Any = create_transform(**config)
    with torch.inference_mode():
        features = model(torch.stack([transform(Image.open(path)) for path in paths]))
    return np.asarray(torch.nn.functional.normalize(features, dim=1).numpy())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        draw(KINDS[number], number, 96).resize((96 + 17 * number, 96)).save(path)
    return paths


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_timm_embeds_files_as_timm_does(name: str, photos: list[Path], tmp_path: Path) -> None:
    model = folder_of(name, tmp_path / "timm")
    exported = export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "encoder")
    spec = exported.spec
    assert (spec.architecture, spec.image_size_px) == (name, side_of(name))
    encoder = load_encoder(tmp_path / "encoder")
    pixels = [preprocess(Image.open(path), *spec.geometry) for path in photos]
    np.testing.assert_allclose(
        encoder.embed(np.stack(pixels)), as_timm_embeds(model, spec.image_size_px, photos), atol=2e-5
    )


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet10t"])
def test_other_precisions_of_every_family_pass(name: str, tmp_path: Path) -> None:
    folder_of(name, tmp_path / "timm")
    options = ExportOptions(precisions=("fp16", "bf16"))
    exported = export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "encoder", options)
    assert exported.refused == ()
    assert [artefact.precision for artefact in exported.artefacts] == ["fp32", "fp16", "bf16"]


def test_the_models_own_crop_filter_and_statistics_are_kept(photos: list[Path], tmp_path: Path) -> None:
    changes = {"crop_pct": 0.95, "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    model = folder_of("resnet10t", tmp_path / "timm", **changes)
    spec = export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "encoder").spec
    assert (spec.crop_share, spec.interpolation) == (0.95, "bilinear")
    pixels = np.stack([preprocess(Image.open(path), *spec.geometry) for path in photos])
    found = load_encoder(tmp_path / "encoder").embed(pixels)
    np.testing.assert_allclose(found, as_timm_embeds(model, spec.image_size_px, photos, **changes), atol=2e-5)


def test_a_model_that_is_shown_whole_pictures_squashed_is_shown_them_so(photos: list[Path], tmp_path: Path) -> None:
    """As those of timm at 384 px."""
    changes = {"crop_pct": 1.0, "crop_mode": "squash"}
    model = folder_of("convnext_atto", tmp_path / "timm", **changes)
    spec = export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "encoder").spec
    assert (spec.crop_share, spec.crop_mode) == (1.0, "squash")
    pixels = np.stack([read_pixels(path, *spec.geometry) for path in photos])
    found = load_encoder(tmp_path / "encoder").embed(pixels)
    np.testing.assert_allclose(found, as_timm_embeds(model, spec.image_size_px, photos, **changes), atol=2e-5)
    centred = np.stack([read_pixels(path, *spec.geometry[:3]) for path in photos])
    assert not np.array_equal(pixels, centred)


def test_another_image_size_is_interpolated_once(tmp_path: Path) -> None:
    model: Any = folder_of("vit_tiny_patch16_224", tmp_path / "timm")
    source = from_model(str(tmp_path / "timm"))
    spec = export_encoder(source, tmp_path / "encoder", ExportOptions(image_size_px=96, with_patches=True)).spec
    assert (spec.image_size_px, spec.patch_grid) == (96, 6)
    model.set_input_size(img_size=(96, 96))
    images = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        tokens = model.forward_features((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
        expected = torch.nn.functional.normalize(model.forward_head(tokens), dim=1)
    encoder = load_encoder(tmp_path / "encoder")
    assert isinstance(encoder, OnnxEncoder)
    embeddings, patches = encoder.embed_with_patches(images)
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=2e-5)
    assert patches.shape == (3, 36, 48)
    np.testing.assert_allclose(patches, tokens[:, 1:].numpy(), atol=2e-4)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_maps_come_out_row_by_row(name: str, tmp_path: Path) -> None:
    folder_of(name, tmp_path / "timm")
    source = from_model(str(tmp_path / "timm"))
    options = ExportOptions(image_size_px=None if name.startswith("swin") else 64, with_patches=True)
    spec = export_encoder(source, tmp_path / "encoder", options).spec
    encoder = load_encoder(tmp_path / "encoder")
    assert isinstance(encoder, OnnxEncoder)
    images = np.zeros((2, spec.image_size_px, spec.image_size_px, 3), np.uint8)
    images[1, : spec.image_size_px // 2] = 255  # a white upper half
    _, patches = encoder.embed_with_patches(images)
    assert patches.shape[1] == spec.patch_grid**2
    rows = np.abs(patches[1] - patches[0]).reshape(spec.patch_grid, spec.patch_grid, -1).mean(axis=2)
    assert np.ptp(rows, axis=1).mean() < np.ptp(rows, axis=0).mean()


def test_a_size_that_no_patch_tiles_is_refused(tmp_path: Path) -> None:
    folder_of("vit_tiny_patch16_224", tmp_path / "timm")
    with pytest.raises(ConfigError, match="whole number of tokens"):
        export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "encoder", ExportOptions(image_size_px=50))
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("pvt_v2_b0", 128, "at 128 px: mimco builds it at its own size only; expected 224 px"),
        ("pvt_v2_b0", 100, "at 100 px: mimco builds it at its own size only; expected 224 px"),
        ("levit_128s", 128, "does not take 128 px: .*; expected 224 px, its own: leave --image-size out"),
    ],
)
def test_a_size_that_a_model_does_not_take_is_answered_with_its_own(
    tmp_path: Path, name: str, side: int, message: str
) -> None:
    save_for_hf(timm.create_model(name, num_classes=0), str(tmp_path / "timm"))
    with pytest.raises(ConfigError, match=message):
        export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "e", ExportOptions(image_size_px=side))


def test_patches_that_make_no_square_are_refused_before_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CoaT counts its CLS token among them."""
    monkeypatch.delattr(pipeline, "convert")
    save_for_hf(timm.create_model("coat_lite_tiny", num_classes=0), str(tmp_path / "timm"))
    with pytest.raises(ConfigError, match=r"coat_lite_tiny gives 50 tokens; expected 7² = 49 for --with-patches"):
        export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "e", ExportOptions(with_patches=True))


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_weights_that_are_no_numbers_are_named_before_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: float
) -> None:
    monkeypatch.delattr(pipeline, "convert")
    model = folder_of("resnet10t", tmp_path / "timm")
    model.layer1[0].conv1.weight.data[0] = broken
    save_for_hf(model, str(tmp_path / "timm"))
    error, message = (
        (CheckpointError, r"nor is its weight layer1\.0\.conv1\.weight") if broken else (NameError, "convert")
    )
    with pytest.raises(error, match=message):
        export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "e")


def test_a_model_that_gives_several_maps_is_refused_by_name(tmp_path: Path) -> None:
    model = timm.create_model("crossvit_tiny_240", num_classes=0)
    save_for_hf(model, str(tmp_path / "timm"))
    with pytest.raises(CheckpointError, match=r"timm as an encoder: .*expected a model that gives one map"):
        from_model(str(tmp_path / "timm"))


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file"):
        from_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("licence", "stated", "expected"),
    [
        ("cc-by-nc-4.0", None, "cc-by-nc-4.0, by timm"),
        ("cc-by-nc-4.0", "MIT", "cc-by-nc-4.0, by timm; stated for the rest: MIT"),
        ("apache-2.0", None, "apache-2.0"),
        ("apache-2.0", "MIT", "MIT"),
    ],
)
def test_a_licence_that_forbids_commerce_taints_the_bundle(
    tmp_path: Path, licence: str, stated: str | None, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of("resnet10t", tmp_path / "timm", license=licence)
    export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "encoder", ExportOptions(licence=stated))
    assert read_bundle(tmp_path / "encoder").spec.licence == expected
    assert ("so is the bundle" in caplog.text) == (licence == "cc-by-nc-4.0")
    assert f"- **Licence**: {expected}\n" in (tmp_path / "encoder/MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_model_built_otherwise_has_another_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for number, args in enumerate([{}, {"act_layer": "silu"}, {"global_pool": "max"}]):
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=0, **args)  # type: ignore[arg-type]
        save_for_hf(model, str(tmp_path / str(number)), model_args=args)
        source = from_model(str(tmp_path / str(number)))
        prints.add(fingerprint(EncoderModule(source.backbone, source.pooling)))
    assert len(prints) == 3


def test_a_swin_whose_windows_differ_is_not_resized(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("swin_s3_tiny_224", num_classes=0), str(tmp_path / "timm"))
    with pytest.raises(ConfigError, match="expected a Swin of one window size"):
        export_encoder(from_model(str(tmp_path / "timm")), tmp_path / "e", ExportOptions(image_size_px=448))


def test_names_that_are_no_text_are_made_readable(tmp_path: Path) -> None:
    """Of a model's folder, of a licence and of where the bundle goes; what is written is UTF-8."""
    model, target = tmp_path / os.fsdecode(b"m\xff"), tmp_path / os.fsdecode(b"e\xff")
    folder_of("vit_tiny_patch16_224", model)
    options = ExportOptions(precisions=("fp16",), licence=os.fsdecode(b"l\xff"))
    assert export_encoder(from_model(str(model)), target, options).refused == ()
    spec = read_bundle(target).spec
    assert (spec.weights_source, spec.licence) == ("m�", "l�")
    assert "- **Weights**: m�\n" in (target / "MODEL_CARD.md").read_text(encoding="utf-8")
    load_encoder(target)
