"""Walk a folder and notice what changed since the last walk.

Paths are relative to the root, with `/`. A name that is not valid UTF-8 keeps its bytes as surrogate escapes, as
`os.fsdecode` gives them; the catalogue stores `os.fsencode` of it, so every name comes back as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mimco_deploy.images import IMAGE_SUFFIXES


class Stamp(NamedTuple):
    """What tells, without reading it, whether a file changed."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Last modification, nanoseconds since 1970."""


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


@dataclass(frozen=True)
class Scan:
    """What one walk found."""

    files: list[FileStat]
    """Sorted by path."""
    unlisted: list[Unlisted]


@dataclass(frozen=True)
class Changes:
    """The difference between what is known and what a walk found."""

    new: list[FileStat] = field(default_factory=list)
    changed: list[FileStat] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    same: list[FileStat] = field(default_factory=list)
    kept: dict[Unlisted, int] = field(default_factory=dict)
    """Known files below each folder that could not be listed: neither gone nor confirmed."""


def scan_root(root: Path) -> Scan:
    """Find the pictures below one folder.

    Hidden files and folders (`.git`, `.mimco`, `._IMG_1.jpg`) are skipped. A link to a folder is not followed, so a
    loop cannot trap the walk; a link to a file counts as that file.

    Args:
        root: folder to walk.

    Returns:
        Files whose suffix names a picture format, in an order that depends on their names only.
    """
    files: list[FileStat] = []
    unlisted: list[Unlisted] = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    _sort_in(entry, f"{folder}/{entry.name}" if folder else entry.name, files, waiting)
        except OSError as error:
            unlisted.append(Unlisted(folder, error.strerror or type(error).__name__))
    return Scan(sorted(files), sorted(unlisted))


def _sort_in(entry: os.DirEntry[str], path: str, files: list[FileStat], waiting: list[str]) -> None:
    if entry.name.startswith("."):
        return
    if entry.is_dir(follow_symlinks=False):
        waiting.append(path)
    elif PurePosixPath(entry.name).suffix.lower() in IMAGE_SUFFIXES:
        try:
            if entry.is_file():
                status = entry.stat()
                files.append(FileStat(path, Stamp(status.st_size, status.st_mtime_ns)))
        except OSError:
            return  # it went away during the walk, or is a link in a circle: no file to index


def compare(known: Mapping[str, Stamp], found: Scan) -> Changes:
    """Tell apart what is new, changed, gone and the same.

    Args:
        known: stamp by path, as recorded.
        found: the walk.

    Returns:
        Each path of both in exactly one of the lists, or counted in `kept`.
    """
    changes = Changes()
    for file in found.files:
        stamp = known.get(file.path)
        target = changes.new if stamp is None else changes.same if stamp == file.stamp else changes.changed
        target.append(file)
    present = {file.path for file in found.files}
    for path in sorted(known.keys() - present):
        hidden_by = next((folder for folder in found.unlisted if _is_below(path, folder.path)), None)
        if hidden_by is None:
            changes.gone.append(path)
        else:
            changes.kept[hidden_by] = changes.kept.get(hidden_by, 0) + 1
    return changes


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def readable(path: str | Path) -> str:
    """A path as text that can be printed and encoded anywhere; bytes that are not UTF-8 become `�`."""
    return os.fsencode(path).decode("utf-8", "replace")
