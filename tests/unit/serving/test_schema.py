from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from mimco_deploy.errors import IndexBusyError, IndexStoreError
from mimco_deploy.serving import catalog as catalog_module
from mimco_deploy.serving import update
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.filters import Filter
from mimco_deploy.serving.generations import current_generation
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.inspect import verify
from mimco_deploy.serving.interchange import export_index, import_index
from mimco_deploy.serving.rewrite import repair
from mimco_deploy.serving.salvage import Salvage
from mimco_deploy.serving.schema import parts_of, upgrade
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, Embeddings, Images, noise

NAMES = ["top.jpg", "a.b/c.JPG", "a.b/d.tar.png", "ü/é.png", "deep/er/x.webp", "no\udcfftext/y\udcc3.png"]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(path, "PNG")
        os.utime(path, (10**9 + number, 10**9 + number))
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    return tmp_path / "index"


def make_old(index: Path, catalog: Path | None = None) -> sqlite3.Connection:
    """Bring a catalogue back to format 2, as mimco wrote it until November 2026."""
    db = sqlite3.connect(catalog or current_generation(index).catalog, isolation_level=None)
    db.executescript("""
        BEGIN;
        CREATE TABLE files_2 (
            root_id INTEGER NOT NULL REFERENCES roots (id), path BLOB NOT NULL,
            size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, row INTEGER NOT NULL REFERENCES contents (row),
            PRIMARY KEY (root_id, path)
        ) WITHOUT ROWID;
        INSERT INTO files_2 SELECT root_id, path, size, mtime_ns, row FROM files;
        DROP TABLE files;
        ALTER TABLE files_2 RENAME TO files;
        CREATE INDEX files_by_row ON files (row);
        CREATE TRIGGER file_added AFTER INSERT ON files BEGIN
            UPDATE contents SET files = files + 1 WHERE row = NEW.row;
        END;
        CREATE TRIGGER file_dropped AFTER DELETE ON files BEGIN
            UPDATE contents SET files = files - 1 WHERE row = OLD.row;
        END;
        CREATE TRIGGER file_changed AFTER UPDATE OF row ON files BEGIN
            UPDATE contents SET files = files - 1 WHERE row = OLD.row;
            UPDATE contents SET files = files + 1 WHERE row = NEW.row;
        END;
        UPDATE settings SET value = '2' WHERE key = 'format_version';
        COMMIT;
    """)
    return db


def schema(index: Path) -> set[tuple[str, str]]:
    """All statements that made the catalogue, but for where lines end."""
    with contextlib.closing(sqlite3.connect(current_generation(index).catalog)) as db:
        found = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {(name, " ".join(sql.replace('"files"', "files").split())) for name, sql in found}


def parts(index: Path) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(current_generation(index).catalog)) as db:
        return db.execute("SELECT path, name_at, suffix, modified FROM files ORDER BY path").fetchall()


def true_parts(name: str, second: int) -> tuple[object, ...]:
    path = os.fsencode(name)
    folder = os.path.dirname(path)  # noqa: PTH120
    return path, len(folder) + 1 + bool(folder), Path(name).suffix.lower(), f"2001-09-09T01:46:{40 + second}"


def test_the_parts_of_a_path_lie_beside_it(index: Path) -> None:
    assert parts(index) == sorted(true_parts(name, second) for second, name in enumerate(NAMES))


@pytest.mark.parametrize(
    ("path", "name", "suffix"),
    [
        (b".jpg", b".jpg", ""),
        (b"a/.jpg", b".jpg", ""),
        (b"a/..JPG", b"..JPG", ".jpg"),
        (b"a.b/c", b"c", ""),
        (b"x.", b"x.", "."),
        (b"\xc3/\xa9.jpg", b"\xa9.jpg", ".jpg"),
        (b"\x83/\x5c.j\xff", b"\x5c.j\xff", ".j\ufffd"),
    ],
)
def test_odd_names_have_parts(path: bytes, name: bytes, suffix: str) -> None:
    name_at, found = parts_of(path)
    assert (path[name_at - 1 :], found) == (name, suffix)


def test_the_parts_follow_a_folder_that_comes_to_lie_in_another(tmp_path: Path, index: Path) -> None:
    update_index(index, [tmp_path], CountingEncoder())
    below = [(f"photos/{name}", second) for second, name in enumerate(NAMES)]
    assert parts(index) == sorted(true_parts(*one) for one in below)


CONDITION = Filter("folder like '%/a.b' and suffix = '.jpg' and name = 'c.JPG' and modified > '2001' and date > '2001'")


def test_an_index_of_the_format_before_is_read_as_it_is_and_brought_to_the_present_one_by_the_next_update(
    tmp_path: Path, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, made, query = parts(index), schema(index), CountingEncoder().embed(np.stack([np.asarray(noise(0))]))[0]
    with ImageIndex.open(index) as opened:
        hits = opened.search(query, 9)
    make_old(index).close()
    old = current_generation(index).catalog.read_bytes()
    caplog.set_level("INFO", "mimco_deploy.serving.schema")
    with ImageIndex.open(index) as opened:
        assert opened.search(query, 9) == hits
        assert [hit.path.name for hit in opened.search(query, 9, CONDITION)] == ["c.JPG"]
        assert verify(index) == []
        assert current_generation(index).catalog.read_bytes() == old, "who reads writes nothing"
        noise(9).save(tmp_path / "photos/new.png")
        (tmp_path / "photos/top.jpg").unlink()
        report = update_index(index, [], CountingEncoder())
        assert (report.added, report.removed, report.embedded) == (1, 1, 1)
        assert [hit.path.name for hit in opened.search(query, 9, CONDITION)] == ["c.JPG"], "open all the while"
    assert "the catalogue of 6 files is brought to format 3" in caplog.text
    assert schema(index) == made
    assert [one for one in parts(index) if one[0] != b"new.png"] == [one for one in before if one[0] != b"top.jpg"]
    assert verify(index) == []


def test_an_import_brings_the_format_before_to_the_present_one(tmp_path: Path, index: Path) -> None:
    export_index(index, tmp_path / "all.npy")
    make_old(index).close()
    assert import_index(index, tmp_path / "all.npy") == len(NAMES)
    assert len(parts(index)) == len(NAMES)
    assert verify(index) == []


def test_who_comes_second_finds_it_done(index: Path) -> None:
    with contextlib.closing(make_old(index)) as db:
        upgrade(db)
        before = db.execute("SELECT * FROM settings").fetchall()
        upgrade(db)
        assert db.execute("SELECT * FROM settings").fetchall() == before


def test_an_upgrade_that_fails_leaves_what_was(index: Path) -> None:
    with contextlib.closing(make_old(index)) as db:
        db.execute("CREATE TABLE files_anew (x)")
        before = "\n".join(db.iterdump())
        with pytest.raises(sqlite3.OperationalError):
            upgrade(db)
        assert "\n".join(db.iterdump()) == before
    with pytest.raises(IndexStoreError, match=r"catalog\.sqlite: .*files_anew"):
        update_index(index, [], CountingEncoder())


def test_what_was_wrong_before_is_told_and_not_in_the_way(index: Path) -> None:
    with contextlib.closing(make_old(index)) as db:
        db.execute("UPDATE files SET row = 99 WHERE path = ?", (b"top.jpg",))
    assert verify(index) == ["catalogue: files names a row of contents that is not there"]
    update_index(index, [], CountingEncoder())
    assert verify(index) == ["catalogue: files names a row of contents that is not there"]
    assert repair(index).lost_files == 1
    update_index(index, [], CountingEncoder())
    assert (verify(index), len(parts(index))) == ([], len(NAMES))


def test_a_rebuild_that_was_begun_in_the_format_before_goes_on(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "COMMIT_EVERY_S", 0.0)

    class Killed(BaseException):
        pass

    class FailingEncoder(CountingEncoder):
        def embed(self, images: Images) -> Embeddings:
            if self.batches:
                raise Killed
            return super().embed(images)

    with pytest.raises(Killed):
        update_index(index, [], FailingEncoder(1, "0" * 64), batch_size=4, rebuild=True)
    with Catalog(index / "000002/catalog.sqlite") as begun, begun.snapshot():
        done = begun.row_count()
    make_old(index).close()
    make_old(index, index / "000002/catalog.sqlite").close()
    report = update_index(index, [], CountingEncoder(1, "0" * 64), batch_size=4, rebuild=True)
    assert (report.embedded, report.counts.files) == (len(NAMES) - done, len(NAMES))
    assert done > 0


def test_a_catalogue_that_is_held_for_now_is_not_taken_for_a_broken_one(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "_WAIT_S", 0.1)
    (tmp_path / "other").mkdir()
    noise(50).save(tmp_path / "other/x.png")
    with contextlib.closing(sqlite3.connect(current_generation(index).catalog, isolation_level=None)) as held:
        held.execute("BEGIN EXCLUSIVE")
        with pytest.raises(IndexBusyError, match="database is locked"):
            update_index(index, [tmp_path / "other"], CountingEncoder(), rebuild=True)
    assert update_index(index, [tmp_path / "other"], CountingEncoder(), rebuild=True).counts.files == len(NAMES) + 1


def test_what_is_left_of_a_damaged_one_of_the_format_before_is_saved(tmp_path: Path, index: Path) -> None:
    before = parts(index)
    make_old(index).close()
    with Salvage(current_generation(index).catalog) as salvage:
        assert salvage.copy_to(tmp_path / "saved.sqlite", np.arange(len(NAMES))) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "saved.sqlite")) as db:
        assert db.execute("SELECT path, name_at, suffix, modified FROM files ORDER BY path").fetchall() == before
