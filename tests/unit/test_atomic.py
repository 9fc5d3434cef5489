"""Whole or not at all: what a crash, a failing writer or a full disk leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimco_deploy.atomic import (
    copy_new,
    current_dir,
    only_writer,
    recover,
    remove_temporaries,
    staged_dir,
    temporary_beside,
    write_bytes,
)
from mimco_deploy.errors import ConfigError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, content: str) -> None:
    (folder / "a.txt").write_text(content, encoding="utf-8")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "b.txt").write_text(content, encoding="utf-8")


def made(target: Path, content: str) -> Path:
    with staged_dir(target) as staging:
        fill(staging, content)
    return target


def content_of(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))]


def test_bytes_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in (b"old", b"", b"new" * 1000):
        write_bytes(path, content)
        assert path.read_bytes() == content
        assert names(path.parent) == ["file"]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    for name in ("x" * 255, "€" * 85):
        write_bytes(tmp_path / name, b"content")
        assert (tmp_path / name).read_bytes() == b"content"


def test_who_may_read_a_file_stays_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    for mode in (0o600, 0o664):
        path.chmod(mode)
        write_bytes(path, b"new")
        assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_keeps_its_content_when_the_writer_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_content_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def spy_replace(path: Path, target: Path) -> Path:
        events.append(f"name {Path(target).name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_bytes(tmp_path / "file", b"x")
    assert events[0].startswith("sync .file.")
    assert events[1:] == ["name file", f"sync {tmp_path.name}"]
    events.clear()
    made(tmp_path / "folder", "x")
    before, after = events[: events.index("name folder")], events[events.index("name folder") :]
    assert {"sync a.txt", "sync b.txt", "sync deeper", "sync .folder.staging"} <= set(before)
    assert after == ["name folder", f"sync {tmp_path.name}"]


def test_a_link_that_waits_under_a_temporary_name_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    temporary_beside(tmp_path / "out").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "out", b"new")
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_takes_a_free_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    os.utime(source, (1, 1))
    copy_new(source, target)
    assert target.read_bytes() == b"content"
    assert target.stat().st_mtime == 1
    assert target.stat().st_nlink == 1
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        copy_new(source, target)
    monkeypatch.setattr(os.path, "lexists", lambda _: False)  # somebody takes the name meanwhile
    with pytest.raises(FileExistsError):
        copy_new(source, target)
    assert target.read_bytes() == b"mine"
    assert names(tmp_path) == ["source", "target"]


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    made(target, "old")
    assert content_of(target) == ["old", "old"]
    (target / "surplus.txt").write_text("surplus", encoding="utf-8")
    with staged_dir(target) as staging:
        assert list(staging.iterdir()) == []
        assert staging.parent == target.parent
        fill(staging, "new")
        assert content_of(target) == ["old", "old", "surplus"]
    assert content_of(target) == ["new", "new"]
    assert names(target.parent) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_keeps_its_content_when_the_writer_fails(tmp_path: Path, error: type[BaseException]) -> None:
    target = made(tmp_path / "folder", "old")

    def fail() -> None:
        with staged_dir(target) as staging:
            (staging / "a.txt").write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(error):
        fail()
    assert content_of(target) == ["old", "old"]
    assert names(tmp_path) == ["folder"]


def test_what_an_earlier_crash_left_in_the_staging_folder_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / ".folder.staging").mkdir()
    (tmp_path / ".folder.staging" / "half.txt").write_text("half", encoding="utf-8")
    assert content_of(made(tmp_path / "folder", "new")) == ["new", "new"]
    assert names(tmp_path) == ["folder"]


def test_recovery_brings_the_old_folder_back_where_there_is_no_new_one(tmp_path: Path) -> None:
    target = made(tmp_path / "folder", "old")
    target.rename(tmp_path / "folder.old")
    recover(target)
    assert content_of(target) == ["old", "old"]
    assert names(tmp_path) == ["folder"]


def test_recovery_drops_the_old_folder_where_there_is_a_new_one(tmp_path: Path) -> None:
    made(tmp_path / "folder.old", "old")
    target = made(tmp_path / "other", "new").rename(tmp_path / "folder")
    recover(target)
    assert content_of(target) == ["new", "new"]
    assert names(tmp_path) == ["folder"]


def test_recovery_of_nothing_does_nothing(tmp_path: Path) -> None:
    recover(tmp_path / "folder")
    assert names(tmp_path) == []
    recover(made(tmp_path / "folder", "old"))
    assert content_of(tmp_path / "folder") == ["old", "old"]


def test_replacing_recovers_first(tmp_path: Path) -> None:
    target = made(tmp_path / "folder", "old")
    target.rename(tmp_path / "folder.old")

    def fail() -> None:
        with staged_dir(target):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert content_of(target) == ["old", "old"]


def test_of_a_link_the_folder_that_it_leads_to_is_replaced(tmp_path: Path) -> None:
    folder, link = made(tmp_path / "disk" / "folder", "old"), tmp_path / "link"
    link.symlink_to(folder)
    for content in ("new", "newer"):
        made(link, content)
        assert link.readlink() == folder
        assert content_of(folder) == [content, content]
    assert names(tmp_path) == ["disk", "link"]
    assert names(folder.parent) == ["folder"]
    folder.rename(folder.with_name("folder.old"))  # as a crash between the two renames leaves it
    assert content_of(current_dir(link)) == ["newer", "newer"]
    recover(link)
    assert content_of(folder) == ["newer", "newer"]


@pytest.mark.parametrize("leads", [True, False])
def test_a_link_that_stepped_aside_is_no_obstacle(tmp_path: Path, leads: bool) -> None:
    target = made(tmp_path / "folder", "old")
    if leads:
        made(tmp_path / "elsewhere", "mine")
    (tmp_path / "folder.old").symlink_to(tmp_path / "elsewhere")
    assert content_of(made(target, "new")) == ["new", "new"]
    assert names(tmp_path) == (["elsewhere", "folder"] if leads else ["folder"])
    assert not leads or content_of(tmp_path / "elsewhere") == ["mine", "mine"]


HOLDS = """
import sys
from pathlib import Path
from mimco_deploy.atomic import only_writer
from mimco_deploy.errors import ConfigError
with only_writer(Path(sys.argv[1]), ConfigError("held")):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """By another process, which is killed: however it ends, the lock falls with it."""
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield
        other.kill()


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match="mine")
    with held(tmp_path / "folder"), refused, only_writer(tmp_path / "folder", ConfigError("mine")):
        pass
    with only_writer(tmp_path / "folder", ConfigError("mine")):
        assert names(tmp_path) == [".folder.lock"]
    assert names(tmp_path) == []


def test_a_lock_file_of_another_user_is_in_the_way_only_while_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    (tmp_path / ".folder.lock").touch()
    with only_writer(tmp_path / "folder", ConfigError("mine")):
        pass
    refused = pytest.raises(ConfigError, match="mine")
    with held(tmp_path / "folder"), refused, only_writer(tmp_path / "folder", ConfigError("mine")):
        pass


def test_names_beside_a_long_one_tell_it_from_another_that_begins_alike(tmp_path: Path) -> None:
    one, other = (tmp_path / ("a" * 240 + end) for end in ("1", "2"))
    left = temporary_beside(one)
    left.touch()
    remove_temporaries(other)
    assert left.exists()
    remove_temporaries(one)
    assert not left.exists()


def test_a_lock_that_its_holder_removes_at_that_moment_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would hold locks of one name, on two files."""
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (tmp_path / ".folder.lock").unlink())
    with pytest.raises(ConfigError, match="mine"), only_writer(tmp_path / "folder", ConfigError("mine")):
        pass


DIES = """
import os, sys
from pathlib import Path
from mimco_deploy.atomic import staged_dir
left = int(sys.argv[2])
def dying(real):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), 9)
        left -= 1
        return real(*arguments, **options)
    return call
os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
with staged_dir(Path(sys.argv[1])) as staging:
    for name in ("a.txt", "b.txt"):
        (staging / name).write_text("new")
"""


def test_a_process_that_dies_at_any_point_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for calls in range(12):
        target = made(tmp_path / str(calls) / "folder", "old")
        run = subprocess.run([sys.executable, "-c", DIES, str(target), str(calls)], check=False)
        recover(target)
        found.append(content_of(target))
        assert found[-1] in (["old", "old"], ["new", "new"])
        if run.returncode == 0:
            break
        assert run.returncode == -9
        assert content_of(made(target, "again")) == ["again", "again"]
        assert names(target.parent) == ["folder"]
    assert found[0] == ["old", "old"]
    assert found[-1] == ["new", "new"]
    assert len(found) > 5  # two files, a folder, two names, the parent: each was died at
