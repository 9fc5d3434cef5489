"""The catalogue of an index: which file holds which content, and where its embedding lies. One SQLite file; the truth.

    settings  key, value                                   format_version, fingerprint, embedding_dim, revision
    roots     id, path                                     the indexed folders, absolute
    contents  row, sha256                                  row = position in `vectors.f32`; a content is embedded once
    files     root_id, path, size, mtime_ns, row           what a search can return
    problems  root_id, path, size, mtime_ns, problem, found  files that are not pictures, and why

Copies, moved and renamed files share the row of their content. A row that no file names is dead: never a hit, alive
again when the content comes back. Rows are never taken away, so `max(row) + 1` is the number of embeddings that count.

Paths are stored as the bytes the file system gave (`os.fsencode`), since not every name is text.

The journal is a rollback journal with `synchronous=EXTRA`, not a write-ahead log: between two writes the catalogue is
one file that can be copied and read from a read-only disk, network file systems need no shared memory, and a batch of
pictures takes far longer to embed than to commit. Transactions are short on both sides; whoever comes second waits.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.scan import Stamp

FORMAT_VERSION = 1
_WAIT_S = 60.0
# What SQLite reports where the catalogue is sound and its surroundings are not.
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}
_SCHEMA = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE roots (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE);
CREATE TABLE contents (row INTEGER PRIMARY KEY, sha256 BLOB NOT NULL UNIQUE);
CREATE TABLE files (
    root_id INTEGER NOT NULL REFERENCES roots (id), path BLOB NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, row INTEGER NOT NULL REFERENCES contents (row),
    PRIMARY KEY (root_id, path)
) WITHOUT ROWID;
CREATE INDEX files_by_row ON files (row);
CREATE TABLE problems (
    root_id INTEGER NOT NULL REFERENCES roots (id), path BLOB NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, problem TEXT NOT NULL, found TEXT NOT NULL,
    PRIMARY KEY (root_id, path)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Root:
    """One indexed folder."""

    id: int
    path: Path
    """Absolute, links resolved."""


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
    with _explained(path), contextlib.closing(_connect(path, "rwc")) as connection:
        connection.execute("BEGIN")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.executemany(
            "INSERT INTO settings VALUES (?, ?)", [(key, str(value)) for key, value in settings.items()]
        )
        connection.execute("COMMIT")


class Catalog:
    """One connection to a catalogue. Use as a context manager, in one thread.

    Calls belong inside `with catalog.snapshot():` or `with catalog.transaction():`, which make them see one state.

    Args:
        path: the file.

    Raises:
        IndexStoreError: missing, not a catalogue, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _explained(path):
            self._db = _connect(path, "rw")
        try:
            with self.snapshot():
                if (version := self._setting("format_version")) != str(FORMAT_VERSION):
                    raise IndexStoreError(
                        f"{path} has format version {version}",
                        expected=str(FORMAT_VERSION),
                        command="mimco index --rebuild DIR",
                    )
                self.fingerprint = self._setting("fingerprint")
                self.embedding_dim = int(self._setting("embedding_dim"))
        except BaseException:
            self._db.close()
            raise

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
        with _explained(self._path):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Change the catalogue: all of the block or, after an error or a crash, nothing of it."""
        with _explained(self._path):
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

    def _setting(self, key: str) -> str:
        row = self._db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise IndexStoreError(f"{self._path} has no setting {key!r}", command="mimco index --rebuild DIR")
        return str(row[0])

    def revision(self) -> int:
        """A number that grows with every change."""
        return int(self._setting("revision"))

    def row_count(self) -> int:
        """How many rows of the vector store count."""
        return int(self._db.execute("SELECT coalesce(max(row) + 1, 0) FROM contents").fetchone()[0])

    def live_rows(self) -> npt.NDArray[np.bool_]:
        """[N] True where at least one file names the row."""
        live = np.zeros(self.row_count(), np.bool_)
        live[[row for (row,) in self._db.execute("SELECT DISTINCT row FROM files")]] = True
        return live

    def counts(self) -> Counts:
        """How much there is of everything."""
        files, live, rows, problems = self._db.execute(
            "SELECT (SELECT count(*) FROM files), (SELECT count(DISTINCT row) FROM files),"
            " (SELECT count(*) FROM contents), (SELECT count(*) FROM problems)"
        ).fetchone()
        return Counts(files=files, contents=live, dead=rows - live, problems=problems)

    def roots(self) -> list[Root]:
        """All indexed folders, sorted by path."""
        rows = self._db.execute("SELECT id, path FROM roots ORDER BY path")
        return [Root(number, Path(os.fsdecode(path))) for number, path in rows]

    def file_stamps(self, root: Root) -> dict[str, Stamp]:
        """Stamp by relative path of the files below one root."""
        rows = self._db.execute("SELECT path, size, mtime_ns FROM files WHERE root_id = ?", (root.id,))
        return {os.fsdecode(path): Stamp(size, mtime) for path, size, mtime in rows}

    def problem_stamps(self, root: Root) -> dict[str, tuple[Stamp, str]]:
        """Stamp and reason class by relative path of the problems below one root."""
        rows = self._db.execute("SELECT path, size, mtime_ns, problem FROM problems WHERE root_id = ?", (root.id,))
        return {os.fsdecode(path): (Stamp(size, mtime), problem) for path, size, mtime, problem in rows}

    def sha256s(self) -> frozenset[bytes]:
        """Every content that was ever embedded, about 100 bytes of memory each."""
        return frozenset(sha256 for (sha256,) in self._db.execute("SELECT sha256 FROM contents"))

    def row_of(self, sha256: bytes) -> int | None:
        """Row of a content, dead or alive; None where it was never embedded."""
        found = self._db.execute("SELECT row FROM contents WHERE sha256 = ?", (sha256,)).fetchone()
        return None if found is None else int(found[0])

    def files_of(self, row: int) -> tuple[str, list[Path]]:
        """The content of one row, SHA-256 in hexadecimal, and the files that hold it, absolute, sorted."""
        (sha256,) = self._db.execute("SELECT sha256 FROM contents WHERE row = ?", (row,)).fetchone()
        rows = self._db.execute(
            "SELECT roots.path, files.path FROM files JOIN roots ON roots.id = root_id WHERE row = ?"
            " ORDER BY roots.path, files.path",
            (row,),
        )
        return sha256.hex(), [_absolute(root, path) for root, path in rows]

    def files(self) -> list[Path]:
        """Every file a search can return, absolute, sorted."""
        rows = self._db.execute("SELECT roots.path, files.path FROM files JOIN roots ON roots.id = root_id")
        return sorted(_absolute(root, path) for root, path in rows)

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
        return found

    def _foreign_keys(self) -> list[tuple[str, int, str, int]]:
        return self._db.execute("PRAGMA foreign_key_check").fetchall()

    # ------------------------------------------------------------------ what changes it

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
            self._db.executemany(
                f"UPDATE {table} SET root_id = ?, path = ? WHERE root_id = ? AND path = ?",
                [(outer.id, prefix + path, inner.id, path) for path in paths],
            )
        self._db.execute("DELETE FROM roots WHERE id = ?", (inner.id,))

    def remove_root(self, root: Root) -> int:
        """Forget a folder; its embeddings stay, dead. Returns how many files were dropped."""
        dropped = self._db.execute("DELETE FROM files WHERE root_id = ?", (root.id,)).rowcount
        self._db.execute("DELETE FROM problems WHERE root_id = ?", (root.id,))
        self._db.execute("DELETE FROM roots WHERE id = ?", (root.id,))
        return dropped

    def add_contents(self, first_row: int, sha256s: Sequence[bytes]) -> None:
        """Count new rows, numbered from `first_row`, one for each content."""
        self._db.executemany("INSERT INTO contents (row, sha256) VALUES (?, ?)", enumerate(sha256s, first_row))

    def put_file(self, root: Root, path: str, stamp: Stamp, row: int) -> None:
        """Record that a file holds the content of a row."""
        self._db.execute("DELETE FROM problems WHERE root_id = ? AND path = ?", (root.id, os.fsencode(path)))
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", (root.id, os.fsencode(path), *stamp, row)
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
    return Path(os.fsdecode(root)) / os.fsdecode(path)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    address = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=_WAIT_S, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = EXTRA")  # reads the file, so this is where a broken one shows
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING:
            expected, command = "room on the disk, the right to write and no other writer", "mimco index"
        else:
            expected, command = "a catalogue", "mimco index --rebuild DIR"
        raise IndexStoreError(f"{path}: {error}", expected=expected, command=command) from error
