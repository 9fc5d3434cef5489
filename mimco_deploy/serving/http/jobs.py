"""Runs of the indexer that the service starts: one at a time, watched and cancelled."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mimco_deploy.errors import MimcoError
from mimco_deploy.serving.http import schemas
from mimco_deploy.serving.http.problems import ConflictError, NotThereError
from mimco_deploy.serving.http.service import Service
from mimco_deploy.serving.scan import readable
from mimco_deploy.serving.update import Progress, UpdateReport, update_index

logger = logging.getLogger(__name__)

_REMEMBERED = 20
_BETWEEN_S = 0.25
_SIGN_OF_LIFE_S = 10.0


class _Cancelled(Exception):  # no error: it was asked for
    pass


@dataclass
class _Run:
    job: schemas.Job
    cancel: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of both: the indexer runs in a thread of its own."""
    task: asyncio.Task[None] | None = None


class Jobs:
    """The runs of one service.

    Args:
        service: whose index is brought up to date, with its encoder.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._runs: OrderedDict[str, _Run] = OrderedDict()

    async def start(self, request: schemas.JobRequest) -> schemas.Job:
        """Begin a run over folders that the index knows: no request can name another one.

        Raises:
            ConflictError: one is running, or the folder is not indexed.
        """
        known = await self._service.read(lambda index: index.roots())
        roots = [root for root in known if readable(root) == request.root]
        if request.root is not None and not roots:
            raise ConflictError(
                f"{request.root} is not an indexed folder",
                expected="one of those that the index status lists",
                command="mimco index DIR",
            )
        running = next((run.job.id for run in self._runs.values() if run.job.state in schemas.UNDER_WAY), None)
        if running is not None:
            raise ConflictError(f"the job {running} is running", expected="one at a time")
        job = schemas.Job(
            id=secrets.token_hex(8), state="running", done=0, total=0, images_per_s=0, waiting=0, doing="walk",
            started=datetime.now(UTC).isoformat(timespec="seconds"), report=None, error=None,
        )  # fmt: skip
        run = self._runs[job.id] = _Run(job)
        while len(self._runs) > _REMEMBERED:
            self._runs.popitem(last=False)
        run.task = asyncio.create_task(self._work(run, roots, request.retry_problems))
        return job

    def all(self) -> list[schemas.Job]:
        """Newest first."""
        return [run.job for run in reversed(self._runs.values())]

    def get(self, job: str) -> schemas.Job:
        """One run.

        Raises:
            NotThereError: there is none of that id.
        """
        return self._run(job).job

    def cancel(self, job: str) -> schemas.Job:
        """Ask a run to stop after its batch; what it has committed stays.

        Raises:
            NotThereError: there is none of that id.
        """
        run = self._run(job)
        with run.lock:
            run.cancel = True
            if run.job.state == "running":
                run.job = run.job.model_copy(update={"state": "cancelling"})
        return run.job

    async def events(self, job: str, stopping: Callable[[], bool]) -> AsyncIterator[schemas.Job | None]:
        """The states of a run, until it ends or the service does; None now and then, so that a dead line shows.

        Raises:
            NotThereError: there is none of that id.
        """
        run = self._run(job)
        told, quiet_s = run.job, 0.0
        yield told
        while told.state in schemas.UNDER_WAY and not stopping():
            await asyncio.sleep(_BETWEEN_S)
            quiet_s += _BETWEEN_S
            if run.job is not told:
                told, quiet_s = run.job, 0.0
                yield told
            elif quiet_s >= _SIGN_OF_LIFE_S:
                quiet_s = 0.0
                yield None

    async def stop(self) -> None:
        """Cancel what runs, and wait for it."""
        for run in self._runs.values():
            run.cancel = True
        await asyncio.gather(*(run.task for run in self._runs.values() if run.task is not None))

    def _run(self, job: str) -> _Run:
        run = self._runs.get(job)
        if run is None:
            raise NotThereError(f"no job {job!r}")
        return run

    async def _work(self, run: _Run, roots: list[Path], retry_problems: bool) -> None:
        now, service = self._service.now, self._service

        def tell(progress: Progress) -> None:
            now = {
                "done": progress.done,
                "total": progress.total,
                "images_per_s": round(progress.images_per_s, 2),
                "waiting": round(progress.waiting, 3),
                "doing": progress.doing,
            }
            with run.lock:
                if run.cancel:
                    raise _Cancelled
                run.job = run.job.model_copy(update=now)

        def update() -> UpdateReport:
            return update_index(
                service.path,
                roots,
                now.encoder,
                retry_problems=retry_problems,
                limits=service.settings.decode,
                encoder_path=None if now.bundle == service.workspace_encoder else now.bundle,
                on_progress=tell,
            )

        end: dict[str, object]
        try:
            report = await asyncio.to_thread(update)
        except _Cancelled:
            end = {"state": "cancelled"}
        except MimcoError as error:
            end = {"state": "failed", "error": str(error)}
        except Exception:
            logger.exception("the job %s failed", run.job.id)
            end = {"state": "failed", "error": "the indexer failed; the log of the service says how"}
        else:
            names = ("added", "changed", "removed", "unchanged", "embedded")
            told = {name: int(getattr(report, name)) for name in names}
            told |= {"problems": len(report.problems), "unreachable": len(report.unreachable)}
            end = {"state": "done", "report": told}
        run.job = run.job.model_copy(update=end)
