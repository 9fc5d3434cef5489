"""The folders of an index: which are recorded, which enclose which, how one is forgotten."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from mimco_deploy.errors import IndexBusyError, IndexStoreError
from mimco_deploy.serving.catalog import Catalog, Root
from mimco_deploy.serving.generations import Generation, current_generation, has_index, writer_lock
from mimco_deploy.serving.inspect import read_current
from mimco_deploy.serving.scan import can_be_walked, readable

logger = logging.getLogger(__name__)


def existing_folder(root: Path) -> Path:
    """Resolve a folder that a user named.

    Raises:
        IndexStoreError: it does not exist or is a file.
    """
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise IndexStoreError(f"{readable(root)} {found}", expected="a folder of pictures")
    return _real(root)


def _real(folder: Path) -> Path:
    """Absolute, links resolved; where they lead in circles `Path.resolve` would raise."""
    return Path(os.path.realpath(folder))


def roots_to_keep(index: Path, *, may_be_broken: bool) -> list[Path]:
    """List the recorded folders that a rebuild has to embed again.

    Args:
        index: the index folder; nothing is recorded where there is none.
        may_be_broken: whether to go on without them where the old catalogue cannot be read.

    Raises:
        IndexStoreError: a folder is not there, and a rebuild would lose what the index holds of it.
    """
    if not has_index(index):
        return []
    try:
        with Catalog(current_generation(index).catalog) as catalog, catalog.transaction():
            follow_links(catalog)
            recorded = [(root.path, len(catalog.file_stamps(root))) for root in catalog.roots()]
    except IndexStoreError as error:
        if isinstance(error, IndexBusyError) or not may_be_broken:
            raise
        logger.warning("the old index cannot be read, only the folders given are indexed: %s", error)
        return []
    for root, files in recorded:
        if files and not root.is_dir():
            raise IndexStoreError(
                f"{readable(root)} is away, and a rebuild would lose its {files} files",
                expected="all indexed folders",
                command=f"mimco index forget {shlex.quote(readable(root))}",
            )
    return [root for root, _ in recorded]


def follow_links(catalog: Catalog) -> None:
    """Record where folders lie now that moved and left a link behind: by either path they are one folder."""
    for root in catalog.roots():
        real = _real(root.path)
        others = [other.path for other in catalog.roots() if other != root]
        if real != root.path and can_be_walked(real) and not any(_overlap(real, other) for other in others):
            catalog.move_root(root, real)


def record_roots(catalog: Catalog, folders: Sequence[Path]) -> list[Root]:
    """Record folders as roots so that no file lies below two; return the roots to walk."""
    touched: dict[Path, Root] = {}
    for folder in sorted(set(folders)):  # outer ones first
        recorded = catalog.roots()
        root = next((known for known in recorded if _reaches(known.path, folder)), None)
        if root is None:
            root = catalog.add_root(folder)
            for inner in recorded:
                if _reaches(folder, inner.path):
                    catalog.absorb_root(inner, root)
        touched[root.path] = root
    return list(touched.values())


def _reaches(outer: Path, inner: Path) -> bool:
    """Whether a walk of `outer` comes to `inner`: walks pass over hidden folders."""
    if not inner.is_relative_to(outer):
        return False
    return not any(part.startswith(".") for part in inner.relative_to(outer).parts)


def _overlap(one: Path, other: Path) -> bool:
    return _reaches(one, other) or _reaches(other, one)


def split_move(index: Path, text: str) -> tuple[Path, Path]:
    """The two folders of OLD=NEW, whose names may hold signs too: NEW is a folder and OLD known, if that can be.

    Args:
        index: the index folder.
        text: with a sign that is neither its first nor its last letter.

    Raises:
        IndexStoreError: several are possible, and there is no index to tell by.
    """
    signs = [at for at, letter in enumerate(text) if letter == "=" and 0 < at < len(text) - 1]
    splits = [(Path(text[:at]), Path(text[at + 1 :])) for at in signs]
    if len(splits) > 1:
        recorded = recorded_roots(index)
        for old, new in splits:
            if new.is_dir() and _start(recorded, old) is not None:
                return old, new
    return splits[0]


def recorded_roots(index: Path) -> list[Root]:
    """The indexed folders, sorted by path, also while the index is rewritten.

    Raises:
        IndexStoreError: there is no index, or it is broken.
    """

    def read(generation: Generation) -> list[Root]:
        with Catalog(generation.catalog) as catalog, catalog.snapshot():
            return catalog.roots()

    return read_current(index, read)


def _start(recorded: Sequence[Root], old: Path) -> Path | None:
    """What `old` means, absolute: what lies there now may be a link. None where no root lies in it."""
    for one in (old.absolute(), _real(old)):
        if any(root.path.is_relative_to(one) for root in recorded):
            return one
    return None


def move_roots(index: Path, moves: Sequence[tuple[Path, Path]]) -> int:
    """Record that indexed folders lie elsewhere now, all of them or none. Nothing is read or embedded again.

    Args:
        index: the index folder.
        moves: an indexed folder, or one that holds some, which need not exist; and where it, with all below, lies now.
            What several of them name moves by the first.

    Returns:
        How many indexed folders moved.

    Raises:
        IndexStoreError: no index, no such indexed folder, a new place is no folder or overlaps another indexed one, or
            another process is writing.
    """
    current_generation(index)  # before the lock makes a folder where there is no index
    targets = [(old, existing_folder(new)) for old, new in moves]
    with writer_lock(index), Catalog(current_generation(index).catalog) as catalog, catalog.transaction():
        recorded = catalog.roots()
        moved: dict[Root, Path] = {}
        for old, target in targets:
            left = [root for root in recorded if root not in moved]
            start = _start(left, old)
            if start is None:
                listed = ", ".join(readable(root.path) for root in left) or "none"
                raise IndexStoreError(f"no indexed folder lies in {readable(old)}", expected=f"one of: {listed}")
            inside = [root for root in left if root.path.is_relative_to(start)]
            moved.update((root, target / root.path.relative_to(start)) for root in inside)
        places = {root: moved.get(root, root.path) for root in recorded}
        for root, path in moved.items():
            for other, place in places.items():
                if other != root and _overlap(path, place):
                    raise IndexStoreError(f"{readable(path)} overlaps the indexed folder {readable(place)}")
        for root in moved:  # to where no folder lies, as one may take the place of another
            catalog.move_root(root, Path(str(root.id)))
        for root, path in moved.items():
            catalog.move_root(root, path)
    return len(moved)


def forget_roots(index: Path, roots: Sequence[Path]) -> int:
    """Take indexed folders out of the index, whether or not they still exist: all of them or none.

    Returns:
        How many files were dropped.

    Raises:
        IndexStoreError: no index, one is not an indexed folder, or another process is writing.
    """
    current_generation(index)  # before the lock makes a folder where there is no index
    with writer_lock(index), Catalog(current_generation(index).catalog) as catalog, catalog.transaction():
        recorded = {one.path: one for one in catalog.roots()}
        found: set[Root] = set()
        for root in roots:
            known = recorded.get(_real(root)) or recorded.get(root.absolute())
            if known is None:
                listed = ", ".join(readable(path) for path in recorded) or "none"
                raise IndexStoreError(f"{readable(root)} is not an indexed folder", expected=f"one of: {listed}")
            found.add(known)
        return sum(map(catalog.remove_root, found))
