"""Files read and decoded by processes that may die of them.

A decoder that hangs, crashes or wants all memory takes its process with it, not the run: the file is refused with what
happened, and another process goes on. Nobody is blamed for one death: another process is given the file once more, in
case something else killed the first, or all of them had been stopped for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import numpy as np
import numpy.typing as npt

import mimco_deploy
from mimco_deploy.bundle import EncoderSpec
from mimco_deploy.errors import ConfigError, ImageError, ImageProblem, MimcoError
from mimco_deploy.images import Facts, shown_name
from mimco_deploy.preprocess import Crop
from mimco_deploy.serving.decode_worker import CONTENT, HASH, LENGTH, READY, REQUEST, STAMP, read_frame, write_frame
from mimco_deploy.serving.scan import Stamp

NEVER_OPENED = Stamp(-1, -1)
"""The stamp of a file that could not be opened, or whose decoder died: what it was when it was opened is not known."""
_STAMP_AND_HASH = STAMP.size + 32
_PIPE_BYTES = 2**20
"""So that an answer with its pixels fits into the pipe and its process goes on."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one file may take."""

    seconds: float = 60.0
    """From opening to pixels, by the clock: slow disks count."""
    memory_mib: int = 2048
    """Of the process that decodes it: the largest pictures take half of this."""


@dataclass(frozen=True)
class Content:
    """What a file held."""

    stamp: Stamp
    sha256: bytes
    pixels: npt.NDArray[np.uint8] | None
    """[H, W, 3], or None where the content was known."""
    facts: Facts
    """What the file says of itself; nothing where the content was known."""


class RefusedError(ImageError):
    """A file that is no picture, or cannot be read; with the stamp it had then."""

    def __init__(self, problem: ImageProblem, found: str, stamp: Stamp) -> None:
        super().__init__(problem, found)
        self.stamp = stamp


class VanishedError(FileNotFoundError):
    """A file that is gone, as the process that was to read it found.

    A class of its own: a system that lacks some other file, such as a folder for temporary ones, says nothing of it.
    """


class DecodePool:
    """Processes that read files, started as they are needed. Safe to use from several threads; close it.

    Args:
        spec: geometry of the encoder.
        limits: what one file may take.
    """

    def __init__(self, spec: EncoderSpec, limits: Limits | None = None) -> None:
        self._spec = spec
        self._limits = limits or Limits()
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def read(self, path: Path, is_known: Callable[[bytes], bool] | None = None, crop: Crop | None = None) -> Content:
        """Read one file.

        Args:
            path: absolute.
            is_known: says of a SHA-256 whether its pixels are not needed; they are always where None.
            crop: the part whose pixels are wanted; all where None.

        Returns:
            What it held.

        Raises:
            VanishedError: it is gone.
            RefusedError: it is no picture, cannot be read, or its decoder did not survive it.
            ConfigError: the crop lies outside of it.
        """
        flags = 0 if is_known is None else HASH
        answer = self._ask(_request(flags, 0, crop) + os.fsencode(path), path, is_known)
        if answer[:1] == b"H":
            return Content(_stamp(answer), answer[1 + STAMP.size :], None, Facts())
        return self._content(answer)

    def decode(self, content: bytes, crop: Crop | None = None) -> Content:
        """As `read`, of a file's content; the stamp says nothing."""
        return self._content(self._ask(_request(CONTENT, 0, crop) + content, None))

    def thumbnail(self, content: bytes, side_px: int) -> bytes:
        """A small copy of a picture as JPEG.

        Args:
            content: of its file.
            side_px: the longest side, unless the picture is smaller.

        Raises:
            RefusedError: as for `read`.
        """
        return self._ask(_request(CONTENT, side_px, None) + content, None)[1:]

    def start(self, count: int) -> None:
        """Start processes before they are needed, which takes a tenth of a second each."""
        for worker in [self._take() for _ in range(count)]:
            self._idle.put(worker)

    def _ask(self, request: bytes, path: Path | None, is_known: Callable[[bytes], bool] | None = None) -> bytes:
        for last in (False, True):
            worker = self._take()
            try:
                answer = worker.ask(request, path, is_known)
            except (EOFError, BrokenPipeError):
                code = self._bury(worker)
                if self._closed:
                    raise FileNotFoundError(path) from None  # nobody waits for it any more
                last = last or (path is None and code == -signal.SIGALRM)  # somebody waits
                if last and code == -signal.SIGALRM:
                    raise _lost(path, "timeout", f"took more than {self._limits.seconds:g} s to decode") from None
                if last:
                    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    raise _lost(path, "crashed", f"brought its decoder down ({how})") from None
            except BaseException as error:
                if isinstance(error, RefusedError | ConfigError | VanishedError):
                    self._idle.put(worker)  # it answered
                else:
                    self._bury(worker)
                raise
            else:
                self._idle.put(worker)
                return answer
        raise AssertionError("unreachable")

    def _content(self, answer: bytes) -> Content:
        sha256 = answer[1 + STAMP.size : 1 + _STAMP_AND_HASH]
        start = 1 + _STAMP_AND_HASH + LENGTH.size
        end = start + LENGTH.unpack_from(answer, 1 + _STAMP_AND_HASH)[0]
        side_px = self._spec.image_size_px
        pixels = np.frombuffer(answer, np.uint8, offset=end).reshape(side_px, side_px, 3)
        return Content(_stamp(answer), sha256, pixels, Facts(**json.loads(answer[start:end])))

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            self._bury(worker)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> _Worker:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        worker = _Worker(self._spec, self._limits)
        with self._lock:
            self._workers.add(worker)
            if self._closed:
                worker.process.kill()
        return worker

    def _bury(self, worker: _Worker) -> int:
        with self._lock:
            self._workers.discard(worker)
        return worker.end()


class _Worker:
    """One process and the pipes to it. Used by one thread at a time."""

    def __init__(self, spec: EncoderSpec, limits: Limits) -> None:
        geometry = map(str, spec.geometry)
        command = [sys.executable, "-P", "-m", "mimco_deploy.serving.decode_worker", *geometry]
        # -P keeps the current folder, which may be one of pictures, from being searched for modules; so this package
        # has to be named. One thread: pictures are decoded side by side already.
        paths = [str(Path(mimco_deploy.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        try:
            with tempfile.TemporaryFile() as complaints:
                self._start([*command, repr(limits.seconds), str(limits.memory_mib)], environment, complaints)
        except OSError as error:  # also where no folder takes temporary files
            raise MimcoError(f"the processes that decode pictures do not start ({error.strerror})") from error
        _widen(self._answers.fileno())

    def _start(self, command: list[str], environment: dict[str, str], complaints: IO[bytes]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=environment
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        # Not as a frame: whatever else an installation prints would be taken for a length.
        if self._answers.read(len(READY)) != READY:
            self.process.kill()
            code = self.end()
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().split("\n")[-1]
            raise MimcoError(f"the processes that decode pictures do not start (exit code {code}: {last})")

    def ask(self, request: bytes, path: Path | None, is_known: Callable[[bytes], bool] | None) -> bytes:
        write_frame(self._requests, request)
        answer = read_frame(self._answers)
        if answer[:1] == b"H" and is_known is not None:
            if is_known(answer[1 + STAMP.size :]):
                write_frame(self._requests, b"0")
                return answer
            write_frame(self._requests, b"1")
            answer = read_frame(self._answers)
        if answer[:1] == b"V":
            raise VanishedError(path)
        if answer[:1] == b"C":
            raise ConfigError(answer[1:].decode())
        if answer[:1] == b"R":
            problem, found = answer[1 + STAMP.size :].split(b"\0", 1)
            raise RefusedError(cast(ImageProblem, problem.decode()), os.fsdecode(found), _stamp(answer))
        return answer

    def end(self) -> int:
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):  # what was not yet written to a dead process
                pipe.close()
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _request(flags: int, thumbnail_px: int, crop: Crop | None) -> bytes:
    return REQUEST.pack(flags, thumbnail_px, *(crop or (0.0,) * 4))


def _lost(path: Path | None, problem: ImageProblem, what: str) -> RefusedError:
    # No look at the file now: one that was put in its place meanwhile would be taken for the one that was read.
    return RefusedError(problem, f"{'the picture' if path is None else shown_name(str(path))} {what}", NEVER_OPENED)


def _stamp(answer: bytes) -> Stamp:
    return Stamp(*STAMP.unpack_from(answer, 1))


def _widen(pipe: int) -> None:
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):  # a limit of the system: it works as it is
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
