"""Where pictures are: found in folders, files and plain tars, named in one order. For training and evaluation.

An index walks folders by its own rules (`serving/scan.py`): it must notice what changed. Standard library and Pillow.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mimco_deploy.errors import DataError, ImageError
from mimco_deploy.images import IMAGE_SUFFIXES, MAX_BYTES, decode_image


@dataclass(frozen=True)
class Picture:
    """Where one picture's bytes are."""

    file: Path
    offset: int
    size: int
    name: str
    """What people read: a path, or `archive.tar:member`."""
    label: str | None
    """Parent folder below the source, for evaluation only."""

    def read(self) -> bytes:
        """The encoded bytes; MAX_BYTES + 1 of them at most.

        Raises:
            ImageError: the file is gone or cannot be read.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                return file.read(min(self.size, MAX_BYTES + 1))
        except OSError as error:
            raise ImageError("unreadable", f"{self.name}: {error.strerror}") from error

    def decode(self, short_side_px: int) -> Image.Image:
        """The upright RGB picture, reduced to a short side of `short_side_px` where it is larger.

        Raises:
            ImageError: see `images.decode_image`.
        """
        picture = decode_image(self.read(), self.name, short_side_px)
        scale = short_side_px / min(picture.size)
        if scale >= 1.0:
            return picture
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def find_pictures(sources: Iterable[str]) -> list[Picture]:
    """List what the sources hold, in one order on every machine.

    Args:
        sources: folders (walked in full, tars inside included), picture files, plain tars.

    Returns:
        Each picture once, sorted by name.

    Raises:
        DataError: a source is missing, or a tar is compressed or broken; or there is no picture at all.
    """
    sources = tuple(sources)
    found: dict[str, Picture] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise DataError(f"{source} does not exist", expected="a folder, a picture or a plain .tar")
        if source.is_dir():
            pictures = _in_folder(source)
        elif source.suffix.lower() in IMAGE_SUFFIXES:
            pictures = iter([_file(source, None)])
        else:
            pictures = _in_tar(source, None)
        for picture in pictures:
            known = found.get(picture.name)
            if known is None or known.label is None:  # named twice, a picture keeps the folder that one naming tells
                found[picture.name] = picture
    if not found:
        raise DataError(f"no picture in {', '.join(sources) or 'no source'}", expected="--data DIR with pictures")
    return [found[name] for name in sorted(found)]


def _in_folder(root: Path) -> Iterator[Picture]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder)
        for name in names:
            if name.startswith("."):  # a Mac writes `._IMG_1.jpg` beside each picture on foreign disks
                continue
            path = here / name
            if path.suffix == ".tar":
                yield from _in_tar(path, here.name if here != root else None)
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                yield _file(path, here.name if here != root else None)


def _file(path: Path, label: str | None) -> Picture:
    return Picture(path, 0, path.stat().st_size, str(path), label)


def _in_tar(path: Path, folder: str | None) -> Iterator[Picture]:
    """The pictures of a tar; those in no folder inside of it have the label of the one that it lies in."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.size < 0:  # which would lead back to the same member, for ever
                    raise tarfile.ReadError("a member has no size")
                inside = Path(member.name)
                if member.isreg() and inside.suffix.lower() in IMAGE_SUFFIXES and not inside.name.startswith("."):
                    label = inside.parent.name or folder
                    yield Picture(path, member.offset_data, member.size, f"{path}:{member.name}", label)
    except (tarfile.TarError, OSError) as error:
        expected = "a plain .tar, which is read in place; unpack or decompress it first"
        raise DataError(f"{path} cannot be read as a tar ({error})", expected=expected) from error
