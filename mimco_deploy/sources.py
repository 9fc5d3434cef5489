"""Where pictures are: found in folders, files and plain tars, named in one order. For training and evaluation.

An index walks folders by its own rules (`serving/scan.py`): it must notice what changed. Standard library and Pillow.
"""

from __future__ import annotations

import functools
import logging
import os
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mimco_deploy.errors import DataError, ImageError
from mimco_deploy.images import IMAGE_SUFFIXES, MAX_BYTES, decode_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """Where one picture's bytes are."""

    file: Path
    offset: int
    size: int
    name: str
    """What people read: a path, or `archive.tar:member`."""
    folder: str | None = None
    """That it lies in below the source, with `/` between names; None in none."""

    @property
    def label(self) -> str | None:
        """Its class, by the name of its folder: composed as Unicode has it, whichever system wrote it."""
        return unicodedata.normalize("NFC", self.folder.rpartition("/")[2]) if self.folder else None

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
        return decode_reduced(self.read(), self.name, short_side_px)


def decode_reduced(content: bytes, name: str, short_side_px: int) -> Image.Image:
    """As `Picture.decode`, of bytes that were read."""
    picture = decode_image(content, name, short_side_px)
    scale = short_side_px / min(picture.size)
    if scale >= 1.0:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def find_pictures(sources: Iterable[str]) -> list[Picture]:
    """List what the sources hold, in one order on every machine. What cannot be read is told in one warning.

    Args:
        sources: folders (walked in full, tars inside included), picture files, plain tars.

    Returns:
        Each picture once, however its folder is spelled, sorted by name.

    Raises:
        DataError: a source is missing, or a tar is compressed or broken; or there is no picture at all.
    """
    sources = tuple(sources)
    found: dict[tuple[str, str, int], Picture] = {}
    unread: list[OSError] = []
    real = functools.cache(os.path.realpath)  # of folders, which are few
    for source in map(Path, sources):
        if not source.exists():
            raise DataError(f"{source} does not exist", expected="a folder, a picture or a plain .tar")
        if source.is_dir():
            pictures: Iterable[Picture] = _in_folder(source, unread)
        elif not source.is_file():  # a pipe would be waited for
            raise DataError(f"{source} is no file", expected="a folder, a picture or a plain .tar")
        elif source.suffix.lower() in IMAGE_SUFFIXES:
            pictures = [_file(source, None)]
        else:
            pictures = _in_tar(source, None)
        for picture in pictures:
            folder, name = os.path.split(picture.file)
            place = (real(folder), name, picture.offset)
            known = found.get(place)
            if known is None or (known.folder is None and picture.folder is not None):
                found[place] = picture  # named twice, a picture keeps the folder that one naming tells
    if unread:
        others = f"; {len(unread) - 1} more likewise" if len(unread) > 1 else ""
        logger.warning("%s cannot be read (%s)%s", unread[0].filename, unread[0].strerror, others)
    if not found:
        raise DataError(f"no picture in {', '.join(sources) or 'no source'}", expected="--data DIR with pictures")
    return sorted(found.values(), key=lambda picture: picture.name)


def shared_pictures(first: Iterable[Picture], second: Iterable[Picture]) -> list[str]:
    """The files that hold what is in both, sorted, one for each picture, however the sources were spelled."""
    places = ({(str(picture.file.resolve()), picture.offset) for picture in some} for some in (first, second))
    return sorted(path for path, _ in set.intersection(*places))


def warn_of_merged_classes(pictures: Iterable[Picture]) -> None:
    """Say where one class is made of folders of the same name in different places, which may be meant, or not."""
    folders: dict[str, set[str]] = {}
    for picture in pictures:
        if picture.folder is not None:
            folders.setdefault(str(picture.label), set()).add(picture.folder)
    merged = {label: sorted(found) for label, found in sorted(folders.items()) if len(found) > 1}
    if merged:
        label, found = next(iter(merged.items()))
        others = f"; {len(merged) - 1} more likewise" if len(merged) > 1 else ""
        logger.warning("class %s is %d folders, such as %s and %s%s", label, len(found), *found[:2], others)


def _in_folder(root: Path, unread: list[OSError]) -> Iterator[Picture]:
    for folder, folders, names in os.walk(root, onerror=unread.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder)
        below = here.relative_to(root).as_posix() if here != root else None
        for name in names:
            if name.startswith("."):  # a Mac writes `._IMG_1.jpg` beside each picture on foreign disks
                continue
            path = here / name
            if path.suffix == ".tar":
                yield from _in_tar(path, below)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                try:
                    if path.is_file():
                        yield _file(path, below)
                except OSError as error:  # of a folder that may be listed but not entered
                    unread.append(error)


def _file(path: Path, folder: str | None) -> Picture:
    return Picture(path, 0, path.stat().st_size, str(path), folder)


def _in_tar(path: Path, folder: str | None) -> Iterable[Picture]:
    """The pictures of a tar; those in no folder inside of it are in the one that it lies in."""
    found: dict[Path, Picture] = {}  # of a member that comes twice, as after `tar -r`, the last counts
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.size < 0:  # which would lead back to the same member, for ever
                    raise tarfile.ReadError("a member has no size")
                inside = Path(member.name)
                if member.isreg() and inside.suffix.lower() in IMAGE_SUFFIXES and not inside.name.startswith("."):
                    within = inside.parent.as_posix() if inside.parent.name else folder
                    found[inside] = Picture(path, member.offset_data, member.size, f"{path}:{member.name}", within)
            file.seek(archive.offset)
            # Python notices where data are cut off, and takes half a header for the end.
            if any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"cut off or broken at byte {archive.offset}")
    except (tarfile.TarError, OSError) as error:
        expected = "a plain .tar, which is read in place; unpack or decompress it first"
        raise DataError(f"{path} cannot be read as a tar ({error})", expected=expected) from error
    return found.values()
