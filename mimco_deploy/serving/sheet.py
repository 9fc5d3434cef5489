"""Search results as one HTML page that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mimco_deploy.atomic import write_bytes
from mimco_deploy.errors import ImageError
from mimco_deploy.images import read_image
from mimco_deploy.serving.index import Hit
from mimco_deploy.serving.scan import readable

THUMBNAIL_PX = 256
_JPEG_QUALITY = 82

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
.well { display: grid; place-items: center; overflow: hidden; aspect-ratio: 1; border-radius: 12px;
  background: var(--well); }
li .well { border-radius: 0; }
.well img { display: block; width: 100%; height: 100%; object-fit: contain; }
.well span { padding: 1rem; color: var(--soft); text-align: center; }
.about { padding: .7rem .85rem .85rem; }
.line { display: flex; align-items: baseline; justify-content: space-between; gap: .5rem; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.bar { height: 3px; margin: .45rem 0 .55rem; border-radius: 2px; background: var(--well); }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--mark); }
.name { font-size: .87rem; overflow-wrap: anywhere; }
.path { font-size: .78rem; }
header .path { margin-bottom: .6rem; }
a { color: inherit; text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
footer { margin-top: 2rem; color: var(--soft); font-size: .8rem; }
"""


def write_sheet(path: Path, query: Path, hits: Sequence[Hit]) -> None:
    """Write a page that shows a query image and its hits.

    Pictures are embedded as thumbnails, so the page can be mailed; only the links to the originals need the disk.

    Args:
        path: file to write, replaced whole.
        query: the query image.
        hits: best first.
    """
    title = html.escape(f"{readable(query.name)} · {_number(len(hits))}")
    query_picture = _picture(query, f"Query image {readable(query.name)}")
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
<h1>{html.escape(readable(query.name))}</h1>
<p class="soft path">{html.escape(readable(query.absolute().parent))}</p>
<p class="soft">{_number(len(hits))}, best first. The score is the cosine of the embeddings: 1 is the same picture.</p>
</div>
</header>
<main>
<ol>
{"".join(_card(rank, hit) for rank, hit in enumerate(hits, 1))}</ol>
</main>
<footer>Made by mimco search.</footer>
</body>
</html>
"""
    write_bytes(path, page.encode())


def _card(rank: int, hit: Hit) -> str:
    name = readable(hit.path.name)
    picture = _picture(hit.path, f"Hit {rank}: {name}")
    link = html.escape(hit.path.as_uri(), quote=True)
    share = round(100 * max(hit.score, 0.0))
    return f"""<li>
<a href="{link}"><div class="well">{picture}</div></a>
<div class="about">
<p class="line"><span class="soft">{rank}</span><span>{hit.score:.3f}</span></p>
<div class="bar"><i style="width:{share}%"></i></div>
<p class="name"><a href="{link}">{html.escape(name)}</a></p>
<p class="soft path">{html.escape(readable(hit.path.parent))}</p>
</div>
</li>
"""


def _picture(path: Path, alt: str) -> str:
    try:
        picture = read_image(path)
    except ImageError as error:
        reason = "no longer there" if error.problem == "missing" else error.problem.replace("_", " ")
        return f'<span role="img" aria-label="{html.escape(alt)}, {reason}">{reason}</span>'
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
