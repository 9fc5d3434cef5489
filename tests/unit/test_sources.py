"""What sources hold, however they are spelled; what of them cannot be read. More in `training/test_corpus.py`."""

from __future__ import annotations

import errno
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.sources import find_pictures
from tests.helpers import gallery, noise, save


def test_a_folder_is_the_same_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery(tmp_path / "p/a", 2)
    with tarfile.open(tmp_path / "p/a/set.tar", "w") as archive:
        archive.add(save(tmp_path / "b.png", 5), "x.png")
        archive.add(save(tmp_path / "b.png", 6), "y.png")
    (tmp_path / "link").symlink_to(tmp_path / "p/a")
    monkeypatch.chdir(tmp_path)
    spelled = ["p/a", str(tmp_path / "p/a"), "p/../p/a", "link", "p/a/0000.png", "./p/a/set.tar"]
    names = [picture.name for picture in find_pictures(spelled)]
    assert names == ["p/a/0000.png", "p/a/0001.png", "p/a/set.tar:x.png", "p/a/set.tar:y.png"]
    folders = {picture.name: picture.folder for picture in find_pictures([*spelled, "p"])}
    assert folders == dict.fromkeys(names, "a")


@pytest.mark.parametrize("name", ["a.png", "folder/a.png"])
def test_of_a_member_that_comes_twice_the_last_counts(tmp_path: Path, name: str) -> None:
    tar = tmp_path / "set.tar"
    for mode, seed in (("w", 1), ("a", 2)):
        with tarfile.open(tar, mode) as archive:  # type: ignore[call-overload]
            archive.add(save(tmp_path / "a.png", seed), name)
    (picture,) = find_pictures([str(tar)])
    assert picture.decode(32).tobytes() == noise(2).tobytes()


@pytest.mark.parametrize("what", ["scandir", "stat"])
def test_what_cannot_be_read_is_told_in_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    gallery(tmp_path / "p", 2)
    for closed in ("closed", "other"):
        save(tmp_path / "p" / closed / "a.png", 7)
    real = getattr(os, what)

    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        names = {Path(path).name, Path(path).parent.name} if isinstance(path, str | Path) else set()
        if names & {"closed", "other"} and (what == "scandir" or str(path).endswith(".png")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, what, refuse)
        found = find_pictures([str(tmp_path / "p")])
    assert len(found) == 2
    (record,) = caplog.records
    assert record.getMessage().endswith("cannot be read (Permission denied); 1 more likewise")
    ending = "" if what == "scandir" else "/a.png"
    assert record.getMessage().split()[0] in {f"{tmp_path}/p/{closed}{ending}" for closed in ("closed", "other")}
