"""MoBY against numbers computed by its authors' own code (tests/golden/README.md says where they come from)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import BackboneConfig, OptimConfig
from mimco_deploy.training.heads import moby_mlp
from mimco_deploy.training.method_config import MoBYConfig
from mimco_deploy.training.methods.moby import MoBY, contrastive_loss
from mimco_deploy.training.momentum import KeyQueue
from mimco_deploy.training.optim import build_optimizer
from mimco_deploy.training.presets import swin_tiny
from mimco_deploy.training.schedules import lr_schedule, momentum_at
from tests.unit.training.golden import assert_final, assert_gradients, deviations_of, leaf, load, renamed, sizes_of


def our_name(official: str) -> str | None:
    """`encoder.layers.0.downsample.norm.bias` → `encoder.body.layers.1.downsample.norm.bias`, and so on."""
    if official.endswith(("attn_mask", "relative_position_index")):
        return None
    if official.startswith("queue"):
        return {"queue1": "queue1.rows", "queue2": "queue2.rows", "queue_ptr": "queue1.pushed"}[official]
    module, _, rest = official.partition(".")
    slow = "momentum_" if module.endswith("_k") else ""
    if module.startswith("encoder"):
        rest = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", rest)
        return f"{slow}encoder.body.{rest}"
    rest = re.sub(r"^linear_hidden\.(\d)", lambda match: str(int(match[1]) - 1), rest)
    return f"{slow}{module.removesuffix('_k')}.{rest.replace('linear_out', '3')}"


def swin_of(sizes: dict[str, Any], **changes: Any) -> BackboneConfig:
    return BackboneConfig(
        name="swin_tiny_patch4_window7_224",
        image_size_px=sizes["img"],
        patch_size_px=sizes["patch"],
        embed_dim=sizes["embed"],
        depth=tuple(sizes["depths"]),
        num_heads=tuple(sizes["heads"]),
        window=sizes["window"],
        **changes,
    )


@pytest.mark.golden("moby/contrastive_seed*.npz")
def test_loss_and_gradients_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    temperatures = [name.removeprefix("loss_T") for name in arrays if name.startswith("loss_T")]
    assert temperatures
    for text in temperatures:
        q, k = leaf(arrays["q"]), leaf(arrays["k"])
        loss = contrastive_loss(q, k, torch.from_numpy(arrays["queue"]).T, float(text))
        np.testing.assert_allclose(loss.item(), arrays[f"loss_T{text}"], rtol=1e-6)
        gradient_q, gradient_k = torch.autograd.grad(loss, (q, k))
        np.testing.assert_allclose(gradient_q, arrays[f"grad_q_T{text}"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradient_k, arrays[f"grad_k_T{text}"], rtol=1e-5, atol=1e-7)


@pytest.mark.golden("moby/queue_w1_seed*.npz")
def test_queues_over_three_steps_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    queues = [KeyQueue(*arrays[f"queue{number}_init"].T.shape) for number in (1, 2)]
    for number, queue in enumerate(queues, start=1):
        queue.rows.copy_(torch.from_numpy(arrays[f"queue{number}_init"]).T)
    for step in range(3):
        pred1, pred2 = (leaf(arrays[f"s{step}_pred{view}"]) for view in (1, 2))
        key1, key2 = (torch.from_numpy(arrays[f"s{step}_key{view}"]) for view in (1, 2))
        loss12 = contrastive_loss(pred1, key2, queues[1].rows.clone(), 0.2)
        loss21 = contrastive_loss(pred2, key1, queues[0].rows.clone(), 0.2)
        for name, loss in (("loss12", loss12), ("loss21", loss21), ("loss", loss12 + loss21)):
            np.testing.assert_allclose(loss.item(), arrays[f"s{step}_{name}"], rtol=1e-6)
        gradients = torch.autograd.grad(loss12 + loss21, (pred1, pred2))
        for view, gradient in enumerate(gradients, start=1):
            np.testing.assert_allclose(gradient, arrays[f"s{step}_grad_pred{view}"], rtol=1e-5, atol=1e-7)
        for number, (queue, key) in enumerate(zip(queues, (key1, key2), strict=True), start=1):
            queue.push(key)
            np.testing.assert_allclose(queue.rows.T, arrays[f"s{step}_queue{number}_after"], rtol=0, atol=1e-6)
            assert int(queue.pushed) % len(queue.rows) == int(arrays[f"s{step}_ptr_after"][0])


@pytest.mark.golden("moby/queue_w2_seed*.npz")
def test_each_of_two_ranks_computes_the_authors_loss_against_queues_of_both(golden_file: Path) -> None:
    arrays = load(golden_file)
    queues = [KeyQueue(*arrays[f"queue{number}_init"].T.shape) for number in (1, 2)]
    for number, queue in enumerate(queues, start=1):
        queue.rows.copy_(torch.from_numpy(arrays[f"queue{number}_init"]).T)
    for step in range(3):
        for rank in (0, 1):
            prefix = f"r{rank}_s{step}"
            pred1, pred2 = (leaf(arrays[f"{prefix}_pred{view}"]) for view in (1, 2))
            key1, key2 = (torch.from_numpy(arrays[f"{prefix}_key{view}"]) for view in (1, 2))
            loss = contrastive_loss(pred1, key2, queues[1].rows.clone(), 0.2)
            loss = loss + contrastive_loss(pred2, key1, queues[0].rows.clone(), 0.2)
            np.testing.assert_allclose(loss.item(), arrays[f"{prefix}_loss"], rtol=1e-6)
            for view, gradient in enumerate(torch.autograd.grad(loss, (pred1, pred2)), start=1):
                np.testing.assert_allclose(gradient, arrays[f"{prefix}_grad_pred{view}"], rtol=1e-5, atol=1e-7)
        for number, queue in enumerate(queues, start=1):
            keys = [torch.from_numpy(arrays[f"r{rank}_s{step}_key{number}"]) for rank in (0, 1)]
            queue.push(torch.cat(keys))  # as `gather_rows` gives them
        assert int(queues[0].pushed) % len(queues[0].rows) == int(arrays[f"s{step}_ptr_after"][0])
    for number, queue in enumerate(queues, start=1):
        np.testing.assert_allclose(queue.rows.T, arrays[f"s2_queue{number}_after"], rtol=0, atol=1e-6)


@pytest.mark.golden("moby/tiny_train_seed*.npz")
def test_three_steps_of_training_are_the_authors(golden_file: Path) -> None:
    arrays = load(golden_file)
    sizes, deviations = sizes_of(arrays), deviations_of(arrays)
    config = MoBYConfig(temperature=sizes["T"], hidden_dim=sizes["inner"], projection_dim=256, queue_size=sizes["K"])
    method = MoBY(swin_of(sizes, drop_path=sizes["drop_path"]), config)
    init = {name: torch.from_numpy(arrays[official]) for name, official in renamed(arrays, "init", our_name).items()}
    init |= {name: init[name].T for name in ("queue1.rows", "queue2.rows")}
    init["queue1.pushed"] = init["queue1.pushed"].squeeze()
    init["queue2.pushed"] = init["queue1.pushed"].clone()
    method.load_state_dict(init, strict=True)
    method.train()
    optimizer = build_optimizer(method, OptimConfig(base_lr=1.0, weight_decay=sizes["weight_decay"], decay="matrices"))
    for group in optimizer.param_groups:
        group["lr"] = sizes["lr"]

    for step in range(3):
        method.update_momentum_encoder(momentum_at((sizes["k_at_step0"] + step) / sizes["K_total"], sizes["m0"]))
        view1, view2 = (torch.from_numpy(arrays[f"step{step}/x{view}"]) for view in (1, 2))
        loss = method(view1, view2)["loss"]
        worst = max(1e-5, 10 * deviations[f"step{step}/loss"][0])
        assert loss.item() == pytest.approx(float(arrays[f"step{step}/loss"]), abs=worst)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(method.parameters(), sizes["clip_grad"])
        assert norm.item() == pytest.approx(float(arrays[f"step{step}/grad_norm"]), rel=1e-3)
        if step == 0:
            assert_gradients(method, arrays, our_name)
        optimizer.step()
        optimizer.zero_grad()
        assert int(method.queue1.pushed) % sizes["K"] == int(arrays[f"step{step}/ptr"][0])

    state = method.state_dict()
    pushed1, pushed2 = state.pop("queue1.pushed"), state.pop("queue2.pushed")
    assert pushed1 == pushed2
    state["queue1.pushed"] = pushed1 % sizes["K"]
    assert_final(state, arrays, our_name, lambda name, array: array.T if name.endswith(".rows") else array)


def test_momentum_is_the_authors(golden: Path) -> None:
    document = json.loads((golden / "moby/momentum_schedule.json").read_text(encoding="utf-8"))
    for case in document["cases"]:
        for row in case["rows"]:
            progress = row["k"] / case["K_total"]
            assert momentum_at(progress, case["contrast_momentum"]) == pytest.approx(row["momentum"], rel=1e-12)


def test_learning_rate_is_the_authors(golden: Path) -> None:
    document = json.loads((golden / "moby/lr_schedule.json").read_text(encoding="utf-8"))
    for case in document["cases"]:
        config = OptimConfig(
            base_lr=case["base_lr"],
            weight_decay=0.05,
            decay="matrices",
            warmup_epochs=case["warmup_epochs"],
            warmup_lr=case["warmup_lr"],
            min_lr=case["min_lr"],
            cosine_from_start=True,
        )
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
        schedule = lr_schedule(
            optimizer,
            config,
            steps_per_epoch=case["n_iter_per_epoch"],
            epochs=case["epochs"],
            global_batch_size=256,  # so that rates are as given
        )
        for row in case["rows"]:
            schedule.step_update(row["num_updates"])
            assert optimizer.param_groups[0]["lr"] == pytest.approx(row["lr_set"], rel=1e-9)


def test_swin_tiny_is_built_decayed_and_dropped_as_the_authors(golden: Path) -> None:
    document = json.loads((golden / "moby/optim_droppath_swin_tiny.json").read_text(encoding="utf-8"))
    recipe = swin_tiny().stage1
    assert isinstance(recipe.method, MoBYConfig)
    method = MoBY(recipe.backbone, recipe.method)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    decayed, spared = build_optimizer(method, recipe.optim).param_groups
    for group, official in ((decayed, "decay"), (spared, "no_decay")):
        assert {names[id(parameter)] for parameter in group["params"]} == {
            our_name(name) for name in document[official]
        }
    frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
    assert frozen == {our_name(name) for name in document["frozen"]}
    for encoder, official in ((method.encoder, "drop_path_online"), (method.momentum_encoder, "drop_path_target")):
        for name, rate in document[official].items():
            drop = encoder.body.get_submodule(name.replace("drop_path", "drop_path1"))
            assert getattr(drop, "drop_prob", 0.0) == pytest.approx(rate, abs=1e-6)
    assert method.encoder.own_width == document["num_features"]
    assert (recipe.method.queue_size, recipe.method.temperature, recipe.method.momentum) == tuple(
        document[name] for name in ("queue", "T", "m0")
    )
    assert (recipe.optim.weight_decay, recipe.optim.clip_norm) == (0.05, document["clip_grad"])
    assert recipe.optim.base_lr * 512 / 256 == document["defaults"]["lr"]


def test_heads_have_the_authors_layers(golden: Path) -> None:
    document = json.loads((golden / "moby/optim_droppath_swin_tiny.json").read_text(encoding="utf-8"))
    for name, width in (("projector", 768), ("predictor", 256)):
        wanted = [*document[name]["linear_hidden"][1:], *document[name]["linear_out"]]
        layers = list(moby_mlp(width, 4096, 256))
        assert len(layers) == len(wanted)
        for module, layer in zip(layers, wanted, strict=True):
            for field in ("in_features", "out_features", "num_features", "affine", "eps", "momentum"):
                if field in layer:
                    assert getattr(module, field) == layer[field]


def test_swin_tiny_has_the_authors_shapes(golden: Path) -> None:
    document = json.loads((golden / "moby/checkpoint_swin_tiny.json").read_text(encoding="utf-8"))
    ours = {name: list(value.shape) for name, value in Backbone(swin_tiny().stage1.backbone).state_dict().items()}
    theirs = {
        name.removeprefix("encoder."): row["shape"]
        for row in document["model"]
        if row["key"].startswith("encoder.") and (name := our_name(row["key"])) is not None
    }
    assert ours == theirs
