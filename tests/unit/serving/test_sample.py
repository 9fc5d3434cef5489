"""The pictures that an encoder is proved on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mimco_deploy.serving.sample import sample_folder
from tests.helpers import SIDE, gallery, save


def test_a_sample_is_of_what_an_index_of_the_folder_holds(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 3)
    save(tmp_path / "photos/deep/er/0003.png", 3)
    (tmp_path / "photos/notes.txt").write_text("no picture")
    (tmp_path / "photos/broken.jpg").write_bytes(b"no picture")
    expected = sample_folder(tmp_path / "photos", 10, SIDE, 1.0, "bicubic")
    assert len(expected) == 4
    for hidden in (".duplicates/0000.png", ".git/deep/0009.png", ".0009.png"):
        save(tmp_path / "photos" / hidden, 9)
    assert np.array_equal(sample_folder(tmp_path / "photos", 10, SIDE, 1.0, "bicubic"), expected)
