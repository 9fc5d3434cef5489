"""k-NN against DINO's own eval script, and against what must hold of any k-NN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mimco_deploy.evaluation.knn import knn_accuracy, knn_predict


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
