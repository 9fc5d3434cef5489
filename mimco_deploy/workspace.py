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
from dataclasses import dataclass
from pathlib import Path

from mimco_deploy.errors import WorkspaceError

FOLDER_NAME = ".mimco"
ENVIRONMENT_VARIABLE = "MIMCO_WORKSPACE"


@dataclass(frozen=True)
class Workspace:
    """One `.mimco` folder."""

    path: Path

    @property
    def stage1(self) -> Path:
        """The stage-1 run."""
        return self.path / "stage1"

    @property
    def stage2(self) -> Path:
        """The stage-2 run."""
        return self.path / "stage2"

    @property
    def finetune(self) -> Path:
        """The run of fine-tuning."""
        return self.path / "finetune"

    @property
    def linear(self) -> Path:
        """The run of a linear probe."""
        return self.path / "linear"

    @property
    def encoder(self) -> Path:
        """The encoder bundle."""
        return self.path / "encoder"

    @property
    def index(self) -> Path:
        """The index."""
        return self.path / "index"


def find_workspace(explicit: Path | None = None, start: Path | None = None) -> Workspace:
    """Find the workspace to use; nothing is created.

    Args:
        explicit: what the user named, or None. The folder itself, whatever its name.
        start: folder to look upward from; the current one by default.

    Returns:
        `explicit`, else `$MIMCO_WORKSPACE`, else the nearest `.mimco` at or above `start`, else `start/.mimco`.

    Raises:
        WorkspaceError: the path is there but is a file; or it was found and belongs to another user, who could have put
            it there for others to fall for.
    """
    start = start or Path.cwd()
    named = explicit or (Path(value) if (value := os.environ.get(ENVIRONMENT_VARIABLE)) else None)
    if named is None:
        above = (folder / FOLDER_NAME for folder in (start, *start.parents))
        named = next((path for path in above if path.is_dir()), start / FOLDER_NAME)
        _refuse_foreign(named)
    if named.exists() and not named.is_dir():
        raise WorkspaceError(f"{named} is a file", expected="a workspace folder", command="mimco --workspace DIR …")
    return Workspace(named)


def _refuse_foreign(found: Path) -> None:
    try:
        owner = found.stat().st_uid
    except OSError:
        return
    if os.geteuid() not in (0, owner) and owner != 0:
        command = f"mimco --workspace {found} …, if you trust it"
        raise WorkspaceError(f"{found} belongs to another user", expected="one of yours", command=command)


def set_aside(folder: Path) -> Path:
    """Rename `folder` to the first free `<folder>-1`, `<folder>-2`, …, and return that."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return folder.replace(aside)
