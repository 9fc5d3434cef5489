"""Pages show an upright and a very wide picture as they show a square one, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.index import Hit
from mimco_deploy.serving.sheet import write_sheet
from mimco_deploy.serving.update import update_index
from tests.e2e.browser import MARKS, opened, until
from tests.e2e.test_page import start, stop
from tests.helpers import noise, tiny_bundle
from tests.unit.serving.http.conftest import Place

pytestmark = MARKS
FRAMED = """[...document.querySelectorAll('%s')].map((image) => {
  const inner = image.getBoundingClientRect(), outer = image.parentElement.getBoundingClientRect();
  return outer.width > 0 && inner.left >= outer.left && inner.top >= outer.top
    && inner.right <= outer.right + 1 && inner.bottom <= outer.bottom + 1;
})"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An upright and a wide picture, each twice."""
    folder = tmp_path.resolve() / "photos"
    folder.mkdir()
    for name, size in (("upright", (60, 300)), ("wide", (300, 60))):
        for number in range(2):
            noise(len(name)).resize(size).save(folder / f"{name}{number}.png")
    return folder


def test_a_sheet_shows_them_whole(browser: Any, photos: Path, tmp_path: Path) -> None:
    hits = [Hit(path, 0.5, "0" * 64) for path in sorted(photos.iterdir())]
    write_sheet(tmp_path / "sheet.html", photos / "upright0.png", hits)
    with opened(browser, (tmp_path / "sheet.html").as_uri()) as page:
        assert page.evaluate(FRAMED % ".well img") == [True] * 5


def test_the_service_shows_them_within_their_frames(browser: Any, photos: Path, tmp_path: Path) -> None:
    place = Place(tmp_path / "index", tiny_bundle(tmp_path / "encoder"), photos)
    update_index(place.index, [photos], load_encoder(place.encoder))
    process, address = start(place)
    try:
        with opened(browser, address) as page:
            for tab, pictures in (("#tab-search", "#hits .well img"), ("#tab-duplicates", "#groups .well img")):
                page.click(tab)
                until(
                    page, f"[...document.querySelectorAll('{pictures}')].filter(i => i.naturalWidth > 0).length === 4"
                )
                assert page.evaluate(FRAMED % pictures) == [True] * 4
    finally:
        stop(process)
