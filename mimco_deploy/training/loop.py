"""The one training loop, for every method: fetch, step, log, checkpoint.

It knows nothing of any paper. A method is an `nn.Module` with an `encoder`, a `start_step(progress)` and a `forward`
that takes a batch's tensors and returns the `loss`, with whatever else is worth logging.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mimco_deploy.errors import CheckpointError, TrainingError, TrainingInterrupted
from mimco_deploy.training.checkpoint import Checkpoint, load_strictly, save_checkpoint, stage_name
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.corpus import Corpus
from mimco_deploy.training.data import MakeViews, StepSampler, Views, load_batches
from mimco_deploy.training.distributed import any_process, is_main, mean_of_all, world_size
from mimco_deploy.training.monitor import COLLAPSED, RunLog, check_alive, check_finite, collapse_limit, first_spread
from mimco_deploy.training.step import Stepper
from mimco_deploy.training.watch import Watch

REPORT_EVERY_S = 30.0
"""Seconds between two reports that only draw the log again; each checkpoint brings one as well."""
REPORT_SHARE = 0.02
"""Most of the time that these reports take: the log of a long run takes seconds to read."""


@dataclass(frozen=True)
class StepReport:
    """What a progress bar shows."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    """Loss parts and the like, of the last logged step."""
    images_per_s: float
    waiting: float
    """Share of the time spent waiting for data since the last log, in [0, 1]."""


def train(
    method: nn.Module,
    config: Stage1Config | Stage2Config,
    corpus: Corpus,
    make_views: MakeViews,
    folder: Path,
    *,
    asked: Stage1Config | Stage2Config | None = None,
    resume: Checkpoint | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> None:
    """Train to the end, or until asked to stop.

    Args:
        method: on its device; satisfies `Method`.
        config: of the stage, its batch fitted to the corpus.
        corpus: pictures.
        make_views: picture → tensors of one sample.
        folder: of the run; gets `last/`, `log.jsonl`, `report.html` and TensorBoard events.
        asked: the config as it was asked for, which the checkpoint keeps; by default the same.
        resume: checkpoint of the same run to go on from.
        on_step: called at every logged step in the main process.

    Raises:
        TrainingError: NaN or collapse; the last good checkpoint stays.
        TrainingInterrupted: SIGINT or SIGTERM came; the checkpoint is written.
        CheckpointError: `resume` is of another corpus or does not fit.
    """
    run = config.run
    step = resume.step if resume else 0
    sampler = StepSampler(len(corpus), run, step)
    restore = functools.partial(_restore, resume, method, corpus)
    stepper = Stepper(method, config, sampler.steps_per_epoch, restore)
    meter = _Meter(run.global_batch_size, collapse_limit(first_spread(folder)) if resume else COLLAPSED)

    def next_views() -> Views:
        with meter.waiting():
            views, bad = next(batches)
        corpus.report_bad(bad)
        return views

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        batches = stack.enter_context(
            contextlib.closing(load_batches(corpus, make_views, sampler, run.seed, config.data.workers))
        )
        watch = Watch(method, config, corpus, make_views, folder, step) if is_main() else None
        records = _Records(stepper, asked or config, corpus, folder, step, meter, watch, on_step)
        stack.enter_context(contextlib.closing(records))
        while step < sampler.total_steps:
            meter.add(step, stepper.take(step, next_views))
            step += 1
            done = step == sampler.total_steps
            # The first step as well: what it shows is what later ones are compared with.
            to_log, to_save = step == 1 or step % run.log_every_steps == 0, step % run.checkpoint_every_steps == 0
            stopping = asked_to_stop(stop, stepper.device, due=to_log or to_save or done)
            if to_log or done or stopping:
                records.log(step)
            if to_save or done or stopping:
                records.save(step)
            if stopping and not done:
                raise TrainingInterrupted(
                    f"stopped after step {step} of {sampler.total_steps}; the checkpoint is written",
                    command=f"mimco train {stage_name(config)} --resume",
                )


class _Records:
    """What a run leaves: log, checkpoints and report, in the main process; the others only check themselves.

    Args:
        stepper: the method and its optimiser.
        config: as the checkpoint keeps it.
        corpus: the pictures.
        folder: of the run.
        step: from which it goes on.
        meter: of the run.
        watch: writes the report; None in other processes.
        on_step: called at every logged step.
    """

    def __init__(
        self,
        stepper: Stepper,
        config: Stage1Config | Stage2Config,
        corpus: Corpus,
        folder: Path,
        step: int,
        meter: _Meter,
        watch: Watch | None,
        on_step: Callable[[StepReport], None],
    ) -> None:
        self._stepper, self._config, self._corpus, self._folder = stepper, config, corpus, folder
        self._meter, self._watch, self._on_step = meter, watch, on_step
        self._log = RunLog(folder, step) if watch is not None else None
        self._report_due = -math.inf

    def log(self, step: int) -> None:
        """Write a row for the steps done, and now and then the report.

        Raises:
            TrainingError: a step was NaN or collapsed.
        """
        with self._alarms():
            row = self._meter.flush()
        if self._log is None or self._watch is None:
            return
        meter, total = self._meter, self._stepper.total_steps
        rates = {"lr": self._stepper.lr, "images_per_s": meter.images_per_s, "waiting": meter.share}
        self._log.write(step - 1, {**row, **rates})
        self._on_step(StepReport(step, total, row, meter.images_per_s, meter.share))
        if (start := time.monotonic()) > self._report_due:
            self._watch.update(step, total, look=not self._watch.has_looked)
            now = time.monotonic()
            self._report_due = now + max(REPORT_EVERY_S, (now - start) / REPORT_SHARE)

    def save(self, step: int) -> None:
        """Write the checkpoint, and the report with a look at the probe's pictures.

        Raises:
            TrainingError: a step was NaN or collapsed, or a weight is no number; the checkpoint before it stays.
        """
        method, total = self._stepper.method, self._stepper.total_steps
        with self._alarms():
            self._meter.check()
            check_finite(step - 1, method)
        if self._watch is not None:
            state = {"step": step, "total_steps": total, "corpus": self._corpus.fingerprint}
            save_checkpoint(self._folder / "last", method, self._stepper.optimizer, self._config, **state)
            self._watch.update(step, total, look=True)

    def close(self) -> None:
        """Flush the log."""
        if self._log is not None:
            self._log.close()

    @contextlib.contextmanager
    def _alarms(self) -> Iterator[None]:
        """Keep the batch of a step that went wrong, and say so in the report."""
        try:
            yield
        except TrainingError as error:
            if self._watch is None or self._log is None:
                raise
            for step, row in self._meter.checked:  # what led to it
                self._log.write(step, {name: value for name, value in row.items() if math.isfinite(value)})
            raise self._watch.alarm(error) from error


def asked_to_stop(stop: threading.Event, device: torch.device, *, due: bool) -> bool:
    """Alone at once; several processes ask each other only where they wait for the device anyhow."""
    if world_size() == 1:
        return stop.is_set()
    return due and any_process(stop.is_set(), device)


def _restore(resume: Checkpoint | None, method: nn.Module, corpus: Corpus, optimizer: torch.optim.Optimizer) -> None:
    if resume is None:
        return
    if resume.corpus != corpus.fingerprint:
        raise CheckpointError(
            f"{resume.path} was trained on another corpus than these {len(corpus)} pictures",
            expected="the same pictures, to resume exactly",
        )
    load_strictly(method, resume.load_model(), resume.path)
    try:
        optimizer.load_state_dict(resume.load_optimizer())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{resume.path / 'optimizer.pt'}: {error}", expected="a state that fits") from error


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into a flag for the time of the block; a second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """Collects metrics on the device and reads them back only when a row is due: no step waits for the one before."""

    def __init__(self, images_per_step: int, limit: float) -> None:
        self._images, self._limit = images_per_step, limit
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        self.checked: list[tuple[int, dict[str, float]]] = []
        """Steps looked at since the last row of the log, with their metrics."""
        self._waited = 0.0
        self._steps = 0
        self._since = time.perf_counter()
        self.images_per_s = 0.0
        self.share = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, step: int, metrics: dict[str, Tensor]) -> None:
        self._pending.append((step, {name: value.detach() for name, value in metrics.items()}))
        self._steps += 1

    def check(self) -> None:
        """Raise for the first pending step that is NaN or collapsed; before a checkpoint, so that none holds it.

        What is checked and logged is the mean over all processes, so that they stop together.
        """
        if not self._pending:
            return
        names = list(self._pending[0][1])
        table = torch.stack([torch.stack([row[name].float() for name in names]) for _, row in self._pending])
        for (step, _), values in zip(self._pending, mean_of_all(table).tolist(), strict=True):
            row = dict(zip(names, values, strict=True))
            self.checked.append((step, row))
            if step == 0 and "feature_spread" in row:
                self._limit = collapse_limit(row["feature_spread"])
            check_alive(step, row, self._limit)
        self._pending.clear()

    def flush(self) -> dict[str, float]:
        """Metrics of the last step, after checking all; updates the rates."""
        self.check()
        elapsed = time.perf_counter() - self._since
        self.images_per_s = self._steps * self._images / elapsed
        self.share = self._waited / elapsed
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0
        _, row = self.checked[-1]
        self.checked.clear()
        return row
