"""An index that follows its folders."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.bundle_archive import pack
from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving import watch as watch_module
from mimco_deploy.serving.generations import writer_lock
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.update import UpdateReport, update_index
from mimco_deploy.serving.watch import watch_folders
from tests.helpers import CountingEncoder, gallery, save, tiny_bundle

WAIT_S = 30.0


class Watch:
    """A watch in a thread."""

    def __init__(self, index: Path, folders: list[Path]) -> None:
        self.reports: queue.Queue[UpdateReport] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(index, folders))
        self._thread.start()

    def _run(self, index: Path, folders: list[Path]) -> None:
        for report in watch_folders(index, folders, CountingEncoder(), settle_s=0.1, stop=self._stop):
            self.reports.put(report)

    def next(self) -> UpdateReport:
        return self.reports.get(timeout=WAIT_S)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    gallery(tmp_path / "photos", 5)
    return tmp_path / "photos"


@pytest.fixture
def watch(photos: Path, tmp_path: Path) -> Iterator[Watch]:
    watch = Watch(tmp_path / "index", [photos])
    yield watch
    watch.end()


def test_what_comes_changes_and_goes_is_indexed(watch: Watch, photos: Path, tmp_path: Path) -> None:
    assert watch.next().added == 5
    save(photos / "new/0100.png", 100)
    seen = watch.next()
    while seen.counts.files < 6:
        seen = watch.next()
    assert seen.counts.files == 6
    with ImageIndex.open(tmp_path / "index") as index:
        assert photos.resolve() / "new/0100.png" in index.files()
    (photos / "0000.png").unlink()
    assert watch.next().counts.files == 5


def test_the_index_in_a_watched_folder_is_no_change_of_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[object] = []

    def counted(*given: Any, **named: Any) -> UpdateReport:
        updates.append(given)
        return update_index(*given, **named)

    monkeypatch.setattr(watch_module, "update_index", counted)
    watch = Watch(photos / ".mimco/index", [photos])
    try:
        assert watch.next().added == 5
        time.sleep(2.0)  # in which it woke itself some ten times
        assert len(updates) <= 2  # the folder that holds it is new as well
        save(photos / "new.png", 77)
        assert watch.next().added == 1
    finally:
        watch.end()


def test_a_folder_that_takes_the_place_of_another_is_watched(watch: Watch, photos: Path) -> None:
    assert watch.next().added == 5
    photos.rename(photos.with_name("old"))
    gallery(photos, 1)
    assert watch.next().removed == 4
    save(photos / "new.png", 77)
    assert watch.next().added == 1


@pytest.mark.parametrize("told", [True, False])
def test_it_waits_for_another_writer(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    monkeypatch.setattr(watch_module, "_BUSY_S", 0.1)
    with writer_lock(tmp_path / "index"):
        if not told:
            (tmp_path / "index/lock").write_text("")  # as before it has said who it is
        watch = Watch(tmp_path / "index", [photos])
        with pytest.raises(queue.Empty):
            watch.reports.get(timeout=0.5)
    try:
        assert watch.next().added == 5
    finally:
        watch.end()


@pytest.mark.parametrize("away", [["photos"], ["photos", "more"]])
def test_a_folder_that_is_away_for_a_while_is_passed_over(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: list[str]
) -> None:
    monkeypatch.setattr(watch_module, "_BUSY_S", 0.1)
    monkeypatch.setattr(watch_module, "_LOOK_AGAIN_S", 0.5)
    gallery(tmp_path / "more", 2, first=10)
    watch = Watch(tmp_path / "index", [photos, tmp_path / "more"])
    try:
        assert watch.next().counts.files == 7
        for name in away:
            (tmp_path / name).rename(tmp_path / f"{name} away")
        if "more" not in away:
            save(tmp_path / "more/0020.png", 20)
            assert watch.next().counts.files == 8, "those of the other one stay"
        with pytest.raises(queue.Empty):
            watch.reports.get(timeout=1.0)
        save(tmp_path / "photos away/0021.png", 21)
        for name in away:
            (tmp_path / f"{name} away").rename(tmp_path / name)
        assert watch.next().added == 1
    finally:
        watch.end()


def test_an_index_that_a_newer_mimco_made_meanwhile_ends_it(photos: Path, tmp_path: Path) -> None:
    reports = watch_folders(tmp_path / "index", [photos], CountingEncoder(), settle_s=0.1)
    assert next(reports).added == 5
    pointer = tmp_path / "index/index.json"
    pointer.write_text(pointer.read_text("utf-8").replace('"format_version": 1', '"format_version": 2'), "utf-8")
    save(photos / "new.png", 77)
    with pytest.raises(IndexStoreError, match="has format version 2; expected 1, or a newer mimco"):
        next(reports)


def test_a_folder_that_is_not_there_and_nothing_to_watch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="does not exist"):
        next(watch_folders(tmp_path / "index", [tmp_path / "none"], CountingEncoder()))
    with pytest.raises(IndexStoreError, match="no folder to index"):
        next(watch_folders(tmp_path / "index", [], CountingEncoder()))


def test_a_watch_that_is_told_to_end_leaves_nothing_unpacked(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 2)
    pack(tiny_bundle(tmp_path / "made"), tmp_path / "encoder.zip")
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "mimco_deploy", "--workspace", str(tmp_path / "space"), "watch"]
    command += [str(tmp_path / "photos"), "--encoder", str(tmp_path / "encoder.zip")]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("2 pictures indexed")
        assert list((tmp_path / "temporary").glob("mimco-bundle-*/model.onnx"))
        process.terminate()
        assert process.wait() == 0
    assert list((tmp_path / "temporary").iterdir()) == []
