"""Read pictures ahead of the encoder: file → SHA-256 → pixels, by several processes, results in order.

Each file is read once; the hash and the pixels come from the same bytes. A thread for each process waits for it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import ImageProblem
from mimco_deploy.images import Facts
from mimco_deploy.serving.catalog import Root
from mimco_deploy.serving.guarded import NEVER_OPENED, DecodePool, RefusedError, VanishedError
from mimco_deploy.serving.scan import FileStat, Stamp

MAX_PROCESSES = 16
"""Past this number the disk or the encoder is what waits. Each takes about 60 MB."""


@dataclass(frozen=True)
class Job:
    """One file to read."""

    root: Root
    file: FileStat
    """As the walk found it."""
    listed: bool
    """Whether the catalogue lists the file, with another stamp."""


@dataclass(frozen=True)
class Picture:
    """A file that is a picture."""

    job: Job
    stamp: Stamp
    """As it was when its bytes were read."""
    sha256: bytes
    pixels: npt.NDArray[np.uint8] | None
    """[H, W, 3], or None where the content is known and need not be embedded."""
    facts: Facts


@dataclass(frozen=True)
class Refused:
    """A file that is not a picture, or cannot be read."""

    job: Job
    stamp: Stamp
    problem: ImageProblem
    found: str


@dataclass(frozen=True)
class Vanished:
    """A file that went away since the walk."""

    job: Job


Outcome = Picture | Refused | Vanished


def read_pictures(
    jobs: Iterable[Job], decoders: DecodePool, known: Set[bytes], ahead: int
) -> Generator[Outcome, None, None]:
    """Read files by several processes.

    Args:
        jobs: what to read.
        decoders: which read it; closed in the end.
        known: contents that need no pixels; it may grow meanwhile.
        ahead: how many outcomes may wait to be taken, at least 1. Only as many encoded files as there are processes
            are in memory at once.

    Yields:
        One outcome for each job, in the order of the jobs. Close the generator to stop the processes.
    """
    threads = min(MAX_PROCESSES, available_cpus())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mimco-read")
    try:
        yield from _in_order(pool, lambda job: _read(job, decoders, known), jobs, max(ahead, threads))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        decoders.close()  # the threads that still wait for an answer get none
        pool.shutdown(wait=True)


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Job], Outcome], jobs: Iterable[Job], ahead: int
) -> Iterator[Outcome]:
    waiting: deque[Future[Outcome]] = deque()
    rest = iter(jobs)
    waiting.extend(pool.submit(work, job) for job in islice(rest, ahead))
    while waiting:
        outcome = waiting.popleft().result()
        waiting.extend(pool.submit(work, job) for job in islice(rest, 1))
        yield outcome


def _read(job: Job, decoders: DecodePool, known: Set[bytes]) -> Outcome:
    try:
        content = decoders.read(job.root.path / job.file.path, known.__contains__)
    except RefusedError as error:
        stamp = job.file.stamp if error.stamp == NEVER_OPENED else error.stamp
        return Refused(job, stamp, error.problem, error.found)
    except VanishedError:
        return Vanished(job)
    return Picture(job, content.stamp, content.sha256, content.pixels, content.facts)
