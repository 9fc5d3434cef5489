"""Spread, alignment and agreement against what must hold of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.label_free import MAX_PICTURES, alignment, neighbour_agreement, spread


def unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def random_embeddings(count: int, width: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


def test_equal_embeddings_have_rank_one_and_no_uniformity() -> None:
    rank, uniformity = spread(np.tile(random_embeddings(1, 16), (50, 1)))
    assert rank.value == pytest.approx(1.0, abs=1e-3)
    assert uniformity.value == pytest.approx(0.0, abs=1e-6)


def test_an_orthonormal_basis_has_full_rank() -> None:
    rank, uniformity = spread(np.eye(12, dtype=np.float32))
    assert rank.value == pytest.approx(12.0, rel=1e-4)
    assert uniformity.value == pytest.approx(-4.0)  # every pair at squared distance 2


def test_rank_and_uniformity_are_those_of_their_definitions() -> None:
    embeddings = random_embeddings(40, 8)
    rank, uniformity = spread(embeddings)
    shares = np.linalg.svd(embeddings.astype(np.float64), compute_uv=False)
    shares = shares / shares.sum() + 1e-7
    assert rank.value == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    kernels = [
        np.exp(-2 * np.sum((embeddings[a].astype(np.float64) - embeddings[b]) ** 2))
        for a in range(40)
        for b in range(40)
        if a != b
    ]
    assert uniformity.value == pytest.approx(np.log(np.mean(kernels)), rel=1e-5)


def test_the_effective_rank_is_not_above_the_number_of_pictures() -> None:
    rank, _ = spread(np.eye(6, 64, dtype=np.float32))  # six of equal weight: with no more directions than they have
    assert rank.value == pytest.approx(6.0, rel=1e-5)


def test_large_sets_are_sampled() -> None:
    rank, _ = spread(random_embeddings(MAX_PICTURES + 500, 4))
    assert rank.count == MAX_PICTURES


def test_one_picture_spreads_over_nothing() -> None:
    with pytest.raises(EvaluationError, match="two or more"):
        spread(random_embeddings(1, 4))


def test_alignment_is_the_squared_distance() -> None:
    first, second = random_embeddings(5, 6), random_embeddings(5, 6, seed=1)
    expected = np.mean(np.sum((first.astype(np.float64) - second) ** 2, axis=1))
    assert alignment(first, second, "blur").value == pytest.approx(expected, rel=1e-5)
    assert alignment(first, first, "blur").value == pytest.approx(0.0, abs=1e-6)


def test_an_encoder_agrees_with_itself_and_with_its_rotation() -> None:
    embeddings = random_embeddings(60, 8)
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0].astype(np.float32)
    assert neighbour_agreement(embeddings, embeddings).value == 1.0
    assert neighbour_agreement(embeddings, embeddings @ rotation).value == pytest.approx(1.0, abs=0.01)


def test_unrelated_encoders_agree_by_chance() -> None:
    found = neighbour_agreement(random_embeddings(500, 8), random_embeddings(500, 8, seed=9))
    assert found.value == pytest.approx(10 / 499, abs=0.01)


def test_of_a_few_pictures_no_interval_is_known() -> None:
    rank, _ = spread(random_embeddings(2, 4))
    assert rank.value > 1
    assert np.isnan(rank.low)


def test_too_few_pictures_to_compare_neighbours_are_refused() -> None:
    with pytest.raises(EvaluationError, match="12 or more"):
        neighbour_agreement(random_embeddings(11, 4), random_embeddings(11, 4))
