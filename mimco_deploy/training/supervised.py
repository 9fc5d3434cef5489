"""Training with labels: fine-tuning and the linear probe, epoch by epoch, measured after each.

What comes at a step is a function of the seed, the step and the position in the batch, as in pre-training, so that a
run which was stopped goes on bit for bit. A loop of its own, for it measures after every epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mimco_deploy.atomic import write_bytes
from mimco_deploy.errors import CheckpointError, ConfigError, TrainingError, TrainingInterrupted
from mimco_deploy.training.augment import ToInput
from mimco_deploy.training.backbone import write_attention_out
from mimco_deploy.training.classifier import Classifier, Config, build_classifier
from mimco_deploy.training.config import OptimConfig
from mimco_deploy.training.data import StepSampler, Views, fit_batch, load_batches, seed_for
from mimco_deploy.training.distributed import is_main, mean_of_all, process_group, rank, world_size
from mimco_deploy.training.finetune_config import FinetuneConfig
from mimco_deploy.training.labelled import LabelledCorpus, LabelledViews, Validation, accuracy, load_labelled
from mimco_deploy.training.layer_decay import decayed_groups
from mimco_deploy.training.loop import StepReport, asked_to_stop, stop_requests
from mimco_deploy.training.monitor import check_alive, check_finite
from mimco_deploy.training.report import write_report
from mimco_deploy.training.run_folder import make_way, only_writer
from mimco_deploy.training.schedules import check_warmup, lr_schedule
from mimco_deploy.training.step import check_compiler, compiles, no_sync, parallel, uses_bf16
from mimco_deploy.training.supervised_checkpoint import Progress, SavedRun, kind_of, save_run

logger = logging.getLogger(__name__)

_MODEL_STREAM = 1  # keeps the model's random numbers apart from the views', which use (seed, position)


def train_with_labels(
    config: Config,
    folder: Path,
    *,
    resume: SavedRun | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> None:
    """Train to the end, or until asked to stop.

    Args:
        config: settings; those of the checkpoint where the run is resumed.
        folder: of the run; gets `last/`, `log.jsonl` and `report.html`.
        resume: where to go on from; it holds the encoder too.
        on_step: called at every logged step in the main process.

    Raises:
        TrainingError: NaN; the last good checkpoint stays.
        TrainingInterrupted: SIGINT or SIGTERM came; the checkpoint is written.
        MimcoError: the pictures, the encoder or the settings do not fit each other.
    """
    with process_group() as device, only_writer(folder):
        corpus, validation = load_labelled(config.data, config.val, config.backbone.image_size_px)
        if resume is not None and (resume.progress.corpus, resume.classes) != (corpus.fingerprint, corpus.classes):
            raise CheckpointError(
                f"{resume.path} was trained on another corpus than these {len(corpus)} pictures",
                expected="the same pictures, to resume exactly",
            )
        asked, config = config, fit_run(config, len(corpus))
        torch.manual_seed(config.run.seed)
        method = build_classifier(config, len(corpus.classes), resume).to(device)
        validation.geometry = method.encoder.geometry
        check_compiler(config.run, device)
        make_way(folder, resuming=resume is not None)
        run = _Run(method, config, asked, corpus, validation, folder, resume, on_step)
        try:
            run.go()
        except TrainingError as error:
            run.write_report(alarm=str(error))
            raise


def build_optimizer(method: Classifier, config: Config) -> torch.optim.Optimizer:
    """AdamW over the layers of encoder and head, or SGD over the head; the schedule sets the rates."""
    if isinstance(config, FinetuneConfig):
        optim = config.optim
        groups = decayed_groups(method, optim.layer_decay, optim.weight_decay)
        return torch.optim.AdamW(groups, betas=optim.betas, fused=True)
    sgd = config.optim
    return torch.optim.SGD(method.head.parameters(), momentum=sgd.momentum, weight_decay=sgd.weight_decay)


def schedule_of(config: Config) -> OptimConfig:
    """What the schedule of learning rates reads."""
    optim, least = config.optim, config.optim.min_lr if isinstance(config, FinetuneConfig) else 0.0
    return OptimConfig(
        base_lr=optim.base_lr, weight_decay=0.0, decay="all", warmup_epochs=optim.warmup_epochs, min_lr=least
    )  # weight decay is in the optimiser's groups


def make_views(config: Config) -> LabelledViews:
    """What the settings show of a picture."""
    augment = config.views.rand_augment if isinstance(config, FinetuneConfig) else ""
    return LabelledViews(config.backbone.image_size_px, config.views.min_crop_scale, augment)


def mixes(config: object) -> bool:
    """Whether pictures are mixed with each other, in pairs."""
    return isinstance(config, FinetuneConfig) and bool(config.method.mixup or config.method.cutmix)


def fit_run(config: Config, pictures: int) -> Config:
    """The run with a batch that so many pictures fill, and that can be divided.

    Raises:
        ConfigError: it cannot be divided, or the warm-up leaves nothing.
    """
    run = fit_batch(config.run, pictures)
    check_warmup(schedule_of(config), run.epochs)
    if run != config.run:
        batch, wanted = run.global_batch_size, config.run.global_batch_size
        logger.warning("global batch of %d instead of %d: %d pictures", batch, wanted, pictures)
    micro, rest = divmod(run.global_batch_size, run.accumulate * world_size())
    if rest or micro < 2 or (mixes(config) and micro % 2):
        raise ConfigError(
            f"run.global_batch_size {run.global_batch_size} over {world_size()} processes × {run.accumulate} "
            "micro-batches",
            expected="at least 2 pictures in each, evenly" + ("; pairs of them, to mix" if mixes(config) else ""),
        )
    return dataclasses.replace(config, run=run)


class LabelledStepper:
    """A classifier with its optimiser and schedule, ready to take steps and to be measured.

    Args:
        method: on its device.
        config: of the run.
        steps_per_epoch: optimiser steps in an epoch.
        restore: called with the optimiser before the first step, where a run is resumed.
    """

    def __init__(
        self,
        method: Classifier,
        config: Config,
        steps_per_epoch: int,
        restore: Callable[[torch.optim.Optimizer], None] = lambda _: None,
    ) -> None:
        run = config.run
        self.method, self._config = method, config
        self.device = next(method.parameters()).device
        self.optimizer = build_optimizer(method, config)
        restore(self.optimizer)
        self._schedule = lr_schedule(
            self.optimizer,
            schedule_of(config),
            steps_per_epoch=steps_per_epoch,
            epochs=run.epochs,
            global_batch_size=run.global_batch_size,
        )
        self._to_input = ToInput(config.backbone).to(self.device)
        self._bf16 = uses_bf16(run, method.encoder.width, self.device)
        method.encoder.checkpoint_gradients(run.grad_checkpointing and isinstance(config, FinetuneConfig))
        if self.device.type == "cpu":
            write_attention_out(method)
        if compiles(run, self.device):
            method.encoder.compile()
        self._parallel = parallel(method, self.device)
        self._parallel.train()

    @property
    def head_lr(self) -> float:
        """The learning rate of the head, the highest of all."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def take(self, step: int, next_views: Callable[[], Views]) -> Tensor:
        """One optimiser step; its mean loss, on the device."""
        run = self._config.run
        self._schedule.step_update(step)
        mean = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in range(run.accumulate):
            pixels, labels = (view.to(self.device, non_blocking=True) for view in next_views())
            torch.manual_seed(seed_for(run.seed, _MODEL_STREAM, step, micro, rank()))
            with no_sync(self._parallel, unless=micro == run.accumulate - 1), self._autocast():
                loss = self._parallel(self._to_input(pixels), labels)
                (loss / run.accumulate).backward()
            mean += loss.detach().double() / run.accumulate
        if isinstance(self._config, FinetuneConfig) and self._config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.method.parameters(), self._config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean

    def measure(self, validation: Validation, batch_size: int) -> tuple[float, float]:
        """Top-1 and top-5, over all processes."""
        self._parallel.eval()
        found = accuracy(self._classify, validation, batch_size, self.device)
        self._parallel.train()
        return found

    def _classify(self, pixels: Tensor) -> Tensor:
        with self._autocast():
            return self.method.classify(self._to_input(pixels))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)


class _Run:
    """One run: its model, its pictures and how far it is.

    Args:
        method: on its device.
        config: its batch fitted to the corpus.
        asked: as it was asked for, which the checkpoint keeps.
        corpus: to train on.
        validation: to measure on.
        folder: of the run.
        resume: where it goes on from.
        on_step: called at every logged step.
    """

    def __init__(
        self,
        method: Classifier,
        config: Config,
        asked: Config,
        corpus: LabelledCorpus,
        validation: Validation,
        folder: Path,
        resume: SavedRun | None,
        on_step: Callable[[StepReport], None],
    ) -> None:
        run = config.run
        self._method, self._config, self._asked = method, config, asked
        self._corpus, self._validation, self._folder, self._on_step = corpus, validation, folder, on_step
        first = resume.progress.step if resume else 0
        self._sampler = StepSampler(len(corpus), run, first)
        restore = resume.restore_optimizer if resume is not None else lambda _: None
        self._stepper = LabelledStepper(method, config, self._sampler.steps_per_epoch, restore)
        self._device = self._stepper.device
        self._progress = Progress(
            total_steps=self._sampler.total_steps,
            corpus=corpus.fingerprint,
            licence=method.encoder.licence,
            **method.encoder.geometry._asdict(),
        )
        if resume is not None:
            self._progress = dataclasses.replace(resume.progress, rows=list(resume.progress.rows))
        self._losses = torch.tensor(self._progress.loss_sum, dtype=torch.float64, device=self._device)

    def go(self) -> None:
        """Every step that is left."""
        progress, run, steps_per_epoch = self._progress, self._config.run, self._sampler.steps_per_epoch
        if progress.rows and is_main():
            self._write_log()  # the run may have ended between checkpoint and log
        workers = self._config.data.workers
        batches = load_batches(self._corpus, make_views(self._config), self._sampler, run.seed, workers)
        self._method.check()
        since, waited, begun, started = time.perf_counter(), 0.0, progress.step, time.perf_counter() - progress.seconds

        def next_views() -> Views:
            nonlocal waited
            start = time.perf_counter()
            views, bad = next(batches)
            waited += time.perf_counter() - start
            self._corpus.report_bad(bad)
            return views

        with stop_requests() as stop, contextlib.closing(batches):
            while progress.step < progress.total_steps:
                loss = self._stepper.take(progress.step, next_views)
                self._losses += loss
                progress.step += 1
                done = progress.step == progress.total_steps
                epoch_done = progress.step % steps_per_epoch == 0
                to_log = progress.step % run.log_every_steps == 0
                to_save = progress.step % run.checkpoint_every_steps == 0
                stopping = asked_to_stop(stop, self._device, due=to_log or to_save or epoch_done)
                if to_log or epoch_done:
                    elapsed, count = time.perf_counter() - since, (progress.step - begun) * run.global_batch_size
                    self._report(loss, count / elapsed, waited / elapsed)
                    since, waited, begun = time.perf_counter(), 0.0, progress.step
                progress.seconds = time.perf_counter() - started
                if epoch_done:
                    self._end_epoch(progress.step // steps_per_epoch, started)
                    since = started = time.perf_counter()
                if to_save or epoch_done or stopping:
                    self._save()
                if stopping and not done:
                    raise TrainingInterrupted(
                        f"stopped after step {progress.step} of {progress.total_steps}; the checkpoint is written",
                        command=f"mimco train {kind_of(self._config)} --resume",
                    )

    def _report(self, loss: Tensor, images_per_s: float, waiting: float) -> None:
        """Tell the bar, and raise TrainingError where the loss is no number, of whichever process."""
        step, row = self._progress.step, {"loss": float(mean_of_all(loss))}
        check_alive(step - 1, row)
        if is_main():
            if self._progress.rows:
                row["val_top1"] = self._progress.rows[-1]["val_top1"]
            self._on_step(StepReport(step, self._progress.total_steps, row, images_per_s, waiting))

    def _end_epoch(self, epoch: int, started: float) -> None:
        """Measure, and add a row."""
        loss = float(mean_of_all(self._losses)) / self._sampler.steps_per_epoch
        check_alive(self._progress.step - 1, {"loss": loss})
        self._losses.zero_()
        self._method.check()
        top1, top5 = self._stepper.measure(self._validation, self._sampler.micro_batch)
        row = {"epoch": epoch, "loss": loss, "lr": self._stepper.head_lr, "val_top1": top1, "val_top5": top5}
        self._progress.rows.append({**row, "seconds": time.perf_counter() - started})
        self._progress.seconds = 0.0

    def _save(self) -> None:
        """Write the checkpoint and the log; raises TrainingError where a weight is no number."""
        check_finite(self._progress.step - 1, self._method)
        losses = float(mean_of_all(self._losses))
        check_alive(self._progress.step - 1, {"loss": losses})
        if not is_main():
            return
        progress = dataclasses.replace(self._progress, loss_sum=losses)
        last = self._folder / "last"
        save_run(last, self._method, self._stepper.optimizer, self._asked, progress, self._corpus.classes)
        self._write_log()

    def write_report(self, *, alarm: str = "") -> None:
        """The run as a page, in the main process."""
        if is_main():
            progress, title = self._progress, f"{kind_of(self._config)} of {self._config.encoder}"
            words = f"Step {progress.step} of {progress.total_steps}, {len(self._corpus.classes)} classes."
            write_report(self._folder, title, words, alarm=alarm)

    def _write_log(self) -> None:
        lines = "".join(f"{json.dumps(row)}\n" for row in self._progress.rows)
        write_bytes(self._folder / "log.jsonl", lines.encode())
        self.write_report()
