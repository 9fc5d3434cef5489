"""From pictures to batches of views, the same ones whatever the number of workers or restarts.

Which picture comes when, and how it is cropped, is a function of the seed, the step and the position in the batch; so a
run resumes in the middle of an epoch, and two processes see what one would.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mimco_deploy.errors import DataError
from mimco_deploy.training.config import RunConfig
from mimco_deploy.training.corpus import Corpus
from mimco_deploy.training.distributed import rank, world_size

Views = tuple[Tensor, ...]
MakeViews = Callable[[Any], Views]
"""From a picture, as the corpus gives it."""
Batches = Generator[tuple[Views, list[str]], None, None]
"""Views, each stacked over the batch, and the names of pictures that were skipped for them; to be closed after use."""
_AHEAD = 8192
"""Most images that wait, beyond one batch of each worker: they lie in shared memory, 0.3 MB for two views of 224 px."""
Slot = tuple[int, int]
"""Index of a picture, and its position in the whole run's sequence of pictures."""


def seed_for(*parts: int) -> int:
    """A 64-bit seed from a few integers, alike on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


class StepSampler(Sampler[list[Slot]]):
    """This process's share of every micro-batch from `start_step` on.

    Args:
        pictures: size of the corpus, at least one global batch.
        run: batch size, accumulation, epochs and seed.
        start_step: first optimiser step to give.
    """

    def __init__(self, pictures: int, run: RunConfig, start_step: int = 0) -> None:
        self.steps_per_epoch = pictures // run.global_batch_size
        self.total_steps = self.steps_per_epoch * run.epochs
        self._pictures = pictures
        self._run = run
        self._start = start_step
        self.micro_batch = run.global_batch_size // (run.accumulate * world_size())

    def __iter__(self) -> Iterator[list[Slot]]:
        """Micro-batches in order; `accumulate` of them make a step."""
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(self._start, self.total_steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng([self._run.seed, epoch]).permutation(self._pictures)
                order_epoch = epoch
            for micro in range(self._run.accumulate):
                first = (micro * world_size() + rank()) * self.micro_batch
                slots = range(first, first + self.micro_batch)
                batch = self._run.global_batch_size
                yield [(int(order[within * batch + slot]), step * batch + slot) for slot in slots]


class _ViewDataset(Dataset[tuple[Views, list[str]] | DataError]):
    def __init__(self, corpus: Corpus, make_views: MakeViews, seed: int) -> None:
        self._corpus, self._make_views, self._seed = corpus, make_views, seed

    def __getitem__(self, slot: Slot) -> tuple[Views, list[str]] | DataError:
        index, position = slot
        try:
            picture, refused = self._corpus.get(index)
        except DataError as error:
            return error  # raised in a data-loading process it would reach the training process as a traceback
        torch.default_generator.manual_seed(seed_for(self._seed, position))
        return self._make_views(picture), refused


def load_batches(corpus: Corpus, make_views: MakeViews, sampler: StepSampler, seed: int, workers: int) -> Batches:
    """Batches of views in the sampler's order. `close()` ends the data-loading processes."""
    pin = torch.cuda.is_available()
    loader = DataLoader(
        _ViewDataset(corpus, make_views, seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        prefetch_factor=max(1, min(4, _AHEAD // (workers * sampler.micro_batch))) if workers else None,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares what is decoded
        worker_init_fn=_leave_signals_to_the_parent,
    )
    return _give_batches(iter(loader))


def _give_batches(batches: Any) -> Batches:
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        if hasattr(batches, "_shutdown_workers"):
            # at the interpreter's end it would be too late: the processes ignore the signal that it sends them
            batches._shutdown_workers()


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C reaches the whole process group: the training process still needs this one for the step it is in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(items: list[tuple[Views, list[str]] | DataError]) -> tuple[Views, list[str]] | DataError:
    good = []
    for item in items:
        if isinstance(item, DataError):
            return item
        good.append(item)
    views = tuple(torch.stack(columns) for columns in zip(*(views for views, _ in good), strict=True))
    return views, [name for _, names in good for name in names]


def fit_batch(run: RunConfig, pictures: int) -> RunConfig:
    """A run whose global batch the corpus fills: as it is, or with the largest power of two that does.

    A smaller batch is divided into fewer micro-batches, none larger than before.
    """
    if run.global_batch_size <= pictures:
        return run
    batch = 1 << (pictures.bit_length() - 1)
    return resize_batch(run, batch)


def resize_batch(run: RunConfig, batch: int) -> RunConfig:
    """A run with another global batch, in as few micro-batches as are no larger than before."""
    accumulate = fewest_parts(batch, run.global_batch_size // run.accumulate)
    return dataclasses.replace(run, global_batch_size=batch, accumulate=accumulate)


def fewest_parts(whole: int, largest: int) -> int:
    """The fewest equal parts of `whole`, none above `largest`; at least 1."""
    return next(parts for parts in range(1, whole + 1) if whole % parts == 0 and whole // parts <= max(1, largest))
