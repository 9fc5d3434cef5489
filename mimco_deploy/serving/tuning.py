"""When a search is exact and when approximate, and how good the approximation is: planned, measured, recorded.

Looking at every embedding is exact and costs N·D·4 bytes of reading. Where that takes longer than a budget, an
approximation is built (`ann.py`) and measured: recall@10 against exact search, on a sample of the index's own
embeddings, each left out of its own hits. It is used where that reaches the floor, measured again after growth, and
built again or given up where it does not. All of it is derived: without it, or where it is damaged, search is exact.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mimco_deploy.bundle import sha256_of
from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.background import keep_background
from mimco_deploy.serving.catalog import BUDGET, Catalog
from mimco_deploy.serving.generations import Generation, current_generation, writer_lock
from mimco_deploy.serving.vectors import read_vectors

if TYPE_CHECKING:  # FAISS takes a while to import, and an update that finds nothing new needs none of it
    from mimco_deploy.serving.ann import Approximation, Rows, Searcher, Vectors

logger = logging.getLogger(__name__)

_BYTES_PER_MS = 8e6
"""Assumed of an exact search: one core reads about 11 GB/s here. Assumed, not timed, so that a plan can be repeated."""
_TAIL_SHARE = 0.1
"""Rows beyond the approximation are scanned; once that takes this share of the latency budget they are added to it."""
_RETRAIN_GROWTH = 2.0
_MEASURE_GROWTH = 1.02
_RETRY_GROWTH = 1.5
_K = 10
_SAMPLE = 2000
_MARGIN = 0.005
"""Above the floor, when the number of lists is chosen: a sample of 2,000 is uncertain by about half of it."""
_GRAPH_FROM = 1024
"""Lists whose centroids are found by a graph: to look at 4,096 of them took four fifths of a search."""
_MAX_SHARE_OF_LISTS = 0.25
"""An approximation that has to read more than this is given up: exact search is about as fast."""
_TIMED = 50
_MIN_ROWS_PER_LIST = 39
"""FAISS asks for no fewer when it trains."""
_SEED = 2209
_SETTING = "neighbours"
EXACT = "exact"
_LITTLE = "there is little to read"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may cost, and must find."""

    latency_ms: float = 50.0
    """For one query; exact search is kept while it stays within."""
    memory_mib: int = 1024
    """For an approximation."""
    recall: float = 0.95
    """Least recall@10 against exact search, in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How an index is searched."""

    kind: str
    """`exact`, or the FAISS factory string of the approximation."""
    reason: str
    file: str = ""
    """Of the approximation, in the folder of the generation."""
    bytes: int = 0
    sha256: str = ""
    """Of the file, hexadecimal; `mimco index verify` looks."""
    rows: int = 0
    """Rows the approximation covers, or that there were when it was given up."""
    trained_rows: int = 0
    """Rows that there were when it was trained."""
    nprobe: int = 0
    """Lists that a search reads."""
    recall: float | None = None
    """recall@10 against exact search, mean over the sample."""
    recall_error: float | None = None
    """Standard error of that mean."""
    measured_rows: int = 0
    """Rows when it was measured."""
    query_ms: float | None = None
    """Median of one query when it was measured."""
    exact_ms: float | None = None
    """The same of exact search."""


def tuning_of(catalog: Catalog) -> Tuning:
    """How an index is searched, as recorded. Inside a snapshot."""
    return catalog.parsed(_SETTING, Tuning) or Tuning(kind=EXACT, reason=_LITTLE)


def budget_of(catalog: Catalog) -> Budget:
    """The budget of an index. Inside a snapshot."""
    return catalog.parsed(BUDGET, Budget) or Budget()


def set_budget(catalog: Catalog, budget: Budget) -> None:
    """Record a budget. Inside a transaction."""
    catalog.set_setting(BUDGET, json.dumps(asdict(budget)))


def open_searcher(generation: Generation, catalog: Catalog, vectors: Vectors) -> Searcher:
    """What to search one state of an index with; exact where the approximation is damaged. Inside a snapshot."""
    from mimco_deploy.serving.ann import Searcher

    tuning, dead = tuning_of(catalog), catalog.dead_rows()
    try:
        return Searcher(vectors, dead, approximation_of(generation, tuning))
    except IndexStoreError as error:
        logger.warning("searching exactly, which is slower: %s", error)
        return Searcher(vectors, dead)


def damage(generation: Generation, tuning: Tuning) -> str:
    """What is wrong with the approximation, in words; empty where nothing is. Reads all of it."""
    try:
        found = approximation_of(generation, tuning)
    except IndexStoreError as error:
        return error.found
    if found is None or sha256_of(found.file) == tuning.sha256:
        return ""
    return f"{found.file} was changed since it was written"


def plan(rows: int, dim: int, budget: Budget) -> str | None:
    """Choose a kind of approximation by size alone; None where exact search stays within the budget.

    Args:
        rows: N.
        dim: D.
        budget: see `Budget`.

    Returns:
        A FAISS factory string: 8 bits a number where that fits into the memory, else product codes of 4 bits for each
        four numbers; a graph over the centroids, of 8 bits too, where they are many.
    """
    if _exact_ms(rows, dim) <= budget.latency_ms or rows < 2 * _K:
        return None
    scalar = rows * (dim + 8) <= budget.memory_mib * 2**20  # and the row numbers
    lists = _lists_for(rows)
    graph = "(HNSW32_SQ8)" if lists >= _GRAPH_FROM else ""
    return f"IVF{lists}{graph}," + ("SQ8" if scalar else f"PQ{_parts(dim)}x4fs")


def keep_tuned(
    generation: Generation, catalog: Catalog, *, anew: bool = False, on_build: Callable[[], None] | None = None
) -> Tuning:
    """Bring the way an index is searched up to date with what it holds. Call under `writer_lock`.

    Args:
        generation: the current one.
        catalog: its catalogue, outside of any transaction.
        anew: build again whatever is there.
        on_build: called before something that takes a while.

    Returns:
        What is recorded now.

    Raises:
        IndexStoreError: the disk is full. What was there before is used on.
    """
    with catalog.snapshot():
        now, budget, dead = tuning_of(catalog), budget_of(catalog), catalog.dead_rows()
        vectors = read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())
    live = len(vectors) - len(dead)
    kind = plan(live, catalog.embedding_dim, budget)
    if kind is None:
        within = _exact_ms(live, catalog.embedding_dim) <= budget.latency_ms
        reason = f"reading all takes less than {budget.latency_ms:g} ms" if within else _LITTLE
        tuning = Tuning(kind=EXACT, reason=reason)
    elif not anew and _still_given_up(now, len(vectors)):
        tuning = now
    else:
        if on_build is not None:
            on_build()
        tuning = _approximate(generation, now, kind, vectors, dead, budget, anew=anew)
    keep_background(catalog, vectors, dead)
    if tuning != now:
        with catalog.transaction():
            catalog.set_setting(_SETTING, json.dumps(asdict(tuning)))
    for path in generation.path.glob("ann-*.faiss"):
        if path.name != tuning.file:
            path.unlink(missing_ok=True)
    return tuning


def keep_tuned_or_warn(generation: Generation, catalog: Catalog, *, on_build: Callable[[], None] | None = None) -> None:
    """As `keep_tuned`, for those who have done what they were asked for: how fast it is found is another matter."""
    try:
        keep_tuned(generation, catalog, on_build=on_build)
    except IndexStoreError as error:
        logger.warning("searching as before: %s", error)


def _approximate(
    generation: Generation, now: Tuning, kind: str, vectors: Vectors, dead: Rows, budget: Budget, *, anew: bool
) -> Tuning:
    kept = (
        None if anew or not _usable(generation, now, kind, len(vectors)) else _grown(generation, now, vectors, budget)
    )
    if kept is not None and kept.rows == now.rows and len(vectors) <= _MEASURE_GROWTH * now.measured_rows:
        return kept
    sample = _Sample(vectors, dead)
    if kept is not None:
        kept = sample.measured(generation, kept)
        if kept.recall is not None and kept.recall >= budget.recall:
            return kept
        logger.info("recall@10 is %.3f, below %.3f: building again", kept.recall, budget.recall)
    return _built(generation, kind, vectors, sample, budget)


def _usable(generation: Generation, now: Tuning, kind: str, rows: int) -> bool:
    if not now.file or damage(generation, now):
        return False
    return now.kind.split(",")[1] == kind.split(",")[1] and rows < _RETRAIN_GROWTH * now.trained_rows


def _built(generation: Generation, kind: str, vectors: Vectors, sample: _Sample, budget: Budget) -> Tuning:
    """A new approximation that reads as few lists as reach the floor, or exact search where too many would."""
    from mimco_deploy.serving.ann import build

    logger.info("building %s over %d embeddings", kind, len(vectors))
    file = _new_file(generation)
    _written(generation, file, lambda path: build(path, kind, vectors))
    tuning = Tuning(
        kind=kind,
        reason=f"reading all would take more than {budget.latency_ms:g} ms",
        file=file,
        **_seal(generation.path / file),
        rows=len(vectors),
        trained_rows=len(vectors),
        nprobe=1,
    )
    lists = _lists_of(kind)
    while True:
        tuning = sample.measured(generation, tuning)
        assert tuning.recall is not None
        if tuning.recall >= min(budget.recall + _MARGIN, 1.0):
            return tuning
        more = math.ceil(1.5 * tuning.nprobe)
        if more > _MAX_SHARE_OF_LISTS * lists:
            break
        tuning = replace(tuning, nprobe=more)
    (generation.path / file).unlink(missing_ok=True)
    reason = f"{kind} finds {tuning.recall:.3f} of the nearest {_K} by reading a quarter of all, not {budget.recall:g}"
    return Tuning(kind=EXACT, reason=reason, rows=len(vectors))


def _grown(generation: Generation, now: Tuning, vectors: Vectors, budget: Budget) -> Tuning:
    """The approximation with the rows that came since, where they are so many that scanning them would hurt."""
    from mimco_deploy.serving.ann import extend

    tail = len(vectors) - now.rows
    if _exact_ms(tail, vectors.shape[1]) <= _TAIL_SHARE * budget.latency_ms:
        return now
    file = _new_file(generation)
    _written(generation, file, lambda path: extend(generation.path / now.file, path, vectors))
    return replace(now, file=file, rows=len(vectors), **_seal(generation.path / file))


class _Sample:
    """Embeddings of the index as queries, and the hits that exact search gives them."""

    def __init__(self, vectors: Vectors, dead: Rows) -> None:
        from mimco_deploy.serving.ann import Searcher

        self._vectors, self._dead, self._searcher = vectors, dead, Searcher
        live = np.setdiff1d(np.arange(len(vectors)), dead, assume_unique=True)
        rng = np.random.default_rng(_SEED)
        self._rows = np.sort(rng.choice(live, min(_SAMPLE, len(live)), replace=False))
        self._queries = np.ascontiguousarray(vectors[self._rows])
        exact = Searcher(vectors, dead)
        self._true = self._hits(exact)
        self._exact_ms = self._timed(exact)

    def measured(self, generation: Generation, tuning: Tuning) -> Tuning:
        """The same with its recall and its speed, on all rows that there are."""
        searcher = self._searcher(self._vectors, self._dead, approximation_of(generation, tuning))
        found = self._hits(searcher)
        recalls = [len(np.intersect1d(*both)) / max(len(both[0]), 1) for both in zip(self._true, found, strict=True)]
        error = float(np.std(recalls) / len(recalls) ** 0.5)
        return replace(
            tuning,
            recall=float(np.mean(recalls)),
            recall_error=error,
            measured_rows=len(self._vectors),
            query_ms=self._timed(searcher),
            exact_ms=self._exact_ms,
        )

    def _hits(self, searcher: Searcher) -> list[Rows]:
        _, rows = searcher.search(self._queries, _K + 1)
        return [found[found != own][:_K] for own, found in zip(self._rows, rows, strict=True)]

    def _timed(self, searcher: Searcher) -> float:
        times = []
        for query in self._queries[:_TIMED]:
            start = time.perf_counter()
            searcher.search(query[np.newaxis], _K)
            times.append(time.perf_counter() - start)
        return float(np.median(times) * 1e3)


def approximation_of(generation: Generation, tuning: Tuning) -> Approximation | None:
    """What to search with, None where that is exact search.

    Raises:
        IndexStoreError: the file is missing or has another size than it was written with.
    """
    if not tuning.file:
        return None
    path = generation.path / tuning.file
    if not path.is_file() or path.stat().st_size != tuning.bytes:
        raise IndexStoreError(f"{path} is not what was written", command="mimco index tune")
    from mimco_deploy.serving.ann import Approximation

    return Approximation(generation.path / tuning.file, tuning.kind, tuning.rows, tuning.nprobe)


def _still_given_up(now: Tuning, rows: int) -> bool:
    return now.kind == EXACT and now.rows > 0 and rows < _RETRY_GROWTH * now.rows


def _lists_for(rows: int) -> int:
    """How many lists to make of so many rows: about four times the root, each with enough rows to train on."""
    wanted: int = 2 ** round(math.log2(4 * rows**0.5))
    return max(1, min(wanted, rows // _MIN_ROWS_PER_LIST))


def _lists_of(kind: str) -> int:
    return int(kind.removeprefix("IVF").partition(",")[0].partition("(")[0])


def _new_file(generation: Generation) -> str:
    taken = [int(path.stem.removeprefix("ann-")) for path in generation.path.glob("ann-*.faiss")]
    return f"ann-{max(taken, default=0) + 1:06d}.faiss"


def _written(generation: Generation, file: str, write: Callable[[Path], None]) -> None:
    path = generation.path / file
    try:
        write(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise IndexStoreError(
            f"{path} cannot be written ({error.strerror})", expected="room on the disk", command="mimco index tune"
        ) from error


def _seal(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _exact_ms(rows: int, dim: int) -> float:
    return rows * dim * 4 / _BYTES_PER_MS


def _parts(dim: int) -> int:
    """Codes of an embedding: one for four numbers, or the nearest that divides it."""
    return next(parts for parts in range(max(dim // 4, 1), 0, -1) if dim % parts == 0)


def tune_index(index: Path, budget: Budget) -> Tuning:
    """Set the budget of an index and build what it asks for anew.

    Args:
        index: the index folder.
        budget: see `Budget`.

    Raises:
        IndexStoreError: there is no index, another process writes, or the disk is full.
    """
    current_generation(index)  # before the lock makes a folder where there is no index
    with writer_lock(index):
        generation = current_generation(index)
        with Catalog(generation.catalog) as catalog:
            with catalog.transaction():
                set_budget(catalog, budget)
            return keep_tuned(generation, catalog, anew=True)
