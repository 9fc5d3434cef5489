"""Backbones of several families: tokens, masks, attention, other sizes; and the teacher in a student's grid."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.distributed import synchronise_batch_norm
from mimco_deploy.training.heads import moby_mlp
from mimco_deploy.training.method_config import MimCoConfig
from mimco_deploy.training.methods.mimco import MimCo, masked_positions
from mimco_deploy.training.teacher import Teacher
from tests.unit.training.small import BACKBONE, MASK, SWIN

BEIT = BackboneConfig(
    name="beit_base_patch16_224", image_size_px=16, patch_size_px=4, embed_dim=24, depth=(2,), num_heads=(2,)
)
LARGE = dataclasses.replace(BACKBONE, image_size_px=32, patch_size_px=32)
FAMILIES = pytest.mark.parametrize("config", [BACKBONE, BEIT, SWIN], ids=["vit", "beit", "swin"])


def make(config: BackboneConfig, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(config).eval()


@FAMILIES
def test_tokens_and_the_models_own_vector(config: BackboneConfig) -> None:
    backbone = make(config)
    with torch.no_grad():
        own, patches = backbone(torch.randn(3, 3, 16, 16))
    assert (backbone.grid, backbone.stride_px) == (4, 4)
    assert patches.shape == (3, 16, backbone.width)
    assert own.shape == (3, backbone.width)
    assert torch.allclose(own, patches.mean(dim=1)) == (config is SWIN)
    assert backbone.own_pooling == ("mean" if config is SWIN else "cls")


@FAMILIES
def test_patches_embedded_by_a_product_are_the_convolutions(config: BackboneConfig) -> None:
    projection = make(config).body.patch_embed.proj
    images = torch.randn(3, 3, 16, 24)
    torch.testing.assert_close(projection.as_product(images), projection(images))


@FAMILIES
def test_the_masked_path_without_a_mask_is_timms_own(config: BackboneConfig) -> None:
    backbone = make(config)
    images, nothing = torch.randn(2, 3, 16, 16), torch.zeros(2, 16 // backbone.patch_px, 16 // backbone.patch_px)
    with torch.no_grad():
        ours = backbone(images, nothing.bool(), backbone.new_mask_token())
        theirs = backbone(images)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@FAMILIES
def test_what_is_masked_is_not_seen(config: BackboneConfig) -> None:
    backbone = make(config)
    token = backbone.new_mask_token()
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, :2], mask[1, :, 3] = True, True
    images, other = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    units = mask.repeat_interleave(4 // backbone.patch_px, 1).repeat_interleave(4 // backbone.patch_px, 2)
    with torch.no_grad():
        seen = backbone(images, units, token)
        under = backbone(torch.where(pixels, other, images), units, token)
        around = backbone(torch.where(pixels, images, other), units, token)
    assert torch.equal(seen.patches, under.patches)
    assert not torch.allclose(seen.patches, around.patches)


def test_the_mask_token_has_the_width_of_an_embedded_patch() -> None:
    assert make(SWIN).new_mask_token().shape == (1, 1, 8)
    assert make(BACKBONE).new_mask_token().shape == (1, 1, 24)


def test_a_model_without_masks_cannot_be_a_student() -> None:
    with pytest.raises(ConfigError, match="masks for resnet10t; expected a student that is a ViT, BEiT or Swin"):
        make(BackboneConfig(name="resnet10t", image_size_px=64)).new_mask_token()


def test_visible_patches_are_encoded_as_if_there_were_no_others() -> None:
    backbone = make(BACKBONE)
    images, other = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    visible = torch.tensor([[0, 5, 9], [15, 2, 3]])
    pixels = torch.zeros(2, 16, dtype=torch.bool).scatter(1, visible, True).view(2, 1, 4, 4)
    pixels = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        seen = backbone(images, visible=visible)
        same = backbone(torch.where(pixels, images, other), visible=visible)
        everything = backbone(images, visible=torch.arange(16).expand(2, 16))
    assert seen.patches.shape == (2, 3, 24)
    assert torch.equal(seen.patches, same.patches)
    torch.testing.assert_close(everything.patches, backbone(images).patches)


def test_attention_is_the_last_blocks_from_the_cls_token() -> None:
    """Against timm's own unfused attention, whose weights a hook sees."""
    backbone = make(BACKBONE)
    images = torch.randn(3, 3, 16, 16)
    features, scores = backbone.attend(images)
    attention = backbone.body.blocks[-1].attn
    attention.fused_attn = False
    seen: list[Tensor] = []
    attention.attn_drop = nn.Identity()
    attention.attn_drop.register_forward_hook(lambda _, __, output: seen.append(output))
    plain = backbone(images)
    (weights,) = seen  # [B, heads, N, N]
    torch.testing.assert_close(scores, weights.mean(dim=1)[:, 0, 1:])
    torch.testing.assert_close(features.patches, plain.patches)
    torch.testing.assert_close(features.own, plain.own)


@pytest.mark.parametrize("config", [SWIN, BEIT], ids=["swin", "beit"])
def test_elsewhere_attention_is_the_cosine_with_the_images_vector(config: BackboneConfig) -> None:
    backbone = make(config)
    features, scores = backbone.attend(torch.randn(3, 3, 16, 16))
    expected = nn.functional.cosine_similarity(features.patches, features.own.unsqueeze(1), dim=2)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("config", [BACKBONE, SWIN], ids=["vit", "swin"])
def test_a_backbone_takes_another_size(config: BackboneConfig) -> None:
    backbone = make(config)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.resize(32)
    assert (backbone.grid, backbone.config.image_size_px) == (8, 32)
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 32, 32)).patches.shape == (1, 64, backbone.width)
    changed = [name for name, value in backbone.state_dict().items() if value.shape != before[name].shape]
    assert changed == (["body.pos_embed"] if config is BACKBONE else [])
    with pytest.raises(ConfigError, match="30 px, 4 px a token; expected a whole number of tokens"):
        backbone.resize(30)


# ------------------------------------------------------------------------------------------------------- the teacher


def test_a_teacher_with_a_finer_grid_is_averaged_to_the_students() -> None:
    fine = make(dataclasses.replace(BACKBONE, patch_size_px=2))
    teacher = Teacher(fine, "cls", make(SWIN))
    images = torch.randn(2, 3, 16, 16)
    features = teacher(images)
    tokens = fine(images).patches.view(2, 4, 2, 4, 2, 24).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(features.patches, tokens)
    torch.testing.assert_close(features.own, fine(images).own)


@pytest.mark.parametrize(
    ("teacher", "student", "names"),
    [
        ({"patch_size_px": 8}, {}, ("2×2", "4×4", "=32")),
        ({"patch_size_px": 4}, {"patch_size_px": 2}, ("4×4", "8×8", "=32")),
        ({"image_size_px": 24, "patch_size_px": 3}, {"image_size_px": 24, "patch_size_px": 4}, ("8×8", "6×6", "=18")),
    ],
    ids=["coarse", "half", "no multiple"],
)
def test_grids_that_do_not_fit_are_both_named(
    teacher: dict[str, Any], student: dict[str, Any], names: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        Teacher(make(dataclasses.replace(BACKBONE, **teacher)), "cls", make(dataclasses.replace(BACKBONE, **student)))
    assert all(name in str(error.value) for name in names)
    size = int(names[2][1:])  # the size that the error suggests does fit
    made = make(dataclasses.replace(BACKBONE, **teacher))
    Teacher(made, "cls", make(dataclasses.replace(BACKBONE, **student)), size)
    assert made.grid % make(dataclasses.replace(BACKBONE, **student)).grid == 0


def test_a_teacher_of_another_size_and_normalisation_sees_the_same_pixels() -> None:
    odd = dataclasses.replace(BACKBONE, image_size_px=32, patch_size_px=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.4, 0.3))
    backbone = make(odd)
    teacher = Teacher(backbone, "cls", make(BACKBONE), image_size_px=32)
    pixels = torch.rand(2, 3, 16, 16)

    def normalised(images: Tensor, config: BackboneConfig) -> Tensor:
        return (images - torch.tensor(config.mean).view(1, 3, 1, 1)) / torch.tensor(config.std).view(1, 3, 1, 1)

    large = nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(
        teacher(normalised(pixels, BACKBONE)).patches, backbone(normalised(large, odd)).patches, rtol=1e-4, atol=1e-5
    )


PAIRS = [(BACKBONE, SWIN), (SWIN, BACKBONE), (SWIN, SWIN), (BEIT, BACKBONE)]


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=["vit-swin", "swin-vit", "swin-swin", "beit-vit"])
@pytest.mark.parametrize("kind", ["random", "attention", "attention_hints"])
def test_students_and_teachers_of_any_family_train_together(
    student: BackboneConfig, teacher: BackboneConfig, kind: Any
) -> None:
    taught = make(teacher)
    method = MimCo(student, taught, taught.own_pooling, dataclasses.replace(MASK, kind=kind), MimCoConfig()).train()
    units = torch.zeros(4, 16, dtype=torch.bool)
    units[:, :10] = True
    row = method(torch.randn(4, 3, 16, 16), method.mask_shape.to_patches(units))
    row["loss"].backward()
    assert row["loss"].isfinite()
    assert method.mask_token.grad is not None


def test_masked_output_tokens_of_a_swin_are_those_under_the_mask() -> None:
    encoder = make(SWIN)
    method = MimCo(SWIN, make(SWIN, 1), "mean", MASK, MimCoConfig())
    units = torch.zeros(2, 16, dtype=torch.bool)
    units[0, :10], units[1, 6:] = True, True
    positions = masked_positions(method.mask_shape.to_patches(units), encoder, method.mask_shape)
    assert positions.tolist() == [list(range(10)), list(range(6, 16))]


def test_a_mask_unit_smaller_than_an_output_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask_patch_size_px 2 for tokens of 4 px; expected a multiple of 4"):
        MimCo(SWIN, make(SWIN, 1), "mean", dataclasses.replace(MASK, mask_patch_size_px=2), MimCoConfig())


def test_batch_norm_is_synchronised_in_heads_and_left_alone_in_a_teachers_network() -> None:
    """timm's batch norm may hold its activation, which torch's conversion would drop."""
    teacher = Teacher(make(BackboneConfig(name="mobilenetv3_small_050", image_size_px=32)), "cls", make(LARGE))
    method = nn.ModuleDict({"head": moby_mlp(4, 8, 4), "teacher": teacher})
    before = {name: type(module) for name, module in method.named_modules()}
    synchronise_batch_norm(method, torch.device("cuda"))
    changed = {name: type(m) for name, m in method.named_modules() if type(m) is not before[name]}
    assert changed == {"head.1": nn.SyncBatchNorm}


@FAMILIES
def test_computing_activations_again_changes_nothing(config: BackboneConfig) -> None:
    config = dataclasses.replace(config, drop_path=0.5)
    backbone = make(config).train()
    mask = torch.rand(4, 16 // backbone.patch_px, 16 // backbone.patch_px) < 0.5
    token, images = backbone.new_mask_token(), torch.randn(4, 3, 16, 16)
    results = []
    for enabled in (False, True):
        backbone.checkpoint_gradients(enabled)
        backbone.zero_grad()
        torch.manual_seed(5)  # of the drop path
        features = backbone(images, mask, token)
        (features.patches.square().mean() + features.own.sum()).backward()
        results.append([features.patches.detach(), *(p.grad for p in backbone.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
