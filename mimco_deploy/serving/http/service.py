"""What the service does, without HTTP: pictures → pixels → embeddings → hits. One event loop, threads behind it.

Every picture from outside and every file is decoded by the guarded processes; the encoder is behind the batcher; the
index is searched by threads. Another generation of the index, also one of another encoder, is taken up between two
requests; what is being answered is answered from the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import EncoderSpec
from mimco_deploy.errors import ConfigError, EncoderMismatchError, ImageError
from mimco_deploy.preprocess import Crop, seen_box
from mimco_deploy.serving.background import in_words
from mimco_deploy.serving.catalog import Listed
from mimco_deploy.serving.encoders import Device, Encoder, load_encoder
from mimco_deploy.serving.filters import Filter
from mimco_deploy.serving.guarded import Content, DecodePool, Limits
from mimco_deploy.serving.http import schemas
from mimco_deploy.serving.http.batching import Batcher, BusyError, RetiredError, time_encoder
from mimco_deploy.serving.http.metrics import Metrics
from mimco_deploy.serving.http.originals import Originals
from mimco_deploy.serving.http.problems import GoneError, NotThereError
from mimco_deploy.serving.index import Hit, ImageIndex
from mimco_deploy.serving.inspect import recorded_encoder
from mimco_deploy.serving.pictures import available_cpus
from mimco_deploy.serving.query import RERANKED, weighted_sum
from mimco_deploy.serving.scan import readable
from mimco_deploy.serving.why import Reason, check_patches, explain_pixels, order_by_parts
from mimco_deploy.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float32]
Result = TypeVar("Result")
Upload = Callable[[], Awaitable[bytes]]
"""Gives the bytes of an uploaded file; asked when it is this file's turn, so that few are in memory at once."""

_SEARCHES, _READING_WAITING = 4, 128
"""Searches at once, and with those that wait. FAISS uses all cores for one."""
_FILTERED, _FILTERED_WAITING = 2, 8
"""Searches with conditions, at once and with those that wait; others do not wait for what may take long."""
_CONDITION_S = 3.0
_BULK = 2
"""Requests with many pictures that are worked on at once."""
_GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How to serve."""

    device: Device = "auto"
    strict: bool = False
    """Whether it is an error that the encoder does not run on that device."""
    encoder: Path | None = None
    """Bundle; None for the index's own, else the workspace's."""
    table: Path | None = None
    """CSV or Parquet whose columns conditions may name."""
    queue: int | None = None
    """Most pictures between admission and embedding; None for what the encoder's pace allows."""
    window_ms: float = 2.0
    """How long a batch waits for pictures that are being decoded."""
    max_upload_mib: int = 32
    """Of one request."""
    upload_s: float = 30.0
    """For one request to arrive."""
    decode: Limits = field(default_factory=lambda: Limits(seconds=20.0))
    """What one picture may take."""


@dataclass
class _Running:
    """What belongs to one encoder."""

    index: ImageIndex
    encoder: Encoder
    bundle: Path
    decoders: DecodePool
    batcher: Batcher


class Service:
    """An index and an encoder that answer. Use `running` as a context of one event loop.

    Args:
        index: the index folder.
        workspace_encoder: the bundle where the index does not name another.
        settings: how.
        metrics: told of what happens.
    """

    def __init__(self, index: Path, workspace_encoder: Path, settings: ServeSettings, metrics: Metrics) -> None:
        self.path = index
        self.workspace_encoder = workspace_encoder
        self.settings = settings
        self.metrics = metrics
        self._now: _Running | None = None
        self._switching = asyncio.Lock()
        self._bulk = 0
        self._retiring: set[asyncio.Task[None]] = set()
        cpus = available_cpus()
        self._decoding = ThreadPoolExecutor(cpus, thread_name_prefix="mimco-decode")
        self._drawing = ThreadPoolExecutor(max(1, cpus // 2), thread_name_prefix="mimco-thumbnail")
        self._searching = ThreadPoolExecutor(_SEARCHES, thread_name_prefix="mimco-search")
        self._filtering = ThreadPoolExecutor(_FILTERED, thread_name_prefix="mimco-filter")
        self._reading: set[asyncio.Future[Any]] = set()
        self._filtering_now: set[asyncio.Future[Any]] = set()
        self._originals = Originals()

    def prepare(self) -> None:
        """Load the encoder and open the index, so that what is wrong with them shows before anything runs.

        Raises:
            BundleError: no encoder, or one that fails its proof.
            IndexStoreError: no index.
            EncoderMismatchError: the index was made by another encoder.
        """
        self._now = self._load()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve; prepared where nobody has. Closes all in the end."""
        if self._now is None:
            self.prepare()
        self.now.batcher.start()
        try:
            yield
        finally:
            for task in self._retiring:
                task.cancel()
            await asyncio.gather(*self._retiring)
            now, self._now = self.now, None
            await _close(now)
            for pool in (self._decoding, self._drawing, self._searching, self._filtering):
                pool.shutdown()

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self._now is not None

    @property
    def now(self) -> _Running:
        """The index and the encoder in use."""
        assert self._now is not None
        return self._now

    # ------------------------------------------------------------------------------------------------ queries

    async def search(self, query: schemas.Query, uploads: Sequence[Upload], *, patient: bool = False) -> schemas.Answer:
        """Answer one query.

        Args:
            query: with parts.
            uploads: what its parts may name.
            patient: wait for room in the queue.

        Raises:
            MimcoError: of the kinds that `problems.py` knows.
        """
        return await self._with_current(lambda now: self._search(now, query, uploads, patient))

    async def search_all(self, queries: Sequence[schemas.Query], uploads: Sequence[Upload]) -> list[schemas.Answer]:
        """Answer several queries, one after the other."""
        with self._one_of_few():
            return [await self.search(query, uploads, patient=True) for query in queries]

    async def embed(self, uploads: Sequence[Upload]) -> tuple[EncoderSpec, Vectors]:
        """Embed pictures [Q, D], one at a time; with the encoder that did it."""
        with self._one_of_few():
            return await self._with_current(lambda now: self._embed(now, uploads))

    async def why(self, request: schemas.WhyRequest, uploads: Sequence[Upload]) -> schemas.Why:
        """Compare two pictures part by part."""
        return await self._with_current(lambda now: self._why(now, request, uploads))

    async def read(self, work: Callable[[ImageIndex], Result], condition: Filter | None = None) -> Result:
        """Run something that reads the index of now, in one of its threads; under a condition, in one of few."""
        return await self._with_current(lambda now: self._read(now, work, condition))

    async def condition(self, where: str, root: str | None) -> Filter:
        """What a request asks for.

        Raises:
            ConfigError: the folder is not absolute: the service's own current folder is nobody's business.
        """
        if root and not Path(root).is_absolute():
            raise ConfigError(f"root = {root!r}", expected="an absolute path")
        return Filter(where, await self._folder(root) if root else None, self.settings.table)

    # ----------------------------------------------------------------------------------------------- pictures

    async def files_with(self, content: str) -> list[Listed]:
        """The files of a content.

        Raises:
            NotThereError: the index has none.
        """
        files = await self.read(lambda index: index.files_with(content))
        if not files:
            raise NotThereError(f"no picture {content[:12]}… in the index")
        return files

    async def open_content(self, content: str) -> tuple[Path, int]:
        """A file that has a content, by its path and open for reading; see `Originals`. To be closed by the caller.

        Raises:
            NotThereError: the index has none.
            GoneError: the disk has none any more.
        """
        files = await self.files_with(content)
        return await asyncio.to_thread(self._open, files, content)

    async def thumbnail(self, content: str, side_px: int) -> bytes:
        """A small JPEG of a content.

        Raises:
            NotThereError: the index has none.
            GoneError: the disk has none any more.
            ImageError: it cannot be decoded any more.
        """
        draw = self.now.decoders.thumbnail
        try:
            return await self._with_content(self._drawing, content, lambda found: draw(found, side_px))
        except FileNotFoundError:  # another encoder took over, and its processes with it
            raise BusyError(1) from None

    # ------------------------------------------------------------------------------------------------- inside

    async def _search(
        self, now: _Running, query: schemas.Query, uploads: Sequence[Upload], patient: bool
    ) -> schemas.Answer:
        assert query.parts
        watch = Stopwatch()
        embedding = await self._query_embedding(now, query.parts, uploads, patient, watch)
        condition = await self.condition(query.where, query.root)
        k = query.k * RERANKED if query.rerank else query.k
        hits, searched = await self._read(
            now,
            lambda index: _look_up(index, embedding, k, condition, query.min_score, query.min_confidence),
            condition,
        )
        watch.lap("search")
        if query.rerank and hits:
            hits = (await self._reranked(now, query.parts[0], hits, uploads, patient))[: query.k]
            watch.lap("rerank")
        for step, ms in watch.laps_ms.items():
            self.metrics.steps.labels(step).observe(ms / 1e3)
        return schemas.Answer(hits=[_hit(hit) for hit in hits], searched=searched, timings_ms=watch.laps_ms)

    async def _embed(self, now: _Running, uploads: Sequence[Upload]) -> tuple[EncoderSpec, Vectors]:
        found = []
        for upload in uploads:
            async with now.batcher.admit(1, patient=True):
                content = await self._decode(now, await upload(), None)
                found.append((await now.batcher.embed([_pixels(content)]))[0])
        return now.encoder.spec, np.concatenate(found)

    async def _read(
        self, now: _Running, work: Callable[[ImageIndex], Result], condition: Filter | None = None
    ) -> Result:
        pool, waiting, most = self._searching, self._reading, _READING_WAITING
        if condition:
            pool, waiting, most = self._filtering, self._filtering_now, _FILTERED_WAITING
        if len(waiting) >= most:
            raise BusyError(1)
        task = asyncio.get_running_loop().run_in_executor(pool, work, now.index)
        waiting.add(task)
        task.add_done_callback(waiting.discard)  # also where nobody waits for it any more
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def _query_embedding(
        self,
        now: _Running,
        parts: Sequence[schemas.QueryPart],
        uploads: Sequence[Upload],
        patient: bool,
        watch: Stopwatch,
    ) -> npt.NDArray[np.float32]:
        """[D]. What is indexed and not cropped needs no encoder."""
        stored = {
            number: await self._stored(now, part)
            for number, part in enumerate(parts)
            if part.upload is None and part.crop is None
        }
        fresh = [(number, part) for number, part in enumerate(parts) if number not in stored]
        if fresh:
            async with now.batcher.admit(len(fresh), patient=patient):
                contents = await asyncio.gather(*(self._content(now, part, uploads) for _, part in fresh))
                watch.lap("decode")
                embeddings, waited_s = await now.batcher.embed([_pixels(content) for content in contents])
            watch.lap("embed")
            watch.laps_ms["wait"] = waited_s * 1e3
            watch.laps_ms["embed"] -= waited_s * 1e3
            stored |= zip((number for number, _ in fresh), embeddings, strict=True)
        return weighted_sum([part.weight for part in parts], [stored[number] for number in range(len(parts))])

    async def _reranked(
        self, now: _Running, part: schemas.QueryPart, hits: Sequence[Hit], uploads: Sequence[Upload], patient: bool
    ) -> list[Hit]:
        check_patches(now.encoder)
        async with now.batcher.admit(1, patient=patient):
            query = _pixels(await self._content(now, part, uploads))
            pixels = await asyncio.gather(*(self._pixels_or_none(now, hit) for hit in hits))
            reasons = await now.batcher.alone(lambda: explain_pixels(now.encoder, query, pixels))
        return order_by_parts(hits, reasons)

    async def _why(self, now: _Running, request: schemas.WhyRequest, uploads: Sequence[Upload]) -> schemas.Why:
        check_patches(now.encoder)
        async with now.batcher.admit(2):
            query = await self._content(now, request.query, uploads)
            hit = await self._decode_indexed(now, request.hit, None)
            (reason,) = await now.batcher.alone(lambda: explain_pixels(now.encoder, _pixels(query), [_pixels(hit)]))
        assert reason is not None
        spec = now.encoder.spec
        return schemas.Why(
            score=reason.score,
            query=_seen(query, reason, spec, request.query.crop, of_query=True),
            hit=_seen(hit, reason, spec, None, of_query=False),
        )

    async def _stored(self, now: _Running, part: schemas.QueryPart) -> npt.NDArray[np.float32]:
        def look(index: ImageIndex) -> npt.NDArray[np.float32] | None:
            return index.embedding_of(_absolute(part.path)) if part.id is None else index.embedding_of_content(part.id)

        found = await self._read(now, look)
        if found is None:
            raise NotThereError(f"{part.id or part.path} is not in the index")
        return found

    async def _content(self, now: _Running, part: schemas.QueryPart, uploads: Sequence[Upload]) -> Content:
        """The picture of a part, decoded. A path is only looked up: no file is read because a request names it."""
        if part.upload is not None:
            return await self._decode(now, await uploads[part.upload](), part.crop)
        content = part.id
        if content is None:
            listed = await self._read(now, lambda index: index.content_of(_absolute(part.path)))
            if listed is None:
                raise NotThereError(f"{part.path} is not in the index")
            content = listed
        return await self._decode_indexed(now, content, part.crop)

    async def _decode(self, now: _Running, content: bytes, crop: Crop | None) -> Content:
        return await asyncio.get_running_loop().run_in_executor(self._decoding, now.decoders.decode, content, crop)

    async def _folder(self, shown: str) -> Path:
        """The folder of a name. An indexed one whose name is not UTF-8 can only be named as it is shown."""
        known = await self.read(lambda index: index.roots()) if "\ufffd" in shown else []
        return next((one for one in known if readable(one) == shown), Path(shown))

    async def _decode_indexed(self, now: _Running, content: str, crop: Crop | None) -> Content:
        return await self._with_content(self._decoding, content, lambda found: now.decoders.decode(found, crop))

    async def _pixels_or_none(self, now: _Running, hit: Hit) -> Pixels | None:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._decoding, now.decoders.read, hit.path)
        except (ImageError, FileNotFoundError):
            return None
        return _pixels(found) if found.sha256.hex() == hit.content else None

    async def _with_content(self, pool: ThreadPoolExecutor, content: str, work: Callable[[bytes], Result]) -> Result:
        """Do something, in a thread, with the bytes of a file that is as it was indexed; see `Originals`."""
        files = await self.files_with(content)

        def read() -> Result:
            with os.fdopen(self._open(files, content)[1], "rb") as file:
                found = file.read(files[0].stamp.size)  # bounded also where it grows
            return work(found)

        return await asyncio.get_running_loop().run_in_executor(pool, read)

    def _open(self, files: Sequence[Listed], content: str) -> tuple[Path, int]:
        for file in files:
            path = Path(file.root, file.path)
            with _gone_or_busy():
                descriptor = self._originals.open(path, file.stamp, content)
                if descriptor is not None:
                    return path, descriptor
        raise GoneError(f"the picture {content[:12]}… is gone or changed since it was indexed", command="mimco index")

    @contextlib.contextmanager
    def _one_of_few(self) -> Iterator[None]:
        if self._bulk >= _BULK:
            raise self.now.batcher.busy()
        self._bulk += 1
        try:
            yield
        finally:
            self._bulk -= 1

    async def _with_current(self, work: Callable[[_Running], Awaitable[Result]]) -> Result:
        """Do it with the index of now; where another encoder has made that meanwhile, with that one."""
        now = self.now
        try:
            return await work(now)
        except EncoderMismatchError:
            async with self._switching:
                if self._now is now:
                    await self._switch()
        except RetiredError:  # another request has switched
            pass
        return await work(self.now)

    async def _switch(self) -> None:
        new = await asyncio.to_thread(self._load)
        new.batcher.start()
        old, self._now = self.now, new
        logger.warning("the index was made anew by encoder %s, which answers from now on", new.index.fingerprint[:12])
        task = asyncio.create_task(self._retire(old))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(self, old: _Running) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(_GRACE_S)  # for thumbnails, which nobody admits
            while old.batcher.admitted:
                await asyncio.sleep(0.1)
        await _close(old)

    def _load(self) -> _Running:
        settings = self.settings
        # The encoder that was asked for was for the index of the start; one that is made anew names its own.
        first = settings.encoder if self._now is None else None
        bundle = first or recorded_encoder(self.path) or self.workspace_encoder
        encoder = load_encoder(bundle, settings.device, strict=settings.strict)
        index = ImageIndex.open(self.path, encoder.spec.fingerprint)
        index.condition_limit_s = _CONDITION_S
        batcher = Batcher(
            encoder.embed,
            time_encoder(encoder.embed, encoder.spec.image_size_px),
            window_s=settings.window_ms / 1e3,
            room=settings.queue,
            on_batch=self.metrics.batches.observe,
        )
        self.metrics.room.set(batcher.room)
        decoders = DecodePool(encoder.spec, settings.decode)
        decoders.start(available_cpus())
        return _Running(index, encoder, bundle, decoders, batcher)


async def _close(running: _Running) -> None:
    await running.batcher.stop()
    await asyncio.to_thread(running.decoders.close)
    running.index.close()


def _absolute(path: str | None) -> Path:
    found = Path(path or "")
    if not found.is_absolute():
        raise NotThereError(f"{path!r} is no absolute path")
    return found


def _look_up(
    index: ImageIndex,
    embedding: npt.NDArray[np.float32],
    k: int,
    condition: Filter,
    min_score: float,
    min_confidence: float,
) -> tuple[list[Hit], int]:
    count = index.picture_count()
    hits = index.search(embedding, k, condition, min_score=min_score) if count else []
    return [hit for hit in hits if hit.confidence is None or hit.confidence >= min_confidence], count


def _pixels(content: Content) -> Pixels:
    assert content.pixels is not None  # nobody said that it was known
    return content.pixels


def _hit(hit: Hit) -> schemas.Hit:
    return schemas.Hit(
        id=hit.content,
        path=readable(hit.path),
        score=hit.score,
        expected_by_chance=hit.expected_by_chance,
        confidence=hit.confidence,
        confidence_word=in_words(hit.confidence),
    )


@contextlib.contextmanager
def _gone_or_busy() -> Iterator[None]:
    """Go on where a file cannot be opened, but where it is this process that has too many open."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise BusyError(1) from error


def _seen(
    content: Content, reason: Reason, spec: EncoderSpec, crop: Crop | None, *, of_query: bool
) -> schemas.SeenPart:
    facts = content.facts
    box = seen_box(facts.width_px or 1, facts.height_px or 1, spec.crop_share, spec.crop_mode, crop)
    heat = reason.query_heat if of_query else reason.hit_heat
    return schemas.SeenPart(box=box, heat=np.round(heat.astype(np.float64), 4).tolist())
