"""Two real processes over gloo: the authors' loss over gathered keys, and training that is one process's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimco_deploy.errors import TrainingInterrupted
from mimco_deploy.training.augment import TwoViews
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import Stage2Config
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.data import StepSampler
from mimco_deploy.training.distributed import any_process, gather_rows, is_main, process_group, rank, world_size
from mimco_deploy.training.loop import train
from mimco_deploy.training.methods.mocov3 import contrastive_loss
from mimco_deploy.training.stages import train_stage1, train_stage2
from tests.unit.training.small import (
    STEPS,
    Stub,
    assert_close_weights,
    assert_same_run,
    draw_photos,
    every_method,
    rows_of,
    run_config,
    stage1_config,
    stage2_config,
    stop_at,
    train_any,
)

REPOSITORY = Path(__file__).parents[3]


def patch_only(photos: Path, teacher: Path) -> Stage2Config:
    """A loss without batch norm and without negatives from elsewhere: the mean over images, whoever holds them."""
    config = stage2_config(photos, teacher, dictionaries=("intra",), image_weight=0.0)
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, drop_path=0.0))


# --- what each of the two processes does ------------------------------------------------------------------------------


def work(folder: Path, golden: Path) -> None:
    photos, teacher = folder / "photos", folder / "stage1" / "last"
    with process_group() as device:
        assert (device.type, world_size(), rank()) == ("cpu", 2, int(os.environ["RANK"]))
        said: dict[str, Any] = {
            "main": is_main(),
            "gathered": gather_rows(torch.full((2, 1), float(rank()), requires_grad=True)).flatten().tolist(),
            "any": [any_process(flag, device) for flag in (rank() == 1, False, True)],
            "slots": list(StepSampler(24, stage1_config(photos).run)),
        }
        losses(golden, folder)

        train_stage2(patch_only(photos, teacher), folder / "two")
        train_stub(photos, folder / "two-stub")
        for name, config in every_method(photos, teacher).items():
            train_any(config, folder / f"two-{name}")
        half = dataclasses.replace(every_method(photos, teacher)["moby"], run=run_config(checkpoint_every_steps=3))
        with contextlib.suppress(TrainingInterrupted):
            train_any(half, folder / "two-half", on_step=stop_at(3))

        try:  # only one of the two is asked to stop
            train_stage2(patch_only(photos, teacher), folder / "two-stopped", on_step=stop_at(3))
        except TrainingInterrupted as error:
            said["stopped"] = str(error)
        any_process(False, device)  # the checkpoint is there for both
        checkpoint = read_checkpoint(folder / "two-stopped" / "last")
        train_stage2(patch_only(photos, teacher), folder / "two-stopped", resume=checkpoint)
    (folder / f"said{os.environ['RANK']}.json").write_text(json.dumps(said), encoding="utf-8")


def losses(golden: Path, folder: Path) -> None:
    """Each rank's own share of the authors' arrays."""
    for path in sorted(golden.glob("moco-v3/contrastive_seed*.npz")):
        out: dict[str, Any] = {}
        with np.load(path, allow_pickle=False) as arrays:
            q, q2, k, k2 = (torch.from_numpy(arrays[f"w2_r{rank()}_{name}"]) for name in ("q", "q2", "k", "k2"))
        q, q2, k, k2 = (tensor.requires_grad_() for tensor in (q, q2, k, k2))
        own = rank() * len(q)
        for text in ("0.2", "1.0"):
            tau = float(text)
            loss = contrastive_loss(q, gather_rows(k), tau, own)
            (out[f"T{text}_grad_q"],) = torch.autograd.grad(loss, q)
            symmetric = contrastive_loss(q, gather_rows(k2), tau, own) + contrastive_loss(q2, gather_rows(k), tau, own)
            out[f"T{text}_sym_grad_q1"], out[f"T{text}_sym_grad_q2"] = torch.autograd.grad(symmetric, (q, q2))
            out[f"T{text}_loss"], out[f"T{text}_symloss"] = loss.detach(), symmetric.detach()
        np.savez(folder / f"{path.stem}_r{rank()}.npz", **{name: value.numpy() for name, value in out.items()})


def train_stub(photos: Path, folder: Path) -> None:
    config = stage1_config(photos)
    if is_main():
        folder.mkdir()
    views = TwoViews(config.backbone.image_size_px, config.views)
    train(Stub(), config, load_corpus(config.data), views, folder)


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))


# --- what comes of it -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder in which two processes have done `work`, and one process the same."""
    folder = tmp_path_factory.mktemp("distributed")
    photos = draw_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        train_stage1(stage1_config(photos), folder / "stage1")
        train_stage2(patch_only(photos, folder / "stage1" / "last"), folder / "one")
        train_stub(photos, folder / "one-stub")
        for name, config in every_method(photos, folder / "stage1" / "last").items():
            train_any(config, folder / f"one-{name}")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    golden: Path = request.config.getoption("--golden")
    environment = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""},
        **{"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)},
    }
    command = [sys.executable, "-W", "error", __file__, str(folder), str(golden)]
    runs = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**environment, "RANK": number, "LOCAL_RANK": number},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in ("0", "1")
    ]
    try:
        said = [run.communicate(timeout=240)[0] for run in runs]
    finally:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                run.send_signal(signal.SIGKILL)
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    return folder


def said_by(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"said{number}.json").read_text(encoding="utf-8")) for number in (0, 1)]


def test_rows_are_gathered_in_rank_order_in_every_process(together: Path) -> None:
    first, second = said_by(together)
    assert first["gathered"] == second["gathered"] == [0.0, 0.0, 1.0, 1.0]
    assert (first["main"], second["main"]) == (True, False)


def test_one_processs_flag_is_every_processs(together: Path) -> None:
    assert [said["any"] for said in said_by(together)] == [[True, False, True]] * 2


def test_two_processes_share_out_what_one_would_take(together: Path) -> None:
    first, second = (said["slots"] for said in said_by(together))
    whole = [[list(slot) for slot in slots] for slots in StepSampler(24, stage1_config(together).run)]
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


@pytest.mark.golden("moco-v3/contrastive_seed*.npz")
def test_two_real_processes_compute_the_authors_loss_and_gradients(together: Path, golden_file: Path) -> None:
    with np.load(golden_file, allow_pickle=False) as theirs:
        for number in (0, 1):
            with np.load(together / f"{golden_file.stem}_r{number}.npz", allow_pickle=False) as ours:
                assert len(ours.files) == 10
                for name in ours.files:
                    np.testing.assert_allclose(
                        ours[name], theirs[f"w2_r{number}_{name}"], rtol=1e-5, atol=1e-6, err_msg=name
                    )


def test_two_processes_train_as_one_does(together: Path) -> None:
    assert_close_weights(together / "two", together / "one")
    assert_close_weights(together / "two-stub", together / "one-stub")
    assert read_checkpoint(together / "two" / "last").step == STEPS


def test_one_log_is_written(together: Path) -> None:
    for name in ("two", "two-stub", "two-mocov3", "two-mimco"):
        assert [row["step"] for row in rows_of(together / name)] == list(range(STEPS))


def test_a_stop_that_one_process_is_asked_for_stops_both_and_resumes_bit_for_bit(together: Path) -> None:
    stopped = [said["stopped"] for said in said_by(together)]
    assert stopped[0] == stopped[1]
    assert f"stopped after step 3 of {STEPS}" in stopped[0]
    assert_same_run(together / "two-stopped", together / "two")


@pytest.mark.parametrize("name", sorted(every_method(Path(), Path())))
def test_two_processes_train_each_method_as_one_does(together: Path, name: str) -> None:
    """Keys gathered, batch norm synchronised, draws shared: what is left are sums in another order."""
    assert read_checkpoint(together / f"two-{name}" / "last").step == STEPS
    one, two = rows_of(together / f"one-{name}"), rows_of(together / f"two-{name}")
    for row, other in zip(one, two, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert_close_weights(together / f"two-{name}", together / f"one-{name}")


def test_a_run_of_two_processes_goes_on_in_one_with_the_same_schedule(together: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(together / "two-half", tmp_path / "run"))
    checkpoint = read_checkpoint(folder / "last")
    assert checkpoint.step == 3
    train_any(checkpoint.config, folder, resume=checkpoint)
    rates = [[row["lr"] for row in rows_of(run)] for run in (folder, together / "one-moby")]
    assert rates[0] == rates[1]
    assert_close_weights(folder, together / "one-moby")
