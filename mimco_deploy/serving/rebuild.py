"""What a rebuild must not lose: files of the old index that are only out of sight, as where a disk is taken out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.catalog import Catalog, Root
from mimco_deploy.serving.generations import files_to_replace
from mimco_deploy.serving.pictures import Job
from mimco_deploy.serving.scan import Unlisted, readable

GIVEN_UP = frozenset({"timeout", "crashed"})
"""Problems that say more of the limits and of the machine than of a file, so that a rebuild tries such files again."""


def refuse_to_lose(index: Path, begun: Catalog, unlisted: Sequence[tuple[Root, Unlisted]], jobs: Sequence[Job]) -> None:
    """Before hours of embedding, and after them: what is not whole cannot take the place of the old index.

    Args:
        index: the index folder.
        begun: catalogue of the rebuild.
        unlisted: folders that the walks could not look into, each with the root that it lies in.
        jobs: that are still to be done.

    Raises:
        IndexStoreError: the old index holds files which the walks could not look at, or which their decoders did not
            survive, or in a folder that is empty or away now, as where a disk was mounted that is taken out.
    """
    with begun.snapshot():
        problems = {one.path: one for one in begun.problems() if jobs or one.problem != "unreadable"}
        held, roots = {*begun.files(), *problems}, [root.path for root in begun.roots()]
    held.update(job.root.path / job.file.path for job in jobs)
    old = files_to_replace(index)
    given_up = [problems[path] for path in old if path in problems and problems[path].problem in GIVEN_UP]
    if given_up and not jobs:
        raise IndexStoreError(
            f"{given_up[0].found}, and a rebuild would lose {len(given_up)} such files that the index holds",
            expected="a longer --file-timeout, more --file-memory, or these files out of the indexed folders",
            command="mimco index reindex",
        )
    missed = [path for path in old if path not in held]
    for root, folder in unlisted:
        below = (str(path.relative_to(root.path)) for path in missed if path.is_relative_to(root.path))
        if lost := sum(map(folder.hides, below)):
            raise _would_lose(root.path / folder.path, folder.reason, lost)
    for parent, lost in Counter(path.parent for path in missed).items():
        top = next((root for root in roots if parent.is_relative_to(root)), None)
        if top is not None and (reason := _emptied(there := _still_there(parent, top))):
            raise _would_lose(there, reason, lost)


def _would_lose(folder: Path, reason: str, files: int) -> IndexStoreError:
    return IndexStoreError(
        f"{readable(folder)} cannot be read ({reason}), and a rebuild would lose its {files} files",
        expected="all indexed folders as they were; an empty one that is meant: delete it, or mimco index forget it",
        command="mimco index reindex",
    )


def _still_there(folder: Path, top: Path) -> Path:
    """The folder, or the nearest above it that was not deleted, up to `top`."""
    while folder != top:
        try:
            folder.lstat()
        except FileNotFoundError:
            folder = folder.parent
        except OSError:
            break
        else:
            break
    return folder


def _emptied(folder: Path) -> str:
    """Why nothing is found in a folder, in words; empty where something is."""
    try:
        with os.scandir(folder) as entries:
            return "" if any(entries) else "it is empty"
    except OSError as error:
        return error.strerror or type(error).__name__
