"""The catalogue of an index: which file holds which content, and where its embedding lies. One SQLite file; the truth.

    settings  key, value                                   format_version, fingerprint, embedding_dim, revision, …
    roots     id, path                                     the indexed folders, absolute
    contents  row, sha256, crc32, files, facts             row = position in `vectors.f32`; a content is embedded once
    files     root_id, path, size, mtime_ns, row, …        what a search can return; the rest is for conditions
    problems  root_id, path, size, mtime_ns, problem, found  files that are not pictures, and why

Copies, moved and renamed files share the row of their content. A row that no file names is dead: never a hit, alive
again when the content comes back. Rows are never taken away, so `max(row) + 1` is the number of embeddings that count.
`contents.files` counts the files of a row; triggers keep it, so that the few dead rows are found without a look at all.

Paths are stored as the bytes the file system gave (`os.fsencode`), since not every name is text.

The journal is a rollback journal with `synchronous=EXTRA`, not a write-ahead log: between two writes the catalogue is
one file that can be copied and read from a read-only disk, network file systems need no shared memory, and a batch of
pictures takes far longer to embed than to commit. Transactions are short on both sides; whoever comes second waits.
What reads for long reads a private copy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexBusyError, IndexStoreError
from mimco_deploy.images import Facts
from mimco_deploy.serving.scan import Stamp
from mimco_deploy.serving.schema import FORMAT_VERSION, READABLE, SCHEMA, other_format, parts_of, upgrade

logger = logging.getLogger(__name__)

BUDGET, MADE_BY = "neighbours_budget", "made_by"
_WAIT_S = 60.0
_MAX_VARIABLES = 30_000
"""In one statement; SQLite takes 32,766."""
# What SQLite reports where the catalogue is sound and its surroundings are not.
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}
# And where a journal lies beside it that only somebody who may write can roll back.
_LEFT_BEHIND = {
    sqlite3.SQLITE_READONLY_ROLLBACK,
    sqlite3.SQLITE_READONLY_CANTLOCK,
    sqlite3.SQLITE_READONLY_RECOVERY,
}
CONTENT = "sha256, crc32, width_px, height_px, taken, camera"


T = TypeVar("T")


@dataclass(frozen=True)
class Root:
    """One indexed folder."""

    id: int
    path: Path
    """Absolute, links resolved."""


class Listed(NamedTuple):
    """One file that a search can return."""

    root: str
    """Indexed folder, absolute."""
    path: str
    """Relative to it."""
    stamp: Stamp
    row: int
    sha256: bytes
    facts: Facts


def as_listed(root: bytes, path: bytes, size: int, mtime_ns: int, row: int, sha256: bytes, *facts: Any) -> Listed:
    """A file as the catalogue has it, from the columns of a query; the facts in the order of `Facts`."""
    return Listed(os.fsdecode(root), os.fsdecode(_inside(path)), Stamp(size, mtime_ns), row, sha256, Facts(*facts))


@dataclass(frozen=True)
class NewContent:
    """A content that was embedded."""

    sha256: bytes
    crc32: int
    """Of the bytes of its embedding."""
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True)
class Problem:
    """One file that could not be indexed."""

    path: Path
    """Absolute."""
    problem: str
    """Reason class, one of `errors.ImageProblem`."""
    found: str
    """The same in words."""


@dataclass(frozen=True)
class Counts:
    """How much an index holds."""

    files: int
    """Files a search can return."""
    contents: int
    """Embeddings that at least one file names."""
    dead: int
    """Embeddings that no file names any more."""
    problems: int
    """Files that could not be indexed."""


def create_catalog(path: Path, fingerprint: str, dim: int) -> None:
    """Write an empty catalogue, whole or not at all.

    Args:
        path: file to make; must not exist.
        fingerprint: of the encoder whose embeddings it will count.
        dim: D, length of an embedding.
    """
    settings = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "embedding_dim": dim, "revision": 0}
    with explained(path), contextlib.closing(connect(path, "rwc")) as connection:
        connection.executescript(f"BEGIN; {SCHEMA}")
        connection.executemany(
            "INSERT INTO settings VALUES (?, ?)", [(key, str(value)) for key, value in settings.items()]
        )
        connection.execute("COMMIT")


class Catalog:
    """One connection to a catalogue. Use as a context manager, in one thread at a time.

    Calls belong inside `with catalog.snapshot():` or `with catalog.transaction():`, which make them see one state.

    Args:
        path: the file.
        private: read a copy of its own, for what takes long: a writer waits for nobody who does. It is on the disk for
            temporary files, gone with the connection, and what is written into it is lost.

    Raises:
        IndexBusyError: locked for long, or of a newer format.
        IndexStoreError: missing, not a catalogue, or of a format that is not read any more.
    """

    def __init__(self, path: Path, *, private: bool = False) -> None:
        self._path = path
        with explained(path):
            self._db = connect(path, "rw")
        try:
            with self.snapshot():
                if (version := self._setting("format_version")) not in READABLE:
                    raise other_format(path, version, FORMAT_VERSION)
                self.fingerprint = self._setting("fingerprint")
                self.embedding_dim = self._number("embedding_dim")
                if not 0 < self.embedding_dim < 2**16:
                    raise self._unreadable("embedding_dim")
                copy = self._copied() if private else None
            if copy is not None:
                self._db.close()
                self._db = copy
        except BaseException:
            self._db.close()
            raise

    def _copied(self) -> sqlite3.Connection:
        """A copy that nobody else sees. Inside a snapshot that has read: else `backup` might wait for ever."""
        copy = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        try:
            self._db.backup(copy)
        except BaseException:
            copy.close()
            raise
        return copy

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection itself, for temporary views over the catalogue (`filters.py`)."""
        return self._db

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read one state of the catalogue, whatever a writer does meanwhile."""
        with explained(self._path):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Change the catalogue: all of the block or, after an error or a crash, nothing of it."""
        with explained(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("UPDATE settings SET value = value + 1 WHERE key = 'revision'")
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite has already rolled back after a full disk
                    self._db.execute("ROLLBACK")
                raise

    # ------------------------------------------------------------------ what it holds

    def setting(self, key: str) -> str | None:
        """One of the settings, None where it is not set."""
        row = self._db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _setting(self, key: str) -> str:
        value = self.setting(key)
        if value is None:
            raise IndexStoreError(f"{self._path} has no setting {key!r}", command="mimco index reindex DIR")
        return value

    def made_by(self) -> dict[str, str]:
        """What embedded last: `provider`, `precision`, and `encoder`, path of a bundle that is not the workspace's."""
        return self.parsed(MADE_BY, dict) or {}

    def revision(self) -> int:
        """A number that grows with every change."""
        return self._number("revision")

    def parsed(self, key: str, make: Callable[..., T]) -> T | None:
        """A setting that is a JSON object, as the arguments of `make`; None where it is not set.

        Raises:
            IndexStoreError: it is something else.
        """
        text = self.setting(key)
        try:
            return None if text is None else make(**json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise self._unreadable(key) from error

    def _number(self, key: str) -> int:
        try:
            return int(self._setting(key))
        except ValueError as error:
            raise self._unreadable(key) from error

    def _unreadable(self, key: str) -> IndexStoreError:
        again = "mimco index reindex DIR" if key == "embedding_dim" else "mimco index repair"
        return IndexStoreError(f"{self._path}: its setting {key!r} cannot be read", command=again)

    def row_count(self) -> int:
        """How many rows of the vector store count."""
        return int(self._db.execute("SELECT coalesce(max(row) + 1, 0) FROM contents").fetchone()[0])

    def dead_rows(self) -> npt.NDArray[np.int64]:
        """Rows that no file names, rising."""
        return np.array([row for (row,) in self._db.execute("SELECT row FROM contents WHERE files = 0")], np.int64)

    def counts(self) -> Counts:
        """How much there is of everything."""
        files, dead, rows, problems = self._db.execute(
            "SELECT (SELECT count(*) FROM files), (SELECT count(*) FROM contents WHERE files = 0),"
            " (SELECT count(*) FROM contents), (SELECT count(*) FROM problems)"
        ).fetchone()
        return Counts(files=files, contents=rows - dead, dead=dead, problems=problems)

    def roots(self) -> list[Root]:
        """All indexed folders, sorted by path."""
        rows = self._db.execute("SELECT id, path FROM roots ORDER BY path")
        return [Root(number, Path(os.fsdecode(path))) for number, path in rows]

    def counts_below(self, root: Root) -> tuple[int, int]:
        """Files and problems below one root."""
        count = "SELECT count(*) FROM {} WHERE root_id = ?"
        files, problems = (self._db.execute(count.format(table), (root.id,)) for table in ("files", "problems"))
        return files.fetchone()[0], problems.fetchone()[0]

    def file_stamps(self, root: Root) -> dict[str, tuple[int, int]]:
        """Size and mtime_ns by relative path of the files below one root. Bare tuples: there are many."""
        rows = self._db.execute("SELECT path, size, mtime_ns FROM files WHERE root_id = ?", (root.id,))
        # As os.fsdecode does, which is called too often here to be called.
        encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
        return {path.decode(encoding, errors): (size, mtime_ns) for path, size, mtime_ns in rows}

    def problem_stamps(self, root: Root) -> dict[str, tuple[Stamp, str]]:
        """Stamp and reason class by relative path of the problems below one root."""
        rows = self._db.execute("SELECT path, size, mtime_ns, problem FROM problems WHERE root_id = ?", (root.id,))
        return {os.fsdecode(path): (Stamp(size, mtime), problem) for path, size, mtime, problem in rows}

    def sha256s(self) -> set[bytes]:
        """Every content that was ever embedded, about 100 bytes of memory each."""
        return {sha256 for (sha256,) in self._db.execute("SELECT sha256 FROM contents")}

    def row_of(self, sha256: bytes) -> int | None:
        """Row of a content, dead or alive; None where it was never embedded."""
        found = self._db.execute("SELECT row FROM contents WHERE sha256 = ?", (sha256,)).fetchone()
        return None if found is None else int(found[0])

    def row_of_file(self, path: Path) -> int | None:
        """Row of an indexed file, by its absolute path; None where it is not listed."""
        for root in self.roots():
            if path.is_relative_to(root.path):
                below = os.fsencode(path.relative_to(root.path))
                found = self._db.execute(
                    "SELECT row FROM files WHERE root_id = ? AND path = ?", (root.id, below)
                ).fetchone()
                if found is not None:
                    return int(found[0])
        return None

    def files_of(self, rows: Collection[int]) -> dict[int, tuple[str, list[Path]]]:
        """What lies behind rows: the content, SHA-256 in hexadecimal, and its files, absolute, sorted by path."""
        roots = dict(self._db.execute("SELECT id, path FROM roots"))
        found: dict[int, tuple[str, list[Path]]] = {}
        left = iter(rows)
        while part := list(islice(left, _MAX_VARIABLES)):
            for row, sha256, root_id, path in self._db.execute(
                "SELECT contents.row, sha256, root_id, path FROM contents JOIN files USING (row)"
                f" WHERE contents.row IN ({', '.join('?' * len(part))})",
                part,
            ):
                paths = found.setdefault(row, (sha256.hex(), []))[1]
                paths.append(_absolute(roots[root_id], path))
        for _, paths in found.values():
            if len(paths) > 1:
                paths.sort()
        return found

    def crc32s(self) -> Iterator[tuple[int, int]]:
        """Row and CRC-32 of the bytes of its embedding, by rising row."""
        return self._db.execute("SELECT row, crc32 FROM contents ORDER BY row")

    def files(self) -> list[Path]:
        """Every file a search can return, absolute, sorted."""
        rows = self._db.execute("SELECT roots.path, files.path FROM files JOIN roots ON roots.id = root_id")
        return sorted(_absolute(root, path) for root, path in rows)

    def listing(self) -> Iterator[Listed]:
        """Every file that a search can return, by root and path."""
        for root, path, size, mtime_ns, row, sha256, _, *facts in self._db.execute(
            f"SELECT roots.path, files.path, size, mtime_ns, row, {CONTENT} FROM files JOIN contents USING (row)"
            " JOIN roots ON roots.id = root_id ORDER BY root_id, files.path"
        ):
            yield as_listed(root, path, size, mtime_ns, row, sha256, *facts)

    def files_with(self, sha256: bytes) -> list[Listed]:
        """The files of one content, by root and path; none where the index does not hold it."""
        return [
            as_listed(root, path, size, mtime_ns, row, sha256, *facts)
            for root, path, size, mtime_ns, row, _, _, *facts in self._db.execute(
                f"SELECT roots.path, files.path, size, mtime_ns, row, {CONTENT} FROM contents JOIN files USING (row)"
                " JOIN roots ON roots.id = root_id WHERE sha256 = ? ORDER BY roots.path, files.path",
                (sha256,),
            )
        ]

    def problems(self) -> list[Problem]:
        """Every file that could not be indexed, sorted by path."""
        rows = self._db.execute(
            "SELECT roots.path, problems.path, problem, found FROM problems JOIN roots ON roots.id = root_id"
            " ORDER BY roots.path, problems.path"
        )
        return [Problem(_absolute(root, path), problem, found) for root, path, problem, found in rows]

    def check(self) -> list[str]:
        """What SQLite, and the tables among each other, find wrong; nothing where they are sound."""
        found = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok"]
        found += [f"{table} names a row of {parent} that is not there" for table, _, parent, _ in self._foreign_keys()]
        (rows, last) = self._db.execute("SELECT count(*), coalesce(max(row) + 1, 0) FROM contents").fetchone()
        if rows != last:
            found.append(f"{last - rows} of {last} rows have no content")
        (miscounted,) = self._db.execute(
            "SELECT count(*) FROM contents WHERE files != (SELECT count(*) FROM files WHERE files.row = contents.row)"
        ).fetchone()
        if miscounted:
            found.append(f"{miscounted} rows count other files than name them")
        return found

    def _foreign_keys(self) -> list[tuple[str, int, str, int]]:
        return self._db.execute("PRAGMA foreign_key_check").fetchall()

    # ------------------------------------------------------------------ what changes it

    def upgrade(self) -> None:
        """Bring an older format to the present one, which `put_file` needs. Under `writer_lock`, in no transaction."""
        with explained(self._path):
            upgrade(self._db)

    def add_root(self, path: Path) -> Root:
        """Record a folder."""
        number = self._db.execute("INSERT INTO roots (path) VALUES (?)", (os.fsencode(path),)).lastrowid
        assert number is not None
        return Root(number, path)

    def absorb_root(self, inner: Root, outer: Root) -> None:
        """Hand over what a root holds to one that encloses it, without reading a file again."""
        prefix = os.fsencode(inner.path.relative_to(outer.path)) + b"/"
        for table in ("files", "problems"):
            paths = [path for (path,) in self._db.execute(f"SELECT path FROM {table} WHERE root_id = ?", (inner.id,))]
            moved = f", name_at = name_at + {len(prefix)}" if table == "files" else ""
            self._db.executemany(
                f"UPDATE {table} SET root_id = ?, path = ?{moved} WHERE root_id = ? AND path = ?",
                [(outer.id, prefix + path, inner.id, path) for path in paths],
            )
        self._db.execute("DELETE FROM roots WHERE id = ?", (inner.id,))

    def remove_root(self, root: Root) -> int:
        """Forget a folder; its embeddings stay, dead. Returns how many files were dropped."""
        dropped = self._db.execute("DELETE FROM files WHERE root_id = ?", (root.id,)).rowcount
        self._db.execute("DELETE FROM problems WHERE root_id = ?", (root.id,))
        self._db.execute("DELETE FROM roots WHERE id = ?", (root.id,))
        return dropped

    def set_setting(self, key: str, value: str | None) -> None:
        """Record a setting; None forgets it."""
        if value is None:
            self._db.execute("DELETE FROM settings WHERE key = ?", (key,))
        else:
            self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, value))

    def move_root(self, root: Root, to: Path) -> None:
        """Record that a folder lies elsewhere now; its files keep their stamps and embeddings."""
        self._db.execute("UPDATE roots SET path = ? WHERE id = ?", (os.fsencode(to), root.id))

    def add_contents(self, first_row: int, contents: Iterable[NewContent]) -> None:
        """Count new rows, numbered from `first_row`."""
        self._db.executemany(
            f"INSERT INTO contents (row, {CONTENT}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((row, new.sha256, new.crc32, *astuple(new.facts)) for row, new in enumerate(contents, first_row)),
        )

    def put_file(self, root: Root, path: str, stamp: Stamp, row: int) -> None:
        """Record that a file holds the content of a row."""
        name = os.fsencode(path)
        self._db.execute("DELETE FROM problems WHERE root_id = ? AND path = ?", (root.id, name))
        self._db.execute(
            "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET size = excluded.size, mtime_ns = excluded.mtime_ns, row = excluded.row",
            (root.id, name, *stamp, row, *parts_of(name)),
        )

    def put_problem(self, root: Root, path: str, stamp: Stamp, problem: str, found: str) -> None:
        """Record that a file is not a picture."""
        self._db.execute("DELETE FROM files WHERE root_id = ? AND path = ?", (root.id, os.fsencode(path)))
        text = found.encode("utf-8", "replace").decode()  # the words may name a file whose name is not text
        self._db.execute(
            "INSERT OR REPLACE INTO problems VALUES (?, ?, ?, ?, ?, ?)",
            (root.id, os.fsencode(path), *stamp, problem, text),
        )

    def drop(self, root: Root, paths: Iterable[str]) -> int:
        """Forget files that are gone. Returns how many of them were files, not problems."""
        keys = [(root.id, os.fsencode(path)) for path in paths]
        self._db.executemany("DELETE FROM problems WHERE root_id = ? AND path = ?", keys)
        return self._db.executemany("DELETE FROM files WHERE root_id = ? AND path = ?", keys).rowcount if keys else 0


def _absolute(root: bytes, path: bytes) -> Path:
    # One Path, not two, nor `os.path.join`: there are many. Of all folders "/" alone ends in a slash.
    return Path(os.fsdecode((root if root == b"/" else root + b"/") + _inside(path)))


def _inside(path: bytes) -> bytes:
    """A path of the catalogue as it is; an index that came from elsewhere could name files outside its folders.

    Raises:
        IndexStoreError: it leads out of its folder.
    """
    if path[:1] == b"/" or b"\0" in path or (b".." in path and b".." in path.split(b"/")):
        raise IndexStoreError(
            f"the catalogue lists {os.fsdecode(path)[:80]!a}, which lies outside of its folder", expected="an own index"
        )
    return path


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open the file, `ro` or `rw`.

    Raises:
        sqlite3.Error: see `explained`.
    """
    address = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = EXTRA")  # reads the file, so this is where a broken one shows
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def explained(path: Path, command: str = "mimco index repair") -> Iterator[None]:
    """Turn what SQLite raises in the block into IndexStoreError, with the next command: `command` if it is broken."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        if code in _LEFT_BEHIND:
            raise IndexBusyError(
                f"{path}: its last writer was killed", expected="its owner to run once: mimco index"
            ) from error
        if code & 0xFF in _PASSING or (code & 0xFF == sqlite3.SQLITE_CANTOPEN and path.exists()):
            expected = "room on the disk, the right to write and no other writer"
            raise IndexBusyError(f"{path}: {error}", expected=expected, command="mimco index") from error
        raise IndexStoreError(f"{path}: {error}", expected="a catalogue", command=command) from error
