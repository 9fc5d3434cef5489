"""MoCo v3 against numbers computed by its authors' own code (tests/golden/README.md says where they come from)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mimco_deploy.training.config import BackboneConfig, OptimConfig
from mimco_deploy.training.heads import mocov3_mlp
from mimco_deploy.training.method_config import MoCoV3Config
from mimco_deploy.training.methods.mocov3 import MoCoV3, contrastive_loss
from mimco_deploy.training.optim import build_optimizer
from mimco_deploy.training.schedules import lr_schedule, momentum_at
from mimco_deploy.training.vit import sincos_positions
from tests.unit.training.golden import assert_final, assert_gradients, deviations_of, leaf, load, renamed, sizes_of


@pytest.mark.golden("moco-v3/contrastive_seed*.npz")
def test_loss_and_gradient_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    temperatures = [name.split("_T")[1].split("_")[0] for name in arrays if name.startswith("w1_T") and "_loss" in name]
    assert temperatures
    for text in temperatures:
        q, q2 = leaf(arrays["w1_q"]), leaf(arrays["w1_q2"])
        k, k2 = torch.from_numpy(arrays["w1_k"]), torch.from_numpy(arrays["w1_k2"])
        loss = contrastive_loss(q, k, float(text))
        torch.testing.assert_close(loss.detach().numpy(), arrays[f"w1_T{text}_loss"], rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss, q)
        np.testing.assert_allclose(gradient, arrays[f"w1_T{text}_grad_q"], rtol=1e-5, atol=1e-7)

        symmetric = contrastive_loss(q, k2, float(text)) + contrastive_loss(q2, k, float(text))
        np.testing.assert_allclose(symmetric.item(), arrays[f"w1_T{text}_symloss"], rtol=1e-6)
        gradient1, gradient2 = torch.autograd.grad(symmetric, (q, q2))
        np.testing.assert_allclose(gradient1, arrays[f"w1_T{text}_sym_grad_q1"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradient2, arrays[f"w1_T{text}_sym_grad_q2"], rtol=1e-5, atol=1e-7)


@pytest.mark.golden("moco-v3/contrastive_seed*.npz")
def test_each_of_two_ranks_computes_the_authors_loss(golden_file: Path) -> None:
    arrays = load(golden_file)
    keys = {
        name: torch.from_numpy(np.concatenate([arrays[f"w2_r0_{name}"], arrays[f"w2_r1_{name}"]]))
        for name in ("k", "k2")
    }
    for rank in (0, 1):
        q, q2 = leaf(arrays[f"w2_r{rank}_q"]), leaf(arrays[f"w2_r{rank}_q2"])
        for text in ("0.2", "1.0"):
            prefix, own = f"w2_r{rank}_T{text}", rank * len(q)
            np.testing.assert_allclose(
                contrastive_loss(q, keys["k"], float(text), own).item(), arrays[f"{prefix}_loss"], rtol=1e-6
            )
            symmetric = contrastive_loss(q, keys["k2"], float(text), own) + contrastive_loss(
                q2, keys["k"], float(text), own
            )
            np.testing.assert_allclose(symmetric.item(), arrays[f"{prefix}_symloss"], rtol=1e-6)
            gradient1, gradient2 = torch.autograd.grad(symmetric, (q, q2))
            np.testing.assert_allclose(gradient1, arrays[f"{prefix}_sym_grad_q1"], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(gradient2, arrays[f"{prefix}_sym_grad_q2"], rtol=1e-5, atol=1e-7)


def test_positions_are_the_authors(golden: Path) -> None:
    arrays = load(golden / "moco-v3/pos_embed.npz")
    for name, dim, grid in (("vit_small_full", 384, 14), ("small_8_grid3x3", 8, 3), ("small_24_grid4x4", 24, 4)):
        np.testing.assert_allclose(sincos_positions(dim, grid), arrays[name], rtol=0, atol=1e-6)


def test_lr_and_momentum_are_the_authors(golden: Path) -> None:
    document = json.loads((golden / "moco-v3/schedules.json").read_text(encoding="utf-8"))
    steps_per_epoch = document["iters_per_epoch_used"]
    for case in document["cases"]:
        config = OptimConfig(
            base_lr=case["base_lr"], weight_decay=0.1, decay="all", warmup_epochs=case["warmup_epochs"]
        )
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        schedule = lr_schedule(
            optimizer,
            config,
            steps_per_epoch=steps_per_epoch,
            epochs=case["epochs"],
            global_batch_size=case["batch_size"],
        )
        for row in case["rows"]:
            step = round(row["epoch"] * steps_per_epoch)
            schedule.step_update(step)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(row["lr"], rel=1e-9, abs=1e-15)
            progress = row["epoch"] / case["epochs"]
            assert momentum_at(progress, case["moco_m"]) == pytest.approx(row["moco_m"], rel=1e-12)


def test_heads_have_the_authors_layers(golden: Path) -> None:
    document = json.loads((golden / "moco-v3/mlp_layouts.json").read_text(encoding="utf-8"))
    layouts = document["vit_small"]
    for name, head in (("projector_base", mocov3_mlp(3, 384, 4096, 256)), ("predictor", mocov3_mlp(2, 256, 4096, 256))):
        assert len(head) == len(layouts[name])
        for module, layer in zip(head, layouts[name], strict=True):
            assert type(module).__name__ == layer["type"]
            for field in ("in_features", "out_features", "num_features", "affine", "eps", "momentum"):
                if field in layer:
                    assert getattr(module, field) == layer[field]
            if "bias" in layer:
                assert (module.bias is not None) == layer["bias"]


def our_name(official: str) -> str:
    """`base_encoder.head.3.weight` → `projector.3.weight`, `base_encoder.norm.bias` → `encoder.body.norm.bias`."""
    side, _, rest = official.partition(".")
    prefix = {"base_encoder": "", "momentum_encoder": "momentum_", "predictor": ""}[side]
    if side == "predictor":
        return official
    return f"{prefix}projector.{rest[5:]}" if rest.startswith("head.") else f"{prefix}encoder.body.{rest}"


@pytest.mark.golden("moco-v3/tiny_train_seed*.npz")
def test_three_steps_of_training_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    sizes, deviations = sizes_of(arrays), deviations_of(arrays)
    backbone = BackboneConfig(
        name="vit_small_patch16_224",
        image_size_px=sizes["img"],
        patch_size_px=sizes["patch"],
        embed_dim=sizes["dim_e"],
        depth=(sizes["depth"],),
        num_heads=(sizes["heads"],),
    )
    config = MoCoV3Config(temperature=sizes["T"], hidden_dim=sizes["mlp"], projection_dim=sizes["dim"])
    method = MoCoV3(backbone, config)
    init = {name: torch.from_numpy(arrays[official]) for name, official in renamed(arrays, "init", our_name).items()}
    method.load_state_dict(init, strict=True)
    method.train()
    optimizer = build_optimizer(method, OptimConfig(base_lr=1.0, weight_decay=sizes["weight_decay"], decay="all"))

    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = float(arrays[f"step{step}/lr"])
        method.update_momentum_encoder(float(arrays[f"step{step}/m"]))
        view1, view2 = (torch.from_numpy(arrays[f"step{step}/x{view}"]) for view in (1, 2))
        loss = method(view1, view2)["loss"]
        worst = max(1e-5, 10 * deviations[f"step{step}/loss"][0])
        assert loss.item() == pytest.approx(float(arrays[f"step{step}/loss"]), abs=worst)
        loss.backward()
        if step == 0:
            assert_gradients(method, arrays, our_name)
        optimizer.step()
        optimizer.zero_grad()
    assert_final(method.state_dict(), arrays, our_name)


def test_equal_embeddings_give_log_n() -> None:
    same = torch.ones(8, 4)
    assert contrastive_loss(same, same, 0.2).item() == pytest.approx(0.4 * np.log(8), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_is_the_papers_formula_in_plain_loops(temperature: float) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(5, 7)), rng.normal(size=(9, 7))
    total = 0.0
    for i in range(5):
        cosines = [q[i] @ key / np.linalg.norm(q[i]) / np.linalg.norm(key) / temperature for key in k]
        total += np.log(sum(np.exp(c) for c in cosines)) - cosines[i + 3]
    expected = 2 * temperature * total / 5
    ours = contrastive_loss(torch.from_numpy(q), torch.from_numpy(k), temperature, first_positive=3)
    assert ours.item() == pytest.approx(expected, rel=1e-6)
