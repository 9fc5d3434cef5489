"""An index that follows its folders: brought up to date whenever something in them changed. Needs the extra `serve`.

The system tells that there was a change, by watchfiles; what changed is found by the same walk as ever, so that nothing
is missed of what happened before, between, or where the system's events overflow.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import watchfiles

from mimco_deploy.errors import IndexBusyError, IndexNewerError, IndexStoreError
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.generations import has_index
from mimco_deploy.serving.roots import existing_folder, recorded_roots
from mimco_deploy.serving.scan import can_be_walked
from mimco_deploy.serving.update import UpdateReport, update_index

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 600.0
"""Without any event: some network disks send none."""
_BUSY_S = 5.0
_TURN_MS = 200
_MOST_SETTLES = 10


def watch_folders(
    index: Path,
    folders: Sequence[Path],
    encoder: Encoder,
    *,
    settle_s: float = 2.0,
    encoder_path: Path | None = None,
    stop: threading.Event | None = None,
) -> Iterator[UpdateReport]:
    """Index folders now, and again after each change. One that is away meanwhile is passed over until it is back.

    Args:
        index: the index folder, made if missing.
        folders: to watch; none for all that are indexed.
        encoder: that made the index.
        settle_s: how long nothing may have changed before it is indexed, at most ten times that after the first change.
        encoder_path: as for `update_index`.
        stop: set it to end; the wait for a change ends within a second.

    Yields:
        What each update did that found a change, the first in any case.

    Raises:
        IndexStoreError: a folder does not exist to begin with, or there is nothing to watch.
        EncoderMismatchError: another encoder made the index.
    """
    stop = stop or threading.Event()
    roots = [existing_folder(folder) for folder in folders]
    watched: list[tuple[Path, int, int]] = []
    changes: Iterator[object] = iter(())
    first = True
    while not stop.is_set():
        # Watched before it is walked: what changes meanwhile is heard of afterwards.
        if (found := list(_found(roots or _recorded(index)))) != watched:
            watched, changes = found, _changes([root for root, *_ in found], index, stop)
            next(changes, None)
        present = [root for root, *_ in found]
        if roots and not present:
            stop.wait(_BUSY_S)
            continue
        try:
            report = update_index(index, present if roots else [], encoder, encoder_path=encoder_path)
        except IndexStoreError as error:
            waits = isinstance(error, IndexBusyError) and not isinstance(error, IndexNewerError)
            if not waits and all(map(can_be_walked, present)):
                raise  # else one went just now
            logger.warning("%s; trying again", error)
            stop.wait(_BUSY_S)
            continue
        if first or report.added or report.changed or report.removed:
            yield report
        first = False
        _wait(changes, settle_s, stop)


def _wait(changes: Iterator[object], settle_s: float, stop: threading.Event) -> None:
    """Until something changed and settled, or a long time has passed."""
    begun = time.monotonic()
    first = last = None
    while not stop.is_set():
        changed = next(changes, None)
        now = time.monotonic()
        if changed is None:  # nothing is there to watch
            stop.wait(_BUSY_S)
            return
        if changed:
            first, last = first or now, now
        settled = last is not None and now - last >= settle_s
        if settled or (first is not None and now - first >= _MOST_SETTLES * settle_s) or now - begun >= _LOOK_AGAIN_S:
            return


def _found(roots: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    """Those that can be walked, each with what tells it from another folder that takes its place."""
    for root in roots:
        if can_be_walked(root):
            with contextlib.suppress(OSError):  # it went just now
                status = root.stat()
                yield root, status.st_dev, status.st_ino


def _recorded(index: Path) -> list[Path]:
    return [root.path for root in recorded_roots(index)] if has_index(index) else []


def _changes(folders: Sequence[Path], index: Path, stop: threading.Event) -> Iterator[object]:
    """What changed; nothing some times a second. The index itself, which may lie in a folder, does not count."""
    if not folders:
        return iter(())
    own = index.resolve()
    return iter(
        watchfiles.watch(
            *folders,
            watch_filter=lambda _, path: not Path(path).is_relative_to(own),
            debounce=_TURN_MS,
            step=_TURN_MS // 2,
            stop_event=stop,
            rust_timeout=_TURN_MS,
            yield_on_timeout=True,
            raise_interrupt=True,
        )
    )
