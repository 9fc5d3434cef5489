"""What looks at the whole index: status, lists, duplicates and the map, as the service answers them.

Duplicates and the map take seconds over large collections: computed once for each state of the index, by one request
while others wait for the same.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mimco_deploy.errors import ConfigError
from mimco_deploy.serving.catalog import Listed
from mimco_deploy.serving.filters import columns_with
from mimco_deploy.serving.generations import writing_process
from mimco_deploy.serving.http import schemas
from mimco_deploy.serving.http.batching import BusyError
from mimco_deploy.serving.http.service import Service
from mimco_deploy.serving.inspect import status_of
from mimco_deploy.serving.scan import readable

_WAITING, _RETRY_AFTER_S = 4, 5
"""Computations that have not ended, one of which runs, on all cores; and when to come again."""
_KEPT = 8


class Views:
    """Lists and summaries of one service's index."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._computed: OrderedDict[tuple[Any, ...], asyncio.Task[Any]] = OrderedDict()
        self._running: set[asyncio.Task[Any]] = set()
        self._one = asyncio.Semaphore(1)

    async def status(self) -> schemas.IndexStatus:
        """What the index holds."""
        service = self._service
        found, (_, revision, _) = await service.read(lambda index: (status_of(index.path), index.state()))
        return schemas.IndexStatus(
            fingerprint=found.fingerprint,
            embedding_dim=found.embedding_dim,
            generation=found.generation,
            revision=revision,
            files=found.counts.files,
            contents=found.counts.contents,
            problems=found.counts.problems,
            bytes=found.bytes,
            roots=[
                schemas.Folder(
                    path=readable(root.path), reachable=root.reachable, files=root.files, problems=root.problems
                )
                for root in found.roots
            ],
            search={"kind": found.search.kind, "reason": found.search.reason, "recall": found.search.recall},
            writer=writing_process(service.path),
            patches=bool(service.now.encoder.spec.patch_grid) and hasattr(service.now.encoder, "embed_with_patches"),
            columns=await asyncio.to_thread(columns_with, service.settings.table),
            max_upload_bytes=service.settings.max_upload_mib * 2**20,
        )

    async def pictures(self, where: str, root: str | None, limit: int, after: str | None) -> schemas.PicturePage:
        """Some files, by folder and name.

        Raises:
            ConfigError: the condition, or `after`, cannot be used.
        """
        service = self._service
        condition = await service.condition(where, root)
        place = _place(after)
        found = await service.read(lambda index: index.page(condition, place, limit + 1), condition)
        shown = found[:limit]
        following = _cursor(shown[-1]) if len(found) > limit else None
        return schemas.PicturePage(pictures=[picture_of([file]) for file in shown], next=following)

    async def problems(self, limit: int, after: int) -> schemas.ProblemPage:
        """Some of the files that could not be indexed."""
        found = await self._service.read(lambda index: index.problems())
        shown = [
            schemas.Problem(path=readable(one.path), problem=one.problem, found=one.found)
            for one in found[after : after + limit]
        ]
        end = after + limit
        return schemas.ProblemPage(problems=shown, total=len(found), next=str(end) if end < len(found) else None)

    async def duplicates(self, min_score: float, root: str | None, limit: int) -> schemas.Duplicates:
        """Groups of copies and near duplicates."""
        from mimco_deploy.serving.duplicates import Group, Member, find_duplicates

        min_score = round(min_score, 3)  # so that what is nearly the same is computed once
        condition = await self._service.condition("", root)
        below = condition.root
        known = await self._service.read(lambda index: index.roots())
        if below is not None and not any(below.is_relative_to(one) or one.is_relative_to(below) for one in known):
            raise ConfigError(f"no indexed folder lies in {root}", expected="a folder that the index status lists")

        if not await self._service.read(lambda index: index.page(condition, _place(None), 1), condition):
            return schemas.Duplicates(groups=[], total=0)

        def compute() -> list[Group]:
            return find_duplicates(self._service.path, min_score, below)

        def file(member: Member) -> schemas.DuplicateFile:
            return schemas.DuplicateFile(
                id=member.content, path=readable(member.path), kind=member.kind, score=member.score
            )

        groups: list[Group] = await self._once(("duplicates", min_score, root), compute)
        return schemas.Duplicates(
            groups=[
                schemas.DuplicateGroup(files=[file(member) for member in (group.kept, *group.others)])
                for group in groups[:limit]
            ],
            total=len(groups),
        )

    async def map(self) -> bytes:
        """`schemas.MapPoints`, as JSON: with a hundred thousand points it is made once."""
        from mimco_deploy.serving.gallery import read_gallery
        from mimco_deploy.serving.map import place_contents

        def compute() -> bytes:
            if not self._service.now.index.picture_count():
                return schemas.MapPoints(method="pca", ids=[], x=[], y=[]).model_dump_json().encode()
            contents, places, method = place_contents(read_gallery(self._service.path))
            rounded = np.round(places.astype(np.float64), 5)
            points = schemas.MapPoints(
                method=method, ids=[one.hex() for one in contents], x=rounded[:, 0].tolist(), y=rounded[:, 1].tolist()
            )
            return points.model_dump_json().encode()

        found: bytes = await self._once(("map",), compute)
        return found

    async def _once(self, what: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        state = await self._service.read(lambda index: index.state())
        key = (*what, state)
        task = self._computed.get(key)
        if task is None:
            if len(self._running) >= _WAITING:
                raise BusyError(_RETRY_AFTER_S)
            task = self._computed[key] = asyncio.create_task(self._compute(compute))
            self._running.add(task)
            task.add_done_callback(self._running.discard)  # also where nobody waits for it any more
            while len(self._computed) > _KEPT:
                self._computed.popitem(last=False)
        self._computed.move_to_end(key)
        try:
            return await asyncio.shield(task)
        except Exception:
            self._computed.pop(key, None)
            raise

    async def _compute(self, compute: Callable[[], Any]) -> Any:
        async with self._one:  # each takes all cores
            return await asyncio.to_thread(compute)


def picture_of(files: list[Listed]) -> schemas.Picture:
    """What is known of one content.

    Args:
        files: of it, at least one.
    """
    first = files[0]
    modified = datetime.fromtimestamp(first.stamp.mtime_ns / 1e9, UTC)
    return schemas.Picture(
        id=first.sha256.hex(),
        paths=[readable(Path(file.root, file.path)) for file in files],
        bytes=first.stamp.size,
        modified=modified.isoformat(timespec="seconds"),
        width_px=first.facts.width_px,
        height_px=first.facts.height_px,
        taken=first.facts.taken,
        camera=first.facts.camera,
    )


def _cursor(file: Listed) -> str:
    place = b"\0".join(os.fsencode(part) for part in (file.root, file.path))
    return base64.urlsafe_b64encode(place).decode()


def _place(cursor: str | None) -> tuple[bytes, bytes]:
    if cursor is None:
        return b"", b""
    try:
        root, path = base64.urlsafe_b64decode(cursor.encode()).split(b"\0")
    except (binascii.Error, ValueError):
        raise ConfigError(f"after = {cursor[:50]!r}", expected="what `next` of the page before said") from None
    return root, path
