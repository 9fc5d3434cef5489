"""Agreement of embeddings: by values that are known, and against a plain loop."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from mimco_deploy.bundle import Tolerance
from mimco_deploy.serving.agreement import MIN_PICTURES, K, compare

Embeddings = npt.NDArray[np.float32]


def drawn(seed: int, count: int = 60, dim: int = 8) -> Embeddings:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def by_loop(found: Embeddings, reference: Embeddings) -> tuple[float, float]:
    """Overlap and recall where no two scores are equal."""
    kept, nearest = [], []
    for number in range(len(reference)):
        others = [other for other in range(len(reference)) if other != number]
        true = sorted(others, key=lambda other: -float(reference[number] @ reference[other]))[:K]
        seen = sorted(others, key=lambda other: -float(found[number] @ found[other]))[:K]
        kept.append(len(set(true) & set(seen)) / K)
        nearest.append(true[0] in seen)
    return float(np.mean(kept)), float(np.mean(nearest))


def test_the_same_embeddings_agree_in_full() -> None:
    found = compare(drawn(0), drawn(0))
    assert (found.pictures, found.max_abs, found.overlap, found.recall) == (60, 0.0, 1.0, 1.0)
    assert found.min_cosine == pytest.approx(1.0)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_neighbours_are_counted_as_a_loop_counts_them(noise: float) -> None:
    reference = drawn(0)
    found = reference + noise * drawn(1)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    agreement = compare(found, reference)
    assert (agreement.overlap, agreement.recall) == pytest.approx(by_loop(found, reference))
    assert agreement.max_abs == np.abs(found - reference).max()


def test_unrelated_embeddings_keep_what_chance_keeps() -> None:
    overlap = compare(drawn(1, 400), drawn(2, 400)).overlap
    assert overlap == pytest.approx(10 / 399, abs=0.015)


def test_of_equal_neighbours_any_will_do() -> None:
    reference = np.tile(drawn(0, 2), (15, 1))  # two pictures, fifteen times each
    shuffled = np.nextafter(reference, np.float32(2), dtype=np.float32)
    assert compare(shuffled, reference).overlap == 1.0


def test_too_few_pictures_say_nothing_of_neighbours() -> None:
    few = compare(drawn(0, MIN_PICTURES - 1), drawn(0, MIN_PICTURES - 1))
    assert (few.overlap, few.recall) == (None, None)
    assert compare(drawn(0, MIN_PICTURES), drawn(0, MIN_PICTURES)).overlap == 1.0


def test_breaches_are_named_with_both_numbers_and_nan_is_one() -> None:
    tolerance = Tolerance(max_abs=1e-3, min_cosine=0.999, min_overlap=0.95)
    assert compare(drawn(0), drawn(0)).breaches(tolerance) == []
    bad = compare(drawn(1), drawn(0)).breaches(tolerance)
    assert [breach.split()[0] for breach in bad] == ["differs", "cosine", "top-10"]
    assert "(at least 0.95)" in bad[2]
    longer = compare(1.3 * drawn(0), drawn(0))
    assert longer.min_cosine == pytest.approx(1.0)
    assert "norms are off by 0.300" in longer.breaches(tolerance)
    broken = drawn(0)
    broken[3, 2] = np.nan
    assert [breach.split()[0] for breach in compare(broken, drawn(0)).breaches(tolerance)] == [
        "differs",
        "cosine",
        "norms",
    ]
