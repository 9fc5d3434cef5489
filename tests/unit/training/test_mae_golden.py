"""MAE against numbers computed by its authors' own code (tests/golden/README.md says where they come from)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mimco_deploy.training.config import BackboneConfig, MaskConfig, OptimConfig
from mimco_deploy.training.masking import mask_shape
from mimco_deploy.training.method_config import MAEConfig
from mimco_deploy.training.methods.mae import MAE, patch_pixel_loss, to_patches
from mimco_deploy.training.optim import build_optimizer
from mimco_deploy.training.schedules import lr_schedule
from mimco_deploy.training.vit import sincos_positions
from tests.unit.training.golden import assert_final, assert_gradients, deviations_of, leaf, load, renamed, sizes_of


def our_name(official: str) -> str:
    """`decoder_pos_embed` → `decoder_positions`; what is no decoder's is the encoder's."""
    if official.startswith(("decoder_", "mask_token")):
        return official.replace("decoder_pos_embed", "decoder_positions")
    return f"encoder.body.{official}"


def mask_from(noise: np.ndarray[tuple[int, ...], np.dtype[np.float32]], kept: int) -> torch.Tensor:
    """The authors keep the patches of least noise."""
    mask = torch.ones(noise.shape, dtype=torch.bool)
    return mask.scatter(1, torch.from_numpy(noise).argsort(dim=1)[:, :kept], False)


@pytest.mark.golden("mae/tiny_train_seed*.npz")
def test_three_steps_of_training_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    sizes, deviations = sizes_of(arrays), deviations_of(arrays)
    backbone = BackboneConfig(
        name="vit_small_patch16_224",
        image_size_px=sizes["img"],
        patch_size_px=sizes["patch"],
        embed_dim=sizes["e"],
        depth=(sizes["d"],),
        num_heads=(sizes["h"],),
    )
    config = MAEConfig(
        decoder_dim=sizes["de"], decoder_depth=sizes["dd"], decoder_heads=sizes["dh"], normalised_pixels=sizes["npl"]
    )
    method = MAE(backbone, MaskConfig(mask_patch_size_px=sizes["patch"], mask_ratio=sizes["r"]), config)
    init = {name: torch.from_numpy(arrays[official]) for name, official in renamed(arrays, "init", our_name).items()}
    method.load_state_dict(init, strict=True)
    method.train()
    optim = OptimConfig(base_lr=1.0, weight_decay=sizes["weight_decay"], decay="matrices", betas=tuple(sizes["betas"]))
    optimizer = build_optimizer(method, optim)
    patches = (sizes["img"] // sizes["patch"]) ** 2

    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = float(arrays[f"step{step}/lr"])
        images = torch.from_numpy(arrays[f"step{step}/x"])
        mask = mask_from(arrays[f"step{step}/noise"], patches - method.mask_shape.masked_patches)
        if step == 0:
            np.testing.assert_array_equal(mask, arrays["mask0"].astype(bool))
            np.testing.assert_allclose(method.reconstruct(images, mask).detach(), arrays["pred0"], rtol=1e-4, atol=1e-5)
        loss = method(images, mask.view(len(mask), int(patches**0.5), -1))["loss"]
        worst = max(1e-5, 10 * deviations[f"step{step}/loss"][0])
        assert loss.item() == pytest.approx(float(arrays[f"step{step}/loss"]), abs=worst)
        loss.backward()
        if step == 0:
            assert_gradients(method, arrays, our_name)
        optimizer.step()
        optimizer.zero_grad()
    assert_final(method.state_dict(), arrays, our_name)


@pytest.mark.golden("mae/patchify_loss_seed*.npz")
def test_patches_loss_and_gradient_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    images, patch = torch.from_numpy(arrays["imgs"]), int(arrays["patch_size"])
    np.testing.assert_array_equal(to_patches(images, patch), arrays["patchified"])
    mask = torch.from_numpy(arrays["mask"]).bool()
    for number, normalised in enumerate((False, True)):
        predicted = leaf(arrays["pred"])
        loss = patch_pixel_loss(predicted, images, mask, patch, normalised=normalised)
        np.testing.assert_allclose(loss.item(), arrays[f"loss_normpix{number}"], rtol=1e-6)
        (gradient,) = torch.autograd.grad(loss, predicted)
        np.testing.assert_allclose(gradient, arrays[f"grad_pred_normpix{number}"], rtol=1e-5, atol=1e-9)


@pytest.mark.golden("mae/random_masking_seed*.npz")
def test_as_many_patches_are_kept_as_by_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    side = int(arrays["noise"].shape[1] ** 0.5)
    shape = mask_shape(side * 16, 16, MaskConfig(mask_patch_size_px=16, mask_ratio=float(arrays["mask_ratio"])))
    assert side**2 - shape.masked_patches == arrays["ids_keep"].shape[1]
    np.testing.assert_array_equal(mask_from(arrays["noise"], arrays["ids_keep"].shape[1]), arrays["mask"].astype(bool))


def test_positions_are_the_authors_with_the_halves_swapped(golden: Path) -> None:
    """MAE's first half tells the column, MoCo v3's the row; we keep MoCo v3's order, which a linear layer undoes."""
    arrays = load(golden / "mae/pos_embed.npz")
    ours = sincos_positions(8, 3)
    swapped = torch.cat([ours[:, 4:], ours[:, :4]], dim=1)
    np.testing.assert_allclose(swapped, arrays["small_8_grid3"], rtol=0, atol=1e-6)
    ours = sincos_positions(512, 14)[29]
    np.testing.assert_allclose(torch.cat([ours[256:], ours[:256]]), arrays["decoder512_row29"], rtol=0, atol=1e-6)


def test_learning_rate_is_the_authors(golden: Path) -> None:
    document = json.loads((golden / "mae/lr_schedule.json").read_text(encoding="utf-8"))
    for case in document["cases"]:
        config = OptimConfig(
            base_lr=case["lr"],
            weight_decay=0.05,
            decay="matrices",
            warmup_epochs=case["warmup_epochs"],
            min_lr=case["min_lr"],
        )
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
        steps = 1000  # an epoch: the authors' epochs are fractions
        schedule = lr_schedule(optimizer, config, steps_per_epoch=steps, epochs=case["epochs"], global_batch_size=256)
        for row in case["rows"]:
            schedule.step_update(round(row["epoch"] * steps))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(row["lr"], rel=1e-9, abs=1e-18)
