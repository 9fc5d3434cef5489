from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimco_deploy.serving.ann import Searcher

Vectors = npt.NDArray[np.float32]


def unit(rng: np.random.Generator, count: int, dim: int) -> Vectors:
    raw = rng.standard_normal((count, dim))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


def search_exact(
    vectors: Vectors, live: npt.NDArray[np.bool_] | None, queries: Vectors, k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    return Searcher(vectors, None if live is None else np.flatnonzero(~live)).search(queries, k)


def oracle(vectors: Vectors, live: npt.NDArray[np.bool_], query: Vectors, k: int) -> list[tuple[float, int]]:
    """Score every row, sort by falling score, then by rising row."""
    scored = [
        (-sum(float(a) * float(b) for a, b in zip(vector, query, strict=True)), row)
        for row, vector in enumerate(vectors)
        if live[row]
    ]
    return [(-score, row) for score, row in sorted(scored)[:k]]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 400), k=st.integers(1, 120), dead=st.floats(0, 1))
def test_the_result_is_that_of_sorting_all_scores(seed: int, count: int, k: int, dead: float) -> None:
    rng = np.random.default_rng(seed)
    # Every sum is exact, and many tie, also across the k-th place.
    vectors, queries = (np.asarray(rng.integers(-1, 2, (rows, 3)) / 2, np.float32) for rows in (count, 3))
    live = rng.random(count) >= dead
    scores, rows = search_exact(vectors, live, queries, k)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    assert scores.shape == rows.shape == (3, min(k, int(live.sum())))
    for query, found_scores, found_rows in zip(queries, scores, rows, strict=True):
        found = list(zip(found_scores.tolist(), found_rows.tolist(), strict=True))
        assert found == oracle(vectors, live, query, k)


def test_equal_scores_come_by_rising_row_although_more_tie_than_are_asked_for() -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat(unit(rng, 1, 16), 500, axis=0)
    vectors[250] = -vectors[250]
    scores, rows = search_exact(vectors, None, vectors[:2], 7)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2
    assert len(set(scores.ravel().tolist())) == 1


@pytest.mark.parametrize("dead", [False, True])
def test_a_score_does_not_depend_on_how_many_are_asked_at_once(dead: bool) -> None:
    rng = np.random.default_rng(1)
    vectors, queries = unit(rng, 400, 32), unit(rng, 64, 32)
    live = rng.random(400) < 0.5 if dead else None
    together = search_exact(vectors, live, queries, 150)  # FAISS takes another road for many queries and large k
    for number in range(0, 64, 9):
        alone = search_exact(vectors, live, queries[number : number + 1], 150)
        np.testing.assert_array_equal(together[0][number], alone[0][0])
        np.testing.assert_array_equal(together[1][number], alone[1][0])


def test_a_dead_row_is_never_found_even_where_it_is_the_best() -> None:
    vectors = unit(np.random.default_rng(2), 50, 8)
    live = np.ones(50, np.bool_)
    live[[7, 13]] = False
    _, rows = search_exact(vectors, live, vectors[[7, 13, 20]], 50)
    assert rows.shape == (3, 48)
    assert not {7, 13} & set(rows.ravel().tolist())
    assert rows[2, 0] == 20


def test_nothing_live_gives_nothing() -> None:
    vectors = unit(np.random.default_rng(3), 4, 8)
    scores, rows = search_exact(vectors, np.zeros(4, np.bool_), vectors[:2], 3)
    assert scores.shape == rows.shape == (2, 0)
    scores, rows = search_exact(vectors[:0], None, vectors[:2], 3)
    assert scores.shape == rows.shape == (2, 0)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 300), k=st.integers(1, 40), allowed=st.floats(0, 1))
def test_a_search_within_some_rows_is_that_of_sorting_their_scores(
    seed: int, count: int, k: int, allowed: float
) -> None:
    rng = np.random.default_rng(seed)
    vectors, queries = (np.asarray(rng.integers(-1, 2, (rows, 3)) / 2, np.float32) for rows in (count, 2))
    chosen = np.flatnonzero(rng.random(count) < allowed)
    whole = Searcher(vectors)
    scores, rows = whole.within(chosen).search(queries, k)
    mask = np.isin(np.arange(count), chosen)
    for query, found_scores, found_rows in zip(queries, scores, rows, strict=True):
        assert list(zip(found_scores.tolist(), found_rows.tolist(), strict=True)) == oracle(vectors, mask, query, k)
    assert whole.search(queries, k)[1].shape == (2, min(k, count))
