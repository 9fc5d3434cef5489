"""Files and folders that appear whole or not at all: temporary name, fsync, rename.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from mimco_deploy.errors import MimcoError

logger = logging.getLogger(__name__)

_KEPT = 50
"""Letters of a name, of four bytes at most, in those of files beside it: 255 bytes are the most a name may have."""


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

    It is not too long where the name is not.
    """
    return path.with_name(f".{_short(path.name)}.{secrets.token_hex(8)}.tmp")


def _short(name: str) -> str:
    """A name, or its beginning and a hash of it."""
    return name if len(name) <= _KEPT else f"{name[:_KEPT]}-{zlib.crc32(os.fsencode(name)):08x}"


def remove_temporaries(path: Path) -> None:
    """What writers of `path` left that were killed. For its one writer, before it begins."""
    for left in path.parent.glob(f".{glob.escape(_short(path.name))}.{'[0-9a-f]' * 16}.tmp"):
        left.unlink(missing_ok=True)


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
def only_writer(target: Path, refusal: MimcoError) -> Iterator[None]:
    """Be the only process that writes `target` while the block runs, by a lock on `.<target>.lock` beside it.

    The lock is POSIX's and not flock's: children that are forked meanwhile do not inherit it, so that it falls with
    this process, however that ends. Where a file system gives no locks, as some of clusters, the block runs without.

    Args:
        target: a folder or file; a link counts itself, not what it leads to.
        refusal: to raise where another process holds the lock.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{_short(target.name)}.lock")
    is_others = lock.exists() and not os.access(lock, os.W_OK)  # in a folder of several users: left over, or held
    with lock.open("rb" if is_others else "ab") as file:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if is_others else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise refusal from None
        except OSError as error:
            logger.warning("%s: no locks there (%s); see that nothing else writes it", target, error.strerror)
        if not os.fstat(file.fileno()).st_nlink:  # its holder removed it just now, and the next one makes another
            raise refusal
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                lock.unlink()


@contextlib.contextmanager
def staged_dir(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends without an error.

    A folder cannot be renamed over another, so the old one steps aside first, under the name `<target>.old`; readers
    find it there by `current_dir` where a crash fell between the two renames. One writer at a time: `only_writer`.

    Args:
        target: the folder to create or replace; of a link, the one that it leads to.

    Yields:
        The staging folder, beside `target`, on the same file system.
    """
    recover(target)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
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
    if not target.exists():
        if aside.exists():
            aside.replace(target.resolve())
    elif aside.is_symlink():  # an older mimco moved links aside, and not what they lead to
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    target = target.resolve()
    return target.with_name(f"{target.name}.old")
