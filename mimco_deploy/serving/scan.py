"""Walk a folder and notice what changed since the last walk.

A walk over an unchanged folder should cost little more than the system calls it cannot do without: one listing a
folder, one look at each file, relative to its open folder, so that no path is resolved again for each.

Paths are relative to the root, with `/`. A name that is not valid UTF-8 keeps its bytes as surrogate escapes, as
`os.fsdecode` gives them; the catalogue stores `os.fsencode` of it, so every name comes back as it was.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mimco_deploy.images import IMAGE_SUFFIXES

_FAR_NS = 2**63 - 1
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""A file that went away during the walk, or a link that leads nowhere or in a circle."""


class Stamp(NamedTuple):
    """What tells, without reading it, whether a file changed."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Last modification, nanoseconds since 1970; cut to 64 bits, which end in the year 2262."""


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return Stamp(status.st_size, _cut(status.st_mtime_ns))


def _cut(mtime_ns: int) -> int:
    return mtime_ns if -_FAR_NS < mtime_ns < _FAR_NS else (_FAR_NS if mtime_ns > 0 else -_FAR_NS)


class FileStat(NamedTuple):
    """One picture file as a walk found it."""

    path: str
    """Relative to the root."""
    stamp: Stamp


class Unlisted(NamedTuple):
    """A folder whose content could not be read: nothing is known about the files below it."""

    path: str
    """Relative to the root; the root itself is empty."""
    reason: str
    files_only: bool = False
    """Nothing is known about the files in it, but the folders in it were looked at, each on its own."""

    def hides(self, path: str) -> bool:
        """Whether a file that the walk did not meet may be there all the same; its path is relative to the root."""
        if self.path and not path.startswith(f"{self.path}/"):
            return False
        return not self.files_only or path.rpartition("/")[0] == self.path


@dataclass(frozen=True)
class Scan:
    """A walk: it takes place while its files are taken."""

    files: Iterable[tuple[str, int, int]]
    """Path relative to the root, size and mtime_ns, in the order of the file system. Bare tuples: there are many."""
    unlisted: list[Unlisted]
    """Complete once `files` has come to its end."""


@dataclass(frozen=True)
class Changes:
    """The difference between what is known and what a walk found."""

    new: list[FileStat] = field(default_factory=list)
    changed: list[FileStat] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    kept: dict[Unlisted, int] = field(default_factory=dict)
    """All folders that could not be read, with the number of known files below: neither gone nor confirmed."""


def scan_root(root: Path) -> Scan:
    """Find the pictures below one folder.

    Hidden files and folders (`.git`, `.mimco`, `._IMG_1.jpg`) are skipped. A link to a folder is not followed, so a
    loop cannot trap the walk; a link to a file counts as that file.

    Args:
        root: folder to walk.

    Returns:
        Files whose suffix names a picture format.
    """
    unlisted: list[Unlisted] = []
    return Scan(_walk(root, unlisted), unlisted)


def can_be_walked(folder: Path) -> bool:
    """Whether a folder is there and may be looked into. `Path.is_dir` raises where one above it may not be entered."""
    return os.access(folder, os.R_OK | os.X_OK) and folder.is_dir()


def _walk(root: Path, unlisted: list[Unlisted]) -> Iterator[tuple[str, int, int]]:
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        prefix = f"{folder}/" if folder else ""
        try:
            opened = os.open(root / folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            unlisted.append(_unlisted(folder, error))
            continue
        try:
            with os.scandir(opened) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(prefix + name)
                    elif name[name.rfind(".") :].lower() in IMAGE_SUFFIXES:
                        try:
                            status = entry.stat()
                        except OSError as error:
                            _note_file(unlisted, folder, error)
                            continue
                        if stat.S_ISREG(status.st_mode):
                            yield prefix + name, status.st_size, _cut(status.st_mtime_ns)
        except OSError as error:
            unlisted.append(_unlisted(folder, error))
        finally:
            os.close(opened)


def _note_file(unlisted: list[Unlisted], folder: str, error: OSError) -> None:
    """Note, once, a folder in which files cannot be looked at: one that may be listed but not entered has only such."""
    if error.errno not in _GONE and (not unlisted or unlisted[-1].path != folder):
        unlisted.append(_unlisted(folder, error, files_only=True))


def _unlisted(folder: str, error: OSError, *, files_only: bool = False) -> Unlisted:
    return Unlisted(folder, error.strerror or type(error).__name__, files_only)


def compare(known: Mapping[str, tuple[int, int]], found: Scan) -> Changes:
    """Tell apart what is new, changed, gone and the same.

    Args:
        known: size and mtime_ns by path, as recorded.
        found: the walk, which takes place here.

    Returns:
        Each path of both in exactly one of the lists, or counted in `kept`.
    """
    changes = Changes()
    missing = dict(known)
    for path, size, mtime_ns in found.files:
        stamp = missing.pop(path, None)
        if stamp == (size, mtime_ns):
            changes.same.append(path)
        else:
            (changes.new if stamp is None else changes.changed).append(FileStat(path, Stamp(size, mtime_ns)))
    changes.kept.update(dict.fromkeys(found.unlisted, 0))
    # By path, since there may be many; of two entries for one folder the one that hides all below counts.
    unlisted = {folder.path: folder for folder in sorted(found.unlisted, key=lambda one: not one.files_only)}
    for path in sorted(missing):
        above = (unlisted.get(parent) for parent in _parents(path))
        hidden_by = next((folder for folder in above if folder is not None and folder.hides(path)), None)
        if hidden_by is None:
            changes.gone.append(path)
        else:
            changes.kept[hidden_by] += 1
    return changes


def _parents(path: str) -> Iterator[str]:
    """The folders that a relative path lies in, the nearest first; the root, empty, is the last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def readable(path: str | Path) -> str:
    """A path as text that can be printed and encoded anywhere; bytes that are not UTF-8 become `�`."""
    return os.fsencode(path).decode("utf-8", "replace")
