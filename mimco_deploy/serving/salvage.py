"""What can still be read of a catalogue, and a new one made of it: for `compact`, `repair` and rebuilds."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.catalog import (
    BUDGET,
    CONTENT,
    MADE_BY,
    connect,
    create_catalog,
    explained,
)
from mimco_deploy.serving.schema import FORMAT_VERSION, READABLE, other_format, parts_of

logger = logging.getLogger(__name__)

_AGAIN = "mimco index reindex DIR"
_KEPT = {BUDGET, MADE_BY}
"""Settings that outlive a rewrite of the index: all but what is derived from its rows."""


class Salvage:
    """All that can still be read of a catalogue, damaged or not. Use as a context manager.

    A damaged page ends a table's reading; what lies behind it is read from the other end.

    Args:
        path: the file.

    Raises:
        IndexStoreError: it is no catalogue, or its settings cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with explained(path, _AGAIN):
            self._db = connect(path, "rw")
        self._db.text_factory = lambda text: text.decode("utf-8", "replace")
        try:
            with explained(path, _AGAIN):
                self._settings = dict(self._db.execute("SELECT key, value FROM settings"))
            version = self._settings.get("format_version")
            if version not in READABLE:
                raise other_format(path, version, FORMAT_VERSION)
            self.embedding_dim = int(self._settings["embedding_dim"])
            self._fingerprint = self._settings["fingerprint"]
        except (KeyError, ValueError) as error:
            self._db.close()
            raise IndexStoreError(f"{path} lacks settings ({error})", expected="a catalogue", command=_AGAIN) from error
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Salvage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def crc32s(self) -> Iterator[tuple[int, int]]:
        """Row and CRC-32 of its embedding, of the contents that `copy_to` copies."""
        return ((row, crc32) for row, _, crc32, *_ in self._contents())

    def copy_to(self, path: Path, new_rows: npt.NDArray[np.int64]) -> int:
        """Write another catalogue with the same folders, and contents, files and problems under other row numbers.

        Args:
            path: file to make.
            new_rows: [N], new number of each row; −1 where it is left out, with its files.

        Returns:
            How many files were lost, as far as that can be told: left out with their rows or folders, or counted by a
            content and not there.
        """
        create_catalog(path, self._fingerprint, self.embedding_dim)
        left_out = 0

        def files() -> Iterator[tuple[Any, ...]]:
            nonlocal left_out
            for root, name, size, mtime_ns, row in self._rows(
                "root_id, path, size, mtime_ns, row", "files", ("root_id", "path"), (int, bytes, int, int, int)
            ):
                if 0 <= row < len(new_rows) and new_rows[row] >= 0:
                    yield root, name, size, mtime_ns, int(new_rows[row]), *parts_of(name)
                else:
                    left_out += 1

        contents = (
            (int(new_rows[row]), *content)
            for row, *content in self._contents()
            if 0 <= row < len(new_rows) and new_rows[row] >= 0
        )
        problems = self._rows(
            "root_id, path, size, mtime_ns, problem, found",
            "problems",
            ("root_id", "path"),
            (int, bytes, int, int, str, str),
        )
        kept = [(key, value) for key, value in self._settings.items() if key in _KEPT and _is_object(value)]
        with explained(path), contextlib.closing(connect(path, "rw")) as new:
            new.execute("PRAGMA foreign_keys = OFF")  # what names a lost row is taken out below
            new.execute("BEGIN")
            new.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", kept)
            for key in ("id", "path"):  # what a damaged page of the table lacks may stand in the index of paths
                roots = self._rows("id, path", "roots", (key,), (int, bytes))
                new.executemany("INSERT OR IGNORE INTO roots VALUES (?, ?)", roots)
            new.executemany(f"INSERT OR IGNORE INTO contents (row, {CONTENT}) VALUES (?, ?, ?, ?, ?, ?, ?)", contents)
            new.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", files())
            new.executemany("INSERT OR IGNORE INTO problems VALUES (?, ?, ?, ?, ?, ?)", problems)
            new.execute("DELETE FROM problems WHERE root_id NOT IN (SELECT id FROM roots)")
            astray = new.execute("DELETE FROM files WHERE root_id NOT IN (SELECT id FROM roots)").rowcount
            left_out += new.execute("DELETE FROM files WHERE row NOT IN (SELECT row FROM contents)").rowcount
            files_kept = int(new.execute("SELECT count(*) FROM files").fetchone()[0])
            new.execute("COMMIT")
        if astray:
            logger.warning("the folders of %d pictures are lost: name them again, mimco index DIR", astray)
        counted: dict[int, int] = dict(self._rows("row, files", "contents", ("row",), (int, int)))
        return max(left_out + astray, sum(counted.values()) - files_kept)

    def _contents(self) -> Iterator[tuple[Any, ...]]:
        types = (int, bytes, int, int | None, int | None, str | None, str | None)
        for content in self._rows(f"row, {CONTENT}", "contents", ("row",), types):
            if len(content[1]) == 32:
                yield content

    def _rows(
        self, columns: str, table: str, keys: tuple[str, ...], types: tuple[type | UnionType, ...]
    ) -> Iterator[tuple[Any, ...]]:
        """Rows of a table from its beginning; behind a damaged page, from its end. A row may come twice.

        Rows with a value of another type are passed over: the type is stored beside each value, and may be damaged.
        """
        for order in ("ASC", "DESC"):
            by = ", ".join(f"{key} {order}" for key in keys)
            try:
                for row in self._db.execute(f"SELECT {columns} FROM {table} ORDER BY {by}"):
                    if all(map(isinstance, row, types)):
                        yield row
            except sqlite3.DatabaseError as error:
                logger.warning("the table %s is damaged: %s", table, error)
            else:
                return


def _is_object(text: object) -> bool:
    try:
        return isinstance(json.loads(str(text)), dict)
    except (ValueError, RecursionError):
        return False
