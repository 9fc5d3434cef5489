"""A service over a tiny index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.http.app import create_app
from mimco_deploy.serving.http.service import ServeSettings
from mimco_deploy.serving.update import update_index
from tests.helpers import gallery, save, tiny_bundle

COUNT = 60
ADDRESS = "http://127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where things lie."""

    index: Path
    encoder: Path
    photos: Path

    def picture(self, number: int) -> Path:
        return self.photos / f"{number:04d}.png"


def make_place(folder: Path, count: int = COUNT) -> Place:
    place = Place(folder / "index", tiny_bundle(folder / "encoder"), folder / "photos")
    gallery(place.photos, count)
    save(place.photos / "copies/same.png", 7)
    (place.photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    update_index(place.index, [place.photos], load_encoder(place.encoder))
    return place


def client_of(place: Place, settings: ServeSettings | None = None, token: str | None = None) -> TestClient:
    app = create_app(place.index, place.encoder, settings, token=token)
    return TestClient(app, base_url=ADDRESS)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Not to be changed."""
    return make_place(tmp_path_factory.mktemp("served").resolve())


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[TestClient]:
    with client_of(place) as client:
        yield client
