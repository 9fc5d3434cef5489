"""The pictures of a run, decoded in memory where they fit."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import DataError, ImageError
from mimco_deploy.sources import Picture, find_pictures
from mimco_deploy.training.config import DataConfig

logger = logging.getLogger(__name__)


@dataclass
class Corpus:
    """The pictures of a run, decoded in memory where they fit."""

    pictures: list[Picture]
    config: DataConfig
    held: list[npt.NDArray[np.uint8] | str] | None = None
    """[H, W, 3] each, or why a picture cannot be decoded; None where they did not fit."""
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

    def get(self, index: int) -> tuple[Any, list[str]]:
        """As `pixels`, in the form that the run's views take."""
        return self.pixels(index)

    def pixels(self, index: int) -> tuple[npt.NDArray[np.uint8], list[str]]:
        """Picture `index`, or the next one that can be decoded, [H, W, 3], and the names of those that could not be."""
        refused: list[str] = []
        for step in range(len(self.pictures)):
            found = self._decoded((index + step) % len(self.pictures))
            if not isinstance(found, str):
                return found, refused
            refused.append(found)
        raise DataError(f"none of {len(self.pictures)} pictures can be decoded", expected="pictures")

    def _decoded(self, index: int) -> npt.NDArray[np.uint8] | str:
        if self.held is not None:
            return self.held[index]
        return _decode_or_reason(self.pictures[index], self.config.short_side_px)

    def report_bad(self, names: Iterable[str]) -> None:
        """Count pictures that could not be decoded, and name each once.

        Raises:
            DataError: their share of the corpus is above the limit.
        """
        for name in set(names) - self.bad:
            self.bad.add(name)
            logger.warning("skipped %s", name)
        total = len(self.pictures)
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
    held: list[npt.NDArray[np.uint8] | str] = []
    used = 0
    decode = functools.partial(_decode_or_reason, short_side_px=config.short_side_px)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pictures), 256):  # a bounded look-ahead: what is decoded is soon counted
            chunk = pictures[start : start + 256]
            held += pool.map(decode, chunk)
            used += sum(one.nbytes for one in held[start:] if not isinstance(one, str))
            if used > budget:
                return corpus
    bad = [one for one in held if isinstance(one, str)]
    if len(bad) == len(pictures):
        raise DataError(f"none of {len(pictures)} pictures can be decoded, such as {bad[0]}", expected="pictures")
    corpus.held = held
    corpus.report_bad(bad)
    return corpus


def _decode_or_reason(picture: Picture, short_side_px: int) -> npt.NDArray[np.uint8] | str:
    try:
        return np.array(picture.decode(short_side_px))  # a copy, which torch may call its own
    except ImageError as error:
        return str(error)
