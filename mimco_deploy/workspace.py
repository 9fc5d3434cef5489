"""Where artefacts live: the nearest `.mimco/` upward from the current folder, as git finds `.git`.

    .mimco/
    ├── stage1/   the teacher's run: last/, log.jsonl, events.*
    ├── stage2/   the student's run, likewise
    ├── finetune/ an encoder trained on with labels: last/, log.jsonl
    ├── linear/   a linear probe of an encoder, likewise
    ├── encoder/  the exported bundle
    └── index/    catalogue and vectors

Standard library only.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from mimco_deploy.errors import WorkspaceError

FOLDER_NAME = ".mimco"
ENVIRONMENT_VARIABLE = "MIMCO_WORKSPACE"


@dataclass(frozen=True)
class Workspace:
    """One `.mimco` folder. To look into one that was found and is another user's raises WorkspaceError."""

    path: Path
    is_foreign: bool = False

    @property
    def stage1(self) -> Path:
        """The stage-1 run."""
        return self._part("stage1")

    @property
    def stage2(self) -> Path:
        """The stage-2 run."""
        return self._part("stage2")

    @property
    def finetune(self) -> Path:
        """The run of fine-tuning."""
        return self._part("finetune")

    @property
    def linear(self) -> Path:
        """The run of a linear probe."""
        return self._part("linear")

    @property
    def encoder(self) -> Path:
        """The encoder bundle."""
        return self._part("encoder")

    @property
    def index(self) -> Path:
        """The index."""
        return self._part("index")

    def _part(self, name: str) -> Path:
        if self.is_foreign:
            command = f"export {ENVIRONMENT_VARIABLE}={shlex.quote(str(self.path))}   # if you trust it"
            raise WorkspaceError(f"{self.path} belongs to another user", expected="one of yours", command=command)
        return self.path / name


def find_workspace(explicit: Path | None = None, start: Path | None = None) -> Workspace:
    """Find the workspace to use; nothing is created.

    Args:
        explicit: what the user named, or None. The folder itself, whatever its name.
        start: folder to look upward from; the current one by default.

    Returns:
        `explicit`, else `$MIMCO_WORKSPACE`, else the nearest `.mimco` at or above `start`, else `start/.mimco`.

    Raises:
        WorkspaceError: the path is there but is a file.
    """
    start = start or Path.cwd()
    named = explicit or (Path(value) if (value := os.environ.get(ENVIRONMENT_VARIABLE)) else None)
    is_foreign = False
    if named is None:
        above = (folder / FOLDER_NAME for folder in (start, *start.parents))
        named = next((path for path in above if path.is_dir()), start / FOLDER_NAME)
        is_foreign = _is_foreign(named)
    if named.exists() and not named.is_dir():
        raise WorkspaceError(f"{named} is a file", expected="a workspace folder", command="mimco --workspace DIR …")
    return Workspace(named, is_foreign)


def _is_foreign(found: Path) -> bool:
    """Whether it is neither ours, nor root's, nor of whom the folder is: in /tmp anybody could make one for us."""
    try:
        owner, above = found.stat().st_uid, found.parent.stat().st_uid
    except OSError:
        return False
    return owner not in (os.geteuid(), 0, above)


def set_aside(folder: Path) -> Path:
    """Rename `folder` to the first free `<folder>-1`, `<folder>-2`, …, and return that."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return folder.replace(aside)
