"""Collections that several tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery, tiny_bundle
from tests.unit.serving.place import COUNT, Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`COUNT` indexed pictures and their encoder, for tests that only search."""
    workspace = tmp_path_factory.mktemp("query").resolve()
    gallery(workspace / "photos", COUNT)
    tiny_bundle(workspace / "encoder")
    update_index(workspace / "index", [workspace / "photos"], CountingEncoder())
    return workspace


@pytest.fixture
def twice(place: Place) -> Place:
    """Three pictures, two of which have copies."""
    gallery(place.photos, 3)
    (place.photos / "deep/er").mkdir(parents=True)
    shutil.copy2(place.photos / "0000.png", place.photos / "deep/a copy.png")
    shutil.copy2(place.photos / "0000.png", place.photos / "deep/er/another.png")
    shutil.copy2(place.photos / "0001.png", place.photos / "deep/0001.png")
    place.update()
    return place
