"""Stopping a run from outside: Ctrl-C, SIGTERM, `kill -9`. What is on disk goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.runs import Request, open_stage1
from mimco_deploy.training.stages import train_stage1
from tests.unit.training.small import assert_same_run, draw_photos, rows_of

REPOSITORY = Path(__file__).parents[3]
SETTINGS = (
    *("backbone.image_size_px=16", "backbone.patch_size_px=4", "backbone.embed_dim=24"),
    *("backbone.depth=1", "backbone.num_heads=2", "method.hidden_dim=32", "method.projection_dim=16"),
    *("run.log_every_steps=1", "run.checkpoint_every_steps=2", "run.precision=fp32", "data.memory_mib=2"),
)
STEPS = 12  # 24 pictures, 8 a step, 4 epochs
# The real command line; each picture takes a while, so that a signal finds the run at work.
SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background
from pathlib import Path
from mimco_deploy.training import augment
real = augment.TwoViews.__call__
def slow(self, picture):
    time.sleep(0.03)
    return real(self, picture)
augment.TwoViews.__call__ = slow
from mimco_deploy.cli import main
main(sys.argv[1:], prog_name="mimco")
"""


def request(photos: Path, workers: int) -> Request:
    return Request(
        data=(photos,),
        preset="vit_tiny_debug",
        epochs=4,
        batch_size=8,
        settings=(*SETTINGS, f"data.workers={workers}"),
    )


def arguments(request: Request) -> list[str]:
    options = [
        "--preset",
        str(request.preset),
        "--epochs",
        str(request.epochs),
        "--batch-size",
        str(request.batch_size),
    ]
    for path in request.data:
        options += ["--data", str(path)]
    for setting in request.settings:
        options += ["--set", setting]
    return options


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("interrupts") / "photos")


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs, in this process."""
    folder = tmp_path_factory.mktemp("whole") / "stage1"
    with on_cpu():
        train_stage1(open_stage1(folder, request(photos, 0))[0], folder)
    assert read_checkpoint(folder / "last").step == STEPS
    return folder


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def start(workspace: Path, options: list[str], code: str = SLOWLY) -> subprocess.Popen[str]:
    """`mimco train stage1`, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, "--workspace", str(workspace), "train", "stage1", *options],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run: subprocess.Popen[str], folder: Path, step: int) -> None:
    while not (folder / "log.jsonl").exists() or len(rows_of(folder)) < step:
        assert run.poll() is None, run.communicate()
        time.sleep(0.005)


def finish(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = run.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        pytest.fail("the run did not end within 30 s of being asked to")
    return run.returncode, out, err


def resume(folder: Path) -> None:
    config, checkpoint = open_stage1(folder, Request(resume=True))
    with on_cpu():
        train_stage1(config, folder, resume=checkpoint)


@pytest.mark.parametrize(
    ("number", "to_group", "workers"),
    [(signal.SIGINT, True, 1), (signal.SIGTERM, False, 0), (signal.SIGTERM, True, 1)],
    ids=["ctrl-c", "sigterm", "sigterm to the group"],
)
def test_a_signal_ends_the_run_after_a_checkpoint_and_resume_finishes_it(
    tmp_path: Path, photos: Path, whole: Path, number: signal.Signals, to_group: bool, workers: int
) -> None:
    folder = tmp_path / "stage1"
    run = start(tmp_path, arguments(request(photos, workers)))
    wait_for_step(run, folder, 3)
    (os.killpg if to_group else os.kill)(run.pid, number)
    code, out, err = finish(run)
    checkpoint = read_checkpoint(folder / "last")
    assert 3 <= checkpoint.step < STEPS
    assert code == 1
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(
        f"Error: stopped after step {checkpoint.step} of {STEPS}; the checkpoint is written"
    )
    assert len(rows_of(folder)) == checkpoint.step
    resume(folder)
    assert_same_run(folder, whole)


def test_a_run_that_is_killed_leaves_a_readable_checkpoint_and_resume_finishes_it(
    tmp_path: Path, photos: Path, whole: Path
) -> None:
    folder = tmp_path / "stage1"
    options = arguments(request(photos, 0))
    steps = []
    for reach in (3, 7):
        run = start(tmp_path, options)
        wait_for_step(run, folder, reach)
        os.killpg(run.pid, signal.SIGKILL)
        assert finish(run)[0] == -signal.SIGKILL
        checkpoint = read_checkpoint(folder / "last")
        steps.append(checkpoint.step)
        assert all(tensor.isfinite().all() for tensor in checkpoint.load_model().values())
        assert checkpoint.load_optimizer()["state"]
        options = ["--resume"]
    assert 2 <= steps[0] < steps[1] < STEPS
    resume(folder)
    assert_same_run(folder, whole)
    assert [row["step"] for row in rows_of(folder)] == list(range(STEPS))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, photos: Path) -> None:
    """While it hangs in a step, for as long as it likes."""
    hanging = 'time.sleep(60 if (Path(sys.argv[2]) / "hang").exists() else 0.01)'
    run = start(tmp_path, arguments(request(photos, 0)), SLOWLY.replace("time.sleep(0.03)", hanging))
    wait_for_step(run, tmp_path / "stage1", 3)
    (tmp_path / "hang").touch()
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None
    os.kill(run.pid, signal.SIGINT)
    code, _, err = finish(run)
    assert code == 1
    assert "Aborted" in err
    assert read_checkpoint(tmp_path / "stage1" / "last").step >= 2
