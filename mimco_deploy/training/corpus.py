"""The pictures of a run: found in folders, files and tars, named in one order, decoded in memory where they fit."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mimco_deploy.errors import DataError, ImageError
from mimco_deploy.images import IMAGE_SUFFIXES, MAX_BYTES, decode_image
from mimco_deploy.training.config import DataConfig

logger = logging.getLogger(__name__)


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
            pictures = _in_tar(source)
        found.update((picture.name, picture) for picture in pictures)
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
                yield from _in_tar(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                yield _file(path, here.name if here != root else None)


def _file(path: Path, label: str | None) -> Picture:
    return Picture(path, 0, path.stat().st_size, str(path), label)


def _in_tar(path: Path) -> Iterator[Picture]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                inside = Path(member.name)
                if member.isreg() and inside.suffix.lower() in IMAGE_SUFFIXES:
                    label = inside.parent.name or None
                    yield Picture(path, member.offset_data, member.size, f"{path}:{member.name}", label)
    except (tarfile.TarError, OSError) as error:
        expected = "a plain .tar, which is read in place; unpack or decompress it first"
        raise DataError(f"{path} cannot be read as a tar ({error})", expected=expected) from error


@dataclass
class Corpus:
    """The pictures of a run, decoded in memory where they fit."""

    pictures: list[Picture]
    config: DataConfig
    held: list[npt.NDArray[np.uint8]] | None = None
    """[H, W, 3] each, or None where they did not fit."""
    bad: set[str] = field(default_factory=set)
    """What was said of each picture that could not be decoded."""

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)

    @property
    def fingerprint(self) -> str:
        """Hash of the names and sizes: a resumed run must see the same corpus."""
        lines = "".join(f"{picture.name}\0{picture.size}\n" for picture in self.pictures)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()

    def get(self, index: int) -> tuple[Image.Image, list[str]]:
        """Picture `index`, or the next one that can be decoded, and the names of those that could not."""
        if self.held is not None:
            return Image.fromarray(self.held[index]), []
        refused: list[str] = []
        for step in range(len(self.pictures)):
            picture = self.pictures[(index + step) % len(self.pictures)]
            try:
                return picture.decode(self.config.short_side_px), refused
            except ImageError as error:
                refused.append(str(error))
        raise DataError(f"none of {len(self.pictures)} pictures can be decoded", expected="pictures")

    def report_bad(self, names: Iterable[str]) -> None:
        """Count pictures that could not be decoded, and name each once.

        Raises:
            DataError: their share of the corpus is above the limit.
        """
        for name in set(names) - self.bad:
            self.bad.add(name)
            logger.warning("skipped %s", name)
        total = len(self.pictures) + (len(self.bad) if self.held is not None else 0)
        if len(self.bad) > self.config.max_bad_share * total:
            raise DataError(
                f"{len(self.bad)} of {total} pictures cannot be decoded, such as {min(self.bad)}",
                expected=f"at most {self.config.max_bad_share:.0%} (--set data.max_bad_share=…)",
            )


def load_corpus(config: DataConfig) -> Corpus:
    """Find the pictures, and decode them into memory if they fit the budget.

    Raises:
        DataError: see `find_pictures`; or more pictures are bad than the config allows.
    """
    pictures = find_pictures(config.sources)
    budget = config.memory_mib * 2**20
    corpus = Corpus(pictures, config)
    if sum(picture.size for picture in pictures) > budget:
        return corpus
    good: list[Picture] = []
    held: list[npt.NDArray[np.uint8]] = []
    bad: list[str] = []
    used = 0
    decode = functools.partial(_decode_or_reason, short_side_px=config.short_side_px)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pictures), 256):  # a bounded look-ahead: what is decoded is soon counted
            chunk = pictures[start : start + 256]
            for picture, pixels in zip(chunk, pool.map(decode, chunk), strict=True):
                if isinstance(pixels, str):
                    bad.append(pixels)
                else:
                    good.append(picture)
                    held.append(pixels)
                    used += pixels.nbytes
            if used > budget:
                return corpus
    if not good:
        raise DataError(f"none of {len(pictures)} pictures can be decoded, such as {bad[0]}", expected="pictures")
    corpus = Corpus(good, config, held)
    corpus.report_bad(bad)
    return corpus


def _decode_or_reason(picture: Picture, short_side_px: int) -> npt.NDArray[np.uint8] | str:
    try:
        return np.asarray(picture.decode(short_side_px))
    except ImageError as error:
        return str(error)
