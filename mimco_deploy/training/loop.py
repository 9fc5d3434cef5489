"""The one training loop, for every method: fetch, forward, backward, step, log, checkpoint.

It knows nothing of any paper. A method is an `nn.Module` with an `encoder`, a `start_step(progress)` and a `forward`
that takes a batch's tensors and returns the `loss`, with whatever else is worth logging.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimco_deploy.errors import CheckpointError, TrainingInterrupted
from mimco_deploy.training.augment import to_input
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.checkpoint import Checkpoint, load_strictly, save_checkpoint, stage_name
from mimco_deploy.training.config import BackboneConfig, RunConfig, Stage1Config, Stage2Config
from mimco_deploy.training.corpus import Corpus
from mimco_deploy.training.data import Batches, MakeViews, StepSampler, load_batches, seed_for
from mimco_deploy.training.distributed import (
    any_process,
    is_main,
    mean_of_all,
    rank,
    synchronise_batch_norm,
    world_size,
)
from mimco_deploy.training.monitor import RunLog, check_alive, check_finite
from mimco_deploy.training.optim import build_optimizer, clip_gradients
from mimco_deploy.training.schedules import lr_schedule

_MODEL_STREAM = 1  # keeps the model's random numbers apart from the views', which use (seed, position)


class Method(Protocol):
    """What the loop asks of a method, which is an `nn.Module` as well."""

    encoder: Backbone

    def start_step(self, progress: float) -> None:
        """Called once before each optimiser step, with the share of the run done."""


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
    resume: Checkpoint | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> None:
    """Train to the end, or until asked to stop.

    Args:
        method: on its device; satisfies `Method`.
        config: of the stage.
        corpus: pictures.
        make_views: picture → tensors of one sample.
        folder: of the run; gets `last/`, `log.jsonl` and TensorBoard events.
        resume: checkpoint of the same run to go on from.
        on_step: called at every logged step in the main process.

    Raises:
        TrainingError: NaN or collapse; the last good checkpoint stays.
        TrainingInterrupted: SIGINT or SIGTERM came; the checkpoint is written.
        CheckpointError: `resume` is of another corpus or does not fit.
    """
    run = config.run
    device = next(method.parameters()).device
    step = resume.step if resume else 0
    sampler = StepSampler(len(corpus), run, step)
    optimizer = build_optimizer(method, config.optim)
    if resume is not None:
        _restore(resume, method, optimizer, corpus)
    schedule = lr_schedule(
        optimizer,
        config.optim,
        steps_per_epoch=sampler.steps_per_epoch,
        epochs=run.epochs,
        global_batch_size=run.global_batch_size,
    )
    parallel = _parallel(method)
    meter = _Meter(run.global_batch_size)

    def save() -> None:
        meter.check()
        check_finite(step - 1, method)
        if is_main():
            state = {"step": step, "total_steps": sampler.total_steps, "corpus": corpus.fingerprint}
            save_checkpoint(folder / "last", method, optimizer, config, **state)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_requests())
        batches = stack.enter_context(
            contextlib.closing(load_batches(corpus, make_views, sampler, run.seed, config.data.workers))
        )
        log = stack.enter_context(contextlib.closing(RunLog(folder, step))) if is_main() else None
        parallel.train()
        while step < sampler.total_steps:
            cast(Method, method).start_step(step / sampler.total_steps)
            schedule.step_update(step)
            lr = optimizer.param_groups[0]["lr"]
            metrics = _accumulate_gradients(parallel, batches, corpus, config, step, meter)
            clip_gradients(method, config.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            meter.add(step, metrics)
            step += 1

            stopping = any_process(stop.is_set(), device)
            done = step == sampler.total_steps
            if step % run.log_every_steps == 0 or done or stopping:
                row = meter.flush()
                if log is not None:
                    log.write(step - 1, {**row, "lr": lr, "images_per_s": meter.images_per_s, "waiting": meter.share})
                    on_step(StepReport(step, sampler.total_steps, row, meter.images_per_s, meter.share))
            if step % run.checkpoint_every_steps == 0 or done or stopping:
                save()
            if stopping and not done:
                raise TrainingInterrupted(
                    f"stopped after step {step} of {sampler.total_steps}; the checkpoint is written",
                    command=f"mimco train {stage_name(config)} --resume",
                )


def _accumulate_gradients(
    parallel: nn.Module,
    batches: Batches,
    corpus: Corpus,
    config: Stage1Config | Stage2Config,
    step: int,
    meter: _Meter,
) -> dict[str, Tensor]:
    """Forward and backward over a step's micro-batches; their mean metrics."""
    run, backbone = config.run, config.backbone
    device = next(parallel.parameters()).device
    means: dict[str, Tensor] = {}
    for micro in range(run.accumulate):
        with meter.waiting():
            views, bad = next(batches)
        corpus.report_bad(bad)
        torch.manual_seed(seed_for(run.seed, _MODEL_STREAM, step, micro, rank()))
        synchronise = micro == run.accumulate - 1
        with _no_sync(parallel, unless=synchronise), _autocast(device, run.precision):
            metrics: dict[str, Tensor] = parallel(*(_to_device(view, device, backbone) for view in views))
            (metrics["loss"] / run.accumulate).backward()  # type: ignore[no-untyped-call]
        for name, value in metrics.items():
            means[name] = means.get(name, 0.0) + value.detach() / run.accumulate
    return means


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in the device's own units, so that autocast gains time."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tell = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch from 2.11 on
    capabilities: dict[str, bool] = tell()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _restore(resume: Checkpoint, method: nn.Module, optimizer: torch.optim.Optimizer, corpus: Corpus) -> None:
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


def _parallel(method: nn.Module) -> nn.Module:
    if world_size() == 1:
        return method
    device = next(method.parameters()).device
    method = synchronise_batch_norm(method, device)
    with warnings.catch_warnings():
        # The name that replaces it is not in torch 2.11. Every process comes to the same buffers by itself.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(method, broadcast_buffers=False)


def _no_sync(parallel: nn.Module, *, unless: bool) -> AbstractContextManager[None]:
    if isinstance(parallel, DistributedDataParallel) and not unless:
        return cast("AbstractContextManager[None]", parallel.no_sync())
    return contextlib.nullcontext()


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    enabled = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _to_device(view: Tensor, device: torch.device, backbone: BackboneConfig) -> Tensor:
    view = view.to(device, non_blocking=True)
    return to_input(view, backbone) if view.dtype == torch.uint8 else view


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
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

    def __init__(self, images_per_step: int) -> None:
        self._images = images_per_step
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        self._row: dict[str, float] = {}
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
            self._row = dict(zip(names, values, strict=True))
            check_alive(step, self._row)
        self._pending.clear()

    def flush(self) -> dict[str, float]:
        """Metrics of the last step, after checking all; updates the rates."""
        self.check()
        elapsed = time.perf_counter() - self._since
        self.images_per_s = self._steps * self._images / elapsed
        self.share = self._waited / elapsed
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0
        return self._row


def fit_batch(run: RunConfig, pictures: int) -> int:
    """The largest global batch that the corpus fills: the configured one, or a power of two below it."""
    if run.global_batch_size <= pictures:
        return run.global_batch_size
    return 1 << (pictures.bit_length() - 1)
