"""The folder of a run: one writer, nothing lost, and what a full disk says."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mimco_deploy.errors import CheckpointError
from mimco_deploy.training import checkpoint, run_folder
from mimco_deploy.training.run_folder import make_way, only_writer
from mimco_deploy.training.stages import build_stage1
from tests.unit.training.small import draw_photos, stage1_config, train_any

HOLD = """
import sys
from pathlib import Path
from mimco_deploy.training.run_folder import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_trainings_do_not_write_into_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "space" / "stage1"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        photos = draw_photos(tmp_path / "photos")
        with pytest.raises(CheckpointError, match=r"another process trains in .*stage1; expected one at a time"):
            train_any(stage1_config(photos), folder)
        assert not folder.exists()
        other.kill()  # however it ends, the lock falls with it
    with only_writer(folder):
        pass


def test_a_folder_that_is_a_link_is_locked_where_it_would_be_moved_aside(tmp_path: Path) -> None:
    """`--fresh` renames the link, so that a lock beside what it leads to would say nothing of its place."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "stage1").symlink_to(tmp_path / "disk")
    with only_writer(tmp_path / "stage1"):
        assert (tmp_path / ".stage1.lock").exists()


def test_a_forked_loader_does_not_keep_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "stage1"
    with only_writer(folder):
        start, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(start, 1)  # until the parent closes its end
            os._exit(0)
        os.close(start)
    held = subprocess.run(
        [sys.executable, "-c", HOLD, str(folder)], input="", capture_output=True, text=True, check=False
    )
    os.close(end)
    os.waitpid(child, 0)
    assert held.stdout == "held\n", held.stderr


def test_a_file_system_without_locks_is_told_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with only_writer(tmp_path / "stage1"):
        pass
    assert "no locks there (No locks available)" in caplog.text


def test_nothing_is_moved_aside_before_all_processes_have_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / "here").touch()
    seen = []
    monkeypatch.setattr(run_folder, "wait_for_all", lambda: seen.append((folder / "here").exists()))
    make_way(folder, resuming=False)
    assert seen == [True]
    assert (tmp_path / "stage1-1" / "here").exists()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        ("save_file", SafetensorError("I/O error: No space left on device"), "I/O error: No space left on device"),
        ("save", RuntimeError("[enforce fail] unexpected pos 44736\nframe #0"), "[enforce fail] unexpected pos"),
        ("save_as_timm", OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception, said: str
) -> None:
    photos, folder = draw_photos(tmp_path / "photos"), tmp_path / "stage1"
    config = stage1_config(photos)
    train_any(config, folder)
    method, _ = build_stage1(config)
    optimizer = torch.optim.AdamW(method.parameters())
    before = {path.name: path.read_bytes() for path in (folder / "last").iterdir() if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise error

    owner = torch if function == "save" else checkpoint
    monkeypatch.setattr(owner, function, full)
    wanted = re.escape(said) + r".*, with [\d,]+ MiB free on its disk; expected room for two checkpoints"
    with pytest.raises(CheckpointError, match=wanted) as caught:
        checkpoint.save_checkpoint(folder / "last", method, optimizer, config, step=1, total_steps=2, corpus="c")
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (folder / "last").iterdir() if path.is_file()} == before
    assert not list(folder.glob("*.staging"))
