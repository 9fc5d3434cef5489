"""Linear probe and few-shot: right where classes can be told apart, chance where they cannot, honest about choosing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.few_shot import few_shot
from mimco_deploy.evaluation.linear import GRID, probe
from mimco_deploy.evaluation.measures import difference, mean_over_draws

Data = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def clusters(count: int, spread: float, seed: int) -> Data:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    rows = np.eye(3, 8)[labels] + spread * rng.normal(size=(count, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def test_classes_that_lie_apart_are_all_right() -> None:
    (gallery, labels), (queries, truth) = clusters(120, 0.05, 0), clusters(60, 0.05, 1)
    assert probe(gallery, labels, queries, truth).right.mean() == 1.0
    assert few_shot(gallery, labels, queries, truth, shots=1).mean() == 1.0


def test_labels_without_meaning_are_guessed_by_chance() -> None:
    gallery, _ = clusters(300, 0.5, 0)
    queries, _ = clusters(300, 0.5, 1)
    rng = np.random.default_rng(2)
    labels, truth = rng.integers(0, 3, 300), rng.integers(0, 3, 300)
    assert probe(gallery, labels, queries, truth).right.mean() == pytest.approx(1 / 3, abs=0.09)
    assert few_shot(gallery, labels, queries, truth, shots=5).mean() == pytest.approx(1 / 3, abs=0.09)


def test_what_is_chosen_does_not_depend_on_the_queries() -> None:
    gallery, labels = clusters(150, 0.6, 0)
    queries, truth = clusters(50, 0.6, 1)
    first = probe(gallery, labels, queries, truth)
    second = probe(gallery, labels, 100 * queries[:10] + 7, (truth[:10] + 1) % 3)
    assert first.chosen_c == second.chosen_c
    assert first.tried == second.tried
    assert list(first.tried) == list(GRID[: len(first.tried)])
    assert first.tried[first.chosen_c] == max(first.tried.values())


def test_a_linear_probe_reads_what_the_nearest_mean_cannot() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 400)
    rows = rng.normal(size=(400, 8))
    rows[:, 0] = (labels - 0.5) * 0.4  # a narrow but clean direction under broad noise
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    right = probe(rows[:300], labels[:300], rows[300:], labels[300:]).right.mean()
    assert right > few_shot(rows[:300], labels[:300], rows[300:], labels[300:], shots=1).mean() + 0.2


@pytest.mark.parametrize("seed", range(6))
def test_a_large_class_does_not_end_the_search_for_a_penalty(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(200) < 0.2).astype(np.int64)
    rows = rng.normal(size=(200, 64)) + labels[:, None] * 0.4
    probed = probe(rows.astype(np.float32), labels, rows.astype(np.float32), labels)
    assert len(probed.tried) > 6  # beyond the penalties under which everything is of the large class


def test_more_examples_help() -> None:
    (gallery, labels), (queries, truth) = clusters(300, 0.5, 0), clusters(300, 0.5, 1)
    one, many = (few_shot(gallery, labels, queries, truth, shots=shots).mean() for shots in (1, 50))
    assert many > one + 0.05


def test_the_interval_of_few_shots_holds_other_draws_of_examples() -> None:
    (gallery, labels), (queries, truth) = clusters(600, 1.0, 0), clusters(400, 1.0, 1)
    all_draws = few_shot(gallery, labels, queries, truth, shots=1, tries=300)
    assert all_draws.shape == (300, 400)
    held = 0
    for start in range(0, 300, 10):
        measure = mean_over_draws("few-shot", "top-1", all_draws[start : start + 10])
        assert measure.value == pytest.approx(all_draws[start : start + 10].mean())
        held += measure.low <= all_draws.mean() <= measure.high
    assert held >= 27


def test_twelve_of_twelve_in_every_draw_are_not_certain() -> None:
    measure = mean_over_draws("few-shot", "top-1", np.ones((10, 12)))
    assert (measure.value, measure.high) == (1.0, 1.0)
    assert measure.low == pytest.approx(0.757, abs=1e-3)


def test_a_difference_over_draws_holds_that_of_other_draws() -> None:
    (gallery, labels), (queries, truth) = clusters(600, 1.0, 0), clusters(400, 1.0, 1)
    worse = gallery + np.random.default_rng(3).normal(size=gallery.shape).astype(np.float32)
    ours, theirs = (few_shot(one, labels, queries, truth, shots=1, tries=300) for one in (gallery, worse))
    held = 0
    for start in range(0, 300, 10):
        some = slice(start, start + 10)
        apart = difference(mean_over_draws("f", "n", ours[some]), mean_over_draws("f", "n", theirs[some]))
        assert apart is not None
        held += apart.low <= theirs.mean() - ours.mean() <= apart.high
    assert held >= 27


@pytest.mark.parametrize(("pictures", "in_common"), [(12, 0.0), (60, 0.0), (60, 0.1)])
def test_encoders_that_do_not_differ_are_beyond_chance_one_time_of_twenty(pictures: int, in_common: float) -> None:
    """Ten draws each, the same for both, of which some may favour one encoder on all pictures."""
    rng, stars, tries = np.random.default_rng(11), 0, 300
    for _ in range(tries):
        favour = in_common * rng.normal(size=(10, 1))
        chance = 0.5 + 0.3 * rng.normal(size=pictures)
        ours, theirs = (
            mean_over_draws("f", "n", (rng.random((10, pictures)) < chance + sign * favour).astype(np.float64))
            for sign in (-0.5, 0.5)
        )
        apart = difference(ours, theirs)
        assert apart is not None
        stars += apart.beyond_chance
    assert 0.02 * tries <= stars <= 0.08 * tries


def test_a_difference_over_draws_of_four_pictures_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (mean_over_draws("f", "n", rng.integers(0, 2, (10, 4)).astype(np.float64)) for _ in range(2))
    apart = difference(ours, theirs)
    assert apart is not None
    assert np.isnan([apart.low, apart.high]).all()


def test_a_single_class_is_refused() -> None:
    gallery, _ = clusters(10, 0.1, 0)
    labels = np.zeros(10, np.int64)
    with pytest.raises(EvaluationError, match="two classes or more"):
        probe(gallery, labels, gallery, labels)
    with pytest.raises(EvaluationError, match="two or more"):
        few_shot(gallery, labels, gallery, labels, shots=1)


def test_a_class_with_one_picture_leaves_none_to_choose_on() -> None:
    gallery, labels = clusters(20, 0.1, 0)
    labels[0] = 3
    with pytest.raises(EvaluationError, match="two pictures or more each"):
        probe(gallery, labels, gallery, labels)
