"""Duplicates: which are found, which is kept, what moves and comes back, and what leaks from folder to folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mimco_deploy.cli import main
from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.errors import IndexStoreError, MoveError
from mimco_deploy.serving import moves, pairs
from mimco_deploy.serving.duplicates import Group, Keep, find_duplicates, find_leaks
from mimco_deploy.serving.moves import UNDO_FILE, Move, move_duplicates, undo_moves
from mimco_deploy.serving.pairs import groups_above, nearest_above, scores_of
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery, save

Vectors = npt.NDArray[np.float32]


def unit(vectors: npt.NDArray[Any]) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def with_near_ones(count: int, near: int, dim: int, low: float, seed: int = 0) -> Vectors:
    """Random vectors, some of which come once more at a cosine of `low` to 1."""
    rng = np.random.default_rng(seed)
    first = unit(rng.standard_normal((count, dim)))
    other = first[rng.integers(0, count, near)]
    drawn = rng.standard_normal((near, dim))
    aside = unit(drawn - (drawn * other).sum(axis=1, keepdims=True) * other)
    cosine = rng.uniform(low, 1, (near, 1))
    return unit(rng.permutation(np.concatenate([first, cosine * other + np.sqrt(1 - cosine**2) * aside])))


def slow_groups(vectors: Vectors, rows: npt.NDArray[np.int64], min_score: float) -> list[int]:
    """The rule, pair by pair."""
    label = list(range(len(rows)))
    for a in range(len(rows)):
        for b in range(a):
            one, other = vectors[rows[a]], vectors[rows[b]]
            score = float((one.astype(np.float64) * other).sum())
            if score >= min_score or bool((one == other).all()):
                old, new = max(label[a], label[b]), min(label[a], label[b])
                label = [new if each == old else each for each in label]
    return label


# ---------------------------------------------------------------------------------------------------- groups of vectors


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 40),
    copies=st.integers(0, 10),
    dim=st.integers(2, 6),
    min_score=st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]),
    block=st.integers(1, 12),
)
def test_groups_are_those_of_a_look_at_every_pair(
    seed: int, count: int, copies: int, dim: int, min_score: float, block: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rng.standard_normal((count, dim)))
    vectors = np.concatenate([vectors, vectors[rng.integers(0, count, copies)]])
    rows = np.sort(rng.choice(len(vectors), rng.integers(1, len(vectors) + 1), replace=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_BLOCK", block)
        assert groups_above(vectors, rows, min_score).tolist() == slow_groups(vectors, rows, min_score)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), others=st.integers(1, 40), block=st.integers(1, 12))
def test_the_nearest_is_that_of_a_look_at_every_pair(seed: int, count: int, others: int, block: int) -> None:
    vectors = unit(np.random.default_rng(seed).standard_normal((count + others, 3)))
    rows = np.arange(count + others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_BLOCK", block)
        found, scores = nearest_above(vectors, rows[:count], rows[count:], 0.9)
    true = vectors[:count].astype(np.float64) @ vectors[count:].astype(np.float64).T
    best = true.max(axis=1)
    assert ((found >= 0) == (best >= 0.9)).all()
    assert scores[found >= 0] == pytest.approx(best[best >= 0.9], abs=1e-6)


@pytest.fixture
def many_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "COMPARED_IN_FULL", 100)


@pytest.mark.usefixtures("many_cells")
@pytest.mark.parametrize("min_score", [0.8, 0.95])
def test_cells_find_what_the_full_comparison_finds(min_score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = with_near_ones(3000, 600, 48, min_score - 0.02)
    rows = np.arange(len(vectors))
    with_cells = groups_above(vectors, rows, min_score)
    near, _ = nearest_above(vectors, rows[:1500], rows[1500:], min_score)
    monkeypatch.setattr(pairs, "COMPARED_IN_FULL", 10_000)
    full = groups_above(vectors, rows, min_score)
    assert (with_cells == full).mean() > 0.99
    assert all(full[a] == full[b] for a, b in enumerate(with_cells))
    full_near, _ = nearest_above(vectors, rows[:1500], rows[1500:], min_score)
    assert (near >= 0).sum() > 0.98 * (full_near >= 0).sum() > 50
    assert ((near == full_near) | (near < 0)).all()


@pytest.mark.usefixtures("many_cells")
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-4, 0.02])
def test_a_crowd_is_one_group_and_costs_no_pairs(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal(32) + spread * rng.standard_normal((20_000, 32)))
    compared = 0
    joined = pairs._Forest.join

    def counted(forest: Any, a: Any, b: Any) -> None:
        nonlocal compared
        compared += len(a)
        joined(forest, a, b)

    monkeypatch.setattr(pairs._Forest, "join", counted)
    assert not groups_above(vectors, np.arange(len(vectors)), 0.95).any()
    assert compared < 10 * len(vectors)  # of 200,000,000 pairs


@pytest.mark.usefixtures("many_cells")
def test_a_chain_is_one_group_although_its_ends_differ() -> None:
    angles = np.linspace(0, np.pi, 2000)
    vectors = unit(np.stack([np.cos(angles), np.sin(angles), np.zeros(2000)], axis=1))
    assert not groups_above(vectors, np.arange(2000), 0.99999).any()


def test_a_score_is_that_of_the_stored_numbers_in_float64() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((50, 384)))
    a, b = np.arange(49), np.arange(1, 50)
    exact = [float((vectors[i].astype(np.float64) * vectors[j]).sum()) for i, j in zip(a, b, strict=True)]
    assert scores_of(vectors, a, b).tolist() == exact


# ---------------------------------------------------------------------------------------------------- pictures


class Place:
    """Folders of pictures under one index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.photos = self.folder / "photos"
        self.photos.mkdir()
        self.index = self.folder / "index"
        self.out = self.folder / "out"

    def update(self, *roots: Path) -> None:
        update_index(self.index, roots or [self.photos], CountingEncoder())

    def groups(self, min_score: float = 0.95, root: Path | None = None, keep: Keep = "largest") -> list[list[str]]:
        return [self.names(group) for group in find_duplicates(self.index, min_score, root, keep)]

    def names(self, group: Group) -> list[str]:
        return [str(one.path.relative_to(self.folder)) for one in (group.kept, *group.others)]

    def tree(self) -> dict[str, bytes]:
        """Every picture by its place, whole."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*.[pj][np]g"))
            if self.index not in path.parents
        }

    def move(self) -> moves.Moves:
        return move_duplicates(self.index, find_duplicates(self.index), self.out)

    def mimco(self, *arguments: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["--workspace", str(self.folder), *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def twice(place: Place) -> Place:
    """Three pictures, two of which have copies."""
    gallery(place.photos, 3)
    (place.photos / "deep/er").mkdir(parents=True)
    shutil.copy2(place.photos / "0000.png", place.photos / "deep/a copy.png")
    shutil.copy2(place.photos / "0000.png", place.photos / "deep/er/another.png")
    shutil.copy2(place.photos / "0001.png", place.photos / "deep/0001.png")
    place.update()
    return place


def test_copies_at_other_sizes_qualities_and_crops_are_found(place: Place) -> None:
    for number, kind in enumerate(KINDS):
        picture = draw(kind, number, 128)
        picture.save(place.photos / f"{kind}.png")
        picture.save(place.photos / f"{kind}-q60.jpg", quality=60)
        picture.resize((64, 64)).save(place.photos / f"{kind}-small.png")
        picture.crop((2, 2, 126, 126)).save(place.photos / f"{kind}-crop.png")
    ImageOps.mirror(draw("clutter", KINDS.index("clutter"), 128)).save(place.photos / "clutter-mirrored.png")
    place.update()
    groups = place.groups()
    assert len(groups) == len(KINDS)
    for kind, group in zip(sorted(KINDS), sorted(groups), strict=True):
        assert sorted(group) == [f"photos/{kind}{tail}" for tail in ("-crop.png", "-q60.jpg", "-small.png", ".png")]
        assert group[0] == f"photos/{kind}.png"  # as many pixels as the JPEG, and more bytes


def test_what_is_most_like_the_kept_one_comes_first_and_copies_before_all(place: Place) -> None:
    picture = draw("rings", 8, 128)
    picture.save(place.photos / "a.png")
    shutil.copy2(place.photos / "a.png", place.photos / "z.png")
    picture.crop((2, 2, 126, 126)).save(place.photos / "b.png")
    picture.resize((100, 100)).save(place.photos / "c.png")
    place.update()
    (group,) = find_duplicates(place.index)
    assert place.names(group) == [f"photos/{name}.png" for name in "azcb"]
    assert [one.kind for one in group.others] == ["copy", "near", "near"]
    assert 0.95 < group.others[2].score < group.others[1].score < group.others[0].score == pytest.approx(1)


def test_another_score_gives_other_groups(place: Place) -> None:
    picture = draw("rings", 8, 128)
    picture.save(place.photos / "a.png")
    picture.crop((2, 2, 126, 126)).save(place.photos / "b.png")
    place.update()
    assert place.groups(0.95) == [["photos/a.png", "photos/b.png"]]
    assert place.groups(0.9999) == []


def test_only_copies_are_found_at_a_score_of_1(twice: Place) -> None:
    assert twice.groups(1.0) == [
        ["photos/0000.png", "photos/deep/a copy.png", "photos/deep/er/another.png"],
        ["photos/0001.png", "photos/deep/0001.png"],
    ]


def test_a_root_or_a_folder_below_one_narrows_the_look(twice: Place) -> None:
    assert twice.groups(root=twice.photos / "deep") == [["photos/deep/a copy.png", "photos/deep/er/another.png"]]
    assert twice.groups(root=twice.photos) == twice.groups()
    with pytest.raises(IndexStoreError, match=r"no indexed picture lies in .*deep/e; expected one of these .*photos"):
        find_duplicates(twice.index, root=twice.photos / "deep/e")


def test_the_kept_one_is_the_largest_or_the_oldest_or_the_first(place: Place) -> None:
    picture = draw("bricks", 1, 256)
    for name, side, day in (("b-large", 200, 3), ("a-small", 64, 2), ("c-old", 64, 1)):
        path = place.photos / f"{name}.png"
        picture.resize((side, side)).save(path)
        os.utime(path, (86_400 * day, 86_400 * day))
    place.update()
    assert [group[0] for group in place.groups(keep="largest")] == ["photos/b-large.png"]
    assert [group[0] for group in place.groups(keep="oldest")] == ["photos/c-old.png"]
    assert [group[0] for group in place.groups(keep="first")] == ["photos/a-small.png"]


def test_of_equal_files_the_oldest_is_kept_then_the_shortest_path_then_the_first_name(place: Place) -> None:
    for name, day in (("aa.png", 2), ("d.png", 2), ("c.png", 2), ("old/aaa.png", 1)):
        os.utime(save(place.photos / name, 1), (86_400 * day, 86_400 * day))
    place.update()
    assert place.groups() == [[f"photos/{name}.png" for name in ("old/aaa", "aa", "c", "d")]]
    (place.photos / "old/aaa.png").unlink()
    place.update()
    assert place.groups()[0][0] == "photos/c.png"


def test_the_date_of_the_camera_counts_before_that_of_the_file(place: Place) -> None:
    picture = draw("bricks", 1, 64)
    for name, year, day in (("a", 2003, 1), ("b", 2001, 3), ("c", 2002, 2)):
        exif = Image.Exif()
        exif[0x0132] = f"{year}:01:01 00:00:00"
        exif.get_ifd(0x8769)[0x9003] = f"{year}:01:01 00:00:00"
        picture.save(place.photos / f"{name}.jpg", exif=exif, quality=95)
        os.utime(place.photos / f"{name}.jpg", (86_400 * day, 86_400 * day))
    place.update()
    assert place.groups(keep="oldest")[0][0] == "photos/b.jpg"


def test_names_of_one_file_are_told_and_never_moved(place: Place) -> None:
    save(place.photos / "a.png", 1)
    os.link(place.photos / "a.png", place.photos / "linked.png")
    (place.photos / "pointed.png").symlink_to("a.png")
    shutil.copy2(place.photos / "a.png", place.photos / "copied.png")
    place.update()
    (group,) = find_duplicates(place.index, keep="first")
    kinds = {one.path.name: one.kind for one in group.others}
    assert kinds == {"copied.png": "copy", "linked.png": "same file", "pointed.png": "same file"}
    result = move_duplicates(place.index, [group], place.out)
    assert [move.source.name for move in result.moved] == ["copied.png"]


def test_files_that_went_or_changed_are_in_no_group(twice: Place, caplog: pytest.LogCaptureFixture) -> None:
    (twice.photos / "0000.png").unlink()
    save(twice.photos / "0001.png", 77)
    assert twice.groups() == [["photos/deep/a copy.png", "photos/deep/er/another.png"]]
    assert "2 files of groups are gone or changed since they were indexed" in caplog.text


def test_an_index_without_copies_has_no_groups(place: Place) -> None:
    gallery(place.photos, 5)
    place.update()
    assert place.groups() == []
    with pytest.raises(IndexStoreError, match="no index"):
        find_duplicates(place.folder / "nowhere")


# ---------------------------------------------------------------------------------------------------- moves


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


@pytest.mark.parametrize("changes", [{"from": "/home/me/.bash_profile"}, {"to": "/home/me/a.png"}, {"to": "../a.png"}])
def test_a_strangers_list_brings_nothing_but_its_own_pictures(twice: Place, changes: dict[str, str]) -> None:
    twice.move()
    file = twice.out / UNDO_FILE
    header, first, *_ = file.read_text("ascii").splitlines()
    document = json.loads(first)
    if changes.get("to", "").startswith("../"):
        changes = {"to": f"{twice.out}/../a.png"}
    file.write_text(f"{header}\n{json.dumps({**document, **changes})}\n", "ascii")
    before = twice.tree()
    undone = undo_moves(file)
    assert [one.reason for one in undone.skipped] == ["no picture below the folder of this list"]
    assert twice.tree() == before


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


# ---------------------------------------------------------------------------------------------------- leaks


@pytest.fixture
def split(place: Place) -> Place:
    """A training and a test folder; two pictures of the one are in the other."""
    for number, kind in enumerate(KINDS):
        draw(kind, number, 96).save(save(place.photos / f"train/{kind}.png", 0))
    for number, kind in enumerate(KINDS[:4]):
        draw(kind, 100 + number, 96).save(save(place.photos / f"test/{kind}.png", 0))
    shutil.copy2(place.photos / "train/rings.png", place.photos / "test/copied.png")
    shutil.copy2(place.photos / "train/rings.png", place.photos / "test/copied too.png")
    draw("sky", KINDS.index("sky"), 96).save(place.photos / "test/near.jpg", quality=70)
    place.update()
    return place


def test_pictures_of_one_folder_in_another_are_found(split: Place) -> None:
    train, test = split.photos / "train", split.photos / "test"
    leaks = find_leaks(split.index, train, test, 0.99)
    assert leaks.pictures == len(KINDS)
    assert [(leak.path.name, leak.other.name, leak.copy) for leak in leaks.found] == [
        ("rings.png", "copied too.png", True),
        ("sky.png", "near.jpg", False),
    ]
    assert leaks.found[0].score == pytest.approx(1)
    assert 0.99 < leaks.found[1].score < 1
    back = find_leaks(split.index, test, train, 0.99)
    assert [leak.path.name for leak in back.found] == ["copied too.png", "copied.png", "near.jpg"]


def test_a_folder_in_the_other_is_held_against_the_rest_of_it(split: Place) -> None:
    test = split.photos / "test"
    assert [leak.path.name for leak in find_leaks(split.index, split.photos, test, 0.99).found] == [
        "rings.png",
        "sky.png",
    ]
    assert len(find_leaks(split.index, test, split.photos, 0.99).found) == 3
    with pytest.raises(IndexStoreError, match="hold the same files; expected two folders"):
        find_leaks(split.index, test, test / "..//test")
    with pytest.raises(IndexStoreError, match="no indexed picture lies in"):
        find_leaks(split.index, test, split.folder / "nowhere")


def test_leaks_do_not_need_the_files(split: Place) -> None:
    shutil.rmtree(split.photos)
    assert len(find_leaks(split.index, split.photos / "train", split.photos / "test", 0.99).found) == 2


# ---------------------------------------------------------------------------------------------------- commands


def test_the_command_lists_moves_and_undoes(twice: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = twice.tree()
    monkeypatch.chdir(twice.folder)
    assert twice.mimco("dupes").stdout.splitlines() == [
        "keep       photos/0000.png",
        "copy       photos/deep/a copy.png",
        "copy       photos/deep/er/another.png",
        "",
        "keep       photos/0001.png",
        "copy       photos/deep/0001.png",
        "",
        "2 groups, 3 pictures too many (3 copies), 0.0 MiB",
    ]
    assert twice.tree() == before
    moved = twice.mimco("dupes", "--move-to", "out").stdout.splitlines()
    assert moved[-2:] == [
        "3 pictures moved to out",
        "back: mimco dupes --undo out/undo.jsonl; then bring the index up to date",
    ]
    (twice.out / "deep/0001.png").unlink()
    undone = twice.mimco("dupes", "--undo", "out/undo.jsonl")
    assert undone.output.splitlines() == ["left out/deep/0001.png: gone", "2 pictures moved back, 1 left"]


def test_the_command_prints_json(twice: Place) -> None:
    document = json.loads(twice.mimco("dupes", "--keep", "first", "--json").stdout)
    assert document["keep"] == "first"
    assert [len(group["others"]) for group in document["groups"]] == [2, 1]
    assert document["groups"][1] == {
        "kept": str(twice.photos / "0001.png"),
        "others": [
            {"path": str(twice.photos / "deep/0001.png"), "kind": "copy", "score": pytest.approx(1)},
        ],
    }
    moved = json.loads(twice.mimco("dupes", "--move-to", twice.out, "--json").stdout)
    assert (len(moved["moved"]), moved["skipped"]) == (3, [])
    undone = json.loads(twice.mimco("dupes", "--undo", twice.out / UNDO_FILE, "--json").stdout)
    assert {one["from"] for one in undone["moved"]} == {one["to"] for one in moved["moved"]}


def test_the_command_prints_any_name(place: Place) -> None:
    save(place.photos / "a.png", 1)
    save(place.photos / os.fsdecode(b"caf\xe9.png"), 1)
    place.update()
    assert "caf�.png" in place.mimco("dupes").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--undo", "x", "--keep", "first"], 2, "--undo goes with no other option"),
        (["--min-score", "0"], 2, "0.0 is not in the range"),
        (["--undo", "x"], 1, "x cannot be read"),
        (["--root", "/nowhere"], 1, "no indexed picture lies in /nowhere"),
        (["--move-to", "photos"], 1, "lies in the indexed folder"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    twice: Place, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(twice.folder)
    result = twice.mimco("dupes", *arguments, code=code)
    assert says in result.stderr.splitlines()[-1]


def test_leaks_fail_only_where_asked_to(split: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(split.photos)
    listed = split.mimco("leaks", "train", "test", "--min-score", "0.99").stdout.splitlines()
    assert listed[0] == "copy       train/rings.png  =  test/copied too.png"
    assert listed[-1] == f"2 of {len(KINDS)} pictures of train found in test too, 1 copy among them"
    split.mimco("leaks", "train", "test", "--fail", code=1)
    document = json.loads(
        split.mimco("leaks", "train", "test", "--min-score", "0.99", "--fail", "--json", code=1).stdout
    )
    assert [leak["kind"] for leak in document["leaks"]] == ["copy", "near"]
    shutil.rmtree(split.photos / "test")
    gallery(split.photos / "test", 3)
    split.update()
    split.mimco("leaks", "train", "test", "--min-score", "1", "--fail")
