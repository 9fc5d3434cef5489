"""The page of `mimco map` in a real browser."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.serving.map import write_map
from mimco_deploy.serving.update import update_index
from tests.e2e.browser import MARKS, opened, until
from tests.helpers import CountingEncoder, gallery, save

pytestmark = MARKS
MARKUP = "<b>bold<∕b>.png"


@pytest.fixture
def other(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A map without thumbnails of three folders, one of them with a copy alone."""
    save(tmp_path / "images/one" / unicodedata.normalize("NFD", "Café.png"), 1)
    save(tmp_path / "images/two/plain.png", 2)
    save(tmp_path / "images/two/other.png", 3)
    save(tmp_path / "images/zero/copy.png", 2)
    update_index(tmp_path / "index", [tmp_path / "images"], CountingEncoder())
    write_map(tmp_path / "map.html", tmp_path / "index", "pca", 0)
    with opened(browser, (tmp_path / "map.html").as_uri()) as page:
        until(page, "document.documentElement.dataset.ready !== undefined")
        yield page


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A map of seven pictures, one with markup in its name."""
    gallery(tmp_path / "images", 6)
    save(tmp_path / "images" / MARKUP, 99)
    update_index(tmp_path / "index", [tmp_path / "images"], CountingEncoder())
    write_map(tmp_path / "map.html", tmp_path / "index", "pca", 2000)
    with opened(browser, (tmp_path / "map.html").as_uri()) as page:
        until(page, "document.documentElement.dataset.ready !== undefined")
        yield page


def listed(page: Any) -> list[str]:
    return [str(name) for name in page.locator("#list a").all_text_contents()]


def test_it_draws_every_picture_and_lists_what_is_in_view(page: Any) -> None:
    assert page.evaluate("document.documentElement.dataset.points") == "7"
    until(page, "document.getElementById('status').textContent === '7 in view'")
    assert len(listed(page)) == 7
    assert MARKUP in listed(page)
    assert page.locator("#list b").count() == 0
    colours = """new Set(new Uint32Array(document.getElementById('view').getContext('2d')
      .getImageData(0, 0, 1280, 800).data.buffer)).size"""
    until(page, f"{colours} > 50")  # thumbnails, no empty canvas


def test_keys_zoom_until_fewer_are_in_view_and_back(page: Any) -> None:
    until(page, "document.getElementById('status').textContent === '7 in view'")
    for _ in range(8):
        page.keyboard.press("+")
    until(page, "parseInt(document.getElementById('status').textContent) < 7")
    page.keyboard.press("0")
    until(page, "document.getElementById('status').textContent === '7 in view'")


def test_part_of_a_path_is_found_and_its_card_opens_the_file(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("BOLD")
    until(page, "document.getElementById('found').textContent.startsWith('1 found')")
    until(page, "document.getElementById('status').textContent === '1 in view'")
    page.evaluate("document.getElementById('listing').open = true")
    page.locator("#list a").first.hover()
    assert page.locator("#card #name").inner_text() == MARKUP
    assert page.locator("#card #open").get_attribute("href").endswith("/images/%3Cb%3Ebold%3C%E2%88%95b%3E.png")


def test_a_name_is_found_however_its_accents_are_written(other: Any) -> None:
    for text in (unicodedata.normalize(form, "CAFÉ") for form in ("NFC", "NFD")):
        other.fill("#query", text)
        until(other, "document.getElementById('found').textContent.startsWith('1 found;')")
        other.fill("#query", "")
        until(other, "document.getElementById('found').textContent === ''")


def test_what_is_found_in_hidden_folders_is_told(other: Any) -> None:
    assert other.locator("#groups button").all_inner_texts() == ["two\n2", "one\n1"]
    other.fill("#query", "plain")
    until(other, "document.getElementById('found').textContent === '1 found; Enter shows them'")
    other.click("#groups button >> nth=0")
    assert other.locator("#found").inner_text() == "1 found in hidden folders"
    other.click("#groups button >> nth=0")
    assert other.locator("#found").inner_text() == "1 found; Enter shows them"


def test_a_map_without_thumbnails_says_so(other: Any) -> None:
    other.evaluate("document.getElementById('listing').open = true")
    other.locator("#list a").first.hover()
    assert other.locator("#card #note").inner_text() == "This map has no thumbnails"
