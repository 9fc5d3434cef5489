"""What a rebuild that was cut short has in common with the index that it replaces, and what a killed run leaves."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving import update
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.inspect import recorded_encoder, status_of
from mimco_deploy.serving.pictures import read_pictures
from mimco_deploy.serving.roots import forget_roots, move_roots
from mimco_deploy.serving.tuning import Budget, tune_index
from mimco_deploy.serving.update import UpdateReport, update_index
from tests.helpers import CountingEncoder, Embeddings, Images, gallery, tiny_bundle

OTHER = "0" * 64


class Killed(BaseException):
    """Stands for a process that ends here."""


class FailingEncoder(CountingEncoder):
    """Ends the run at its second batch."""

    def embed(self, images: Images) -> Embeddings:
        if self.batches:
            raise Killed
        return super().embed(images)


@pytest.fixture(autouse=True)
def every_batch_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "COMMIT_EVERY_S", 0.0)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of the folders a and b, four pictures each, of whose rebuild those of a are done."""
    gallery(tmp_path / "a", 4)
    gallery(tmp_path / "b", 4, first=10)
    update_index(tmp_path / "index", [tmp_path / "a", tmp_path / "b"], CountingEncoder())
    with pytest.raises(Killed):
        update_index(tmp_path / "index", [], FailingEncoder(1, OTHER), batch_size=4, rebuild=True)
    return tmp_path / "index"


def test_a_folder_that_was_forgotten_meanwhile_does_not_come_back(index: Path) -> None:
    folder = index.parent
    forget_roots(index, [folder / "a"])
    report = update_index(index, [], CountingEncoder(1, OTHER), rebuild=True)
    assert ImageIndex.open(index).roots() == [folder / "b"]
    assert (report.counts.files, report.counts.dead, report.embedded) == (4, 4, 4)


def test_a_folder_that_moved_meanwhile_is_there_once_and_is_not_embedded_again(index: Path) -> None:
    folder = index.parent
    (folder / "a").rename(folder / "moved")
    move_roots(index, [(folder / "a", folder / "moved")])
    report = update_index(index, [], CountingEncoder(1, OTHER), rebuild=True)
    assert ImageIndex.open(index).roots() == [folder / "b", folder / "moved"]
    assert (report.counts.files, report.counts.dead, report.embedded) == (8, 0, 4)


def test_a_folder_that_is_given_again_is_not_taken_out(index: Path) -> None:
    folder = index.parent
    forget_roots(index, [folder / "a"])
    report = update_index(index, [folder / "a"], CountingEncoder(1, OTHER), rebuild=True)
    assert (report.unchanged, report.counts.files, report.embedded) == (4, 8, 4)


def test_a_rebuild_keeps_the_budget(index: Path) -> None:
    budget = Budget(latency_ms=7, recall=0.5)
    tune_index(index, budget)
    update_index(index, [], CountingEncoder(1, OTHER), rebuild=True)
    assert (status_of(index).generation, status_of(index).budget) == (2, budget)


def test_a_rebuild_of_an_index_that_cannot_be_read_goes_on_with_all_that_it_has(index: Path) -> None:
    (index / "000001" / "catalog.sqlite").write_bytes(b"no catalogue")
    report = update_index(index, [index.parent / "b"], CountingEncoder(1, OTHER), rebuild=True)
    assert (report.unchanged, report.counts.files, report.embedded) == (4, 8, 4)


def test_a_first_run_that_was_killed_says_what_embedded_it(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 8)
    bundle = tiny_bundle(tmp_path / "encoder")
    with pytest.raises(Killed):
        update_index(tmp_path / "index", [tmp_path / "photos"], FailingEncoder(), batch_size=4, encoder_path=bundle)
    assert status_of(tmp_path / "index").counts.files == 4
    assert status_of(tmp_path / "index").made_by["provider"] == "NumPy"
    assert recorded_encoder(tmp_path / "index") == bundle


@pytest.mark.parametrize("disk", ["a", "a/disk"])
@pytest.mark.parametrize("mounted_on", [False, True])
def test_a_rebuild_whose_disk_is_taken_out_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, mounted_on: bool
) -> None:
    folder, index = tmp_path / disk, tmp_path / "index"
    gallery(folder, 4)
    if disk != "a":
        mounted_on = True  # without a place to mount it on, it was deleted for all that can be known
        gallery(tmp_path / "a/here", 4, first=20)
    gallery(tmp_path / "b", 4, first=10)
    update_index(index, [tmp_path / "a", tmp_path / "b"], CountingEncoder())
    count = len(ImageIndex.open(index).files())

    def taken_out(*arguments: Any) -> Iterator[Any]:
        folder.rename(tmp_path / "away")
        if mounted_on:
            folder.mkdir()
        return read_pictures(*arguments)

    def rebuilt() -> UpdateReport:
        return update_index(index, [], CountingEncoder(1, OTHER), rebuild=True)

    monkeypatch.setattr(update, "read_pictures", taken_out)
    with pytest.raises(IndexStoreError, match=rf"{disk} cannot be read .*a rebuild would lose its 4 files"):
        rebuilt()
    monkeypatch.setattr(update, "read_pictures", read_pictures)
    with pytest.raises(IndexStoreError, match="a rebuild would lose its 4 files"):
        rebuilt()  # nor the next time
    assert len(ImageIndex.open(index, "f" * 64).files()) == count
    if mounted_on:
        folder.rmdir()
    (tmp_path / "away").rename(folder)
    report = rebuilt()
    assert (report.embedded, report.counts.files) == (4, count)


@pytest.mark.parametrize("inner", [False, True])
def test_a_folder_that_was_emptied_for_good_is_deleted_or_forgotten(tmp_path: Path, inner: bool) -> None:
    folder, index = tmp_path / "a" / ("inner" if inner else ""), tmp_path / "index"
    paths = gallery(folder, 4)
    if inner:
        gallery(tmp_path / "a/here", 1, first=20)
    gallery(tmp_path / "b", 2, first=10)
    update_index(index, [tmp_path / "a", tmp_path / "b"], CountingEncoder())
    for path in paths:
        path.unlink()
    with pytest.raises(IndexStoreError, match=r"it is empty.*delete it, or mimco index forget it"):
        update_index(index, [], CountingEncoder(1, OTHER), rebuild=True)
    if inner:
        folder.rmdir()
    else:
        forget_roots(index, [folder])
    assert update_index(index, [], CountingEncoder(1, OTHER), rebuild=True).counts.files == 2 + inner


def test_a_disk_that_fails_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery(tmp_path / "a/disk", 4)
    gallery(tmp_path / "a/here", 2, first=10)
    index = tmp_path / "index"
    update_index(index, [tmp_path / "a"], CountingEncoder())

    def fails(*arguments: Any) -> Iterator[Any]:
        (tmp_path / "a/disk").rename(tmp_path / "away")
        return read_pictures(*arguments)

    def lstat(path: Path) -> os.stat_result:
        if "disk" in path.parts:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return path.stat(follow_symlinks=False)

    monkeypatch.setattr(update, "read_pictures", fails)
    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(IndexStoreError, match=r"disk cannot be read .*would lose its 4 files"):
        update_index(index, [], CountingEncoder(1, OTHER), rebuild=True)


def test_a_rebuild_goes_on_where_files_are_deleted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, index = gallery(tmp_path / "a", 4), tmp_path / "index"
    update_index(index, [tmp_path / "a"], CountingEncoder())

    def deleted(*arguments: Any) -> Iterator[Any]:
        paths[0].unlink()
        return read_pictures(*arguments)

    monkeypatch.setattr(update, "read_pictures", deleted)
    assert update_index(index, [], CountingEncoder(1, OTHER), rebuild=True).counts.files == 3
