"""Put duplicates out of the way, and back.

    DIR/undo.jsonl    {"format_version": 1, "holds": "moves"}
                      {"from": "/photos/2019/a.jpg", "to": "DIR/2019/a.jpg", "sha256": "39447ca2…"}   one for each move

A line is on the disk before its file moves. So after a kill at any moment each file lies at one of the two places of
its line, and `undo_moves` puts it back. Paths that are not UTF-8 keep their bytes as surrogate escapes.

Nothing is overwritten: a name is taken by making an empty file of it, which fails where there is one, and the picture
then takes the place of that. Nothing is deleted but such an empty file and, between two file systems, a picture whose
copy was compared with what the catalogue says of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mimco_deploy.atomic import sync_dir, sync_file, write_bytes
from mimco_deploy.errors import MoveError
from mimco_deploy.images import IMAGE_SUFFIXES
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.duplicates import Group, Member, file_of, is_as_listed
from mimco_deploy.serving.generations import Generation
from mimco_deploy.serving.inspect import read_current
from mimco_deploy.serving.scan import readable

FORMAT_VERSION = 1
UNDO_FILE = "undo.jsonl"
_EMPTY_SHA256 = hashlib.sha256().hexdigest()
_HEADER = {"format_version": FORMAT_VERSION, "holds": "moves"}


@dataclass(frozen=True)
class Move:
    """One file, from one place to another."""

    source: Path
    """Absolute."""
    target: Path
    """Absolute."""
    sha256: str
    """Of the file, hexadecimal."""


@dataclass(frozen=True)
class Skipped:
    """A file that stays where it is."""

    path: Path
    """Absolute."""
    reason: str


@dataclass(frozen=True)
class Moves:
    """What was moved, and what was not."""

    moved: list[Move]
    skipped: list[Skipped]


def move_duplicates(index: Path, groups: Sequence[Group], folder: Path) -> Moves:
    """Move all but the kept files of groups into a folder, keeping their paths below their indexed folders.

    A file moves only if it and the kept one of its group have the size and date that the catalogue has, and no other
    name of it is in the group: that would stay, and if it is a link lead nowhere.

    Args:
        index: the index folder; it is not changed.
        groups: from `find_duplicates`.
        folder: made where it is missing; a list of what moved is added to its `undo.jsonl`.

    Raises:
        IndexStoreError: there is no index.
        MoveError: an update of the index would walk the folder, or its list cannot be written.
    """
    folder = Path(os.path.realpath(folder))  # unlike `resolve`, no error where links lead in circles
    _refuse_indexed(index, folder)
    result = Moves([], [])
    if not any(group.spare for group in groups):
        return result
    with _UndoList(folder / UNDO_FILE) as undo:
        for group in groups:
            others = [is_as_listed(one.path, one.stamp) for one in group.others if one.kind == "same file"]
            twice = {file_of(status) for status in others if status is not None}
            for member in group.spare:
                reason = _reason_to_stay(group.kept, member, twice)
                moved = None
                if reason is None:
                    try:
                        moved = _move_into(folder, member, undo)
                    except OSError as error:
                        reason = error.strerror or str(error)
                if moved is None:
                    result.skipped.append(Skipped(member.path, reason or ""))
                else:
                    result.moved.append(moved)
    return result


def undo_moves(file: Path) -> Moves:
    """Move back what `move_duplicates` moved and is still there. May be repeated.

    Args:
        file: the `undo.jsonl`; it stays.

    Returns:
        What came back, and what did not: gone or changed since, or another file lies at its old place. Files that never
        left or are back already are in neither list.

    Raises:
        MoveError: it is no such list, or lies elsewhere than what it tells of.
    """
    own = str(Path(os.path.realpath(file)).parent)
    listed = _read(file)
    if listed and not any(move.target.is_relative_to(own) for move in listed):
        there = os.path.commonpath([move.target.parent for move in listed])
        raise MoveError(
            f"{readable(file)} tells of pictures in {readable(Path(there))}, not of those beside it",
            expected="the folder under the name that it had when they were moved there",
        )
    result = Moves([], [])
    treated: set[tuple[Path, Path]] = set()
    for move in reversed(listed):
        if (move.source, move.target) in treated:
            continue  # it left, came back and left again: the last line says what it is
        treated.add((move.source, move.target))
        try:
            reason = _undo(move) if _may_come_back(move, own) else "no picture below the folder of this list"
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is None:
            result.moved.append(Move(move.target, move.source, move.sha256))
        elif reason:
            result.skipped.append(Skipped(move.target, reason))
    return result


def _refuse_indexed(index: Path, folder: Path) -> None:
    for root in read_current(index, _roots):
        walked = folder.is_relative_to(root) and not any(
            part.startswith(".") for part in folder.relative_to(root).parts
        )
        if walked or root.is_relative_to(folder):
            where = "lies in" if walked else "holds"
            raise MoveError(
                f"{readable(folder)} {where} the indexed folder {readable(root)}",
                expected=f"a folder elsewhere, or a hidden one such as {readable(root / '.duplicates')}",
            )


def _roots(generation: Generation) -> list[Path]:
    with Catalog(generation.catalog) as catalog, catalog.snapshot():
        return [root.path for root in catalog.roots()]


def _reason_to_stay(kept: Member, member: Member, twice: set[tuple[int, int]]) -> str | None:
    if is_as_listed(kept.path, kept.stamp) is None:
        return f"the one to keep is gone or changed: {readable(kept.path)}"
    if member.path.is_symlink():
        return "it is a link"
    status = is_as_listed(member.path, member.stamp)
    if status is None:
        return "gone or changed since it was indexed"
    return "another name of it stays" if file_of(status) in twice else None


def _move_into(folder: Path, member: Member, undo: _UndoList) -> Move:
    for target in _names(folder / member.below):
        move = Move(member.path, target, member.content)
        undo.add(move)
        with contextlib.suppress(FileExistsError):  # somebody took the name just now: take the next
            _move(move)
            return move
    raise AssertionError("names do not end")


def _names(wanted: Path) -> Iterator[Path]:
    """The name wanted and then `name (2).jpg` and so on, as far as they are free."""
    number = 1
    while True:
        path = wanted if number == 1 else wanted.with_name(f"{wanted.stem} ({number}){wanted.suffix}")
        if not os.path.lexists(path):
            yield path
        number += 1


def _move(move: Move) -> None:
    """Raises FileExistsError where the target is there."""
    try:
        move.target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, "a file lies where a folder is needed", str(move.target.parent)
        ) from error
    os.close(os.open(move.target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        try:
            move.source.rename(move.target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_across(move)
    except OSError:
        # It did not move, or its copy is not in place: an empty file is what lies there.
        _drop_empty(move.target)
        raise


def _copy_across(move: Move) -> None:
    """Move between two file systems: a copy, compared with the checksum, before the original goes."""
    before = move.source.stat()
    temporary = move.target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        shutil.copy2(move.source, temporary)
        sync_file(temporary)
        after = move.source.stat()
        same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        if not same or _sha256(temporary) != move.sha256:
            raise OSError(errno.ESTALE, "changed since it was indexed", os.fspath(move.source))
        temporary.replace(move.target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_dir(move.target.parent)
    try:
        move.source.unlink()
    except OSError:
        move.target.unlink()
        raise


def _drop_empty(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.lstat().st_size == 0:
            path.unlink()


def _undo(move: Move) -> str | None:
    """Move one file back. None where it came back, else why not; an empty reason where there is nothing to do."""
    there, back = os.path.lexists(move.target), os.path.lexists(move.source)
    if there and back and _is_empty(move.target):
        move.target.unlink()  # the name was taken, and then came the kill
        there = False
    if not there:
        return "" if back else "gone"
    if back and not (_is_empty(move.source) and move.sha256 != _EMPTY_SHA256):
        return f"another file lies at {readable(move.source)}"
    if not stat.S_ISREG(move.target.lstat().st_mode) or _sha256(move.target) != move.sha256:
        return "changed since it was moved"
    if back:
        move.source.unlink()  # the name was taken for it to come back, and then came the kill
    try:
        _move(Move(move.target, move.source, move.sha256))
    except FileExistsError:
        return f"another file lies at {readable(move.source)}"
    return None


def _is_empty(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(file: Path) -> list[Move]:
    try:
        header, *lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise MoveError(f"{readable(file)} cannot be read ({error.strerror})", expected=f"an {UNDO_FILE}") from error
    document = _document(header)
    if document.get("holds") != _HEADER["holds"]:
        raise MoveError(f"{readable(file)} is no list of moves", expected=f"the {UNDO_FILE} that --move-to wrote")
    if document.get("format_version") != FORMAT_VERSION:
        raise MoveError(
            f"{readable(file)} has format version {document.get('format_version')}", expected=str(FORMAT_VERSION)
        )
    # A line that a kill cut short is of a file that had not moved.
    return [move for move in map(_move_of, map(_document, lines)) if move is not None]


def _may_come_back(move: Move, own: str) -> bool:
    """A list that came from elsewhere may bring nothing but the pictures of its own folder, and as pictures."""
    suffixes = {move.source.suffix.lower(), move.target.suffix.lower()}
    inside = ".." not in (*move.source.parts, *move.target.parts) and move.target.is_relative_to(own)
    return inside and suffixes <= IMAGE_SUFFIXES


def _document(line: bytes) -> dict[str, object]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _move_of(document: dict[str, object]) -> Move | None:
    source, target, sha256 = (document.get(key) for key in ("from", "to", "sha256"))
    if not (isinstance(source, str) and isinstance(target, str) and isinstance(sha256, str)):
        return None
    whole = all(path.startswith("/") and "\0" not in path for path in (source, target))
    return Move(Path(source), Path(target), sha256) if whole and re.fullmatch("[0-9a-f]{64}", sha256) else None


class _UndoList:
    """Adds lines to an `undo.jsonl`, each on the disk when `add` returns. Makes the file where it is missing."""

    def __init__(self, file: Path) -> None:
        self._path = file
        with self._explained():
            if file.exists():
                _read(file)  # refuses what is something else
            else:
                write_bytes(file, _line(_HEADER))
            self._file = os.open(file, os.O_RDWR | os.O_APPEND)
            size = os.fstat(self._file).st_size
            if os.pread(self._file, 1, size - 1) != b"\n":
                self._write(b"\n")  # a kill or a full disk cut the last line short

    def add(self, move: Move) -> None:
        with self._explained():
            self._write(_line({"from": str(move.source), "to": str(move.target), "sha256": move.sha256}))
            os.fsync(self._file)

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[os.write(self._file, left) :]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MoveError(
                f"{readable(self._path)} cannot be written ({error.strerror})",
                expected="room on the disk and the right to write",
            ) from error

    def __enter__(self) -> _UndoList:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def _line(document: dict[str, object] | dict[str, str]) -> bytes:
    return json.dumps(document).encode("ascii") + b"\n"
