"""Collections that several tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import gallery
from tests.unit.serving.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


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
