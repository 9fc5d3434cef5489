"""Files and folders that appear whole or not at all: temporary name, fsync, rename.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def sync_dir(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush one file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def temporary_beside(path: Path) -> Path:
    """A name for what becomes `path`. Nobody else knows it: in a folder of several users a link could wait under it.

    It has the beginning of the name only, so that it is not too long where the name is not.
    """
    return path.with_name(f".{path.name[:32]}.{secrets.token_hex(8)}.tmp")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: readers see the old file or the new one, never a part. Who may read it stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            if path.is_file():
                shutil.copymode(path, temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_dir(path.parent)


def copy_new(source: Path, target: Path) -> None:
    """Copy a file, with its dates and rights, to a name that nothing has.

    Raises:
        FileExistsError: something has it, be it a link that leads nowhere.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    temporary = temporary_beside(target)
    try:
        with source.open("rb") as content, temporary.open("xb") as copy:
            shutil.copyfileobj(content, copy)
        shutil.copystat(source, temporary)
        sync_file(temporary)
        try:
            os.link(temporary, target)  # replaces nothing, as a rename does
        except FileExistsError:
            raise
        except OSError:  # a file system without links, as on many a stick
            target.touch(exist_ok=False)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_dir(target.parent)


@contextlib.contextmanager
def staged_dir(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends without an error.

    A folder cannot be renamed over another, so the old one steps aside first, under the name `<target>.old`; readers
    find it there by `current_dir` where a crash fell between the two renames. One writer at a time.

    Args:
        target: the folder to create or replace.

    Yields:
        The staging folder, beside `target`, on the same file system.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for folder, _, names in os.walk(staging):
        for name in names:
            sync_file(Path(folder) / name)
        sync_dir(Path(folder))
    aside = _aside(target)
    if target.exists():
        target.replace(aside)
    staging.replace(target)
    sync_dir(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def current_dir(target: Path) -> Path:
    """Where to read what `staged_dir` writes: `target`, or what stepped aside for it when a crash came between.

    Readers rename nothing: a writer may be between its two renames at this moment.
    """
    return _aside(target) if not target.exists() and _aside(target).exists() else target


def recover(target: Path) -> None:
    """Undo a replacement of `target` that a crash interrupted. For the one writer, before it replaces it."""
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.replace(target)


def _aside(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")
