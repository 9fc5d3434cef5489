"""Duplicates: which are found, which is kept, what leaks from folder to folder, and the commands."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image, ImageOps

from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.duplicates import find_duplicates, find_leaks
from mimco_deploy.serving.moves import UNDO_FILE, move_duplicates
from tests.helpers import gallery, save
from tests.unit.serving.place import Place


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
        (["--root", "circle"], 1, "no indexed picture lies in circle"),
        (["--move-to", "photos"], 1, "lies in the indexed folder"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    twice: Place, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(twice.folder)
    (twice.folder / "circle").symlink_to("circle")
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
