"""SimMIM against numbers computed by its authors' own code (tests/golden/README.md says where they come from)."""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import register_model
from timm.models.beit import Beit
from torch import nn

from mimco_deploy.training.config import BackboneConfig, MaskConfig, OptimConfig
from mimco_deploy.training.masking import draw_mask, mask_shape
from mimco_deploy.training.methods.simmim import SimMIM, pixel_loss
from mimco_deploy.training.optim import build_optimizer
from tests.unit.training.golden import assert_final, assert_gradients, deviations_of, leaf, load, renamed, sizes_of
from tests.unit.training.test_moby_golden import swin_of


@register_model
def simmim_vit(**sizes: Any) -> nn.Module:
    """SimMIM's ViT, which timm does not name: one relative-position table for all blocks, no absolute positions."""
    known = inspect.signature(Beit.__init__).parameters
    sizes = {name: value for name, value in sizes.items() if name in known}
    norm: Any = functools.partial(nn.LayerNorm, eps=1e-6)
    return Beit(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1, norm_layer=norm, **sizes)


def our_name(official: str) -> str | None:
    """`encoder.mask_token` → `mask_token`, `decoder.0.weight` → `head.weight`, and timm's names in the encoder."""
    if official.endswith(("attn_mask", "relative_position_index")):
        return None
    if official == "encoder.mask_token":
        return "mask_token"
    if official.startswith("decoder."):
        return official.replace("decoder.0.", "head.")
    rest = official.removeprefix("encoder.")
    rest = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", rest)
    return f"encoder.body.{rest}"


def backbone_of(sizes: dict[str, Any]) -> BackboneConfig:
    if sizes["kind"] == "swin":
        return swin_of(sizes)
    return BackboneConfig(
        name="simmim_vit",
        image_size_px=sizes["img"],
        patch_size_px=sizes["patch"],
        embed_dim=sizes["embed"],
        depth=(sizes["depth"],),
        num_heads=(sizes["heads"],),
    )


@pytest.mark.golden("simmim/tiny_train_seed*.npz")
def test_three_steps_of_training_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    sizes, deviations = sizes_of(arrays), deviations_of(arrays)
    method = SimMIM(backbone_of(sizes), MaskConfig(mask_patch_size_px=sizes["cell"], mask_ratio=sizes["mask_ratio"]))
    init = {name: torch.from_numpy(arrays[official]) for name, official in renamed(arrays, "init", our_name).items()}
    init["head.weight"] = init["head.weight"].flatten(1)  # theirs is a convolution of one pixel
    method.load_state_dict(init, strict=True)
    method.train()
    optimizer = build_optimizer(method, OptimConfig(base_lr=1.0, weight_decay=sizes["weight_decay"], decay="weights"))
    decayed, spared = optimizer.param_groups
    if sizes["kind"] == "vit":  # the authors' code decays the mask token of ViTs alone; ours of none
        decayed["params"].append(method.mask_token)
        spared["params"] = [parameter for parameter in spared["params"] if parameter is not method.mask_token]
    for group in (decayed, spared):
        group["lr"] = sizes["lr"]

    for step in range(3):
        images = torch.from_numpy(arrays[f"step{step}/x"])
        mask = torch.from_numpy(arrays[f"step{step}/mask"]).bool()
        if step == 0:
            np.testing.assert_allclose(
                method.reconstruct(images, mask).detach(), arrays["x_rec0"], rtol=1e-5, atol=1e-5
            )
        loss = method(images, mask)["loss"]
        worst = max(1e-5, 10 * deviations[f"step{step}/loss"][0])
        assert loss.item() == pytest.approx(float(arrays[f"step{step}/loss"]), abs=worst)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(method.parameters(), sizes["clip_grad"])
        assert norm.item() == pytest.approx(float(arrays[f"step{step}/grad_norm"]), rel=1e-3)
        if step == 0:
            assert_gradients(method, arrays, our_name)
        optimizer.step()
        optimizer.zero_grad()
    assert_final(method.state_dict(), arrays, our_name)


@pytest.mark.golden("simmim/l1_seed*.npz")
def test_loss_and_gradient_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    images, predicted = torch.from_numpy(arrays["x"]), leaf(arrays["x_rec"])
    mask = torch.from_numpy(arrays["mask"]).bool()
    loss = pixel_loss(predicted, images, mask)
    np.testing.assert_allclose(loss.item(), arrays["loss"], rtol=1e-6)
    (gradient,) = torch.autograd.grad(loss, predicted)
    np.testing.assert_allclose(gradient, arrays["grad_x_rec"], rtol=1e-5, atol=1e-9)
    for name, everywhere in (("all0", torch.zeros_like(mask)), ("all1", torch.ones_like(mask))):
        np.testing.assert_allclose(
            pixel_loss(predicted, images, everywhere).item(), arrays[f"loss_mask_{name}"], rtol=1e-6
        )


@pytest.mark.golden("simmim/masks_seed*.npz")
def test_masks_have_the_authors_counts_and_units(golden_file: Path) -> None:
    """Their generator is NumPy's and ours torch's: the masks differ, what they can be does not."""
    arrays = load(golden_file)
    for name in ("swin192", "vit224"):
        image, unit, patch = (int(value) for value in arrays[f"{name}_cfg"])
        config = MaskConfig(mask_patch_size_px=unit, mask_ratio=float(arrays[f"{name}_ratio"]))
        shape = mask_shape(image, patch, config)
        theirs = torch.from_numpy(arrays[f"{name}_masks"]).bool()
        assert shape.masked_units == int(arrays[f"{name}_mask_count"])
        for mask in theirs:
            units = mask[:: shape.unit, :: shape.unit]
            assert torch.equal(shape.to_patches(units.flatten()), mask)
            ours = draw_mask(shape)
            assert ours.shape == mask.shape
            assert ours.sum() == mask.sum() == shape.masked_patches


@pytest.mark.parametrize(
    ("name", "backbone"), [("swin_base", "swin_base_patch4_window7_224"), ("vit_base", "simmim_vit")]
)
def test_decay_is_the_authors(golden: Path, name: str, backbone: str) -> None:
    """But for the ViT's mask token, which theirs decays; the field's docstring says so."""
    document = json.loads((golden / f"simmim/pretrain_groups_{name}.json").read_text(encoding="utf-8"))
    size, patch = (192, 4) if name == "swin_base" else (224, 16)
    window = 6 if name == "swin_base" else 0
    method = SimMIM(BackboneConfig(name=backbone, image_size_px=size, patch_size_px=patch, window=window), MaskConfig())
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups = build_optimizer(method, OptimConfig(base_lr=1.0, weight_decay=0.05, decay="weights")).param_groups
    decayed, spared = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    theirs_decayed, theirs_spared = ({our_name(key) for key in document[key]} for key in ("decay", "no_decay"))
    assert (decayed ^ theirs_decayed) == (spared ^ theirs_spared) == (set() if name == "swin_base" else {"mask_token"})
