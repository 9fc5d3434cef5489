"""Concurrent pictures share the encoder: what waits together is embedded together, and no more waits than is bearable.

A picture is admitted before it is decoded and leaves when it is embedded. How many may be in between is bounded by
time, not by a number that fits one machine: at the start the encoder is timed with one picture and with a full batch,
and as many are admitted as it embeds in `PATIENCE` times what one takes. On two cores that is three pictures, on a GPU
some dozens. Whoever comes then is told when to come again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import MimcoError

Pixels = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float32]
Result = TypeVar("Result")

MOST = 16
"""Pictures in a batch."""
PATIENCE = 3.0
"""Times what one picture takes: how long one may wait for the encoder."""
_TIMED = 3


class BusyError(MimcoError):
    """More is asked than can be answered soon.

    Args:
        retry_after_s: when to come again, at least 1.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the service is busy", expected=f"another try in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class RetiredError(Exception):
    """Another encoder has taken over."""


@dataclass(frozen=True)
class Pace:
    """How fast an encoder is."""

    lone_s: float
    """One picture by itself."""
    images_per_s: float
    """At best, of one by one and full batches."""

    @property
    def room(self) -> int:
        """Pictures that are embedded in `PATIENCE` times what one takes, at least 2: one embedded, one decoded."""
        return max(2, int(PATIENCE * self.lone_s * self.images_per_s))


def time_encoder(embed: Callable[[Pixels], Vectors], side_px: int) -> Pace:
    """Time an encoder, and warm it up.

    Args:
        embed: [B, H, W, 3] → [B, D].
        side_px: H and W.
    """
    seconds = {}
    for count in (1, MOST):
        pixels = np.zeros((count, side_px, side_px, 3), np.uint8)
        embed(pixels)
        times = []
        for _ in range(_TIMED):
            start = time.perf_counter()
            embed(pixels)
            times.append(time.perf_counter() - start)
        seconds[count] = min(times)
    return Pace(seconds[1], max(1 / seconds[1], MOST / seconds[MOST]))


@dataclass
class _Waiting:
    pixels: Pixels
    since: float
    embedding: asyncio.Future[tuple[npt.NDArray[np.float32], float]]


class Batcher:
    """One queue before one encoder. Used from one event loop; `start` and `stop` it.

    Args:
        embed: [B, H, W, 3] → [B, D]; called in a thread, never twice at once.
        pace: of the encoder.
        window_s: how long a batch waits for pictures that are being decoded.
        room: most pictures admitted; None for what the pace says.
        on_batch: told the size of each batch.
    """

    def __init__(
        self,
        embed: Callable[[Pixels], Vectors],
        pace: Pace,
        *,
        window_s: float = 0.002,
        room: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.pace = pace
        self.room = room or pace.room
        self.admitted = 0
        """Pictures between admission and embedding."""
        self._embed, self._window_s = embed, window_s
        self._on_batch = on_batch or (lambda _count: None)
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._left = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mimco-encoder")
        self._worker: asyncio.Task[None] | None = None
        self._retired = False

    def start(self) -> None:
        """Begin to take pictures."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End; whoever still waits is told so."""
        self._retired = True
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        while not self._queue.empty():
            self._queue.get_nowait().embedding.cancel()
        self._thread.shutdown()

    @property
    def full(self) -> bool:
        """Whether one more picture would be refused."""
        return self.admitted >= self.room

    def busy(self) -> BusyError:
        """What to say to those who are refused."""
        return BusyError(max(1, math.ceil(self.admitted / self.pace.images_per_s)))

    @contextlib.asynccontextmanager
    async def admit(self, count: int, *, patient: bool = False) -> AsyncIterator[None]:
        """Hold a place for some pictures, from before they are decoded until they are embedded.

        Args:
            count: of pictures. More than there is ever room for are admitted when nobody else is there.
            patient: wait for room; only for callers whose number is bounded elsewhere.

        Raises:
            BusyError: there is no room.
            RetiredError: it was stopped.
        """
        if self._retired:
            raise RetiredError
        while self.admitted and self.admitted + count > self.room:
            if not patient:
                raise self.busy()
            self._left.clear()
            await self._left.wait()
        self.admitted += count
        try:
            yield
        finally:
            self.admitted -= count
            self._left.set()

    async def embed(self, pictures: Sequence[Pixels]) -> tuple[Vectors, float]:
        """Embed pictures that were admitted.

        Args:
            pictures: [H, W, 3] each, at least one.

        Returns:
            [B, D], and for how many seconds they waited for their batch.
        """
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        waiting = [_Waiting(pixels, now, loop.create_future()) for pixels in pictures]
        for one in waiting:
            self._queue.put_nowait(one)
        answers = await asyncio.gather(*(one.embedding for one in waiting))
        return np.stack([embedding for embedding, _ in answers]), max(waited for _, waited in answers)

    async def alone(self, work: Callable[[], Result]) -> Result:
        """Run something else in the encoder's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [one for one in await self._next() if not one.embedding.done()]  # nobody waits for the others
            if not batch:
                continue
            start = time.perf_counter()
            try:
                pixels = np.stack([one.pixels for one in batch])
                embeddings = await loop.run_in_executor(self._thread, self._embed, pixels)
            except Exception as error:
                for one in batch:
                    if not one.embedding.done():
                        one.embedding.set_exception(error)
                continue
            self._on_batch(len(batch))
            for one, embedding in zip(batch, embeddings, strict=True):
                if not one.embedding.done():
                    one.embedding.set_result((embedding, start - one.since))

    async def _next(self) -> list[_Waiting]:
        """What waits, and for a moment what is about to."""
        batch = [await self._queue.get()]
        until = time.perf_counter() + self._window_s
        while len(batch) < MOST:
            if not self._queue.empty():
                batch.append(self._queue.get_nowait())
                continue
            rest = until - time.perf_counter()
            if rest <= 0 or len(batch) >= self.admitted:
                break
            with contextlib.suppress(TimeoutError):
                batch.append(await asyncio.wait_for(self._queue.get(), rest))
        return batch
