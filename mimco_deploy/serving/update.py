"""Bring an index up to date with its folders: walk, read, embed, append, commit, batch by batch.

A batch is durable in two steps: its embeddings are appended and synced, then one catalogue transaction counts them.
A crash between the two leaves embeddings that nothing counts; the next writer cuts them off. So whatever kills a run,
what was committed stays, row and file belong together, and the next run goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimco_deploy.errors import BundleError, IndexStoreError
from mimco_deploy.serving.catalog import Catalog, Counts, Problem, Root
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.generations import (
    Generation,
    begin_generation,
    check_encoder,
    current_generation,
    has_index,
    sweep,
    switch_to,
    writer_lock,
)
from mimco_deploy.serving.pictures import Job, Outcome, Picture, Refused, Vanished, read_pictures
from mimco_deploy.serving.roots import existing_folder, record_roots, roots_to_keep
from mimco_deploy.serving.scan import Stamp, compare, scan_root
from mimco_deploy.serving.vectors import VectorWriter

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called after each commit with how many files are done, and of how many."""

# Files that need no embedding are committed with the batch, or after this many times its size.
_OUTCOMES_PER_BATCH = 16
_RETRY = Stamp(-1, -1)  # no file has it


@dataclass(frozen=True)
class Unreachable:
    """A folder that could not be listed. What the index holds of it was kept."""

    path: Path
    """Absolute."""
    reason: str
    kept: int
    """Files that stay listed although nobody could look at them."""


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What an update did."""

    added: int
    """Files that were not listed before, moved and renamed ones among them."""
    changed: int
    """Listed files whose size or date had changed and that were read again."""
    removed: int
    """Files that are gone, under their old name at least."""
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
    batch_size: int = 64,
    rebuild: bool = False,
    on_progress: Progress | None = None,
) -> UpdateReport:
    """Index folders, or bring an index up to date.

    Folders given before are walked again: only new and changed files are read, only unknown contents embedded, what is
    gone is dropped. A folder inside an indexed one updates that one; one that encloses indexed ones takes them over.

    Args:
        index: the index folder, made if missing.
        roots: folders to index; none means all that are recorded.
        encoder: must be the one that made the index, or `rebuild` be set.
        batch_size: pictures in one step of the encoder and one commit, at least 1.
        rebuild: embed everything again, all recorded folders and `roots`. Searches see the old index until the new one
            is whole; a rebuild that was cut short goes on where it stopped.
        on_progress: see `Progress`.

    Returns:
        What was done.

    Raises:
        IndexStoreError: a folder does not exist, nothing to index, another process is writing, the disk is full.
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
            check_encoder(index, catalog, encoder.spec.fingerprint)
            with catalog.snapshot():
                count = catalog.row_count()
            with VectorWriter(generation.vectors, catalog.embedding_dim, count) as vectors:
                update = _Update(catalog, vectors, encoder, batch_size, on_progress)
                report = update.run(folders, everything=rebuild or not folders)
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
        self, catalog: Catalog, vectors: VectorWriter, encoder: Encoder, batch_size: int, on_progress: Progress | None
    ) -> None:
        self._catalog = catalog
        self._vectors = vectors
        self._encoder = encoder
        self._batch_size = batch_size
        self._on_progress = on_progress
        self._added = self._changed = self._removed = self._unchanged = self._embedded = 0
        self._unreachable: list[Unreachable] = []

    def run(self, folders: Sequence[Path], *, everything: bool) -> UpdateReport:
        with self._catalog.transaction():
            touched = record_roots(self._catalog, folders)
            roots = self._catalog.roots() if everything else touched
        jobs = [job for root in roots for job in self._compare(root)]
        self._read_and_commit(jobs)
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
        tried = {path: _RETRY if problem == "unreadable" else stamp for path, (stamp, problem) in problems.items()}
        found = scan_root(root.path)
        changes = compare(listed | tried, found)
        for folder, kept in changes.kept.items():
            self._unreachable.append(Unreachable(root.path / folder.path, folder.reason, kept))
        if changes.gone:
            with self._catalog.transaction():
                self._removed += self._catalog.drop(root, changes.gone)
        self._unchanged += sum(file.path in listed for file in changes.same)
        return [Job(root, file, file.path in listed) for file in sorted(changes.new + changes.changed)]

    def _read_and_commit(self, jobs: Sequence[Job]) -> None:
        with self._catalog.snapshot():
            known = self._catalog.sha256s() if jobs else frozenset()
        outcomes = read_pictures(jobs, self._encoder.spec, known, 2 * self._batch_size)
        batch: list[Outcome] = []
        done = pixels = 0
        with contextlib.closing(outcomes):
            for outcome in outcomes:
                batch.append(outcome)
                pixels += isinstance(outcome, Picture) and outcome.pixels is not None
                done += 1
                full = pixels == self._batch_size or len(batch) == _OUTCOMES_PER_BATCH * self._batch_size
                if full or done == len(jobs):
                    self._commit(batch)
                    batch, pixels = [], 0
                    if self._on_progress is not None:
                        self._on_progress(done, len(jobs))

    def _commit(self, batch: Sequence[Outcome]) -> None:
        with self._catalog.snapshot():  # contents of this run may have come twice
            fresh = {
                outcome.sha256: outcome
                for outcome in batch
                if isinstance(outcome, Picture) and self._catalog.row_of(outcome.sha256) is None
            }
        first_row = self._append(list(fresh.values())) if fresh else self._vectors.count
        with self._catalog.transaction():
            self._catalog.add_contents(first_row, list(fresh))
            for outcome in batch:
                self._record(outcome)
        self._embedded += len(fresh)

    def _append(self, pictures: Sequence[Picture]) -> int:
        images = np.stack([picture.pixels for picture in pictures if picture.pixels is not None])  # [B, H, W, 3]
        embeddings = self._encoder.embed(images)  # [B, D]
        if not np.isfinite(embeddings).all():
            raise BundleError("the encoder gave an embedding that is not finite", command="mimco export --format onnx")
        return self._vectors.append(embeddings)

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
                self._catalog.put_problem(job.root, job.file.path, outcome.stamp, outcome.problem, outcome.found)
            case Vanished():
                self._removed += self._catalog.drop(job.root, [job.file.path])
