"""Pairs of like embeddings: groups and nearest ones, as a look at every pair finds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimco_deploy.serving import pairs
from mimco_deploy.serving.pairs import groups_above, nearest_above, scores_of

Vectors = npt.NDArray[np.float32]


def unit(vectors: npt.NDArray[Any]) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def with_near_ones(count: int, near: int, dim: int, low: float, seed: int = 0) -> Vectors:
    """Random vectors, some of which come once more at a cosine of `low` to 1."""
    rng = np.random.default_rng(seed)
    first = unit(rng.standard_normal((count, dim)))
    other = first[rng.integers(0, count, near)]
    drawn = rng.standard_normal((near, dim))
    aside = unit(drawn - (drawn * other).sum(axis=1, keepdims=True) * other)
    cosine = rng.uniform(low, 1, (near, 1))
    return unit(rng.permutation(np.concatenate([first, cosine * other + np.sqrt(1 - cosine**2) * aside])))


def slow_groups(vectors: Vectors, rows: npt.NDArray[np.int64], min_score: float) -> list[int]:
    """The rule, pair by pair."""
    label = list(range(len(rows)))
    for a in range(len(rows)):
        for b in range(a):
            one, other = vectors[rows[a]], vectors[rows[b]]
            score = float((one.astype(np.float64) * other).sum())
            if score >= min_score or bool((one == other).all()):
                old, new = max(label[a], label[b]), min(label[a], label[b])
                label = [new if each == old else each for each in label]
    return label


# ---------------------------------------------------------------------------------------------------- groups of vectors


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 40),
    copies=st.integers(0, 10),
    dim=st.integers(2, 6),
    min_score=st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]),
    block=st.integers(1, 12),
)
def test_groups_are_those_of_a_look_at_every_pair(
    seed: int, count: int, copies: int, dim: int, min_score: float, block: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rng.standard_normal((count, dim)))
    vectors = np.concatenate([vectors, vectors[rng.integers(0, count, copies)]])
    rows = np.sort(rng.choice(len(vectors), rng.integers(1, len(vectors) + 1), replace=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_BLOCK", block)
        assert groups_above(vectors, rows, min_score).tolist() == slow_groups(vectors, rows, min_score)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), others=st.integers(1, 40), block=st.integers(1, 12))
def test_the_nearest_is_that_of_a_look_at_every_pair(seed: int, count: int, others: int, block: int) -> None:
    vectors = unit(np.random.default_rng(seed).standard_normal((count + others, 3)))
    rows = np.arange(count + others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_BLOCK", block)
        found, scores = nearest_above(vectors, rows[:count], rows[count:], 0.9)
    true = vectors[:count].astype(np.float64) @ vectors[count:].astype(np.float64).T
    best = true.max(axis=1)
    assert ((found >= 0) == (best >= 0.9)).all()
    assert scores[found >= 0] == pytest.approx(best[best >= 0.9], abs=1e-6)


@pytest.fixture
def many_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "COMPARED_IN_FULL", 100)


@pytest.mark.usefixtures("many_cells")
@pytest.mark.parametrize("min_score", [0.8, 0.95])
def test_cells_find_what_the_full_comparison_finds(min_score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = with_near_ones(3000, 600, 48, min_score - 0.02)
    rows = np.arange(len(vectors))
    with_cells = groups_above(vectors, rows, min_score)
    near, _ = nearest_above(vectors, rows[:1500], rows[1500:], min_score)
    monkeypatch.setattr(pairs, "COMPARED_IN_FULL", 10_000)
    full = groups_above(vectors, rows, min_score)
    assert (with_cells == full).mean() > 0.99
    assert all(full[a] == full[b] for a, b in enumerate(with_cells))
    full_near, _ = nearest_above(vectors, rows[:1500], rows[1500:], min_score)
    assert (near >= 0).sum() > 0.98 * (full_near >= 0).sum() > 50
    assert ((near == full_near) | (near < 0)).all()


@pytest.mark.usefixtures("many_cells")
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-4, 0.02])
def test_a_crowd_is_one_group_and_costs_no_pairs(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal(32) + spread * rng.standard_normal((20_000, 32)))
    compared = 0
    joined = pairs._Forest.join

    def counted(forest: Any, a: Any, b: Any) -> None:
        nonlocal compared
        compared += len(a)
        joined(forest, a, b)

    monkeypatch.setattr(pairs._Forest, "join", counted)
    assert not groups_above(vectors, np.arange(len(vectors)), 0.95).any()
    assert compared < 10 * len(vectors)  # of 200,000,000 pairs


@pytest.mark.usefixtures("many_cells")
def test_a_chain_is_one_group_although_its_ends_differ() -> None:
    angles = np.linspace(0, np.pi, 2000)
    vectors = unit(np.stack([np.cos(angles), np.sin(angles), np.zeros(2000)], axis=1))
    assert not groups_above(vectors, np.arange(2000), 0.99999).any()


def test_a_score_is_that_of_the_stored_numbers_in_float64() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((50, 384)))
    a, b = np.arange(49), np.arange(1, 50)
    exact = [float((vectors[i].astype(np.float64) * vectors[j]).sum()) for i, j in zip(a, b, strict=True)]
    assert scores_of(vectors, a, b).tolist() == exact
