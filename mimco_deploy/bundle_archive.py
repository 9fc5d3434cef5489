"""A bundle as one file: `.zip`, or `.tar` whatever compresses it.

Nothing in an archive is trusted: only plain files are taken, only under relative names that a bundle has, and no more
bytes than an encoder can have. Standard library only.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import shlex
import shutil
import struct
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from mimco_deploy.atomic import sync_dir, sync_file, temporary_beside
from mimco_deploy.errors import BundleError

_MAX_FILES = 256
_MAX_HEADER_BYTES = 1 << 16
_LONG_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *(kind.encode() for kind in "xgXK"))
_MAX_BYTES = 16 << 30
_FILES = re.compile(r"(encoder|parity)\.json|model(\.\w+)?\.onnx|golden\.npz|MODEL_CARD\.md|engines/[^/]+")
_DEPTH = 3
"""A folder around the bundle, and `engines/` in it."""
_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, ValueError, NotImplementedError, OSError),  # OSError: gzip's and bzip2's, two members of one name
)


class Unpacked:
    """A temporary folder, removed with this object and at the latest when the process ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mimco-bundle-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def is_archive(path: Path) -> bool:
    """Whether a name is an archive's: `.zip`, `.tar`, `.tar.gz` and so on. Of a link, what it leads to counts."""
    return os.path.realpath(path).lower().endswith(_SUFFIXES)


def unpack(path: Path) -> Unpacked:
    """Unpack an archive into a temporary folder.

    Raises:
        BundleError: there is no such file; it is no archive, is damaged, or holds what no bundle holds.
    """
    if not path.is_file():
        command = f"mimco export --format onnx --output {shlex.quote(str(path))}"
        raise BundleError(f"no encoder in {path}", expected="an archive", command=command)
    unpacked = Unpacked()
    try:
        members = _zip_members(path) if path.suffix.lower() == ".zip" else _tar_members(path)
        with contextlib.closing(members):
            _write(members, unpacked.path)
        _leave_outer_folder(unpacked.path)
    except _BROKEN as error:
        unpacked.remove()
        raise BundleError(f"{path} cannot be unpacked ({error})", expected="a whole archive of a bundle") from error
    return unpacked


def pack(folder: Path, path: Path) -> None:
    """Write the files of `folder` as one archive, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(temporary, "x") as archive:  # stored: weights do not shrink
                for file in files:
                    archive.write(file, file.relative_to(folder).as_posix())
        else:
            compression = path.suffix.lower().removeprefix(".").replace("tgz", "gz").replace("tar", "")
            with tarfile.open(temporary, f"x:{compression}") as tar:  # type: ignore[call-overload]
                for file in files:
                    tar.add(file, file.relative_to(folder).as_posix())
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_dir(path.parent)


def _zip_members(path: Path) -> Generator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        _check_bytes(sum(info.file_size for info in archive.infolist()))
        for info in archive.infolist():
            if info.is_dir():
                continue
            if (info.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                raise ValueError(f"{info.filename} is no plain file")
            if info.flag_bits & 1:
                raise ValueError(f"{info.filename} is encrypted")
            with archive.open(info) as file:
                yield info.filename, file


class _Member(tarfile.TarInfo):
    """Long names and other attributes are read whole, before anything of the archive is seen: kept short."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _LONG_HEADERS and not 0 <= self.size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # of no documented name
        return found


def _tar_members(path: Path) -> Generator[tuple[str, IO[bytes]]]:
    total = 0
    with tarfile.open(path, "r:*", tarinfo=_Member) as archive:
        for count, member in enumerate(archive, start=1):
            if count > _MAX_FILES or member.size < 0:  # a negative size would lead back to the same member
                raise ValueError(f"more than {_MAX_FILES} members" if count > _MAX_FILES else "a member has no size")
            total += member.size
            _check_bytes(total)
            if member.isdir():
                continue
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                raise ValueError(f"{member.name} is no plain file")
            with file:
                yield member.name, file


def _check_bytes(stated: int) -> None:
    """Of what is stated: no more is read of a member."""
    if stated > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES:,} bytes")


def _write(members: Iterator[tuple[str, IO[bytes]]], folder: Path) -> None:
    for count, (name, file) in enumerate(members, start=1):
        parts = PurePosixPath(name).parts
        # Not by the first part alone: two slashes at the start are a root of their own.
        outside = name.startswith("/") or ".." in parts or "\\" in name
        if outside or not 1 <= len(parts) <= _DEPTH or count > _MAX_FILES:
            raise ValueError(f"{name!r} has no place in a bundle")
        if not any(_FILES.fullmatch("/".join(inner)) for inner in (parts, parts[1:])):
            continue
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            shutil.copyfileobj(file, out)


def _leave_outer_folder(folder: Path, contract: str = "encoder.json") -> None:
    """Archives are often made of the folder itself, some with a system's own files beside it: move its content up."""
    outer = [child for child in folder.iterdir() if (child / contract).is_file()]
    if (folder / contract).is_file() or len(outer) != 1:
        return
    inside = outer[0].rename(folder / ".outer")  # no name of its own is in the way
    for child in inside.iterdir():
        shutil.move(child, folder / child.name)
    inside.rmdir()
