"""Moves of duplicates: what moves, what comes back, and what no crash, fault or stranger can do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimco_deploy.errors import IndexStoreError, MoveError
from mimco_deploy.serving import moves
from mimco_deploy.serving.duplicates import find_duplicates
from mimco_deploy.serving.moves import UNDO_FILE, Move, move_duplicates, undo_moves
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery, save
from tests.unit.serving.place import Place


def test_all_but_the_kept_move_and_come_back(twice: Place) -> None:
    before = twice.tree()
    result = twice.move()
    assert not result.skipped
    after = twice.tree()
    assert set(after) == {f"photos/000{number}.png" for number in range(3)} | {
        "out/deep/a copy.png",
        "out/deep/er/another.png",
        "out/deep/0001.png",
    }
    assert sorted(after.values()) == sorted(before.values())
    twice.update()
    assert twice.groups() == []
    undone = undo_moves(twice.out / UNDO_FILE)
    assert (len(undone.moved), undone.skipped) == (3, [])
    assert twice.tree() == before
    again = undo_moves(twice.out / UNDO_FILE)
    assert (again.moved, again.skipped) == ([], [])


def test_an_undone_file_is_not_read_again(twice: Place) -> None:
    twice.move()
    undo_moves(twice.out / UNDO_FILE)
    report = update_index(twice.index, [], CountingEncoder())
    assert (report.unchanged, report.added, report.changed) == (6, 0, 0)


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("moment", ["before the name", "before the move", "after the move"])
def test_a_kill_at_any_moment_can_be_undone(
    twice: Place, monkeypatch: pytest.MonkeyPatch, which: int, moment: str
) -> None:
    before = twice.tree()
    real_move, real_rename = moves._move, Path.rename
    done = 0

    def move(one: Move) -> None:
        nonlocal done
        if done == which and moment == "before the name":
            raise Killed
        real_move(one)
        done += 1

    def rename(path: Path, target: Path) -> Path:
        if done == which and moment == "before the move":
            raise Killed
        moved = real_rename(path, target)
        if done == which and moment == "after the move":
            raise Killed
        return moved

    groups = find_duplicates(twice.index)
    with moves._UndoList(twice.out / UNDO_FILE):
        pass  # the list is there from an earlier run
    monkeypatch.setattr(moves, "_move", move)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        move_duplicates(twice.index, groups, twice.out)
    monkeypatch.undo()
    with (twice.out / UNDO_FILE).open("ab") as file:
        file.write(b'{"from": "/somewh')  # and of the next line only this reached the disk
    undo_moves(twice.out / UNDO_FILE)
    assert twice.tree() == before
    twice.move()  # goes on after the torn line
    undone = undo_moves(twice.out / UNDO_FILE)
    assert (len(undone.moved), undone.skipped) == (3, [])
    assert twice.tree() == before


@pytest.mark.parametrize("which", range(3))
def test_a_kill_while_undoing_can_be_undone(twice: Place, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    before = twice.tree()
    twice.move()
    real, done = Path.rename, 0

    def rename(path: Path, target: Path) -> Path:
        nonlocal done
        if done == which:
            raise Killed  # the name is taken
        done += 1
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        undo_moves(twice.out / UNDO_FILE)
    monkeypatch.undo()
    undone = undo_moves(twice.out / UNDO_FILE)
    assert (len(undone.moved), undone.skipped) == (3 - which, [])
    assert twice.tree() == before


def test_an_empty_file_at_the_old_place_goes_only_for_the_picture_that_was_there(twice: Place) -> None:
    before = twice.tree()
    twice.move()
    left, away = twice.photos / "deep/a copy.png", twice.out / "deep/a copy.png"
    left.touch()
    save(away, 70)
    undone = undo_moves(twice.out / UNDO_FILE)
    assert [skipped.reason for skipped in undone.skipped] == ["changed since it was moved"]
    assert left.stat().st_size == 0
    shutil.copy(twice.photos / "deep/er/another.png", away)
    assert len(undo_moves(twice.out / UNDO_FILE).moved) == 1
    assert twice.tree() == before


def test_a_file_that_stays_is_named_once_however_often_it_left(twice: Place) -> None:
    for _ in range(3):
        assert len(twice.move().moved) == 3
        undo_moves(twice.out / UNDO_FILE)
    twice.move()
    save(twice.photos / "deep/0001.png", 70)
    (twice.out / "deep/a copy.png").unlink()
    undone = undo_moves(twice.out / UNDO_FILE)
    assert {skipped.path.name: skipped.reason.split(" at ")[0] for skipped in undone.skipped} == {
        "0001.png": "another file lies",
        "a copy.png": "gone",
    }
    assert (len(undone.moved), len(undone.skipped)) == (1, 2)


def test_a_line_is_on_the_disk_before_its_file_moves(twice: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moves._move

    def move(one: Move) -> None:
        lines = (twice.out / UNDO_FILE).read_text("ascii").splitlines()
        assert json.loads(lines[-1]) == {"from": str(one.source), "to": str(one.target), "sha256": one.sha256}
        assert one.source.exists()
        real(one)

    monkeypatch.setattr(moves, "_move", move)
    assert len(twice.move().moved) == 3


def test_files_that_change_between_the_look_and_the_move_stay(twice: Place) -> None:
    groups = find_duplicates(twice.index)
    save(twice.photos / "deep/a copy.png", 50)
    (twice.photos / "deep/er/another.png").unlink()
    (twice.photos / "0001.png").unlink()  # the kept one of the other group
    result = move_duplicates(twice.index, groups, twice.out)
    assert not result.moved
    assert {skipped.path.name: skipped.reason.split(":")[0] for skipped in result.skipped} == {
        "a copy.png": "gone or changed since it was indexed",
        "another.png": "gone or changed since it was indexed",
        "0001.png": "the one to keep is gone or changed",
    }


def test_a_link_stays(place: Place) -> None:
    save(place.photos / "a.png", 1)
    save(place.folder / "elsewhere/a.png", 1)
    (place.photos / "link.png").symlink_to(place.folder / "elsewhere/a.png")
    place.update()
    result = move_duplicates(place.index, find_duplicates(place.index, keep="first"), place.out)
    assert [(skipped.path.name, skipped.reason) for skipped in result.skipped] == [("link.png", "it is a link")]


def test_a_file_of_two_names_stays_under_both(place: Place) -> None:
    """Nothing were won by moving one, and a link to it would lead nowhere."""
    for number, name in enumerate(("hard", "soft")):
        save(place.photos / f"a{name}.png", number)
        shutil.copy2(place.photos / f"a{name}.png", place.photos / f"b{name}.png")
    (place.photos / "chard.png").hardlink_to(place.photos / "bhard.png")
    (place.photos / "csoft.png").symlink_to("bsoft.png")
    place.update()
    kinds = [[one.kind for one in group.others] for group in find_duplicates(place.index, keep="first")]
    assert kinds == [["copy", "same file"], ["copy", "same file"]]
    before = place.tree()
    for keep in ("first", "oldest"):
        done = place.mimco("dupes", "--keep", keep, "--move-to", place.out)
        assert "2 groups, 2 pictures too many (2 copies)" in done.stdout
        assert done.stderr.count("bhard.png: another name of it stays") == 1
        assert done.stderr.count("bsoft.png: another name of it stays") == 1
        assert place.tree() == before
    (place.photos / "chard.png").unlink()
    place.update()
    assert [one.source.name for one in place.move().moved] == ["bhard.png"]


def test_nothing_is_overwritten_whatever_the_names(place: Place) -> None:
    other = place.folder / "other"
    for path, seed in (("photos/a.png", 1), ("photos/x/b.png", 1), ("other/x/b.png", 1), ("out/x/b.png", 9)):
        save(place.folder / path, seed)
    before = place.tree()
    place.update(place.photos, other)
    assert len(place.move().moved) == 2
    assert sorted(name for name in place.tree() if name.startswith("out")) == [
        "out/x/b (2).png",
        "out/x/b (3).png",
        "out/x/b.png",
    ]
    save(place.photos / "x/b.png", 5)  # somebody puts another picture where one was
    undone = undo_moves(place.out / UNDO_FILE)
    assert [move.target.parent.parent.name for move in undone.moved] == ["other"]
    assert [skipped.reason for skipped in undone.skipped] == [f"another file lies at {place.photos / 'x/b.png'}"]
    (place.photos / "x/b.png").unlink()
    undo_moves(place.out / UNDO_FILE)
    assert place.tree() == before


def test_a_name_that_is_taken_at_the_last_moment_is_left_alone(twice: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moves._move

    def move(one: Move) -> None:
        if "(2)" not in one.target.name:
            save(one.target, 60)
        real(one)

    monkeypatch.setattr(moves, "_move", move)
    before = twice.tree()
    result = twice.move()
    assert {move.target.name for move in result.moved} == {"a copy (2).png", "another (2).png", "0001 (2).png"}
    monkeypatch.undo()
    undone = undo_moves(twice.out / UNDO_FILE)
    assert (len(undone.moved), len(undone.skipped)) == (3, 3)  # the pictures of others are not taken for ours
    assert {name: content for name, content in twice.tree().items() if name.startswith("photos")} == before


def test_a_folder_that_an_update_would_walk_is_refused(twice: Place) -> None:
    groups = find_duplicates(twice.index)
    for folder in (twice.photos, twice.photos / "deep/dupes", twice.folder):
        with pytest.raises(MoveError, match=r"the indexed folder .*; expected a folder elsewhere, or a hidden one"):
            move_duplicates(twice.index, groups, folder)
    hidden = twice.photos / ".dupes"
    assert len(move_duplicates(twice.index, groups, hidden).moved) == 3
    twice.update()
    assert twice.groups() == []


@pytest.mark.parametrize("fault", ["none", "changed", "no right to remove"])
def test_another_file_system_gets_a_compared_copy(twice: Place, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def rename(path: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(path), None, str(target))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if twice.photos in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, missing_ok)

    real = Path.unlink
    before = twice.tree()
    groups = find_duplicates(twice.index)
    monkeypatch.setattr(Path, "rename", rename)
    if fault == "changed":
        monkeypatch.setattr(moves, "_sha256", lambda _: "0" * 64)
    if fault == "no right to remove":
        monkeypatch.setattr(Path, "unlink", unlink)
    result = move_duplicates(twice.index, groups, twice.out)
    monkeypatch.undo()
    if fault == "none":
        assert len(result.moved) == 3
        monkeypatch.setattr(Path, "rename", rename)
        assert len(undo_moves(twice.out / UNDO_FILE).moved) == 3
    else:
        assert len(result.skipped) == 3
    assert twice.tree() == before
    assert [path for path in twice.out.rglob("*") if path.is_file()] == [twice.out / UNDO_FILE]


def test_a_file_that_cannot_be_moved_costs_one_file(twice: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "another.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    result = twice.move()
    assert [(skipped.path.name, skipped.reason) for skipped in result.skipped] == [("another.png", "Permission denied")]
    assert len(result.moved) == 2
    assert not (twice.out / "deep/er/another.png").exists()


def test_a_full_disk_moves_nothing_that_its_list_does_not_say(twice: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moves._UndoList._write

    def write(undo: Any, content: bytes) -> None:
        if b"another" in content:
            real(undo, content[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(undo, content)

    before = twice.tree()
    monkeypatch.setattr(moves._UndoList, "_write", write)
    with pytest.raises(MoveError, match=r"undo\.jsonl cannot be written \(No space left on device\)"):
        twice.move()
    monkeypatch.undo()
    assert len(undo_moves(twice.out / UNDO_FILE).moved) == 1
    assert twice.tree() == before


def test_names_that_are_no_text_move_and_come_back(place: Place) -> None:
    name = os.fsdecode(b"caf\xe9\n.png")
    save(place.photos / "a.png", 1)
    save(place.photos / "deep" / name, 1)
    place.update()
    before = place.tree()
    result = place.move()
    assert [move.target for move in result.moved] == [place.out / "deep" / name]
    assert len((place.out / UNDO_FILE).read_text("ascii").splitlines()) == 2
    undo_moves(place.out / UNDO_FILE)
    assert place.tree() == before


def test_what_was_taken_or_changed_since_does_not_come_back(twice: Place) -> None:
    twice.move()
    (twice.out / "deep/0001.png").unlink()
    save(twice.out / "deep/a copy.png", 70)
    undone = undo_moves(twice.out / UNDO_FILE)
    assert {skipped.path.name: skipped.reason for skipped in undone.skipped} == {
        "0001.png": "gone",
        "a copy.png": "changed since it was moved",
    }
    assert [move.target.name for move in undone.moved] == ["another.png"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot be read"),
        (b"", "is no list of moves"),
        (b"[1]\n", "is no list of moves"),
        (b"\xff\xfe\n", "is no list of moves"),
        (b'{"format_version": 9, "holds": "moves"}\n', "has format version 9; expected 1"),
    ],
)
def test_only_a_list_of_moves_is_undone_or_added_to(twice: Place, content: bytes | None, match: str) -> None:
    file = twice.out / UNDO_FILE
    twice.out.mkdir()
    if content is not None:
        file.write_bytes(content)
        with pytest.raises(MoveError, match=match):
            twice.move()
    with pytest.raises(MoveError, match=match):
        undo_moves(file)


def test_a_strangers_index_moves_nothing_out_of_the_folder(place: Place) -> None:
    """A catalogue that lists a file outside of its folder, as a copy of one inside."""
    gallery(place.photos, 3)
    save(place.photos / "copy.png", 1)
    place.update()
    victim = place.folder / "victim.png"
    shutil.copyfile(place.photos / "copy.png", victim)
    stamp = victim.stat()
    with sqlite3.connect(next(place.index.glob("0*/catalog.sqlite"))) as catalog:
        catalog.execute(
            "UPDATE files SET path = ?, size = ?, mtime_ns = ? WHERE path = ?",
            (b"../victim.png", stamp.st_size, stamp.st_mtime_ns, b"copy.png"),
        )
    catalog.close()
    with pytest.raises(IndexStoreError, match="lies outside of its folder"):
        place.move()
    assert victim.is_file()


def test_a_folder_that_was_renamed_is_told_by_the_name_it_had(twice: Place) -> None:
    before = twice.tree()
    twice.move()
    moved = twice.out.rename(twice.folder / "renamed")
    refused = twice.mimco("dupes", "--undo", moved / UNDO_FILE, code=1)
    assert refused.stderr.count("\n") == 1
    assert f"tells of pictures in {twice.out}/deep, not of those beside it" in refused.stderr
    moved.rename(twice.out)
    (twice.folder / "link.jsonl").symlink_to(twice.out / UNDO_FILE)
    assert "3 pictures moved back" in twice.mimco("dupes", "--undo", twice.folder / "link.jsonl").stdout
    assert twice.tree() == before


@pytest.mark.parametrize("changes", [{"from": "/home/me/.bash_profile"}, {"to": "/home/me/a.png"}, {"to": "../a.png"}])
def test_a_strangers_list_brings_nothing_but_its_own_pictures(twice: Place, changes: dict[str, str]) -> None:
    twice.move()
    file = twice.out / UNDO_FILE
    header, first, second, *_ = file.read_text("ascii").splitlines()
    document = json.loads(first)
    if changes.get("to", "").startswith("../"):
        changes = {"to": f"{twice.out}/../a.png"}
    file.write_text(f"{header}\n{json.dumps({**document, **changes})}\n{second}\n", "ascii")
    undone = undo_moves(file)
    assert [one.reason for one in undone.skipped] == ["no picture below the folder of this list"]
    assert [str(one.source) for one in undone.moved] == [json.loads(second)["to"]]


def test_a_line_of_an_old_place_keeps_no_other_back(twice: Place) -> None:
    twice.move()
    file = twice.out / UNDO_FILE
    old = {"from": str(twice.photos / "x.png"), "to": "/media/old/x.png", "sha256": "0" * 64}
    file.write_text(file.read_text("ascii") + json.dumps(old) + "\n", "ascii")
    undone = undo_moves(file)
    assert len(undone.moved) == 3
    assert [str(one.path) for one in undone.skipped] == ["/media/old/x.png"]
    twice.move()  # adds to the list


def test_a_pipe_in_place_of_a_picture_is_not_read(twice: Place) -> None:
    moved = twice.move().moved[0].target
    moved.unlink()
    os.mkfifo(moved)
    undone = undo_moves(twice.out / UNDO_FILE)
    assert [one.reason for one in undone.skipped] == ["changed since it was moved"]
    assert moves._document(b"[" * 100_000) == {}


@given(line=st.binary(max_size=60) | st.sampled_from([b'{"from": 1, "to": 2, "sha256": 3}', b"{}", b"null"]))
def test_lines_that_say_nothing_are_passed_over(line: bytes) -> None:
    assert moves._move_of(moves._document(line)) is None
