"""Which pictures may be hits: conditions on what the catalogue and a side table know, in the words of SQL.

A condition is one boolean expression of SQLite over the columns of `COLUMNS` and those of a side table:

    taken >= '2024-05' and camera like 'canon%'
    folder glob '*/holidays/*' and width_px >= 2000
    label in ('cat', 'dog')

The shell, Python and HTTP take the same text. It comes from outside, so SQLite is told what it may do: read these
columns and call functions that only compute, for a bounded number of steps.
"""

from __future__ import annotations

import csv
import os
import re
import sqlite3
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import ConditionError, ConfigError, MissingExtraError
from mimco_deploy.serving.catalog import Listed, as_listed
from mimco_deploy.serving.scan import readable
from mimco_deploy.serving.schema import FUNCTIONS, columns_for_conditions
from mimco_deploy.serving.side_table import SideTable, column_names, read_side_table

COLUMNS = {
    "path": "absolute",
    "folder": "the path without the name",
    "name": "of the file",
    "suffix": "lower-case, with its dot",
    "root": "the indexed folder",
    "bytes": "of the file",
    "modified": "date of the file, UTC, such as 2024-05-31T18:30:00",
    "taken": "by the camera's clock, in the same form; null where the file does not say",
    "date": "taken, else modified",
    "width_px": "of the upright picture",
    "height_px": "of the upright picture",
    "orientation": "landscape, portrait or square",
    "camera": "make and model; null where the file does not say",
}
"""What a condition can name."""
_FILES, _FILES_OF_ROWS = "mimco_files", "mimco_files_of_rows"
# Left to itself SQLite reads all files by the index of their rows, which takes eight times as long where the condition
# names what is not in it; that index is for the files of a few rows. The other is the table's own order.
_ORDERS = {_FILES: "INDEXED BY sqlite_autoindex_files_1", _FILES_OF_ROWS: "INDEXED BY files_by_row"}
# The indexed folders, which are few, stand in it as they are: to join them takes a third of a condition on paths.
_VIEW = """
CREATE TEMP VIEW {name} AS SELECT
    roots.path AS root_bytes, files.root_id AS root_id, files.path AS path_bytes, files.row AS row,
    {above} || CAST(files.path AS TEXT) AS path,
    CASE {name_at} WHEN 1 THEN {root}
        ELSE {above} || CAST(substr(files.path, 1, {name_at} - 2) AS TEXT) END AS folder,
    CAST(substr(files.path, {name_at}) AS TEXT) AS name, {suffix} AS suffix,
    {root} AS root,
    files.size AS bytes, files.mtime_ns AS mtime_ns,
    {modified} AS modified, contents.taken AS taken, coalesce(contents.taken, {modified}) AS date,
    contents.width_px AS width_px, contents.height_px AS height_px,
    CASE WHEN contents.width_px > contents.height_px THEN 'landscape'
         WHEN contents.width_px < contents.height_px THEN 'portrait'
         WHEN contents.width_px IS NOT NULL THEN 'square' END AS orientation,
    contents.camera AS camera, contents.sha256 AS sha256
FROM main.files {order}
    LEFT JOIN main.roots ON roots.id = files.root_id LEFT JOIN main.contents ON contents.row = files.row
"""
_QUOTED = re.compile(r"""'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/|("(?:[^"]|"")*")""", re.DOTALL)
"""Names in double quotes, outside of texts and remarks."""
_INLINE = 16
"""Indexed folders that stand in the views."""
LIMIT_S = 20.0
"""For one condition."""
_STEPS_BETWEEN_LOOKS = 400
_MAX_VALUE = 8192
"""Letters of anything that a condition computes: one step of SQLite cannot be interrupted, so it must be short."""
_MAX_PATTERN = 256
"""Letters of what LIKE and GLOB look for, whose time grows with it and the text, in one step."""
_MAX_LENGTH = 4096
_SAFE_FUNCTIONS = frozenset(
    {"abs", "coalesce", "ifnull", "iif", "instr", "length", "like", "glob", "lower", "upper", "max", "min", "nullif"}
    | {
        "hex",
        "round",
        "substr",
        "substring",
        "trim",
        "ltrim",
        "rtrim",
        "replace",
        "date",
        "datetime",
        "julianday",
        "strftime",
    }
    | {"time", "unicode", "typeof", "sign", *FUNCTIONS}
)
_SIDE = "mimco_side"
_READABLE = frozenset({"files", "roots", "contents", _FILES, _FILES_OF_ROWS, _SIDE})
_MAX_COLUMNS = 200
_TAKEN = {*COLUMNS, "root_bytes", "root_id", "path_bytes", "row", "mtime_ns", "sha256", "side_key"}
"""Names that a column of a side table cannot have; SQLite takes no notice of their case."""
_KEYS = {
    "path": "side_key = path OR side_key = substr(path, length(root) + 2)",
    "name": "side_key = name",
    "sha256": "side_key = lower(hex(sha256))",
}
"""How the rows of a side table find their files."""


@dataclass(frozen=True)
class Filter:
    """Which files may be hits."""

    where: str = ""
    """A condition, see the module; empty for none."""
    root: Path | None = None
    """Only files in this folder or below."""
    table: Path | None = None
    """CSV or Parquet whose columns the condition may name; one whose name is taken (`COLUMNS`, `row`, `sha256`) is
    `side_` and that. Its rows belong to files by a column `path` (absolute, or relative to the indexed folder), else
    `name`, else `sha256` (hexadecimal, lower case)."""

    def __bool__(self) -> bool:
        return bool(self.where or self.root)


def columns_with(table: Path | None) -> dict[str, str]:
    """What a condition can name, with what it is; with the columns of a side table, if that can be read."""
    try:
        names = [] if table is None else _renamed(column_names(table), table)[1]
    except (OSError, ValueError, csv.Error, ConfigError, MissingExtraError):  # which a condition over it is told
        return COLUMNS
    return COLUMNS | {name: "of the side table" for name in names if name != "side_key"}


def _renamed(names: Sequence[str], table: Path) -> tuple[str, list[str]]:
    """The column of a side table that finds the files, and what a condition calls each."""
    key = next((wanted for wanted in _KEYS if wanted in names), None)
    if key is None:
        raise ConfigError(
            f"{readable(table)} has the columns {', '.join(names)}", expected=f"one of {', '.join(_KEYS)}"
        )
    if len({name.lower() for name in names}) < len(names) or len(names) > _MAX_COLUMNS:
        raise ValueError(f"{len(names)} columns, some of one name or too many")
    return key, ["side_key" if name == key else f"side_{name}" if name.lower() in _TAKEN else name for name in names]


class FilteredFiles:
    """Runs conditions over one open catalogue.

    Args:
        connection: of the catalogue; gets temporary views and tables, nothing of it is written.
        limit_s: for one condition.
    """

    def __init__(self, connection: sqlite3.Connection, limit_s: float = LIMIT_S) -> None:
        self._db = connection
        self._limit_s = limit_s
        self.table: tuple[Path, int] | None = None
        """The side table that is loaded, and what it was when it was."""
        self._key = ""
        self._side_columns: list[str] = []
        self._defined_for: tuple[list[tuple[int, bytes]], dict[str, str]] | None = None
        self._define_views()

    def rows(self, condition: Filter) -> npt.NDArray[np.int64]:
        """Rows of the vector store with at least one file for which the condition holds.

        Returns:
            [N], rising.

        Raises:
            ConditionError: it is no condition, names what is not there, or takes too long.
        """
        found = self._select("SELECT row", _FILES, condition, "")  # DISTINCT would take as long again
        return np.unique(np.fromiter((row for (row,) in found), np.int64, len(found)))

    def files(self, condition: Filter, rows: Sequence[int]) -> set[tuple[int, Path]]:
        """Row and absolute path of the files of some rows for which the condition holds."""
        numbers = ", ".join(str(int(row)) for row in rows)
        found = self._select(
            "SELECT row, root_bytes, path_bytes", _FILES_OF_ROWS, condition, f" AND row IN ({numbers})"
        )
        return {(row, Path(os.fsdecode(root)) / os.fsdecode(path)) for row, root, path in found}

    def page(self, condition: Filter, after: tuple[bytes, bytes], limit: int) -> list[Listed]:
        """Some of the files for which the condition holds, by indexed folder and path.

        Args:
            condition: may be empty.
            after: folder and path of the last file of the page before; two empty ones for the first page.
            limit: most files, at least 1.
        """
        columns = "root_bytes, path_bytes, bytes, mtime_ns, row, sha256, width_px, height_px, taken, camera"
        distinct = "DISTINCT " if condition.table is not None else ""  # a file may have several rows there
        place = f"(root_bytes, path_bytes) > (x'{after[0].hex()}', x'{after[1].hex()}')"
        order = f"ORDER BY root_bytes, path_bytes LIMIT {int(limit)}"
        return [
            as_listed(*one)
            for one in self._select(f"SELECT {distinct}{columns}", _FILES, condition, f" AND {place} {order}")
        ]

    def prepare(self, condition: Filter) -> None:
        """Load the side table of a condition, and follow the indexed folders.

        Outside of any transaction, which would take both back.

        Raises:
            ConfigError: it cannot be read.
        """
        self._define_views()
        if condition.table is not None:
            self._join(condition.table)

    def _select(self, what: str, view: str, condition: Filter, more: str) -> list[Any]:
        if len(condition.where) > _MAX_LENGTH:
            raise ConditionError(f"a condition of {len(condition.where)} letters", expected=f"at most {_MAX_LENGTH}")
        self._check_quoted(condition)
        join = "" if condition.table is None else f" LEFT JOIN temp.{_SIDE} ON {_KEYS[self._key]}"
        tests = [f"({condition.where or 'true'}\n)"]  # a comment at its end must not hide the bracket
        if condition.root is not None:
            tests.append(self._below(condition.root))
        source = f"temp.{view}{join}"
        text = f"{what} FROM {source} WHERE {' AND '.join(tests)}{more}"
        stop_at = time.monotonic() + self._limit_s
        most = self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE)
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _MAX_PATTERN)
        self._db.set_authorizer(_allowed)
        self._db.set_progress_handler(lambda: time.monotonic() > stop_at, _STEPS_BETWEEN_LOOKS)
        try:
            # What is whole between brackets and also without any cannot reach out of either.
            self._db.execute(f"EXPLAIN SELECT CASE WHEN {condition.where or 'true'}\n THEN 1 END FROM {source}")
            return self._db.execute(text).fetchall()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: not text that SQLite takes
            raise self._refused(condition, error) from error
        finally:
            self._db.set_progress_handler(None, 0)
            self._db.set_authorizer(None)
            self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, most)

    def _check_quoted(self, condition: Filter) -> None:
        """Refuse a name in double quotes that is no column: SQLite would take it for a text."""
        columns = {name.lower() for name in (*COLUMNS, *self._side_columns)}
        for name in _QUOTED.findall(condition.where):
            if name and name[1:-1].replace('""', '"').lower() not in columns:
                raise self._refused(condition, ValueError(f"{name!r} is no column; texts stand in single quotes"))

    def _define_views(self) -> None:
        """Again where the indexed folders, or the format, are others than before."""
        roots = self._db.execute("SELECT id, path FROM main.roots ORDER BY id").fetchall()
        columns = columns_for_conditions(self._db)
        if (roots, columns) == self._defined_for:
            return
        root, above = (_root_by_number(roots, end) for end in ("", "/"))
        for name, order in _ORDERS.items():
            self._db.execute(f"DROP VIEW IF EXISTS temp.{name}")
            self._db.execute(_VIEW.format(name=name, order=order, root=root, above=above, **columns))
        self._defined_for = (roots, columns)

    def _below(self, folder: Path) -> str:
        """The test for the files of a folder and below. The index has links resolved up to its folders, not below them.

        Raises:
            ConfigError: none is indexed.
        """
        roots = [
            (number, Path(os.fsdecode(path))) for number, path in self._db.execute("SELECT id, path FROM main.roots")
        ]
        # Without its links; and with them, but for its "..", since a link below an indexed folder was indexed as such.
        for start in (Path(os.path.realpath(folder)), Path(os.path.abspath(folder))):  # noqa: PTH100
            tests = [f"root_id = {number}" for number, root in roots if root.is_relative_to(start)]
            for number, root in roots:
                if start != root and start.is_relative_to(root):
                    first = os.fsencode(start.relative_to(root)) + b"/"
                    after = first[:-1] + bytes([first[-1] + 1])
                    test = f"root_id = {number} AND path_bytes >= x'{first.hex()}' AND path_bytes < x'{after.hex()}'"
                    if self._db.execute(f"SELECT 1 FROM temp.{_FILES} WHERE {test} LIMIT 1").fetchone():
                        tests.append(test)
            if tests:
                return f"({' OR '.join(tests)})"
        raise ConfigError(f"{readable(folder)} holds no indexed picture", expected="an indexed folder, or one below")

    def _refused(self, condition: Filter, error: Exception) -> ConditionError:
        text = f"takes more than {self._limit_s:g} s" if str(error) == "interrupted" else str(error)
        return ConditionError(
            f"the condition {condition.where!r} cannot be used ({text})",
            expected=f"an expression of SQL over {', '.join((*COLUMNS, *self._side_columns))}",
        )

    # ------------------------------------------------------------------ the side table

    def _join(self, table: Path) -> None:
        try:
            status = table.stat()
            stamp = status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0  # a pipe is read once
            if self.table != (table, stamp):
                self.table = None
                self._key = self._load(read_side_table(table), table)
                self.table = (table, stamp)
        except (OSError, ValueError, sqlite3.Error, csv.Error) as error:
            raise ConfigError(f"{readable(table)} cannot be read ({error})", expected="CSV or Parquet") from error

    def _load(self, side: SideTable, table: Path) -> str:
        """Copy the table into a temporary one; returns what its key is."""
        names = side.names
        key, renamed = _renamed(names, table)
        self._side_columns = [name for name in renamed if name != "side_key"]
        columns = ", ".join(
            f"{_quoted(name)} {'TEXT' if name == 'side_key' else kind}"
            for name, kind in zip(renamed, side.kinds, strict=True)
        )
        places = ", ".join("?" * len(names))
        self._db.execute(f"DROP TABLE IF EXISTS temp.{_SIDE}")
        self._db.execute(f"CREATE TEMP TABLE {_SIDE} ({columns})")
        self._db.executemany(f"INSERT INTO temp.{_SIDE} VALUES ({places})", side.rows)
        self._db.execute(f"CREATE INDEX temp.{_SIDE}_by_key ON {_SIDE} (side_key)")
        return key


def _root_by_number(roots: list[tuple[int, bytes]], end: str) -> str:
    """An expression for the folder of `files.root_id`: text where it is one, else looked up, also where it is new."""
    texts = [(number, path.decode("utf-8", "replace")) for number, path in roots[:_INLINE]]
    cases = " ".join(f"WHEN {number} THEN {_text(text + end)}" for number, text in texts if "\ufffd" not in text)
    other = f"(SELECT CAST(path AS TEXT) || '{end}' FROM main.roots WHERE id = files.root_id)"
    return f"CASE files.root_id {cases} ELSE {other} END" if cases else other


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _allowed(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    del database, source
    if action == sqlite3.SQLITE_SELECT or (action == sqlite3.SQLITE_READ and first in _READABLE):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and second in _SAFE_FUNCTIONS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
