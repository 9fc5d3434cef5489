"""Rebuilding an index, its lock and its generations."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mimco_deploy.errors import EncoderMismatchError, IndexBusyError, IndexStoreError
from mimco_deploy.serving import catalog as catalog_module
from mimco_deploy.serving import rewrite as rewrite_module
from mimco_deploy.serving import update
from mimco_deploy.serving.generations import begin_generation, current_generation, switch_to, writer_lock
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.query import search_image
from mimco_deploy.serving.rewrite import RewriteReport, compact, repair
from mimco_deploy.serving.update import Progress, UpdateReport, update_index
from tests.helpers import CountingEncoder, Embeddings, Images, gallery, noise, save

OTHER = "0" * 64


class Killed(BaseException):
    """Stands for a process that ends here."""


class FailingEncoder(CountingEncoder):
    """Ends the run after some pictures."""

    def __init__(self, after: int, seed: int, fingerprint: str) -> None:
        super().__init__(seed, fingerprint)
        self._after = after

    def embed(self, images: Images) -> Embeddings:
        if self.pictures >= self._after:
            raise Killed
        return super().embed(images)


@pytest.fixture(autouse=True)
def every_batch_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "COMMIT_EVERY_S", 0.0)


def grow(tmp_path: Path, encoder: CountingEncoder, *roots: Path, rebuild: bool = False) -> UpdateReport:
    return update_index(tmp_path / "index", roots, encoder, batch_size=4, rebuild=rebuild)


def folders(index: Path) -> list[str]:
    return sorted(path.name for path in index.iterdir() if path.is_dir())


def test_a_rebuild_embeds_all_recorded_folders_and_those_given(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "a", 5)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    paths += gallery(tmp_path / "b", 2, first=10)
    encoder = CountingEncoder(seed=1, fingerprint=OTHER)
    report = grow(tmp_path, encoder, tmp_path / "b", rebuild=True)
    assert (report.added, report.embedded, encoder.pictures) == (7, 7, 7)
    index = ImageIndex.open(tmp_path / "index", OTHER)
    assert index.files() == paths
    assert search_image(index, encoder, paths[3], 1)[0].path == paths[3]
    assert folders(tmp_path / "index") == ["000002"]


def test_dead_embeddings_are_gone_after_a_rebuild(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "a", 4)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    paths[0].unlink()
    assert grow(tmp_path, CountingEncoder()).counts.dead == 1
    counts = grow(tmp_path, CountingEncoder(), rebuild=True).counts
    assert (counts.files, counts.contents, counts.dead) == (3, 3, 0)


def test_searches_see_the_old_index_until_the_new_one_is_whole(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "a", 8)
    old = CountingEncoder()
    grow(tmp_path, old, tmp_path / "a")
    index = ImageIndex.open(tmp_path / "index")
    with pytest.raises(Killed):
        grow(tmp_path, FailingEncoder(4, 1, OTHER), rebuild=True)
    assert search_image(index, old, paths[6], 1)[0].path == paths[6]
    assert grow(tmp_path, old).unchanged == 8


def test_a_rebuild_that_was_cut_short_goes_on_where_it_stopped(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 10)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    with pytest.raises(Killed):
        grow(tmp_path, FailingEncoder(8, 1, OTHER), rebuild=True)
    encoder = CountingEncoder(seed=1, fingerprint=OTHER)
    report = grow(tmp_path, encoder, rebuild=True)
    assert (report.unchanged, report.embedded) == (8, 2)
    assert folders(tmp_path / "index") == ["000002"]


def test_a_rebuild_does_not_go_on_with_what_a_third_encoder_began(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 10)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    with pytest.raises(Killed):
        grow(tmp_path, FailingEncoder(8, 1, OTHER), rebuild=True)
    assert grow(tmp_path, CountingEncoder(seed=2, fingerprint="2" * 64), rebuild=True).embedded == 10
    assert ImageIndex.open(tmp_path / "index").fingerprint == "2" * 64


def killed_rebuild(tmp_path: Path) -> Path:
    """An index of ten pictures, eight of which another encoder had embedded anew when it was killed."""
    gallery(tmp_path / "a", 10)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    with pytest.raises(Killed):
        grow(tmp_path, FailingEncoder(8, 1, OTHER), rebuild=True)
    return tmp_path / "index"


@pytest.mark.parametrize("rewrite", [compact, repair])
def test_a_rewrite_drops_nothing_that_a_killed_rebuild_embedded(
    tmp_path: Path, rewrite: Callable[[Path], RewriteReport]
) -> None:
    index = killed_rebuild(tmp_path)
    assert rewrite(index).files == rewrite(index).files == 10
    assert folders(index) == ["000005", "000006"]
    assert grow(tmp_path, CountingEncoder()).unchanged == 10
    assert grow(tmp_path, CountingEncoder(seed=1, fingerprint=OTHER), rebuild=True).embedded == 2
    assert folders(index) == ["000006"]
    assert rewrite(index).files == 10


@pytest.mark.parametrize("fingerprint", ["f" * 64, OTHER], ids=["cut off", "another encoder"])
def test_an_index_whose_pointer_is_lost_is_repaired_not_begun_anew(tmp_path: Path, fingerprint: str) -> None:
    gallery(tmp_path / "a", 4)
    index = tmp_path / "index"
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    grow(tmp_path, CountingEncoder(), rebuild=True)
    (index / "index.json").unlink()
    if fingerprint != OTHER:
        os.truncate(index / "000002/vectors.f32", (index / "000002/vectors.f32").stat().st_size - 4)
    with pytest.raises(IndexStoreError, match=r"has lost its index\.json; run: mimco index repair"):
        grow(tmp_path, CountingEncoder(1, fingerprint), tmp_path / "a")
    assert repair(index).files == (4 if fingerprint == OTHER else 3)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR])
def test_a_rebuild_that_cannot_be_looked_at_for_now_is_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    gallery(tmp_path / "a", 8)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    with pytest.raises(Killed):
        grow(tmp_path, FailingEncoder(4, 1, OTHER), rebuild=True)

    def fails(path: Path, mode: str) -> sqlite3.Connection:
        if "000002" in path.parts:
            error = sqlite3.OperationalError("for now")
            error.sqlite_errorcode = code
            raise error
        return real(path, mode)

    real = catalog_module.connect
    with monkeypatch.context() as patch:
        patch.setattr(catalog_module, "connect", fails)
        with pytest.raises(IndexBusyError, match="for now"):
            grow(tmp_path, CountingEncoder(1, OTHER), rebuild=True)
    assert grow(tmp_path, CountingEncoder(1, OTHER), rebuild=True).embedded == 4


def test_a_rewrite_that_is_killed_before_it_takes_over_keeps_that_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = killed_rebuild(tmp_path)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rewrite_module, "switch_to", killed)
        with pytest.raises(Killed):
            compact(index)
    assert folders(index) == ["000001", "000003", "000004"]
    assert compact(index).files == 10
    assert grow(tmp_path, CountingEncoder(seed=1, fingerprint=OTHER), rebuild=True).embedded == 2
    assert len(folders(index)) == 1


@pytest.mark.parametrize(
    "encoder", [FailingEncoder(0, 1, OTHER), FailingEncoder(8, 0, "f" * 64)], ids=["nothing embedded", "the same"]
)
def test_a_compaction_passes_a_killed_rebuild_that_nobody_misses(tmp_path: Path, encoder: FailingEncoder) -> None:
    gallery(tmp_path / "a", 10)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    with pytest.raises(Killed):
        grow(tmp_path, encoder, rebuild=True)
    assert compact(tmp_path / "index").files == 10
    assert folders(tmp_path / "index") == ["000003"]


def test_a_reader_of_an_index_that_another_encoder_rebuilt_is_refused(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 3)
    old = CountingEncoder()
    grow(tmp_path, old, tmp_path / "a")
    index = ImageIndex.open(tmp_path / "index")
    embedding = old.embed(np.asarray(noise(0))[np.newaxis])[0]
    grow(tmp_path, CountingEncoder(seed=1, fingerprint=OTHER), rebuild=True)
    with pytest.raises(EncoderMismatchError):
        index.search(embedding, 1)


def test_an_open_index_follows_a_rebuild_by_the_same_encoder(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "a", 3)
    encoder = CountingEncoder()
    grow(tmp_path, encoder, tmp_path / "a")
    index = ImageIndex.open(tmp_path / "index")
    before = search_image(index, encoder, paths[0], 3)
    grow(tmp_path, encoder, rebuild=True)
    assert search_image(index, encoder, paths[0], 3) == before


def test_a_generation_that_a_crash_left_behind_is_removed(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 3)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    grow(tmp_path, CountingEncoder(), rebuild=True)
    shutil.copytree(tmp_path / "index" / "000002", tmp_path / "index" / "000001")
    (tmp_path / "index" / ".index.json.4711.tmp").touch()
    grow(tmp_path, CountingEncoder())
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["000002", "index.json", "lock"]


def test_a_first_index_that_was_cut_short_before_its_pointer_is_taken_up(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 3)
    with writer_lock(tmp_path / "index"):
        begin_generation(tmp_path / "index", "f" * 64, 16)
        (tmp_path / "index" / "000001" / "catalog.sqlite").write_bytes(b"")
    assert grow(tmp_path, CountingEncoder(), tmp_path / "a").counts.files == 3


# ---------------------------------------------------------------------- broken indexes


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format_version": 1}', b'{"format_version": 1, "generation": "x"}']
)
def test_a_broken_pointer_is_refused_and_a_rebuild_mends_it(tmp_path: Path, content: bytes) -> None:
    gallery(tmp_path / "a", 3)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    (tmp_path / "index" / "index.json").write_bytes(content)
    with pytest.raises(IndexStoreError, match=r"index.json cannot be read .*; run: mimco index repair"):
        ImageIndex.open(tmp_path / "index")
    with pytest.raises(IndexStoreError, match="run: mimco index repair"):
        grow(tmp_path, CountingEncoder(), rebuild=True)
    assert grow(tmp_path, CountingEncoder(), tmp_path / "a", rebuild=True).counts.files == 3
    assert folders(tmp_path / "index") == ["000002"]


def test_an_index_of_another_format_is_refused(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 1)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    pointer = tmp_path / "index" / "index.json"
    good = pointer.read_text()
    pointer.write_text(json.dumps({"format_version": 2, "generation": 1}))
    with pytest.raises(IndexStoreError, match="has format version 2; expected 1"):
        ImageIndex.open(tmp_path / "index")
    pointer.write_text(good)
    connection = sqlite3.connect(current_generation(tmp_path / "index").catalog)
    connection.execute("UPDATE settings SET value = '1' WHERE key = 'format_version'")
    connection.commit()
    connection.close()
    with pytest.raises(IndexStoreError, match="has format version 1; expected 3"):
        ImageIndex.open(tmp_path / "index")


@pytest.mark.parametrize("newer", ["index.json", "catalog.sqlite", "catalog.sqlite, without index.json"])
def test_an_index_of_a_newer_format_is_left_as_it_is(tmp_path: Path, newer: str) -> None:
    gallery(tmp_path / "a", 2)
    index = tmp_path / "index"
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    if newer == "index.json":
        (index / newer).write_text(json.dumps({"format_version": 2, "generation": 1}))
    else:
        connection = sqlite3.connect(current_generation(index).catalog)
        connection.execute("UPDATE settings SET value = '4' WHERE key = 'format_version'")
        connection.commit()
        connection.close()
        if newer.endswith("without index.json"):
            (index / "index.json").unlink()
    before = {path: path.read_bytes() for path in index.rglob("*") if path.is_file()}
    attempts: list[Callable[[], object]] = [
        lambda: grow(tmp_path, CountingEncoder(), tmp_path / "a"),
        lambda: grow(tmp_path, CountingEncoder(), tmp_path / "a", rebuild=True),
        lambda: repair(index),
    ]
    for attempt in attempts:
        with pytest.raises(IndexBusyError, match=r"has format version [24]; expected [13], or a newer mimco$"):
            attempt()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("content", [b"", b"no database" * 500, None])
def test_a_broken_catalogue_is_refused_with_the_way_out(tmp_path: Path, content: bytes | None) -> None:
    gallery(tmp_path / "a", 2)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    catalog = current_generation(tmp_path / "index").catalog
    catalog.unlink() if content is None else catalog.write_bytes(content)
    for _ in range(2):
        with pytest.raises(IndexStoreError, match=r"catalog.sqlite.*run: mimco index repair"):
            ImageIndex.open(tmp_path / "index")
    with pytest.raises(IndexStoreError, match="run: mimco index repair"):
        grow(tmp_path, CountingEncoder())
    with pytest.raises(IndexStoreError, match=r"catalog.sqlite.*run: mimco index reindex DIR"):
        repair(tmp_path / "index")
    assert grow(tmp_path, CountingEncoder(), tmp_path / "a", rebuild=True).counts.files == 2


def test_vectors_shorter_than_the_catalogue_counts_are_refused(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 3)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    vectors = current_generation(tmp_path / "index").vectors
    os.truncate(vectors, vectors.stat().st_size - 5)
    for attempt in (lambda: ImageIndex.open(tmp_path / "index"), lambda: grow(tmp_path, CountingEncoder())):
        with pytest.raises(IndexStoreError, match=r"holds 2 embeddings; expected the 3 .*; run: mimco index repair"):
            attempt()
    assert grow(tmp_path, CountingEncoder(), rebuild=True).counts.files == 3


def test_a_torn_tail_is_cut_off_and_never_searched(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "a", 3)
    encoder = CountingEncoder()
    grow(tmp_path, encoder, tmp_path / "a")
    vectors = current_generation(tmp_path / "index").vectors
    whole = vectors.stat().st_size
    with vectors.open("ab") as file:
        file.write(b"\x7f" * 100)
    index = ImageIndex.open(tmp_path / "index")
    assert search_image(index, encoder, paths[0], 9)[0].path == paths[0]
    paths.append(save(tmp_path / "a" / "new.png", 50))
    grow(tmp_path, encoder)
    assert vectors.stat().st_size == whole + 16 * 4
    assert [search_image(index, encoder, path, 1)[0].path for path in paths] == paths


def test_an_index_that_may_not_be_written_can_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = gallery(tmp_path / "a", 3)
    encoder = CountingEncoder()
    grow(tmp_path, encoder, tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}
    assert search_image(ImageIndex.open(tmp_path / "index"), encoder, paths[0], 1)[0].path == paths[0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")} == before
    real = Path.open

    def closed(self: Path, mode: str = "r", **options: str) -> object:
        if "a" in mode:
            raise PermissionError(13, "Permission denied")
        return real(self, mode, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(IndexStoreError, match=r"cannot be written \(Permission denied\)"):
        grow(tmp_path, encoder)


# ---------------------------------------------------------------------- one writer


def test_a_second_writer_is_refused_with_the_process_of_the_first(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 2)
    message = f"being written by process {os.getpid()}; expected one writer"
    with writer_lock(tmp_path / "index"), pytest.raises(IndexStoreError, match=message):
        grow(tmp_path, CountingEncoder(), tmp_path / "a")
    assert grow(tmp_path, CountingEncoder(), tmp_path / "a").counts.files == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    refusal = f"the file system of {tmp_path / 'index'} gives no locks ({os.strerror(code)}); expected a local disk"
    with pytest.raises(IndexStoreError, match=f"^{re.escape(refusal)}$"):
        grow(tmp_path, CountingEncoder(), gallery(tmp_path / "a", 2)[0].parent)


def test_the_lock_is_held_during_the_whole_of_a_rebuild(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 8)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    refused: list[int] = []

    def intrude(progress: Progress) -> None:
        with pytest.raises(IndexStoreError, match="being written by process"):
            grow(tmp_path, CountingEncoder())
        refused.append(progress.done)

    update_index(tmp_path / "index", [], CountingEncoder(), batch_size=4, rebuild=True, on_progress=intrude)
    assert refused == [4, 8]
    with (tmp_path / "index" / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


def test_readers_and_a_writer_never_refuse_each_other(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "a", 60)
    encoder = CountingEncoder()
    update_index(tmp_path / "index", [tmp_path / "a"], CountingEncoder(), batch_size=60)
    embeddings = encoder.embed(np.stack([np.asarray(noise(seed)) for seed in range(60)]))
    gallery(tmp_path / "a", 60, first=60)
    writer = threading.Thread(
        target=update_index, args=(tmp_path / "index", [], CountingEncoder()), kwargs={"batch_size": 1}
    )
    writer.start()
    index, seen = ImageIndex.open(tmp_path / "index"), [60]
    while writer.is_alive():
        assert [hits[0].path for hits in index.search_many(embeddings, 1)] == paths
        seen.append(index.counts().files)
    writer.join()
    assert seen == sorted(seen), "a reader never sees less than before"
    assert index.counts().files == 120


def test_the_lock_falls_when_a_run_fails(tmp_path: Path) -> None:
    gallery(tmp_path / "a", 8)
    with pytest.raises(Killed):
        grow(tmp_path, FailingEncoder(4, 0, "f" * 64), tmp_path / "a")
    assert len(ImageIndex.open(tmp_path / "index").files()) == 4
    assert grow(tmp_path, CountingEncoder(), tmp_path / "a").embedded == 4


def test_a_reader_that_opens_while_a_rebuild_ends_reads_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = gallery(tmp_path / "a", 2)
    grow(tmp_path, CountingEncoder(), tmp_path / "a")
    calls: list[int] = []

    def slow(path: Path) -> object:
        found = current_generation(path)
        calls.append(found.number)
        if len(calls) == 1:
            with writer_lock(path):
                newer = begin_generation(path, "f" * 64, 16)
                switch_to(path, newer)
            grow(tmp_path, CountingEncoder(), tmp_path / "a")
        return found

    monkeypatch.setattr("mimco_deploy.serving.inspect.current_generation", slow)
    assert ImageIndex.open(tmp_path / "index").files() == paths
    assert calls[:2] == [1, 2]
