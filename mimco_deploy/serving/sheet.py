"""Search results as one HTML page that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mimco_deploy.atomic import write_bytes
from mimco_deploy.errors import ImageError
from mimco_deploy.html_page import place_of_page
from mimco_deploy.images import decode_image, read_image
from mimco_deploy.preprocess import Crop, cut
from mimco_deploy.serving.background import counted, in_words
from mimco_deploy.serving.index import Hit, least_by_chance
from mimco_deploy.serving.query import Part
from mimco_deploy.serving.scan import readable
from mimco_deploy.serving.why import Reason

THUMBNAIL_PX = 256
_JPEG_QUALITY = 82
_LEAST_RANGE = 0.2
"""Of heat, from dark to bright: where all parts are alike, all are bright."""

_STYLE = """
:root { color-scheme: light dark; --page: #f6f5f2; --card: #fff; --ink: #1d1c1a; --soft: #6d6a64; --line: #e4e1da;
  --well: #efede8; --mark: #0b6e5f; }
@media (prefers-color-scheme: dark) { :root { --page: #141413; --card: #1e1e1c; --ink: #ecebe7; --soft: #9b978f;
  --line: #32312e; --well: #272624; --mark: #5fd0b9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: clamp(1rem, 3vw, 2.5rem); background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 1.5rem; margin-bottom: 2rem; padding-bottom: 1.75rem;
  border-bottom: 1px solid var(--line); }
header .well { width: 176px; flex: none; border: 1px solid var(--line); }
header > div:last-child { flex: 1 1 16rem; min-width: 0; }
h1 { margin: .1rem 0 .35rem; font-size: 1.45rem; line-height: 1.25; overflow-wrap: anywhere; }
p { margin: 0; }
.soft { color: var(--soft); }
.kicker { color: var(--mark); font-size: .75rem; font-weight: 650; letter-spacing: .08em; text-transform: uppercase; }
.path { overflow-wrap: anywhere; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 190px), 1fr)); gap: 1rem; margin: 0;
  padding: 0; list-style: none; }
li { overflow: hidden; border: 1px solid var(--line); border-radius: 12px; background: var(--card); }
.well { display: grid; grid-template-rows: 100%; place-items: center; overflow: hidden; aspect-ratio: 1;
  border-radius: 12px; background: var(--well); }
li .well { border-radius: 0; }
.well img { display: block; width: 100%; height: 100%; object-fit: contain; }
.well span { padding: 1rem; color: var(--soft); text-align: center; }
.about { padding: .7rem .85rem .85rem; }
.line { display: flex; align-items: baseline; justify-content: space-between; gap: .5rem; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.bar { height: 3px; margin: .45rem 0 .55rem; border-radius: 2px; background: var(--well); }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--mark); }
.part { display: flex; align-items: center; gap: .5rem; margin-bottom: .4rem; }
.part img { width: 48px; height: 48px; object-fit: contain; border-radius: 6px; background: var(--well); }
.pair { display: flex; gap: 2px; margin-bottom: .4rem; }
.pair img { width: 50%; height: auto; }
.name { font-size: .87rem; overflow-wrap: anywhere; }
.path { font-size: .78rem; }
header .path { margin-bottom: .6rem; }
a { color: inherit; text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
footer { margin-top: 2rem; color: var(--soft); font-size: .8rem; }
"""


def write_sheet(
    path: Path, query: Path | Sequence[Part], hits: Sequence[Hit], reasons: Sequence[Reason | None] = ()
) -> None:
    """Write a page that shows a query image and its hits.

    Pictures are embedded as thumbnails, so the page can be mailed; only the links to the originals need the disk.

    Args:
        path: file to write, replaced whole.
        query: the query image, or its parts, as for `search_image`.
        hits: best first.
        reasons: of each hit, where it and the query are alike; none to show pictures alone.
    """
    first, *others = [Part(query)] if isinstance(query, Path) else query
    name = _name(first)
    folder = "" if isinstance(first.picture, bytes) else readable(first.picture.absolute().parent)
    title = html.escape(f"{name} · {_number(len(hits))}")
    query_picture = _picture(first.picture, f"Query image {name}", first.crop)
    more = "".join(
        f'<div class="part">{_picture(part.picture, _name(part), part.crop)}'
        f'<p class="soft path">and {"un" if part.weight < 0 else ""}like {html.escape(_name(part))}'
        f"{'' if abs(part.weight) == 1 else f', weight {abs(part.weight):g}'}</p></div>"
        for part in others
    )
    cards = [_card(rank, hit, reasons[rank - 1] if reasons else None) for rank, hit in enumerate(hits, 1)]
    heat = " Bright parts of a pair are alike in both." if any(reasons) else ""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mimco">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<div class="well">{query_picture}</div>
<div>
<p class="kicker">Query image</p>
<h1>{html.escape(name)}</h1>
<p class="soft path">{html.escape(folder)}</p>
{more}<p class="soft">{_number(len(hits))}, best first.
The score is the cosine of the embeddings: 1 is the same picture.{heat}</p>
{_no_match(hits)}</div>
</header>
<main>
<ol>
{"".join(cards)}</ol>
</main>
<footer>Made by mimco search.</footer>
</body>
</html>
"""
    write_bytes(place_of_page(path), page.encode())


def _name(part: Part) -> str:
    name = "picture on stdin" if isinstance(part.picture, bytes) else readable(part.picture.name)
    return name if part.crop is None else f"{name}, a part"


def _no_match(hits: Sequence[Hit]) -> str:
    best = least_by_chance(hits)
    if best is None or best < 1:
        return ""
    return f"<p><strong>Nothing really matches</strong>: about {counted(best)} would be as alike by chance.</p>\n"


def _card(rank: int, hit: Hit, reason: Reason | None) -> str:
    name = readable(hit.path.name)
    picture = _picture(hit.path, f"Hit {rank}: {name}")
    link = html.escape(hit.path.as_uri(), quote=True)
    share = round(100 * max(hit.score, 0.0))
    return f"""<li>
<a href="{link}"><div class="well">{picture}</div></a>
<div class="about">
<p class="line"><span class="soft">{rank}</span>{_confidence(hit)}<span>{hit.score:.3f}</span></p>
<div class="bar"><i style="width:{share}%"></i></div>
{_pair(reason)}<p class="name"><a href="{link}">{html.escape(name)}</a></p>
<p class="soft path">{html.escape(readable(hit.path.parent))}</p>
</div>
</li>
"""


def _confidence(hit: Hit) -> str:
    if hit.expected_by_chance is None:
        return ""
    told = f"about {hit.expected_by_chance:.2g} pictures would score this by chance"
    return f'<span class="soft" title="{told}">{in_words(hit.confidence)}</span>'


def _pair(reason: Reason | None) -> str:
    if reason is None:
        return ""
    sides = (
        ("query", reason.query, reason.query_heat),
        ("hit", reason.hit, reason.hit_heat),
    )
    shown = "".join(
        _tag(_heated(pixels, heat), f"Parts of the {name} that are alike in the other") for name, pixels, heat in sides
    )
    return f'<div class="pair">{shown}</div><p class="soft path">alike by parts: {reason.score:.3f}</p>\n'


def _heated(pixels: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> Image.Image:
    """A picture that is dark where the heat is lowest, unless it is nearly as high there."""
    low, high = float(heat.min()), float(heat.max())
    share = 1 - (high - heat) / max(high - low, _LEAST_RANGE)
    mask = Image.fromarray(np.rint(share * 255).astype(np.uint8)).resize(
        (pixels.shape[1], pixels.shape[0]), Image.Resampling.BICUBIC
    )
    dimmed = Image.fromarray((pixels * 0.2).astype(np.uint8))
    return Image.composite(Image.fromarray(pixels), dimmed, mask)


def _picture(source: Path | bytes, alt: str, crop: Crop | None = None) -> str:
    side_px = None if crop else THUMBNAIL_PX  # a crop may be in pixels of the whole
    try:
        picture = decode_image(source, "query", side_px) if isinstance(source, bytes) else read_image(source, side_px)
    except ImageError as error:
        reason = "no longer there" if error.problem == "missing" else error.problem.replace("_", " ")
        return f'<span role="img" aria-label="{html.escape(alt)}, {reason}">{reason}</span>'
    return _tag(cut(picture, crop), alt)


def _tag(picture: Image.Image, alt: str) -> str:
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    content = base64.b64encode(encoded.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/jpeg;base64,{content}" width="{picture.width}" height="{picture.height}"'
        f' alt="{html.escape(alt, quote=True)}">'
    )


def _number(hits: int) -> str:
    return "1 hit" if hits == 1 else f"{hits} hits"
