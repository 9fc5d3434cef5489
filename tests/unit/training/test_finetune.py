"""Training with labels, fine-tuning and the linear probe, from the command line to bits."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mimco_deploy.cli import main
from mimco_deploy.errors import CheckpointError, TrainingError, TrainingInterrupted
from mimco_deploy.export.student import EncoderModule, from_model
from mimco_deploy.training.augment import ToInput
from mimco_deploy.training.classifier import build_classifier, draws_follow_torch
from mimco_deploy.training.config import BackboneConfig, DataConfig
from mimco_deploy.training.distributed import process_group
from mimco_deploy.training.finetune_config import (
    FinetuneConfig,
    FinetuneMethodConfig,
    FinetuneOptimConfig,
    FinetuneViewsConfig,
    LinearOptimConfig,
    LinearViewsConfig,
    finetune_preset,
    linear_preset,
)
from mimco_deploy.training.supervised import train_with_labels
from mimco_deploy.training.supervised_checkpoint import Progress, read_run
from tests.unit.training.labelled import (
    BOTH,
    CONFIGS,
    KINDS,
    draw_classes,
    finetune_config,
    linear_config,
    rows_of,
    save_encoder,
)
from tests.unit.training.small import BACKBONE, SWIN, assert_same_state, run_config, stop_at

STEPS = 9
"""24 pictures, 8 a step, 3 epochs."""
REPOSITORY = Path(__file__).parents[3]


pytestmark = pytest.mark.usefixtures("on_cpu")


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


def test_a_linear_probe_leaves_the_encoder_bit_equal(here: Path, whole: Path) -> None:
    config = linear_config(here)
    fresh = build_classifier(config, 2).encoder.state_dict()
    trained = read_run(whole / "linear/last", "linear").load_model()
    assert_same_state({name: trained[f"encoder.{name}"] for name in fresh}, fresh)
    assert not torch.equal(trained["head.weight"], torch.zeros_like(trained["head.weight"]))
    assert (trained["norm.running_mean"] != 0).any()


def test_fine_tuning_moves_every_parameter_but_what_a_softmax_does_not_see(here: Path, whole: Path) -> None:
    fresh = build_classifier(finetune_config(here), 2).state_dict()
    trained = read_run(whole / "finetune/last", "finetune").load_model()
    still = {name for name in fresh if torch.equal(fresh[name], trained[name])}
    assert still == set()  # positions and the patch embedding too, which pre-training may keep


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
