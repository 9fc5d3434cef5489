"""The tables of the catalogue, and how one of an older format is brought to them.

What conditions ask of a path and of a date is kept beside it (`name_at`, `suffix`, `modified`): to find the last
slash of 100,000 paths takes three times as long as to read where it is.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from mimco_deploy.errors import IndexNewerError, IndexStoreError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
_WITHOUT_PARTS_OF_PATHS = "2"
READABLE = (_WITHOUT_PARTS_OF_PATHS, str(FORMAT_VERSION))
"""Formats that can be read. Whoever adds files brings the older one to the present one first."""

FUNCTIONS = ("mimco_name_at", "mimco_suffix")
"""Of Python, for the older format: what `parts_of` gives."""

_FILES = """
CREATE TABLE {name} (
    root_id INTEGER NOT NULL REFERENCES roots (id), path BLOB NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, row INTEGER NOT NULL REFERENCES contents (row),
    name_at INTEGER NOT NULL, suffix TEXT NOT NULL,
    modified TEXT AS (strftime('%Y-%m-%dT%H:%M:%S', mtime_ns / 1000000000, 'unixepoch')) STORED,
    PRIMARY KEY (root_id, path)
) WITHOUT ROWID;
"""
_ABOUT_FILES = (
    "CREATE INDEX files_by_row ON files (row)",
    """
CREATE TRIGGER file_added AFTER INSERT ON files BEGIN
    UPDATE contents SET files = files + 1 WHERE row = NEW.row;
END""",
    """
CREATE TRIGGER file_dropped AFTER DELETE ON files BEGIN
    UPDATE contents SET files = files - 1 WHERE row = OLD.row;
END""",
    """
CREATE TRIGGER file_changed AFTER UPDATE OF row ON files BEGIN
    UPDATE contents SET files = files - 1 WHERE row = OLD.row;
    UPDATE contents SET files = files + 1 WHERE row = NEW.row;
END""",
)
SCHEMA = f"""
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE roots (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE);
CREATE TABLE contents (
    row INTEGER PRIMARY KEY, sha256 BLOB NOT NULL UNIQUE, crc32 INTEGER NOT NULL,
    width_px INTEGER, height_px INTEGER, taken TEXT, camera TEXT, files INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX dead_contents ON contents (row) WHERE files = 0;
{_FILES.format(name="files")}
{";".join(_ABOUT_FILES)};
CREATE TABLE problems (
    root_id INTEGER NOT NULL REFERENCES roots (id), path BLOB NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, problem TEXT NOT NULL, found TEXT NOT NULL,
    PRIMARY KEY (root_id, path)
) WITHOUT ROWID;
"""


def other_format(path: Path, found: object, expected: int) -> IndexStoreError:
    """What is wrong with a file of another format. A newer one is sound, and nothing may take its place."""
    said = f"{path} has format version {found}"
    if str(found).isdecimal() and int(str(found)) > expected:
        return IndexNewerError(said, expected=f"{expected}, or a newer mimco")
    return IndexStoreError(said, expected=str(expected), command="mimco index reindex DIR")


def parts_of(path: bytes) -> tuple[int, str]:
    """Of a path, as bytes: the place of the first byte of its name, from 1, and its suffix, lower-case, with its dot.

    Not by SQLite, whose functions on text go astray where a name is no UTF-8.
    """
    name_at = path.rfind(b"/") + 1
    dot = path.rfind(b".")
    return name_at + 1, path[dot:].decode("utf-8", "replace").lower() if dot > name_at else ""


def columns_for_conditions(connection: sqlite3.Connection) -> dict[str, str]:
    """An expression of SQL for each of `name_at`, `suffix` and `modified` of `files`; slow ones in the older format."""
    names = {name for _, name, *_ in connection.execute("PRAGMA main.table_xinfo(files)")}
    if "name_at" in names:
        return {name: f"files.{name}" for name in ("name_at", "suffix", "modified")}
    _add_functions(connection)
    modified = "strftime('%Y-%m-%dT%H:%M:%S', files.mtime_ns / 1000000000, 'unixepoch')"
    return {"name_at": "mimco_name_at(files.path)", "suffix": "mimco_suffix(files.path)", "modified": modified}


def _add_functions(connection: sqlite3.Connection) -> None:
    for number, name in enumerate(FUNCTIONS):
        connection.create_function(name, 1, lambda path, number=number: parts_of(path)[number], deterministic=True)


def upgrade(connection: sqlite3.Connection) -> None:
    """Bring a catalogue of format 2 to the present one, whole or not at all. What is wrong in it stays wrong.

    Raises:
        sqlite3.Error: it cannot be written, or there is no room.
    """
    (version,) = connection.execute("SELECT value FROM settings WHERE key = 'format_version'").fetchone()
    if version != _WITHOUT_PARTS_OF_PATHS:
        return
    _add_functions(connection)
    connection.execute("PRAGMA foreign_keys = OFF")  # `verify` tells of a file without a row, and `repair` mends it
    connection.execute("BEGIN IMMEDIATE")
    try:
        (count,) = connection.execute("SELECT count(*) FROM files").fetchone()
        logger.info("the catalogue of %d files is brought to format %d", count, FORMAT_VERSION)
        for statement in (
            _FILES.format(name="files_anew"),
            "INSERT INTO files_anew"
            " SELECT root_id, path, size, mtime_ns, row, mimco_name_at(path), mimco_suffix(path) FROM files",
            "DROP TABLE files",
            "ALTER TABLE files_anew RENAME TO files",
            *_ABOUT_FILES,
            f"UPDATE settings SET value = '{FORMAT_VERSION}' WHERE key = 'format_version'",
            "UPDATE settings SET value = value + 1 WHERE key = 'revision'",
        ):
            connection.execute(statement)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has already rolled back after a full disk
            connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA foreign_keys = ON")
