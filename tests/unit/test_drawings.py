"""The pictures that mimco draws: the same each time, varied within a kind, and not to be told apart by colour."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mimco_deploy.drawings import KINDS, draw, draw_gallery
from mimco_deploy.errors import ConfigError
from mimco_deploy.images import read_image


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_picture_and_another_seed_another(kind: str) -> None:
    pictures = [draw(kind, seed, 48) for seed in (3, 3, 4)]

    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert pictures[0].tobytes() != pictures[2].tobytes()


@pytest.mark.parametrize("size_px", [1, 7, 96, 224])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_in_every_size(kind: str, size_px: int) -> None:
    picture = draw(kind, 0, size_px)

    assert picture.mode == "RGB"
    assert picture.size == (size_px, size_px)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_motif_in_every_size(kind: str) -> None:
    small, large = draw(kind, 5, 48), draw(kind, 5, 192).reduce(4)

    difference = np.asarray(small, float) - np.asarray(large, float)

    assert np.abs(difference).mean() < 20  # noise and edges; another motif is 50 and more


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_shows_something(kind: str) -> None:
    for seed in range(20):
        assert np.asarray(draw(kind, seed, 48), float).std(axis=(0, 1)).max() > 10


def test_colour_does_not_give_the_kind_away() -> None:
    means = np.array([[np.asarray(draw(kind, seed, 16), float).mean((0, 1)) for seed in range(25)] for kind in KINDS])
    means = means.reshape(-1, 3)
    labels = np.repeat(np.arange(len(KINDS)), 25)
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1)
    np.fill_diagonal(apart, np.inf)

    found = (labels[apart.argmin(1)] == labels).mean()

    assert found < 3 / len(KINDS)  # guessing finds 1 / len(KINDS)


def test_a_gallery_lies_in_one_folder_a_kind_and_can_be_read(tmp_path: Path) -> None:
    paths = draw_gallery(tmp_path / "gallery", 2, 24)

    assert [path.relative_to(tmp_path / "gallery").as_posix() for path in paths[:2]] == [
        f"{KINDS[0]}/{KINDS[0]}-0001.jpg",
        f"{KINDS[0]}/{KINDS[0]}-0002.jpg",
    ]
    assert len(paths) == 2 * len(KINDS)
    assert {read_image(path).size for path in paths} == {(24, 24)}


def test_galleries_of_different_seeds_share_no_picture(tmp_path: Path) -> None:
    first = draw_gallery(tmp_path / "first", 3, 24, seed=0)
    second = draw_gallery(tmp_path / "second", 3, 24, seed=1)

    digests = {hashlib.sha256(path.read_bytes()).digest() for path in first + second}

    assert len(digests) == len(first) + len(second)


def test_an_unknown_kind_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="stripes"):
        draw("cats", 0)
