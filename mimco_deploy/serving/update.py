"""Bring an index up to date with its folders: walk, read, embed, append, commit, batch by batch.

A batch is durable in two steps: its embeddings are appended and synced, then one catalogue transaction counts them.
A crash between the two leaves embeddings that nothing counts; the next writer cuts them off. So whatever kills a run,
what was committed stays, row and file belong together, and the next run goes on with what is missing.

Files are read and decoded by other processes while this one embeds (`pictures.py`, `guarded.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import BundleError, IndexStoreError
from mimco_deploy.images import Facts
from mimco_deploy.serving.catalog import MADE_BY, Catalog, Counts, NewContent, Problem, Root
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.generations import (
    Generation,
    begin_generation,
    check_encoder,
    current_generation,
    has_index,
    sweep,
    switch_to,
    take_over,
    writer_lock,
)
from mimco_deploy.serving.guarded import DecodePool, Limits
from mimco_deploy.serving.pictures import Job, Outcome, Picture, Refused, Vanished, read_pictures
from mimco_deploy.serving.rebuild import GIVEN_UP, refuse_to_lose
from mimco_deploy.serving.roots import existing_folder, follow_links, record_roots, roots_to_keep
from mimco_deploy.serving.scan import Stamp, Unlisted, compare, scan_root
from mimco_deploy.serving.tuning import keep_tuned_or_warn
from mimco_deploy.serving.vectors import VectorWriter, crc32s

logger = logging.getLogger(__name__)

COMMIT_EVERY_S = 1.0
"""A full batch is committed at once, unless the last commit was less than this ago."""
_LONGEST_BATCH_S = 4.0
"""Slow encoders get smaller batches, so that a crash never costs more than about this."""
_CPU_BATCH, _BATCH = 16, 64
# Files that need no embedding are committed with the batch, or after this many times its size.
_OUTCOMES_PER_BATCH = 16
_RETRY = Stamp(-1, -1)  # no file has it
_SMOOTHING = 0.3


@dataclass(frozen=True)
class Progress:
    """How far an update is."""

    done: int
    """Files, new or changed, that were dealt with."""
    total: int
    """Such files; 0 before the folders were walked."""
    images_per_s: float
    """Files a second of late."""
    waiting: float
    """Share of the time, of late, that the encoder waited for pictures, in [0, 1]."""
    doing: str = "index"
    """In a word or two."""


OnProgress = Callable[[Progress], None]
"""Called after each batch and commit."""


@dataclass(frozen=True)
class Unreachable:
    """A folder that could not be read. What the index holds of it was kept."""

    path: Path
    """Absolute."""
    reason: str
    kept: int
    """Files that stay listed although nobody could look at them; 0 where the index holds none of it."""


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What an update did."""

    added: int
    """Files that were not listed before, moved and renamed ones among them."""
    changed: int
    """Listed files whose size or date had changed and that were read again."""
    removed: int
    """Files that are gone, under their old name at least, or are no pictures any more."""
    unchanged: int
    """Files that nobody had to read."""
    embedded: int
    """Pictures that went through the encoder."""
    reused: int
    """Of those added and changed, files whose content the index had already: copies, moves, renames, new dates."""
    problems: tuple[Problem, ...]
    """All files of the index that are not pictures or cannot be read."""
    unreachable: tuple[Unreachable, ...]
    counts: Counts
    """What the index holds now."""


def update_index(
    index: Path,
    roots: Sequence[Path],
    encoder: Encoder,
    *,
    batch_size: int | None = None,
    rebuild: bool = False,
    retry_problems: bool = False,
    limits: Limits | None = None,
    encoder_path: Path | None = None,
    on_progress: OnProgress | None = None,
) -> UpdateReport:
    """Index folders, or bring an index up to date.

    Folders given before are walked again: only new and changed files are read, only unknown contents embedded, what is
    gone is dropped. A folder inside an indexed one updates that one; one that encloses indexed ones takes them over.

    Args:
        index: the index folder, made if missing.
        roots: folders to index; none means all that are recorded.
        encoder: must be the one that made the index, or `rebuild` be set.
        batch_size: most pictures in one step of the encoder, at least 1; by default 16 on a CPU, where more was slower,
            and 64 elsewhere.
        rebuild: embed everything again, all recorded folders and `roots`. Searches see the old index until the new one
            is whole; a rebuild that was cut short goes on where it stopped.
        retry_problems: read files again that were no pictures, although they did not change.
        limits: what one file may take to decode.
        encoder_path: bundle of the encoder, to be found again by searches; None for the workspace's own.
        on_progress: see `OnProgress`.

    Returns:
        What was done.

    Raises:
        IndexStoreError: a folder does not exist, nothing to index, another process is writing, the disk is full, or a
            rebuild would lose files that were given up, or in a folder that cannot be read or went away meanwhile.
        EncoderMismatchError: the index was made by another encoder.
    """
    folders = [existing_folder(root) for root in roots]
    if not folders and not has_index(index):
        raise IndexStoreError(f"no index in {index} and no folder to index", command="mimco index DIR")
    with writer_lock(index):
        if rebuild:
            folders += roots_to_keep(index, may_be_broken=bool(folders))
        generation = _generation_to_fill(index, encoder, rebuild)
        with Catalog(generation.catalog) as catalog:
            check_encoder(index, catalog.fingerprint, encoder.spec.fingerprint)
            catalog.upgrade()
            if rebuild:
                take_over(index, catalog, folders)
            with catalog.snapshot():
                count = catalog.row_count()
            with VectorWriter(generation.vectors, catalog.embedding_dim, count) as vectors:
                update = _Update(catalog, vectors, encoder, batch_size, on_progress or (lambda _: None))
                update.retry_problems, update.limits, update.encoder_path = retry_problems, limits, encoder_path
                update.replaces = index if rebuild else None
                report = update.run(folders, everything=rebuild or not folders)
            keep_tuned_or_warn(generation, catalog, on_build=lambda: update.tell("tuning"))
        if rebuild:
            switch_to(index, generation)
    return report


def _generation_to_fill(index: Path, encoder: Encoder, rebuild: bool) -> Generation:
    spec = encoder.spec
    if not rebuild and has_index(index):
        generation = current_generation(index)
        sweep(index, generation)
        return generation
    generation = begin_generation(index, spec.fingerprint, spec.embedding_dim)
    if not rebuild:
        switch_to(index, generation)  # a first index can be searched while it grows
    return generation


class _Update:
    """One run: the connections it works on and what it counted."""

    def __init__(
        self,
        catalog: Catalog,
        vectors: VectorWriter,
        encoder: Encoder,
        batch_size: int | None,
        on_progress: OnProgress,
    ) -> None:
        self._catalog = catalog
        self._vectors = vectors
        self._encoder = encoder
        self._batch_size = batch_size
        self._on_progress = on_progress
        self.retry_problems = False
        self.limits: Limits | None = None
        self.encoder_path: Path | None = None
        self.replaces: Path | None = None
        self._added = self._changed = self._removed = self._unchanged = self._embedded = 0
        self._unreachable: list[Unreachable] = []
        self._unlisted: list[tuple[Root, Unlisted]] = []
        self._progress = Progress(0, 0, 0.0, 0.0)
        self._told_at, self._waited_s = time.perf_counter(), 0.0

    def run(self, folders: Sequence[Path], *, everything: bool) -> UpdateReport:
        with self._catalog.transaction():
            self._sign()
            follow_links(self._catalog)
            touched = record_roots(self._catalog, folders)
            roots = self._catalog.roots() if everything else touched
        jobs = [job for root in roots for job in self._compare(root)]
        if self.replaces is not None:
            refuse_to_lose(self.replaces, self._catalog, self._unlisted, jobs)
        self._read_and_commit(jobs)
        if self.replaces is not None:
            refuse_to_lose(self.replaces, self._catalog, self._unlisted, ())
        with self._catalog.snapshot():
            problems, counts = tuple(self._catalog.problems()), self._catalog.counts()
        return UpdateReport(
            added=self._added,
            changed=self._changed,
            removed=self._removed,
            unchanged=self._unchanged,
            embedded=self._embedded,
            reused=self._added + self._changed - self._embedded,
            problems=problems,
            unreachable=tuple(self._unreachable),
            counts=counts,
        )

    def _compare(self, root: Root) -> list[Job]:
        """Walk one root, drop what is gone, and list what has to be read."""
        with self._catalog.snapshot():
            listed, problems = self._catalog.file_stamps(root), self._catalog.problem_stamps(root)
        # Access rights change without a trace in size or date, so what could not be read is always tried again.
        again = {"unreadable", *(problem for _, problem in problems.values() if self.retry_problems)}
        if self.replaces is not None:
            again |= GIVEN_UP
        tried = {path: _RETRY if problem in again else stamp for path, (stamp, problem) in problems.items()}
        changes = compare(listed | tried, scan_root(root.path))
        for folder, kept in changes.kept.items():
            self._unreachable.append(Unreachable(root.path / folder.path, folder.reason, kept))
            self._unlisted.append((root, folder))
        if changes.gone:
            with self._catalog.transaction():
                self._removed += self._catalog.drop(root, changes.gone)
        self._unchanged += sum(map(listed.__contains__, changes.same))
        return [Job(root, file, file.path in listed) for file in sorted(changes.new + changes.changed)]

    def _read_and_commit(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        with self._catalog.snapshot():
            known = self._catalog.sha256s()
        most = self._batch_size or (_CPU_BATCH if self._encoder.provider == "CPUExecutionProvider" else _BATCH)
        batch = _Batch(self._encoder, known)
        outcomes = read_pictures(jobs, DecodePool(self._encoder.spec, self.limits), known, 2 * max(most, _BATCH))
        full, committed_at = most, time.perf_counter()
        with contextlib.closing(outcomes):
            for done in range(1, len(jobs) + 1):
                asked_at = time.perf_counter()
                batch.outcomes.append(outcome := next(outcomes))
                self._waited_s += time.perf_counter() - asked_at
                batch.take_pixels(outcome)
                last = done == len(jobs) or time.perf_counter() - committed_at >= _LONGEST_BATCH_S
                if last or batch.pixels == full or len(batch.outcomes) % (_OUTCOMES_PER_BATCH * full) == 0:
                    full = max(1, min(most, int(_LONGEST_BATCH_S / batch.embed())))
                    if last or time.perf_counter() - committed_at >= COMMIT_EVERY_S:
                        self._commit(batch)
                        batch, committed_at = _Batch(self._encoder, known), time.perf_counter()
                    self._tell_done(done, len(jobs))

    def tell(self, doing: str) -> None:
        """Say what is done now."""
        self._progress = replace(self._progress, doing=doing)
        self._on_progress(self._progress)

    def _tell_done(self, done: int, total: int) -> None:
        now, last = time.perf_counter(), self._progress
        passed = now - self._told_at
        weight = 1.0 if last.done == 0 else _SMOOTHING
        rate = last.images_per_s + weight * ((done - last.done) / passed - last.images_per_s)
        waiting = last.waiting + weight * (self._waited_s / passed - last.waiting)
        self._progress = Progress(done, total, rate, min(waiting, 1.0))
        self._told_at, self._waited_s = now, 0.0
        self._on_progress(self._progress)

    def _commit(self, batch: _Batch) -> None:
        first_row = self._vectors.append(np.concatenate(batch.embeddings)) if batch.embeddings else self._vectors.count
        with self._catalog.transaction():
            self._catalog.add_contents(first_row, batch.contents)
            if batch.contents:
                self._sign(provider=self._encoder.provider, precision=self._encoder.precision)
            for outcome in batch.outcomes:
                self._record(outcome)
        self._embedded += len(batch.contents)

    def _sign(self, **ran: str) -> None:
        """Note where the encoder lies, which may have moved, before anything is embedded, and with that what ran it."""
        made_by = {**self._catalog.made_by(), **ran}
        made_by.pop("encoder", None)
        if self.encoder_path is not None:
            made_by["encoder"] = str(self.encoder_path.absolute())
        self._catalog.set_setting(MADE_BY, json.dumps(made_by))

    def _record(self, outcome: Outcome) -> None:
        job = outcome.job
        match outcome:
            case Picture():
                row = self._catalog.row_of(outcome.sha256)
                assert row is not None
                self._catalog.put_file(job.root, job.file.path, outcome.stamp, row)
                self._added += not job.listed
                self._changed += job.listed
            case Refused():
                logger.info("not indexed: %s", outcome.found)
                self._removed += job.listed
                self._catalog.put_problem(job.root, job.file.path, outcome.stamp, outcome.problem, outcome.found)
            case Vanished():
                self._removed += self._catalog.drop(job.root, [job.file.path])


class _Batch:
    """What was read and embedded since the last commit.

    Args:
        encoder: to embed with.
        known: contents that have a row or will have; those embedded here are added.
    """

    def __init__(self, encoder: Encoder, known: set[bytes]) -> None:
        self._encoder = encoder
        self._known = known
        self._waiting: dict[bytes, tuple[npt.NDArray[np.uint8], Facts]] = {}
        self._picture_s = 0.0
        self.outcomes: list[Outcome] = []
        self.contents: list[NewContent] = []
        self.embeddings: list[npt.NDArray[np.float32]] = []
        """Of `contents`, in portions [B, D]."""

    @property
    def pixels(self) -> int:
        """Pictures that wait to be embedded."""
        return len(self._waiting)

    def take_pixels(self, outcome: Outcome) -> None:
        """Have a picture embedded with the others, unless its content came before."""
        if isinstance(outcome, Picture) and outcome.pixels is not None and outcome.sha256 not in self._known:
            self._waiting[outcome.sha256] = (outcome.pixels, outcome.facts)

    def embed(self) -> float:
        """Embed what waits.

        Returns:
            Seconds for each picture; those of the last time, where none waits.
        """
        if not self._waiting:
            return self._picture_s or 1e-9
        start = time.perf_counter()
        embeddings = self._encoder.embed(np.stack([pixels for pixels, _ in self._waiting.values()]))  # [B, D]
        if not np.isfinite(embeddings).all():
            raise BundleError("the encoder gave an embedding that is not finite", command="mimco export --format onnx")
        for (sha256, (_, facts)), crc32 in zip(self._waiting.items(), crc32s(embeddings), strict=True):
            self.contents.append(NewContent(sha256, crc32, facts))
        self.embeddings.append(embeddings)
        self._known.update(self._waiting)
        self._picture_s = (time.perf_counter() - start) / len(embeddings)
        self._waiting = {}
        return self._picture_s
