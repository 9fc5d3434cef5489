"""Read pictures ahead of the encoder: file → SHA-256 → pixels, in several threads, results in order.

Each file is read once; the hash and the pixels come from the same bytes. The stamp is taken from the open file before
its bytes are read, so a file that is written to meanwhile has another stamp at the next walk and is read again.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import EncoderSpec
from mimco_deploy.errors import ImageError, ImageProblem
from mimco_deploy.images import MAX_BYTES, decode_image
from mimco_deploy.preprocess import preprocess
from mimco_deploy.serving.catalog import Root
from mimco_deploy.serving.scan import FileStat, Stamp

# Decoding lets go of the interpreter lock, so threads help; past this number the disk or the encoder is what waits.
MAX_THREADS = 8


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
    jobs: Iterable[Job], spec: EncoderSpec, known: frozenset[bytes], ahead: int
) -> Generator[Outcome, None, None]:
    """Read files in several threads.

    Args:
        jobs: what to read.
        spec: geometry of the encoder.
        known: contents that need no pixels.
        ahead: how many outcomes may wait to be taken, at least 1. Only as many encoded files as there are threads are
            in memory at once.

    Yields:
        One outcome for each job, in the order of the jobs. Close the generator to stop the threads.
    """
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mimco-read")
    try:
        yield from _in_order(pool, lambda job: _read(job, spec, known), jobs, max(ahead, threads))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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


def _read(job: Job, spec: EncoderSpec, known: frozenset[bytes]) -> Outcome:
    path = job.root.path / job.file.path
    stamp = job.file.stamp
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            stamp = Stamp(status.st_size, status.st_mtime_ns)
            if stamp.size > MAX_BYTES:
                return Refused(job, stamp, "too_large", f"{path} has {stamp.size:,} bytes, more than {MAX_BYTES:,}")
            content = file.read(MAX_BYTES + 1)
        sha256 = hashlib.sha256(content).digest()
        if sha256 in known:
            return Picture(job, stamp, sha256, None)
        picture = decode_image(content, str(path))
        pixels = preprocess(picture, spec.image_size_px, spec.crop_share, spec.interpolation)
        return Picture(job, stamp, sha256, pixels)
    except ImageError as error:
        return Refused(job, stamp, error.problem, error.found)
    except (FileNotFoundError, NotADirectoryError):
        return Vanished(job)
    except OSError as error:
        return Refused(job, stamp, "unreadable", f"{path} cannot be read ({error.strerror})")
