from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimco_deploy.serving.scan import Scan, Stamp, Unlisted, compare, readable, scan_root
from tests.helpers import save


def paths(scan: Scan) -> list[str]:
    return sorted(path for path, _, _ in scan.files)


def test_pictures_are_found_by_their_suffix(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/y/x.webp", "a.png", "notes.txt", "a/no-suffix"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    scan = scan_root(tmp_path)
    files = sorted(scan.files)
    assert [path for path, _, _ in files] == ["a.png", "a/y/x.webp", "a/z.JPG", "b.png"]
    assert scan.unlisted == []
    status = (tmp_path / "b.png").stat()
    assert files[-1] == ("b.png", 7, status.st_mtime_ns)


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    for name in (".mimco/a.png", ".git/b.png", "._c.png", "seen.png", "x/.hidden/d.png"):
        save(tmp_path / name, 0)
    assert paths(scan_root(tmp_path)) == ["seen.png"]


def test_a_link_to_a_folder_is_not_followed_and_one_to_a_file_is(tmp_path: Path) -> None:
    save(tmp_path / "real" / "a.png", 0)
    (tmp_path / "real" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    assert paths(scan_root(tmp_path)) == ["link.png", "real/a.png"]


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    scan = scan_root(tmp_path)
    assert paths(scan) == []
    assert scan.unlisted == []


def test_a_name_that_is_not_utf8_is_found_under_its_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    save(tmp_path / name, 0)
    (found,) = paths(scan_root(tmp_path))
    assert os.fsencode(found) == b"caf\xe9.png"
    assert readable(found) == "caf�.png"


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "open" / "a.png", 0)
    save(tmp_path / "closed" / "b.png", 1)
    real = os.open

    def opened(path: Path, flags: int) -> int:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path, flags)

    monkeypatch.setattr(os, "open", opened)
    scan = scan_root(tmp_path)
    assert paths(scan) == ["open/a.png"]
    assert scan.unlisted == [Unlisted("closed", "Permission denied")]


class Closed:
    """Lists folders as the system does, but no file in the closed one can be looked at."""

    def __init__(self, folder: Path, code: int) -> None:
        self._folder, self._code = folder.stat(), code
        self._real = os.scandir

    def __call__(self, opened: int) -> Any:
        listing = self._real(opened)
        if not os.path.samestat(os.fstat(opened), self._folder):
            return listing
        with listing:
            entries = [SimpleNamespace(name=one.name, is_dir=one.is_dir, stat=self._fail) for one in listing]
        return contextlib.nullcontext(iter(entries))

    def _fail(self) -> os.stat_result:
        raise OSError(self._code, os.strerror(self._code))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_can_be_listed_but_not_entered_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    for name in ("open.png", "closed/a.png", "closed/b.png", "closed/below/c.png"):
        save(tmp_path / name, 0)
    monkeypatch.setattr(os, "scandir", Closed(tmp_path / "closed", code))
    scan = scan_root(tmp_path)
    assert paths(scan) == ["closed/below/c.png", "open.png"]
    assert scan.unlisted == [Unlisted("closed", os.strerror(code), files_only=True)]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP])
def test_a_file_that_goes_away_during_the_walk_is_no_closed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save(tmp_path / "closed" / "a.png", 0)
    monkeypatch.setattr(os, "scandir", Closed(tmp_path / "closed", code))
    scan = scan_root(tmp_path)
    assert (paths(scan), scan.unlisted) == ([], [])


def test_a_root_that_is_away_is_unlisted_as_a_whole(tmp_path: Path) -> None:
    scan = scan_root(tmp_path / "unplugged")
    assert paths(scan) == []
    assert [folder.path for folder in scan.unlisted] == [""]


stamps = st.dictionaries(
    st.text("abc/", min_size=1, max_size=4), st.builds(Stamp, st.integers(0, 3), st.integers(0, 3)), max_size=12
)


@given(known=stamps, found=stamps)
def test_every_path_is_in_exactly_one_list(known: dict[str, Stamp], found: dict[str, Stamp]) -> None:
    changes = compare(known, Scan([(path, *stamp) for path, stamp in found.items()], []))
    assert {file.path for file in changes.new} == found.keys() - known.keys()
    assert set(changes.gone) == known.keys() - found.keys()
    both = known.keys() & found.keys()
    assert set(changes.same) == {path for path in both if known[path] == found[path]}
    assert {file.path for file in changes.changed} == {path for path in both if known[path] != found[path]}
    assert changes.kept == {}


def test_files_below_an_unlisted_folder_are_kept_and_counted() -> None:
    stamp = Stamp(1, 1)
    closed = Unlisted("shut", "Permission denied")
    changes = compare({"shut/a.png": stamp, "shut/b/c.png": stamp, "shutter.png": stamp}, Scan([], [closed]))
    assert changes.gone == ["shutter.png"]
    assert changes.kept == {closed: 2}


@pytest.mark.parametrize("path", ["", "shut"])
def test_a_folder_that_cannot_be_entered_hides_no_file_of_a_folder_in_it(path: str) -> None:
    folder, known = Unlisted(path, "Permission denied", files_only=True), ("a.png", "b/c.png")
    names = [f"{path}/{name}" if path else name for name in known]
    changes = compare(dict.fromkeys(names, Stamp(1, 1)), Scan([], [folder]))
    assert (changes.kept, changes.gone) == ({folder: 1}, names[1:])


def test_a_folder_that_failed_while_it_was_listed_hides_all_below() -> None:
    partly, wholly = (Unlisted("shut", "Input/output error", files_only=only) for only in (True, False))
    changes = compare({"shut/a/b.png": Stamp(1, 1)}, Scan([], [partly, wholly]))
    assert (changes.kept, changes.gone) == ({partly: 0, wholly: 1}, [])


def test_many_closed_folders_are_not_gone_through_for_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    hides = Unlisted.hides

    def counted(folder: Unlisted, path: str) -> bool:
        asked.append(path)
        return hides(folder, path)

    monkeypatch.setattr(Unlisted, "hides", counted)
    closed = [Unlisted(f"shut/{number}", "Permission denied") for number in range(50)]
    known = [f"shut/{number}/deep/{name}.png" for number in range(50) for name in "ab"]
    changes = compare(dict.fromkeys(known, Stamp(1, 1)), Scan([], closed))
    assert changes.kept == dict.fromkeys(closed, 2)
    assert len(asked) == len(known)


def test_a_folder_that_cannot_be_read_and_of_which_nothing_is_known_is_told_too() -> None:
    closed = Unlisted("shut", "Permission denied")
    assert compare({}, Scan([], [closed])).kept == {closed: 0}
