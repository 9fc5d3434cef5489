"""A service over a tiny index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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


class PatchEncoder:
    """Adds patch tokens, the mean colours of a grid of 4 × 4, to an encoder."""

    def __init__(self, encoder: Any) -> None:
        self.spec = replace(encoder.spec, patch_grid=4)
        self.embed, self.provider, self.precision = encoder.embed, encoder.provider, encoder.precision

    def embed_with_patches(self, images: Any) -> Any:
        side = images.shape[1] // 4
        cells = images.reshape(len(images), 4, side, 4, side, 3).mean(axis=(2, 4)) - 127.5
        return self.embed(images), cells.reshape(len(images), 16, 3).astype(np.float32)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Not to be changed."""
    return make_place(tmp_path_factory.mktemp("served").resolve())


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[TestClient]:
    with client_of(place) as client:
        yield client
