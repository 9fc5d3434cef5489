"""k-NN against DINO's own eval script, and against what must hold of any k-NN."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from mimco_deploy.evaluation import knn as module
from mimco_deploy.evaluation.knn import (
    Floats,
    Labels,
    knn_accuracies,
    knn_accuracy,
    knn_predict,
    neighbour_confusion,
)


@pytest.mark.golden("dino/knn_seed*.npz")
def test_predictions_and_accuracy_are_the_authors(golden_file: Path) -> None:
    with np.load(golden_file, allow_pickle=False) as arrays:
        gallery, labels = arrays["train_features"], arrays["train_labels"]
        queries, truth = arrays["test_features"], arrays["test_labels"]
        ks = [int(name[1:].split("_")[0]) for name in arrays if name.endswith("_top1")]
        assert ks
        for k in ks:
            predicted = knn_predict(gallery, labels, queries, k=k)
            np.testing.assert_array_equal(predicted, arrays[f"k{k}_pred1"])
            accuracy, _ = knn_accuracy(gallery, labels, queries, truth, k=k)
            assert 100 * accuracy == pytest.approx(float(arrays[f"k{k}_top1"]))


def test_k_beyond_the_gallery_lets_all_vote() -> None:
    gallery = np.eye(3, dtype=np.float32)
    labels = np.array([0, 1, 1])
    assert knn_predict(gallery, labels, gallery, k=50).tolist() == [0, 1, 1]


@pytest.mark.golden("dino/knn_seed*.npz")
def test_one_search_gives_the_authors_top1_and_top5_for_every_k(golden_file: Path) -> None:
    with np.load(golden_file, allow_pickle=False) as arrays:
        gallery, labels = arrays["train_features"], arrays["train_labels"]
        queries, truth = arrays["test_features"], arrays["test_labels"]
        ks = [int(name[1:].split("_")[0]) for name in arrays if name.endswith("_top1")]
        accuracies = knn_accuracies(gallery, labels, queries, truth, ks)
        assert list(accuracies) == ks
        assert ks
        for k, accuracy in accuracies.items():
            np.testing.assert_array_equal(accuracy.right, arrays[f"k{k}_pred1"] == truth)
            assert 100 * accuracy.top1 == pytest.approx(float(arrays[f"k{k}_top1"]))
            assert 100 * accuracy.top5 == pytest.approx(float(arrays[f"k{k}_top5_positive_score_only"]))


def drawn(seed: int) -> tuple[Floats, Labels, Floats, Labels]:
    """Gallery, labels, queries, truth: products are exact, and many are equal."""
    rng = np.random.default_rng(seed)
    gallery, queries = (rng.integers(-1, 2, (count, 5)).astype(np.float32) for count in (40, 15))
    return gallery, rng.integers(0, 8, 40), queries, rng.integers(0, 9, 15)


def votes_of(gallery: Floats, labels: Labels, query: Floats, k: int, temperature: float) -> dict[int, float]:
    """Class → votes, from the definition."""
    scores = [float(row @ query) for row in gallery]
    votes: dict[int, float] = defaultdict(float)
    for number in sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:k]:
        votes[int(labels[number])] += math.exp(scores[number] / temperature)
    return votes


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_are_those_of_a_loop_over_the_definition(seed: int) -> None:
    gallery, labels, queries, truth = drawn(seed)
    for k, accuracy in knn_accuracies(gallery, labels, queries, truth, (1, 3, 12, 60), temperature=0.9).items():
        for query, label in enumerate(truth):
            votes = votes_of(gallery, labels, queries[query], k, 0.9)
            ranking = sorted(votes, key=lambda name: (-round(votes[name], 9), name))
            assert accuracy.right[query] == (ranking[0] == label)
            assert accuracy.right_of_5[query] == (label in ranking[:5])


def test_a_class_without_a_neighbour_is_not_among_the_five() -> None:
    gallery = np.eye(4, dtype=np.float32)
    queries = gallery[:1]
    accuracy = knn_accuracies(gallery, np.array([0, 1, 2, 3]), queries, np.array([1]), (1, 2))
    assert not accuracy[1].right_of_5[0]
    assert accuracy[2].right_of_5[0]


def test_a_class_that_the_gallery_does_not_have_is_never_right() -> None:
    gallery = np.eye(2, dtype=np.float32)
    accuracy = knn_accuracies(gallery, np.array([0, 1]), gallery, np.array([0, 2]), (2,))[2]
    assert (accuracy.top1, accuracy.top5) == (0.5, 0.5)


def test_a_low_temperature_neither_overflows_nor_forgets_a_neighbour() -> None:
    gallery = np.array([[1, 0], [-1, 0]], np.float32)
    accuracy = knn_accuracies(gallery, np.array([0, 1]), gallery[:1], np.array([1]), (2,), temperature=1e-3)[2]
    assert (accuracy.top1, accuracy.top5) == (0, 1)


def test_of_equally_near_pictures_the_first_of_the_gallery_vote() -> None:
    gallery = np.ones((50, 2), np.float32)
    labels = np.arange(50)[::-1].copy()
    assert knn_predict(gallery, labels, gallery[:1], k=3).tolist() == [47]  # 49, 48 and 47 weigh the same
    confusion = neighbour_confusion(gallery, labels, gallery[:1], np.array([0]), classes=50, k=2)
    assert np.flatnonzero(confusion[0]).tolist() == [48, 49]


def test_confusion_is_the_mean_share_of_neighbours() -> None:
    gallery, labels, queries, truth = drawn(7)
    truth[truth == 2] = 3
    confusion = neighbour_confusion(gallery, labels, queries, truth, classes=9, k=6)
    expected = np.zeros((9, 9))
    for query, label in enumerate(truth):
        scores = [float(row @ queries[query]) for row in gallery]
        for number in sorted(range(40), key=lambda number: (-scores[number], number))[:6]:
            expected[label, labels[number]] += 1 / 6
    asked = np.bincount(truth, minlength=9)
    np.testing.assert_allclose(confusion[asked > 0], expected[asked > 0] / asked[asked > 0, None], atol=1e-12)
    np.testing.assert_allclose(confusion[asked > 0].sum(axis=1), 1)
    assert np.isnan(confusion[2]).all()


def test_small_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = drawn(8)
    whole, confusion = knn_accuracies(*arguments, (3, 9)), neighbour_confusion(*arguments, 9, 4)
    monkeypatch.setattr(module, "_BLOCK", 100)
    for k, accuracy in knn_accuracies(*arguments, (3, 9)).items():
        np.testing.assert_array_equal(accuracy.right, whole[k].right)
        np.testing.assert_array_equal(accuracy.right_of_5, whole[k].right_of_5)
    np.testing.assert_array_equal(neighbour_confusion(*arguments, 9, 4), confusion)


def test_among_themselves_no_picture_is_its_own_neighbour() -> None:
    gallery = np.repeat(np.eye(2, dtype=np.float32), 3, axis=0)  # three copies of each of two pictures
    labels = np.array([0, 0, 1, 1, 1, 0])
    shares = neighbour_confusion(gallery, labels, gallery, labels, classes=2, k=2, among=True)
    # 0, 1 and 2 see each other, 3, 4 and 5 too: of class 0, pictures 0 and 1 see {0, 1} each, picture 5 sees {1, 1}
    np.testing.assert_allclose(shares, [[2 / 6, 4 / 6], [4 / 6, 2 / 6]])


def test_the_last_class_may_have_no_picture_on_either_side() -> None:
    gallery = np.eye(2, dtype=np.float32)
    shares = neighbour_confusion(gallery, np.array([0, 1]), gallery, np.array([0, 1]), classes=3, k=1)
    assert shares.shape == (3, 3)
    assert np.isnan(shares[2]).all()
    assert shares[:2].tolist() == [[1, 0, 0], [0, 1, 0]]
