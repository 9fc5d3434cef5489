"""Folders that lie elsewhere now: nothing is read or embedded again. Folders that are forgotten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mimco_deploy.cli import main
from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.generations import writer_lock
from mimco_deploy.serving.guarded import DecodePool
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.query import search_image
from mimco_deploy.serving.roots import move_roots, split_move
from mimco_deploy.serving.update import UpdateReport, update_index
from tests.helpers import CountingEncoder, gallery, save, tiny_bundle


class Place:
    """Two indexed folders on one disk and one on another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "index"
        self.old = folder / "disk"
        gallery(self.old / "2023", 4)
        save(self.old / "2023" / "caf\udce9" / "new\nline.png", 40)
        (self.old / "2023" / "bad.png").write_bytes(b"no picture")
        gallery(self.old / "2024", 3, first=10)
        gallery(folder / "other", 2, first=20)
        self.roots = [self.old / "2023", self.old / "2024", folder / "other"]
        update_index(self.index, self.roots, CountingEncoder())

    def mimco(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(main, ["--workspace", str(self.folder), "index", *map(str, arguments)])

    def opened(self) -> ImageIndex:
        return ImageIndex.open(self.index)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def check_that_nothing_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> UpdateReport:
    encoder = CountingEncoder()
    with monkeypatch.context() as patch:
        patch.setattr(DecodePool, "read", lambda *_: pytest.fail("it was read again"))
        report = update_index(place.index, [], encoder)
    assert (report.added, report.changed, report.removed, report.embedded) == (0, 0, 0, 0)
    assert (report.unchanged, len(report.problems), report.unreachable) == (10, 1, ())
    assert encoder.pictures == 0
    return report


def test_a_folder_that_moved_keeps_its_files(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    new = place.folder / "new disk" / "photos 2024"
    new.parent.mkdir()
    (place.old / "2024").rename(new)
    assert move_roots(place.index, [(place.old / "2024", new)]) == 1
    assert place.opened().roots() == sorted([place.old / "2023", new, place.folder / "other"])
    check_that_nothing_is_read(place, monkeypatch)
    hit = search_image(place.opened(), CountingEncoder(), new / "0011.png", 1)[0]
    assert hit.path == new / "0011.png"
    assert hit.score == pytest.approx(1, abs=1e-6)


def test_all_folders_of_a_disk_move_with_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = place.opened().files()
    new = place.folder / "elsewhere" / "disk"
    new.parent.mkdir()
    place.old.rename(new)
    assert move_roots(place.index, [(place.old, new)]) == 2
    assert place.opened().roots() == [new / "2023", new / "2024", place.folder / "other"]
    moved = [new / path.relative_to(place.old) if path.is_relative_to(place.old) else path for path in before]
    assert place.opened().files() == sorted(moved)
    assert [problem.path for problem in place.opened().problems()] == [new / "2023" / "bad.png"]
    check_that_nothing_is_read(place, monkeypatch)


def test_what_is_new_at_the_new_place_is_noticed(place: Place) -> None:
    new = place.folder / "new"
    (place.old / "2024").rename(new)
    save(new / "fresh.png", 70)
    (new / "0010.png").unlink()
    move_roots(place.index, [(place.old / "2024", new)])
    report = update_index(place.index, [], CountingEncoder())
    assert (report.added, report.removed, report.embedded) == (1, 1, 1)


def test_a_move_there_and_back_is_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = place.opened().files()
    (place.folder / "new").mkdir()
    assert move_roots(place.index, [(place.old, place.folder / "new")]) == 2
    assert move_roots(place.index, [(place.folder / "new", place.old)]) == 2
    assert place.opened().files() == before
    check_that_nothing_is_read(place, monkeypatch)


def test_a_folder_may_move_into_or_out_of_itself(place: Place) -> None:
    inside = place.old / "2024" / "inside"
    inside.mkdir()
    assert move_roots(place.index, [(place.old / "2024", inside)]) == 1
    assert inside in place.opened().roots()
    assert move_roots(place.index, [(inside, place.old / "2024")]) == 1
    assert place.opened().roots() == sorted(place.roots)


def test_folders_may_take_each_others_places(place: Place) -> None:
    gallery(place.old / "inner" / "2024", 2, first=50)
    update_index(place.index, [place.old / "inner" / "2024"], CountingEncoder())
    assert move_roots(place.index, [(place.old, place.old / "inner")]) == 3
    inner = place.old / "inner"
    assert place.opened().roots() == sorted(
        [*(inner / name for name in ("2023", "2024", "inner/2024")), place.roots[2]]
    )
    places = [inner / "2023", inner / "2024"]
    for folder in places:
        folder.mkdir(exist_ok=True)
    files = len(place.opened().files())
    assert move_roots(place.index, [(places[0], places[1]), (places[1], places[0])]) == 2
    assert len(place.opened().files()) == files
    assert places[0] / "0010.png" in place.opened().files()


def test_of_moves_given_together_all_or_none_happen(place: Place) -> None:
    (place.folder / "new").mkdir()
    first = f"{place.old / '2024'}={place.folder / 'new'}"
    refused = place.mimco("--root", first, "--root", f"{place.folder / 'unknown'}={place.folder / 'new'}")
    assert "no indexed folder lies in" in refused.output
    assert place.opened().roots() == sorted(place.roots)
    with pytest.raises(IndexStoreError, match="overlaps"):
        move_roots(place.index, [(root, place.folder / "new") for root in place.roots[:2]])
    assert place.opened().roots() == sorted(place.roots)


def test_the_new_place_may_be_named_through_a_link(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.old / "2024").rename(place.folder / "new")
    (place.folder / "link").symlink_to(place.folder / "new")
    move_roots(place.index, [(place.old / "2024", place.folder / "link")])
    assert place.folder / "new" in place.opened().roots()
    check_that_nothing_is_read(place, monkeypatch)


def test_the_old_place_may_be_named_through_a_link(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.folder / "link").symlink_to(place.folder)
    (place.old / "2024").rename(place.folder / "new")
    assert move_roots(place.index, [(place.folder / "link" / "disk" / "2024", place.folder / "new")]) == 1
    check_that_nothing_is_read(place, monkeypatch)


def test_a_link_that_was_left_at_the_old_place_is_no_hindrance(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.old / "2024").rename(place.folder / "new")
    (place.old / "2024").symlink_to(place.folder / "new")
    assert move_roots(place.index, [(place.old / "2024", place.folder / "new")]) == 1
    assert place.folder / "new" in place.opened().roots()
    check_that_nothing_is_read(place, monkeypatch)


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("named", ["old", "new", "above", "none"])
def test_a_folder_that_left_a_link_behind_is_not_indexed_twice(place: Place, named: str, rebuild: bool) -> None:
    new = place.folder / "disks/new"
    new.parent.mkdir()
    (place.old / "2024").rename(new)
    (place.old / "2024").symlink_to(new)
    folders = {"old": [place.old / "2024"], "new": [new], "above": [new.parent], "none": []}[named]
    report = update_index(place.index, folders, CountingEncoder(), rebuild=rebuild)
    assert (report.added, report.removed, report.counts.files) == (10 if rebuild else 0, 0, 10)
    recorded = new.parent if named == "above" else new
    assert place.opened().roots() == sorted({*place.roots, recorded} - {place.old / "2024"})


def test_a_link_to_another_indexed_folder_stays_one_of_its_own(place: Place) -> None:
    shutil.rmtree(place.old / "2024")
    (place.old / "2024").symlink_to(place.folder / "other")
    update_index(place.index, [], CountingEncoder())
    assert place.opened().roots() == sorted(place.roots)


def test_relative_names_are_those_of_the_current_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    (place.old / "2024").rename(place.folder / "new")
    assert move_roots(Path("index"), [(Path("disk/2024"), Path("new"))]) == 1
    assert place.folder / "new" in place.opened().roots()


def test_a_folder_that_is_not_indexed_is_refused_with_those_that_are(place: Place) -> None:
    for unknown in (place.old / "2025", place.old / "2023" / "caf\udce9", place.folder / "dis"):
        with pytest.raises(IndexStoreError, match=r"no indexed folder lies in .*; expected one of: .*2023, .*2024"):
            move_roots(place.index, [(unknown, place.folder)])
    assert place.opened().roots() == sorted(place.roots)


@pytest.mark.parametrize(("name", "message"), [("nowhere", "does not exist"), ("other/0020.png", "is a file")])
def test_a_new_place_that_is_no_folder_is_refused(place: Place, name: str, message: str) -> None:
    with pytest.raises(IndexStoreError, match=f"{message}; expected a folder of pictures"):
        move_roots(place.index, [(place.old, place.folder / name)])
    assert place.opened().roots() == sorted(place.roots)


@pytest.mark.parametrize("new", ["other", "other/inside", ""])
def test_a_new_place_that_overlaps_an_indexed_folder_is_refused(place: Place, new: str) -> None:
    (place.folder / "other" / "inside").mkdir()
    before = place.opened().files()
    with pytest.raises(IndexStoreError, match="overlaps the indexed folder"):
        move_roots(place.index, [(place.old / "2024", place.folder / new)])
    assert place.opened().files() == before


def test_of_folders_that_move_together_all_or_none_do(place: Place) -> None:
    (place.folder / "new" / "2024").mkdir(parents=True)
    gallery(place.folder / "new" / "2024", 1, first=90)
    update_index(place.index, [place.folder / "new" / "2024"], CountingEncoder())
    before = place.opened().roots()
    with pytest.raises(IndexStoreError, match="overlaps"):
        move_roots(place.index, [(place.old, place.folder / "new")])  # 2023 would fit
    assert place.opened().roots() == before


def test_a_hidden_folder_beside_an_indexed_one_is_no_overlap(place: Place) -> None:
    hidden = place.folder / "other" / ".hidden"
    hidden.mkdir()
    assert move_roots(place.index, [(place.old / "2024", hidden)]) == 1
    assert hidden in place.opened().roots()


def test_without_an_index_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="no index in"):
        move_roots(tmp_path / "index", [(tmp_path, tmp_path)])
    assert not (tmp_path / "index").exists()


def test_a_second_writer_is_refused(place: Place) -> None:
    with writer_lock(place.index), pytest.raises(IndexStoreError, match="is being written by process"):
        move_roots(place.index, [(place.old, place.folder)])


def test_a_reader_that_is_open_follows(place: Place) -> None:
    opened = place.opened()
    (place.folder / "new").mkdir()
    move_roots(place.index, [(place.old, place.folder / "new")])
    assert place.folder / "new" / "2024" / "0010.png" in opened.files()


@pytest.mark.parametrize("name", ["2024=b", "=2024", "a=b=c"])
@pytest.mark.parametrize("new", ["new", "new=disk"])
def test_names_may_hold_the_sign(place: Place, name: str, new: str) -> None:
    named, there = place.folder / name, place.folder / new
    gallery(named, 2, first=70)
    update_index(place.index, [named], CountingEncoder())
    named.rename(there)
    assert split_move(place.index, f"{named}={there}") == (named, there)
    tiny_bundle(place.folder / "encoder")
    assert place.mimco("--root", f"{named}={there}").exit_code == 0
    assert there in place.opened().roots()
    assert named not in place.opened().roots()


def test_where_no_split_fits_the_first_sign_splits(place: Place) -> None:
    assert split_move(place.index, "a=b=c") == (Path("a"), Path("b=c"))
    for text in ("ab", "=b", "a=", "="):
        assert place.mimco("--root", text).exit_code == 2


def test_of_folders_that_are_forgotten_together_all_or_none_are(place: Place) -> None:
    unknown = place.mimco("forget", place.old / "2023", place.folder / "othr")
    assert unknown.exit_code == 1
    assert f"{place.folder}/othr is not an indexed folder; expected one of: " in unknown.output
    assert place.opened().roots() == sorted(place.roots)
    done = place.mimco("forget", place.old / "2024", place.folder / "other", place.folder / "other")
    assert done.output == "5 pictures dropped from the index\n"
    assert place.opened().roots() == [place.old / "2023"]


@pytest.mark.parametrize("command", [("forget", "loop"), ("--root", "loop=new"), ("--root", "disk=loop")])
def test_links_in_a_circle_are_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(place.folder)
    Path("loop").symlink_to("loop")
    Path("new").mkdir()
    tiny_bundle(place.folder / "encoder")
    done = place.mimco(*command)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "loop" in done.output
