"""Pictures that are there more than once: exact copies, near duplicates, and pictures of one folder in another.

Only the index is read. What is found is looked at on the disk once more, since a file may have gone or changed since
the last update; only files that are as the catalogue has them are named. `moves.py` puts them out of the way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.catalog import Listed
from mimco_deploy.serving.gallery import read_gallery
from mimco_deploy.serving.pairs import Rows, Vectors, groups_above, nearest_above, scores_of
from mimco_deploy.serving.scan import Stamp, readable, stamp_of

logger = logging.getLogger(__name__)

MIN_SCORE = 0.95
"""Our choice, measured on no encoder: what is nearly the same depends on the encoder, so look before you move."""
Keep = Literal["largest", "oldest", "first"]
Kind = Literal["kept", "copy", "near", "same file"]


@dataclass(frozen=True)
class Member:
    """One file of a group."""

    path: Path
    """Absolute."""
    below: str
    """The same, relative to its indexed folder."""
    stamp: Stamp
    """As the catalogue has it."""
    content: str
    """SHA-256 of the file, hexadecimal."""
    kind: Kind
    """`copy`: the bytes of the kept one; `near`: alike, itself or by others of the group; `same file`: another name of
    the kept one or of one before it in the order of `keep`, so that nothing is won by moving it."""
    score: float
    """Cosine with the kept one, in [−1, 1]."""


@dataclass(frozen=True)
class Group:
    """Files that show the same picture."""

    kept: Member
    """The best one, by the rule asked for."""
    others: list[Member]
    """Most like the kept one first."""

    @property
    def spare(self) -> list[Member]:
        """The others that are files of their own."""
        return [member for member in self.others if member.kind != "same file"]


@dataclass(frozen=True)
class Leak:
    """A picture of one folder that is in another too."""

    path: Path
    """Absolute."""
    other: Path
    """The file of the other folder that is most like it; the first by path where several are."""
    score: float
    """Cosine in [−1, 1]."""
    copy: bool
    """Whether the two have the same bytes."""


@dataclass(frozen=True)
class Leaks:
    """How much of one folder is in another."""

    pictures: int
    """Files of the first folder that were looked for."""
    found: list[Leak]
    """By path."""


def find_duplicates(
    index: Path, min_score: float = MIN_SCORE, root: Path | None = None, keep: Keep = "largest"
) -> list[Group]:
    """Group exact copies and near duplicates.

    Args:
        index: the index folder.
        min_score: cosine from which two pictures count as the same, in (0, 1]. Groups are what hangs together by such
            pairs, so two of one group may be less alike.
        root: an indexed folder or one below; None for all.
        keep: which file of a group is the kept one. `largest`: most pixels, then most bytes, then the oldest, then the
            shortest path, then by name; `oldest`: taken or else modified first, then as `largest`; `first`: by path.

    Returns:
        Groups of at least two names, by the path of the kept one. Files that are gone or changed since the last update
        are in none.

    Raises:
        IndexStoreError: no index, a broken or an empty one, or no picture of it lies in `root`.
    """
    gallery = read_gallery(index)
    files = gallery.files if root is None else _below(gallery.files, root)
    rows, places = np.unique(np.array([file.row for file in files], np.int64), return_inverse=True)
    vectors = np.asarray(gallery.vectors)
    heads = groups_above(vectors, rows, min_score)[places]
    together: dict[int, list[Listed]] = {}
    for file, head in zip(files, heads.tolist(), strict=True):
        together.setdefault(head, []).append(file)
    groups: list[Group] = []
    absent = 0
    for members in together.values():
        if len(members) > 1:
            present = [(file, status) for file in members if (status := is_as_listed(_path(file), file.stamp))]
            absent += len(members) - len(present)
            if len(present) > 1:
                groups.append(_group(present, vectors, _ORDERS[keep]))
    if absent:
        logger.warning("%d files of groups are gone or changed since they were indexed; run: mimco index", absent)
    return sorted(groups, key=lambda group: group.kept.path)


def find_leaks(index: Path, a: Path, b: Path, min_score: float = MIN_SCORE) -> Leaks:
    """Find the pictures of one folder that are in another too, exactly or nearly.

    Where one of the folders lies in the other, the outer one stands for the rest of it.

    Args:
        index: the index folder; it is not compared with the disk.
        a: an indexed folder or one below, whose pictures are looked for.
        b: another one.
        min_score: cosine from which two pictures count as the same, in (0, 1].

    Raises:
        IndexStoreError: no index, a broken or an empty one, no picture of it lies in one of the folders, or both are
            the same folder.
    """
    gallery = read_gallery(index)
    of_a, of_b = _below(gallery.files, a), _below(gallery.files, b)
    both = {(file.root, file.path) for file in of_a} & {(file.root, file.path) for file in of_b}
    if len(both) == len(of_a) == len(of_b):
        raise IndexStoreError(f"{readable(a)} and {readable(b)} hold the same files", expected="two folders")
    if len(both) == len(of_b):
        of_a = [file for file in of_a if (file.root, file.path) not in both]
    else:
        of_b = [file for file in of_b if (file.root, file.path) not in both]
    first: dict[int, Path] = {}
    for file in of_b:
        path = _path(file)
        first[file.row] = min(first.get(file.row, path), path)
    vectors = np.asarray(gallery.vectors)
    rows = np.array(sorted({file.row for file in of_a}), np.int64)
    nearest, scores = _nearest(vectors, rows, np.array(sorted(first), np.int64), min_score)
    by_row = dict(zip(rows.tolist(), zip(nearest.tolist(), scores.tolist(), strict=True), strict=True))
    found = [
        Leak(_path(file), first[other], score, copy=other == file.row)
        for file in of_a
        for other, score in [by_row[file.row]]
        if other >= 0
    ]
    return Leaks(len(of_a), sorted(found, key=lambda leak: leak.path))


def _nearest(vectors: Vectors, rows: Rows, others: Rows, min_score: float) -> tuple[Rows, Any]:
    """As `nearest_above`, where a content that is among the others finds itself."""
    same = np.isin(rows, others)
    found, scores = rows.copy(), np.empty(len(rows))
    scores[same] = scores_of(vectors, rows[same], rows[same])
    found[~same], scores[~same] = nearest_above(vectors, rows[~same], others, min_score)
    return found, scores


def is_as_listed(path: Path, stamp: Stamp) -> os.stat_result | None:
    """What the file system says of a file; None where it is gone, or has another size or date than the catalogue."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status if stamp_of(status) == stamp else None


def file_of(status: os.stat_result) -> tuple[int, int]:
    """What all names of one file share."""
    return (status.st_dev, status.st_ino)


def _path(file: Listed) -> Path:
    return Path(file.root) / file.path


def _below(files: Sequence[Listed], folder: Path) -> list[Listed]:
    for start in (os.path.realpath(folder), folder.absolute()):  # a folder that is gone may have been a link
        prefix = f"{str(start).rstrip('/')}/"
        found = [file for file in files if f"{file.root}/{file.path}".startswith(prefix)]
        if found:
            return found
    listed = ", ".join(sorted({readable(file.root) for file in files}))
    raise IndexStoreError(
        f"no indexed picture lies in {readable(folder)}",
        expected=f"one of these or a folder in one: {listed}",
        command="mimco index status",
    )


def _group(present: list[tuple[Listed, os.stat_result]], vectors: Vectors, order: Callable[[Listed], Any]) -> Group:
    present = sorted(present, key=lambda one: order(one[0]))
    best, its_status = present[0]
    rows = np.array([file.row for file, _ in present], np.int64)
    scores = scores_of(vectors, np.full(len(rows), best.row), rows).tolist()

    def member(file: Listed, kind: Kind, score: float) -> Member:
        return Member(_path(file), file.path, file.stamp, file.sha256.hex(), kind, score)

    seen = {file_of(its_status)}

    def kind_of(file: Listed, status: os.stat_result) -> Kind:
        if file_of(status) in seen:
            return "same file"
        seen.add(file_of(status))
        return "copy" if file.row == best.row else "near"

    others = [
        member(file, kind_of(file, status), score)
        for (file, status), score in zip(present[1:], scores[1:], strict=True)
    ]
    others.sort(key=lambda one: (one.content != best.sha256.hex(), -one.score, one.path))
    return Group(member(best, "kept", scores[0]), others)


def _date(file: Listed) -> str:
    """When it was taken, else modified, in a form that sorts."""
    if file.facts.taken is not None:
        return file.facts.taken
    try:
        return datetime.fromtimestamp(file.stamp.mtime_ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "9999"  # no date that a calendar has


def _by_size(file: Listed) -> tuple[Any, ...]:
    pixels = (file.facts.width_px or 0) * (file.facts.height_px or 0)
    path = f"{file.root}/{file.path}"
    return (-pixels, -file.stamp.size, _date(file), len(path), path)


_ORDERS: dict[Keep, Callable[[Listed], Any]] = {
    "largest": _by_size,
    "oldest": lambda file: (_date(file), *_by_size(file)),
    "first": _path,
}
