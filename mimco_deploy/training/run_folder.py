"""The folder of a run: one training at a time writes into it; a run that is in the way is moved aside, never lost."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from mimco_deploy import atomic
from mimco_deploy.errors import CheckpointError
from mimco_deploy.training.distributed import is_main, wait_for_all
from mimco_deploy.workspace import set_aside

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only training that writes into `folder` while the block runs; the main process is it for all.

    Raises:
        CheckpointError: another process trains there.
    """
    if not is_main():
        yield
        return
    refusal = CheckpointError(
        f"another process trains in {folder}", expected="one at a time", command="mimco --workspace DIR train …"
    )
    with atomic.only_writer(folder, refusal):
        yield


def make_way(folder: Path, *, resuming: bool) -> None:
    """Make the run's folder; a run that is there and not resumed is moved aside.

    To be called once nothing else can be refused. No process comes back before all have read what they start from,
    which may lie in the very folder.
    """
    wait_for_all()
    if not is_main():
        return
    if not resuming and folder.exists():
        logger.warning("the run that was in %s is now in %s", folder, set_aside(folder))
    folder.mkdir(parents=True, exist_ok=True)
