from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mimco_deploy.serving.index import Hit
from mimco_deploy.serving.sheet import THUMBNAIL_PX, write_sheet
from tests.helpers import noise, save


class Page(HTMLParser):
    """Collects tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def hit(path: Path, score: float = 0.5) -> Hit:
    return Hit(path, score, "0" * 64)


def sheet(folder: Path, query: Path, hits: list[Hit]) -> Page:
    write_sheet(folder / "sheet.html", query, hits)
    return Page((folder / "sheet.html").read_text(encoding="utf-8"))


def test_it_says_so_where_nothing_really_matches(tmp_path: Path) -> None:
    query = save(tmp_path / "query.png", 1)
    for expected, said in (((3.0,), True), ((0.9,), False), ((None,), False), ((3.0, 0.9), False), ((), False)):
        page = sheet(tmp_path, query, [Hit(query, 0.5, "0" * 64, chance, 0.25) for chance in expected])
        assert ("Nothing really matches" in page.text) == said


def test_the_sheet_shows_the_query_and_every_hit_with_rank_score_and_path(tmp_path: Path) -> None:
    paths = [save(tmp_path / "deep" / f"{number}.png", number) for number in range(3)]
    page = sheet(tmp_path, paths[0], [hit(path, 0.9 - number / 10) for number, path in enumerate(paths)])
    images = page.all("img")
    assert [image["alt"] for image in images] == ["Query image 0.png", "Hit 1: 0.png", "Hit 2: 1.png", "Hit 3: 2.png"]
    assert len(page.all("li")) == 3
    for expected in ("0.900", "0.800", "0.700", "3 hits", str(tmp_path / "deep")):
        assert expected in page.text
    assert page.all("html") == [{"lang": "en"}]


def test_the_sheet_needs_nothing_but_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 1)
    page = sheet(tmp_path, path, [hit(path)])
    assert page.all("script") == page.all("link") == []
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all("img"))
    text = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", text)
    assert {anchor["href"] for anchor in page.all("a")} == {path.as_uri()}


def test_thumbnails_are_small_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(1).resize((800, 400)).save(tmp_path / "wide.jpg", exif=exif)
    page = sheet(tmp_path, tmp_path / "wide.jpg", [])
    (image,) = page.all("img")
    content = base64.b64decode((image["src"] or "").partition(",")[2])
    with Image.open(io.BytesIO(content)) as thumbnail:
        assert thumbnail.size == (THUMBNAIL_PX // 2, THUMBNAIL_PX)
        assert (image["width"], image["height"]) == ("128", "256")
        assert not thumbnail.getexif()


@pytest.mark.parametrize("name", ["<script>alert(1)</script>.png", 'a" onload="x.png', "a&amp;b'.png", "日本 ü.png"])
def test_names_are_shown_as_they_are_and_never_run(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name.replace("/", "∕"), 1)
    page = sheet(tmp_path, path, [hit(path)])
    assert page.text.count(path.name) >= 2
    assert page.all("script") == []
    assert all(set(image) == {"src", "alt", "width", "height"} for image in page.all("img"))


def test_a_name_that_is_not_utf8_is_shown(tmp_path: Path) -> None:
    path = save(tmp_path / os.fsdecode(b"caf\xe9.png"), 1)
    page = sheet(tmp_path, path, [hit(path)])
    assert "caf�.png" in page.text
    assert page.all("a")[0]["href"] == (tmp_path / "caf").as_uri() + "%E9.png"


def test_a_hit_that_vanished_or_broke_has_a_placeholder(tmp_path: Path) -> None:
    query = save(tmp_path / "a.png", 1)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page = sheet(tmp_path, query, [hit(tmp_path / "gone.png"), hit(tmp_path / "broken.png")])
    assert [span["aria-label"] for span in page.all("span") if span.get("role") == "img"] == [
        "Hit 1: gone.png, no longer there",
        "Hit 2: broken.png, unsupported",
    ]
    assert len(page.all("img")) == 1


def test_a_negative_score_has_an_empty_bar(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 1)
    page = sheet(tmp_path, path, [hit(path, -0.25)])
    assert "-0.250" in page.text
    assert page.all("i") == [{"style": "width:0%"}]
