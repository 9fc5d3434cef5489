"""Retrieval against loops written from the definitions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation import retrieval as module
from mimco_deploy.evaluation.retrieval import Retrieval, average_precision, retrieval, retrieval_among

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
KS = (1, 2, 5, 40)


def expected_of(scores: Sequence[float], relevant: Sequence[bool]) -> tuple[float, list[float], list[float]]:
    """AP, recall and precision at each of KS of one query, from the definitions; of equals the relevant ones last."""
    ranking = sorted(range(len(scores)), key=lambda number: (-scores[number], relevant[number]))
    hits = [relevant[number] for number in ranking]
    precisions = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
    recall = [float(any(hits[:k])) for k in KS]
    return sum(precisions) / len(precisions), recall, [sum(hits[:k]) / k for k in KS]


def unit(rng: np.random.Generator, count: int, width: int = 8) -> Floats:
    rows = rng.normal(size=(count, width))
    embeddings: Floats = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return embeddings


def exact(rng: np.random.Generator, count: int, width: int = 6) -> Floats:
    """Rows whose products are exact in float32 whatever the order of summing, with many ties."""
    return rng.integers(-1, 2, (count, width)).astype(np.float32)


def same(first: Retrieval, second: Retrieval) -> bool:
    fields = ("average_precision", "recall", "precision")
    return all(np.array_equal(getattr(first, name), getattr(second, name), equal_nan=True) for name in fields)


@pytest.mark.parametrize("ties", [False, True])
def test_each_query_has_the_numbers_of_the_definitions(ties: bool) -> None:
    rng = np.random.default_rng(3)
    make = exact if ties else unit
    queries, gallery = make(rng, 12), make(rng, 30)
    query_labels, labels = rng.integers(0, 4, 12), rng.integers(0, 4, 30)
    found = retrieval(queries, query_labels, gallery, labels, KS)
    scores = queries @ gallery.T
    assert (np.diff(np.sort(scores, axis=1)) == 0).any() == ties
    for query in range(12):
        area, recall, precision = expected_of(scores[query].tolist(), (labels == query_labels[query]).tolist())
        assert found.average_precision[query] == pytest.approx(area, abs=1e-12)
        assert found.recall[query].tolist() == recall
        assert found.precision[query] == pytest.approx(precision, abs=1e-12)
    assert found.mean_average_precision == pytest.approx(found.average_precision.mean())
    assert found.mean_recall == {k: pytest.approx(found.recall[:, i].mean()) for i, k in enumerate(KS)}
    assert found.mean_precision == {k: pytest.approx(found.precision[:, i].mean()) for i, k in enumerate(KS)}


@pytest.mark.parametrize("ties", [False, True])
def test_among_themselves_pictures_search_all_others(ties: bool) -> None:
    rng = np.random.default_rng(4)
    embeddings = (exact if ties else unit)(rng, 25)
    labels = np.arange(25) % 5
    found = retrieval_among(embeddings, labels, KS)
    scores = embeddings @ embeddings.T
    for query in range(25):
        others = np.delete(np.arange(25), query)
        area, recall, precision = expected_of(
            scores[query, others].tolist(), (labels[others] == labels[query]).tolist()
        )
        assert found.average_precision[query] == pytest.approx(area, abs=1e-12)
        assert found.recall[query].tolist() == recall
        assert found.precision[query] == pytest.approx(precision, abs=1e-12)


def test_a_copy_of_another_class_that_comes_before_the_query_itself_is_a_miss() -> None:
    embeddings = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    found = retrieval_among(embeddings, np.array([0, 1, 0, 1]), (1,))
    assert found.recall.ravel().tolist() == [0, 0, 0, 0]  # dropping rank 0 would leave picture 1 and 3 themselves


def test_a_perfect_ranking_is_1_and_the_worst_is_not() -> None:
    gallery = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    labels = np.repeat(np.arange(4), 3)
    perfect = retrieval(np.eye(4, dtype=np.float32), np.arange(4), gallery, labels, (1, 3))
    assert perfect.mean_average_precision == 1
    assert perfect.mean_recall == {1: 1, 3: 1}
    assert perfect.mean_precision == {1: 1, 3: 1}
    worst = retrieval(-np.eye(4, dtype=np.float32), np.arange(4), gallery, labels, (1, 3))
    assert worst.mean_recall == {1: 0, 3: 0}
    assert worst.average_precision == pytest.approx([(1 / 10 + 2 / 11 + 3 / 12) / 3] * 4)


def test_a_query_without_a_relevant_picture_is_counted_and_left_out_of_the_means() -> None:
    gallery = np.eye(3, dtype=np.float32)
    found = retrieval(gallery, np.array([0, 1, 7]), gallery, np.array([0, 2, 1]), (1,))
    assert found.without_relevant == 1
    assert np.isnan([found.average_precision[2], found.recall[2, 0], found.precision[2, 0]]).all()
    assert found.mean_average_precision == pytest.approx(
        (1 + 1 / 3) / 2
    )  # query 1 finds 1, then 0 and 2 at equal scores
    assert found.mean_recall == {1: 0.5}


def test_alone_in_its_class_a_picture_has_nothing_to_find() -> None:
    found = retrieval_among(np.eye(3, dtype=np.float32), np.array([0, 1, 2]), (1,))
    assert found.without_relevant == 3
    assert np.isnan(found.mean_average_precision)
    assert np.isnan(found.mean_recall[1])


@pytest.mark.parametrize("labels", [[0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]])
def test_a_collapsed_encoder_gets_nothing_for_the_order_of_the_gallery(labels: list[int]) -> None:
    same_rows = np.ones((6, 2), np.float32)
    found = retrieval(same_rows[:1], np.array([1]), same_rows, np.array(labels), (2, 4, 5))
    assert found.average_precision[0] == pytest.approx((1 / 5 + 2 / 6) / 2)  # as if they came last
    assert found.recall[0].tolist() == [0, 0, 1]


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_the_gallerys_order_does_not_matter_without_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries = np.eye(4, dtype=np.float32)  # so that scores are the gallery's entries, exactly
    gallery = np.stack([rng.permutation(20) for _ in queries], axis=1).astype(np.float32)
    query_labels, labels, order = rng.integers(0, 5, 4), rng.integers(0, 5, 20), rng.permutation(20)
    first = retrieval(queries, query_labels, gallery, labels, KS)
    assert same(first, retrieval(queries, query_labels, gallery[order], labels[order], KS))


@pytest.mark.parametrize("scores", [1, 30, 77, 10_000])
def test_blocks_of_any_size_give_the_same(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    queries, gallery = exact(rng, 17), exact(rng, 30)
    query_labels, labels = rng.integers(0, 3, 17), rng.integers(0, 3, 30)
    whole = retrieval(queries, query_labels, gallery, labels, KS), retrieval_among(gallery, labels, KS)
    monkeypatch.setattr(module, "BLOCK_SCORES", scores)
    blocked = retrieval(queries, query_labels, gallery, labels, KS), retrieval_among(gallery, labels, KS)
    assert all(map(same, whole, blocked))


def test_broken_input_is_refused() -> None:
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(EvaluationError, match="2 labels for 3 pictures"):
        retrieval_among(rows, np.array([0, 1]))
    with pytest.raises(EvaluationError, match="not finite"):
        retrieval(rows, np.arange(3), np.full((3, 3), np.nan, np.float32), np.arange(3))
    with pytest.raises(EvaluationError, match="k = 0"):
        retrieval_among(rows, np.arange(3), (0, 1))


@pytest.mark.golden("revisitop/ap_micro.json")
def test_trapezoidal_average_precision_is_the_authors(golden_file: Path) -> None:
    cases = json.loads(golden_file.read_text())
    assert cases
    for case in cases:
        area = average_precision(case["positions"], case["nres"], trapezoidal=True)
        assert area == pytest.approx(case["ap"], abs=1e-12)


def test_both_rules_of_average_precision_by_hand() -> None:
    assert average_precision([1, 3], 3, trapezoidal=False) == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert average_precision([1, 3], 3, trapezoidal=True) == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 3)
    assert average_precision([0, 1], 2, trapezoidal=False) == average_precision([0, 1], 2, trapezoidal=True) == 1
    assert average_precision([], 2, trapezoidal=False) == 0
    assert np.isnan(average_precision([], 0, trapezoidal=True))
