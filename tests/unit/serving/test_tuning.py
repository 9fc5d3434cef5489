"""When an approximation is built, how good it is said to be and is, and that search is exact without it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving import ann
from mimco_deploy.serving import tuning as tuning_module
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.generations import current_generation, writer_lock
from mimco_deploy.serving.index import Hit, ImageIndex
from mimco_deploy.serving.inspect import status_of, verify
from mimco_deploy.serving.interchange import import_index
from mimco_deploy.serving.roots import forget_roots
from mimco_deploy.serving.tuning import EXACT, Budget, Tuning, budget_of, plan, tune_index, tuning_of
from mimco_deploy.serving.update import update_index
from tests.helpers import DIM, CountingEncoder, gallery, noise

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

REPOSITORY = Path(__file__).parent.parent.parent.parent
COUNT = 3000
NOW = Budget(latency_ms=0)
"""Nothing is fast enough: an approximation whatever the size, and no row beyond it."""
SOON = Budget(latency_ms=0.02)
"""3,000 embeddings of 16 numbers take 0.024 ms, by the plan's own reckoning; 250 more are scanned."""
SAMPLE_SEED, SAMPLE = 2209, 2000


# ---------------------------------------------------------------------- indexes of made-up embeddings


def unit(raw: npt.NDArray[np.float64]) -> Vectors:
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


def clustered(count: int, seed: int, dim: int = DIM) -> Vectors:
    """Embeddings in heaps, as those of photos are; the heaps are the same for every seed."""
    centres = np.random.default_rng(99).standard_normal((60, dim))
    rng = np.random.default_rng(seed)
    return unit(centres[rng.integers(0, 60, count)] + 0.3 * rng.standard_normal((count, dim)))


def isotropic(count: int, seed: int) -> Vectors:
    return unit(np.random.default_rng(seed).standard_normal((count, DIM)))


def take_in(index: Path, vectors: Vectors, first: int = 0, root: str = "/photos") -> None:
    """Import embeddings as files of their numbers; the first is row `first`."""
    source = index.with_name(f"in-{first}.npy")
    np.save(source, vectors)
    header = {"format_version": 1, "fingerprint": "f" * 64, "embedding_dim": vectors.shape[1]}
    numbers = range(first, first + len(vectors))
    records = [
        {"root": root, "path": f"{number:06d}.png", "sha256": f"{number:064x}", "size": 1, "mtime_ns": 1}
        for number in numbers
    ]
    lines = source.with_name(f"{source.name}.jsonl")
    lines.write_text("".join(json.dumps(line) + "\n" for line in [header, *records]))
    assert import_index(index, source) == len(vectors)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """3,000 clustered embeddings, searched exactly."""
    take_in(tmp_path / "index", clustered(COUNT, 0))
    return tmp_path / "index"


def rows_of(found: list[Hit]) -> list[int]:
    return [int(hit.path.stem) for hit in found]


def exact_rows(vectors: Vectors, query: Vectors, k: int, dead: Rows | None = None) -> list[int]:
    """The true hits, by looking at all in float64."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    if dead is not None:
        scores[dead] = -np.inf
    best: list[int] = np.argsort(-scores, kind="stable")[:k].tolist()
    return best


def true_recall(index: Path, vectors: Vectors, dead: Rows | None = None) -> float:
    """recall@10 of the index as it answers, by the definition: its own embeddings, each left out of its hits."""
    live = np.setdiff1d(np.arange(len(vectors)), [] if dead is None else dead)
    sample = np.sort(np.random.default_rng(SAMPLE_SEED).choice(live, min(SAMPLE, len(live)), replace=False))
    found = ImageIndex.open(index).search_many(vectors[sample], 11)
    shares = []
    for row, hits in zip(sample.tolist(), found, strict=True):
        expected = [other for other in exact_rows(vectors, vectors[row], 11, dead) if other != row][:10]
        answered = [other for other in rows_of(hits) if other != row][:10]
        shares.append(len(set(expected) & set(answered)) / len(expected))
    return float(np.mean(shares))


def tuning(index: Path) -> Tuning:
    return ImageIndex.open(index).tuning()


def approximations(index: Path) -> list[str]:
    return sorted(path.name for path in current_generation(index).path.glob("ann-*"))


def build_counter(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is built from now on, as a list that grows."""
    built, real = list[str](), ann.build

    def build(path: Path, kind: str, vectors: Vectors) -> None:
        built.append(kind)
        real(path, kind, vectors)

    monkeypatch.setattr(ann, "build", build)
    return built


# ---------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("rows", "dim", "budget", "kind"),
    [
        (0, 384, NOW, None),
        (19, 384, NOW, None),
        (20, 384, NOW, "IVF1,SQ8"),
        (3000, 16, NOW, "IVF76,SQ8"),
        (100_000, 384, Budget(), None),
        (92_681, 384, NOW, "IVF1024(HNSW32_SQ8),SQ8"),
        (40_000, 384, NOW, "IVF1024(HNSW32_SQ8),SQ8"),
        (39_935, 384, NOW, "IVF1023,SQ8"),
        (260_416, 384, Budget(), None),
        (260_417, 384, Budget(), "IVF2048(HNSW32_SQ8),SQ8"),
        (1_000_000, 384, Budget(), "IVF4096(HNSW32_SQ8),SQ8"),
        (1_000_000, 384, Budget(latency_ms=192), None),
        (1_000_000, 384, Budget(memory_mib=374), "IVF4096(HNSW32_SQ8),SQ8"),
        (1_000_000, 384, Budget(memory_mib=373), "IVF4096(HNSW32_SQ8),PQ96x4fs"),
        (10_000_000, 768, Budget(), "IVF16384(HNSW32_SQ8),PQ192x4fs"),
        (3000, 10, Budget(latency_ms=0, memory_mib=0), "IVF76,PQ2x4fs"),
        (3000, 7, Budget(latency_ms=0, memory_mib=0), "IVF76,PQ1x4fs"),
        (3000, 2, Budget(latency_ms=0, memory_mib=0), "IVF76,PQ1x4fs"),
    ],
)
def test_the_kind_follows_from_size_and_budget(rows: int, dim: int, budget: Budget, kind: str | None) -> None:
    assert plan(rows, dim, budget) == kind


@pytest.mark.parametrize("rows", [20, 38, 39, 78, 500, 5_000, 100_000, 10_000_000])
def test_each_list_has_rows_enough_to_train_on(rows: int) -> None:
    kind = plan(rows, DIM, NOW)
    assert kind is not None
    lists = int(re.findall(r"\d+", kind)[0])
    assert lists == 1 or rows // lists >= 39


def test_the_recall_that_is_asked_for_does_not_change_the_kind() -> None:
    assert plan(COUNT, DIM, replace(NOW, recall=0.5)) == plan(COUNT, DIM, replace(NOW, recall=1.0))


# ---------------------------------------------------------------------- building


def test_a_small_index_is_searched_exactly(index: Path) -> None:
    found = tuning(index)
    assert (found.kind, found.file, found.recall) == (EXACT, "", None)
    assert "less than 50 ms" in found.reason
    assert approximations(index) == []
    assert true_recall(index, clustered(COUNT, 0)) == 1.0


def test_an_approximation_is_built_where_exact_search_would_take_too_long(index: Path) -> None:
    done = tune_index(index, NOW)
    assert done == tuning(index) == status_of(index).search
    assert (done.kind, done.file) == ("IVF76,SQ8", "ann-000001.faiss")
    assert (done.rows, done.trained_rows, done.measured_rows) == (COUNT, COUNT, COUNT)
    assert "more than 0 ms" in done.reason
    assert 1 <= done.nprobe <= 76 // 4
    assert done.bytes == (current_generation(index).path / done.file).stat().st_size
    assert done.query_ms is not None
    assert done.exact_ms is not None
    assert verify(index) == []


def test_many_centroids_are_found_by_a_graph(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_module, "_GRAPH_FROM", 50)
    done = tune_index(index, replace(NOW, recall=0.99))
    assert done.kind == "IVF76(HNSW32_SQ8),SQ8"
    assert done.recall is not None
    assert done.recall >= 0.99
    assert true_recall(index, clustered(COUNT, 0)) == pytest.approx(done.recall, abs=1e-9)
    take_in(index, clustered(1000, 1), first=COUNT)
    grown = tuning(index)
    assert (grown.rows, grown.trained_rows, grown.kind) == (COUNT + 1000, COUNT, done.kind)
    assert verify(index) == []


def test_a_graph_over_the_centroids_makes_product_codes_no_worse(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = replace(NOW, memory_mib=0, recall=0.3)
    without = tune_index(index, tight)
    monkeypatch.setattr(tuning_module, "_GRAPH_FROM", 50)
    done = tune_index(index, tight)
    assert done.kind == "IVF76(HNSW32_SQ8),PQ4x4fs"
    assert done.recall is not None
    assert without.recall is not None
    assert done.nprobe == without.nprobe
    assert done.recall == pytest.approx(without.recall, abs=0.02)


@pytest.mark.parametrize("budget", [NOW, replace(NOW, recall=0.5), replace(NOW, recall=0.99)])
def test_the_recall_that_is_recorded_is_that_of_the_searches(index: Path, budget: Budget) -> None:
    done = tune_index(index, budget)
    assert done.recall is not None
    assert done.recall >= budget.recall
    assert done.recall == pytest.approx(true_recall(index, clustered(COUNT, 0)), abs=1e-9)
    assert done.recall_error is not None
    assert 0 <= done.recall_error < 0.05


def test_no_more_lists_are_read_than_the_recall_needs(index: Path) -> None:
    probed = {recall: tune_index(index, replace(NOW, recall=recall)).nprobe for recall in (0.3, 0.95, 0.99)}
    assert probed[0.3] == 1
    assert probed[0.3] <= probed[0.95] <= probed[0.99]
    assert probed[0.99] > 1


def test_every_hit_has_the_score_that_exact_search_gives_it(index: Path) -> None:
    tune_index(index, replace(NOW, recall=0.3))
    vectors = clustered(COUNT, 0)
    for hits, query in zip(ImageIndex.open(index).search_many(vectors[:50], 20), vectors[:50], strict=True):
        rows = rows_of(hits)
        assert len(set(rows)) == len(rows) == 20
        exact = (vectors[rows].astype(np.float64) * query).sum(axis=1)
        assert [hit.score for hit in hits] == pytest.approx(exact.tolist(), abs=1e-6)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_an_index_that_is_open_follows(index: Path) -> None:
    opened = ImageIndex.open(index)
    assert opened.tuning().kind == EXACT
    tune_index(index, NOW)
    assert opened.tuning().kind == "IVF76,SQ8"
    assert rows_of(opened.search(clustered(COUNT, 0)[17], 1)) == [17]


def test_the_same_index_is_tuned_to_the_same(index: Path) -> None:
    first = tune_index(index, NOW)
    second = tune_index(index, NOW)
    timeless = [replace(done, file="", query_ms=None, exact_ms=None) for done in (first, second)]
    assert timeless[0] == timeless[1]
    assert (first.file, second.file) == ("ann-000001.faiss", "ann-000002.faiss"), "open readers keep theirs"
    assert approximations(index) == [second.file]


def test_a_larger_budget_makes_it_exact_again(index: Path) -> None:
    tune_index(index, NOW)
    done = tune_index(index, Budget())
    assert (done.kind, done.file, approximations(index)) == (EXACT, "", [])
    assert true_recall(index, clustered(COUNT, 0)) == 1.0


def test_the_budget_is_recorded(index: Path) -> None:
    budget = Budget(latency_ms=3, memory_mib=77, recall=0.8)
    tune_index(index, budget)
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        assert budget_of(catalog) == budget
    assert status_of(index).budget == budget


def test_without_an_index_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="no index in"):
        tune_index(tmp_path / "index", NOW)
    assert not (tmp_path / "index").exists()


def test_a_second_writer_is_refused(index: Path) -> None:
    with writer_lock(index), pytest.raises(IndexStoreError, match="is being written by process"):
        tune_index(index, NOW)


def test_little_memory_makes_product_codes(index: Path) -> None:
    budget = Budget(latency_ms=0, memory_mib=0, recall=0.9)
    done = tune_index(index, budget)
    assert done.kind == "IVF76,PQ4x4fs"
    assert done.recall == pytest.approx(true_recall(index, clustered(COUNT, 0)), abs=1e-9)
    assert done.recall is not None
    assert done.recall >= 0.9
    assert done.bytes < tune_index(index, replace(NOW, recall=0.9)).bytes
    assert verify(index) == []


@pytest.mark.parametrize("count", [0, 1, 19, 20, 30, 100])
@pytest.mark.parametrize("memory_mib", [0, 1024])
def test_the_smallest_indexes_are_tuned_without_complaint(tmp_path: Path, count: int, memory_mib: int) -> None:
    take_in(tmp_path / "index", clustered(count, 1))
    done = tune_index(tmp_path / "index", Budget(latency_ms=0, memory_mib=memory_mib, recall=0.1))
    assert verify(tmp_path / "index") == []
    if count > 1:
        assert true_recall(tmp_path / "index", clustered(count, 1)) >= 0.1
    assert (done.kind == EXACT) == (done.file == "")


# ---------------------------------------------------------------------- what no search may miss or find


@pytest.mark.parametrize("memory_mib", [0, 1024])
def test_files_that_were_forgotten_are_no_hits(tmp_path: Path, memory_mib: int) -> None:
    index, vectors = tmp_path / "index", clustered(COUNT, 0)
    take_in(index, vectors[:2000])
    take_in(index, vectors[2000:], first=2000, root="/others")
    budget = Budget(latency_ms=0, memory_mib=memory_mib, recall=0.8)
    tune_index(index, budget)
    opened = ImageIndex.open(index)
    assert any(row >= 2000 for hits in opened.search_many(vectors[:50], 10) for row in rows_of(hits))
    assert forget_roots(index, [Path("/others")]) == 1000
    assert tuning(index).file != "", "it is still there"
    dead = np.arange(2000, COUNT)
    for hits in opened.search_many(vectors[-50:], 10):
        assert len(hits) == 10
        assert all(hit.path.parent == Path("/photos") for hit in hits)
    assert true_recall(index, vectors, dead) >= 0.8
    assert rows_of(opened.search(vectors[2500], 200)) == exact_rows(vectors, vectors[2500], 200, dead)
    again = tune_index(index, budget)
    assert again.recall == pytest.approx(true_recall(index, vectors, dead), abs=1e-9)


def test_where_hardly_any_is_left_the_rest_is_found_to_the_last(index: Path) -> None:
    tune_index(index, NOW)
    vectors, left = clustered(COUNT, 0), [3, 700, 1500, 2222, 2999]
    with writer_lock(index), Catalog(current_generation(index).catalog) as catalog, catalog.transaction():
        (root,) = catalog.roots()
        catalog.drop(root, [f"{row:06d}.png" for row in range(COUNT) if row not in left])
    for query in vectors[:20]:
        expected = [row for row in exact_rows(vectors, query, COUNT) if row in left]
        assert rows_of(ImageIndex.open(index).search(query, 50)) == expected
        assert rows_of(ImageIndex.open(index).search(query, 3)) == expected[:3]
    done = tune_index(index, NOW)
    assert (done.kind, approximations(index)) == (EXACT, [])


def test_pictures_that_are_removed_and_come_are_followed_by_the_update(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", 60)
    index, encoder = tmp_path / "index", CountingEncoder()
    update_index(index, [tmp_path / "photos"], encoder)
    tune_index(index, Budget(latency_ms=0, recall=0.1))
    assert tuning(index).file == "ann-000001.faiss"
    for path in paths[:10]:
        path.unlink()
    new = gallery(tmp_path / "photos", 5, first=200)
    update_index(index, [], encoder)
    assert tuning(index).rows == 65
    queries = encoder.embed(np.stack([np.asarray(noise(seed)) for seed in [*range(10), *range(200, 205)]]))
    found = ImageIndex.open(index).search_many(queries, 5)
    assert not {hit.path for hits in found for hit in hits} & set(paths[:10])
    assert [hits[0].path for hits in found[10:]] == new
    assert verify(index) == []


@pytest.mark.parametrize("dead", [None, np.arange(0, COUNT, 7)])
def test_more_hits_than_are_tuned_for_are_searched_exactly(tmp_path: Path, dead: Rows | None) -> None:
    vectors = clustered(COUNT, 0)
    ann.build(tmp_path / "a.faiss", "IVF76,SQ8", vectors)
    few = ann.Approximation(tmp_path / "a.faiss", "IVF76,SQ8", COUNT, 6)
    searcher, exact = ann.Searcher(vectors, dead, few), ann.Searcher(vectors, dead)
    most = ann.MAX_APPROXIMATE_K
    assert not np.array_equal(searcher.search(vectors[:50], most)[1], exact.search(vectors[:50], most)[1])
    assert np.array_equal(searcher.search(vectors[:50], most + 1)[1], exact.search(vectors[:50], most + 1)[1])


# ---------------------------------------------------------------------- growth


def test_rows_that_come_later_are_found_at_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tune_index(index, SOON)
    built = build_counter(monkeypatch)
    more = clustered(40, 1)
    opened = ImageIndex.open(index)
    take_in(index, more, first=COUNT)
    assert tuning(index) == before, "so few are scanned, and change no recall worth measuring"
    assert [rows_of(hits)[0] for hits in opened.search_many(more, 3)] == list(range(COUNT, COUNT + 40))
    assert true_recall(index, np.concatenate([clustered(COUNT, 0), more])) >= 0.95
    assert built == []
    assert verify(index) == []


def test_rows_that_come_later_and_go_are_no_hits(index: Path) -> None:
    tune_index(index, SOON)
    more = clustered(40, 1)
    take_in(index, more, first=COUNT, root="/others")
    forget_roots(index, [Path("/others")])
    found = ImageIndex.open(index).search_many(more, 10)
    assert max(row for hits in found for row in rows_of(hits)) < COUNT
    assert all(len(hits) == 10 for hits in found)


def test_after_some_growth_the_recall_is_measured_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tune_index(index, SOON)
    built = build_counter(monkeypatch)
    more = clustered(100, 1)
    take_in(index, more, first=COUNT)
    after = tuning(index)
    assert (after.rows, after.measured_rows, after.file) == (COUNT, COUNT + 100, before.file)
    assert after.recall == pytest.approx(true_recall(index, np.concatenate([clustered(COUNT, 0), more])), abs=1e-9)
    assert built == []


def test_after_more_growth_the_rows_are_added(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune_index(index, SOON)
    opened = ImageIndex.open(index)
    opened.search(clustered(1, 1)[0], 1)
    built = build_counter(monkeypatch)
    more = clustered(400, 1)
    take_in(index, more, first=COUNT)
    after = tuning(index)
    assert (after.rows, after.trained_rows, after.measured_rows) == (COUNT + 400, COUNT, COUNT + 400)
    assert (after.file, approximations(index)) == ("ann-000002.faiss", ["ann-000002.faiss"])
    assert after.bytes == (current_generation(index).path / after.file).stat().st_size
    assert after.recall == pytest.approx(true_recall(index, np.concatenate([clustered(COUNT, 0), more])), abs=1e-9)
    assert [rows_of(hits)[0] for hits in opened.search_many(more[:50], 1)] == list(range(COUNT, COUNT + 50))
    assert built == []
    assert verify(index) == []


def test_after_doubling_it_is_trained_anew(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune_index(index, SOON)
    built = build_counter(monkeypatch)
    take_in(index, clustered(COUNT, 1), first=COUNT)
    after = tuning(index)
    assert (after.rows, after.trained_rows, after.measured_rows) == (2 * COUNT,) * 3
    assert built == [after.kind] == ["IVF153,SQ8"]
    assert approximations(index) == [after.file]
    assert true_recall(index, np.concatenate([clustered(COUNT, 0), clustered(COUNT, 1)])) >= 0.95


def test_growth_that_spoils_the_recall_makes_it_build_anew(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune_index(index, SOON)
    built = build_counter(monkeypatch)
    others = isotropic(2000, 5)  # far from every centroid
    take_in(index, others, first=COUNT)
    after, everything = tuning(index), np.concatenate([clustered(COUNT, 0), others])
    assert built == [f"IVF{5000 // 39},SQ8"]
    if after.kind == EXACT:
        assert "not 0.95" in after.reason
        assert true_recall(index, everything) == 1.0
    else:
        assert after.trained_rows == COUNT + 2000
        assert true_recall(index, everything) >= 0.95


def test_an_index_that_grows_over_the_budget_gets_one_by_itself(tmp_path: Path) -> None:
    index = tmp_path / "index"
    take_in(index, clustered(1000, 0))
    assert tune_index(index, SOON).kind == EXACT
    take_in(index, clustered(2000, 1), first=1000)
    assert tuning(index).kind == "IVF76,SQ8"


# ---------------------------------------------------------------------- approximations that are no good


def test_an_approximation_that_misses_too_much_is_given_up_with_the_reason(tmp_path: Path) -> None:
    index, vectors = tmp_path / "index", isotropic(COUNT, 0)
    take_in(index, vectors)
    done = tune_index(index, replace(NOW, recall=1.0))
    assert (done.kind, done.file, done.rows) == (EXACT, "", COUNT)
    assert done.reason.startswith("IVF76,SQ8 finds 0.")
    assert done.reason.endswith("of the nearest 10 by reading a quarter of all, not 1")
    assert approximations(index) == []
    assert true_recall(index, vectors) == 1.0
    assert verify(index) == []


def test_what_was_given_up_is_tried_again_after_growth_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    take_in(index, isotropic(COUNT, 0))
    before = tune_index(index, replace(NOW, recall=1.0))
    built = build_counter(monkeypatch)
    take_in(index, isotropic(1400, 1), first=COUNT)
    assert (tuning(index), built) == (before, [])
    take_in(index, isotropic(100, 2), first=COUNT + 1400)
    assert len(built) == 1
    assert tuning(index).rows == COUNT + 1500


# ---------------------------------------------------------------------- damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_other_rows(file: Path) -> None:
    ann.build(file, "IVF76,SQ8", clustered(COUNT - 1, 0))


def of_other_length(file: Path) -> None:
    ann.build(file, "IVF76,SQ8", clustered(COUNT, 0, DIM + 4))


damaged = pytest.mark.parametrize(
    "damage",
    [Path.unlink, cut, of_other_rows, of_other_length, lambda file: file.write_bytes(b"")],
    ids=["deleted", "cut", "other rows", "other D", "empty"],
)


@damaged
def test_without_its_approximation_an_index_is_searched_exactly_and_says_so_once(
    index: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    done, vectors = tune_index(index, replace(NOW, recall=0.3)), clustered(COUNT, 0)
    assert true_recall(index, vectors) < 1.0
    file = current_generation(index).path / done.file
    damage(file)
    with caplog.at_level(logging.WARNING):
        opened = ImageIndex.open(index)
        for _ in range(3):
            for query in vectors[:20]:
                assert rows_of(opened.search(query, 10)) == exact_rows(vectors, query, 10)
    (warning,) = caplog.records
    assert warning.getMessage().startswith(f"searching exactly, which is slower: {file} ")
    assert warning.getMessage().endswith("run: mimco index tune")
    assert len(verify(index)) == 1
    mended = tune_index(index, NOW)
    assert verify(index) == []
    assert mended.recall == pytest.approx(true_recall(index, vectors), abs=1e-9)
    assert approximations(index) == [mended.file]


@damaged
@pytest.mark.parametrize("budget", [NOW, SOON], ids=["rows are added", "rows are scanned"])
def test_an_update_survives_a_damaged_approximation(
    index: Path, tmp_path: Path, budget: Budget, damage: Callable[[Path], object]
) -> None:
    done = tune_index(index, budget)
    damage(current_generation(index).path / done.file)
    gallery(tmp_path / "pictures", 2)
    report = update_index(index, [tmp_path / "pictures"], CountingEncoder())
    assert report.counts.files == COUNT + 2
    found = ImageIndex.open(index).search_many(clustered(COUNT, 0)[:3], 1)
    assert [hits[0].path.name for hits in found] == ["000000.png", "000001.png", "000002.png"]
    tune_index(index, SOON)
    assert verify(index) == []


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dead", [None, np.arange(100)])
def test_row_numbers_that_changed_on_the_disk_give_no_hit_twice_and_none_that_is_not_there(
    tmp_path: Path, seed: int, dead: Rows | None
) -> None:
    vectors, rng = clustered(COUNT, 0), np.random.default_rng(seed)
    ann.build(tmp_path / "a.faiss", "IVF76,SQ8", vectors)
    content = bytearray((tmp_path / "a.faiss").read_bytes())
    for at in rng.integers(len(content) // 2, len(content), 200):  # the lists stand at the end
        content[at] ^= 1 << int(rng.integers(0, 8))
    (tmp_path / "a.faiss").write_bytes(content)
    searcher = ann.Searcher(vectors, dead, ann.Approximation(tmp_path / "a.faiss", "IVF76,SQ8", COUNT, 8))
    scores, rows = searcher.search(vectors[:200], 10)
    assert all(len(set(found)) == 10 for found in rows.tolist())
    assert rows.min() >= (0 if dead is None else 100)
    assert rows.max() < COUNT
    for query, found_scores, found in zip(vectors[:200], scores, rows, strict=True):
        assert found_scores.tolist() == pytest.approx((vectors[found] @ query).tolist(), abs=1e-5)


# ---------------------------------------------------------------------- full disks


def full(*_: object) -> None:
    raise RuntimeError("Error in write_index: write error in a.faiss: 0 != 1 (No space left on device)")


@pytest.mark.parametrize("before", [None, NOW])
def test_a_full_disk_leaves_what_was_there(index: Path, monkeypatch: pytest.MonkeyPatch, before: Budget | None) -> None:
    vectors = clustered(COUNT, 0)
    if before is not None:
        tune_index(index, before)
    searched, files = tuning(index), approximations(index)
    opened = ImageIndex.open(index)
    expected = opened.search_many(vectors[:30], 10)
    with monkeypatch.context() as patch:
        patch.setattr("faiss.write_index", full)
        with pytest.raises(IndexStoreError, match=r"No space left on device.*; expected room on the disk; run: mimco"):
            tune_index(index, replace(NOW, recall=0.9))
    assert (tuning(index), approximations(index)) == (searched, files)
    assert opened.search_many(vectors[:30], 10) == expected
    assert verify(index) == []
    assert tune_index(index, NOW).kind == "IVF76,SQ8"


def test_a_full_disk_while_rows_are_added_leaves_what_was_there(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = tune_index(index, NOW)
    (path,) = gallery(tmp_path / "pictures", 1)
    with monkeypatch.context() as patch:
        patch.setattr("faiss.write_index", full)
        report = update_index(index, [tmp_path / "pictures"], CountingEncoder())
    assert report.counts.files == COUNT + 1, "the picture is in"
    assert "searching as before" in caplog.text
    assert (tuning(index), approximations(index)) == (before, [before.file])
    query = CountingEncoder().embed(np.asarray(noise(0))[np.newaxis])[0]
    assert ImageIndex.open(index).search(query, 1)[0].path == path
    assert verify(index) == []


LIMITED = """
import resource, sys
from pathlib import Path
from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.tuning import Budget, tune_index
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    tune_index(Path(sys.argv[1]), Budget(latency_ms=0))
except IndexStoreError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize("share", [0.7, 0.99])
def test_a_limit_on_the_size_of_files_leaves_what_was_there(tmp_path: Path, share: float) -> None:
    index, vectors = tmp_path / "index", clustered(2000, 0, 768)
    take_in(index, vectors)
    ann.build(tmp_path / "a.faiss", "IVF51,SQ8", vectors)
    limit = int(share * (tmp_path / "a.faiss").stat().st_size)
    assert current_generation(index).catalog.stat().st_size < limit, "only the approximation is too large"
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(index), str(limit)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (1, "")
    assert "expected room on the disk; run: mimco index tune" in run.stdout
    assert (tuning(index).kind, approximations(index)) == (EXACT, [])
    assert verify(index) == []
    assert tune_index(index, NOW).kind == "IVF51,SQ8"


def test_a_tuning_is_read_as_it_was_recorded(index: Path) -> None:
    done = tune_index(index, NOW)
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        assert tuning_of(catalog) == done
