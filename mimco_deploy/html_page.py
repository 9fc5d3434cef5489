"""One HTML page that needs nothing beside it: the style that mimco's reports share, pictures in the page, no script."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from mimco_deploy.errors import ConfigError

_THUMBNAIL_PX = 168
STYLE = """
:root { color-scheme: light dark; --page: #f6f5f2; --card: #fff; --ink: #1d1c1a; --soft: #6d6a64; --line: #e4e1da;
  --mark: #0b6e5f; --bad: #a3271b; }
@media (prefers-color-scheme: dark) { :root { --page: #141413; --card: #1e1e1c; --ink: #ecebe7; --soft: #9b978f;
  --line: #32312e; --mark: #5fd0b9; --bad: #f08a7e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: clamp(1rem, 3vw, 2.5rem); background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.45rem; } h2 { margin: 2rem 0 .7rem; font-size: 1.05rem; }
p { margin: 0; } .soft { color: var(--soft); font-size: .85rem; }
.alarm { margin: 1rem 0; padding: .8rem 1rem; border: 1px solid var(--bad); border-radius: 10px; color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 12px; background: var(--card); }
figcaption { display: flex; justify-content: space-between; gap: .5rem; font-weight: 650; }
figcaption b { font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; margin: .4rem 0; overflow: visible; }
polyline { fill: none; stroke: var(--mark); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
line { stroke: var(--line); } circle { fill: var(--mark); }
.strip { display: flex; gap: .4rem; margin-bottom: .6rem; overflow-x: auto; }
.strip div { flex: none; width: 84px; font-size: .75rem; color: var(--soft); text-align: center; }
.strip img { display: block; width: 84px; height: 84px; object-fit: cover; border-radius: 8px; }
.strip div:first-child img { outline: 2px solid var(--mark); outline-offset: -2px; }
"""


def build_page(title: str, parts: Iterable[str], style: str = "") -> bytes:
    """A whole page.

    Args:
        title: plain text.
        parts: HTML, all foreign text in it escaped.
        style: what the page adds to the common style.
    """
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>{''.join(parts)}</body></html>"
    ).encode("utf-8", "replace")


def place_of_page(path: Path) -> Path:
    """Where a page of this name lies: what it leads to, if it is a link.

    Raises:
        ConfigError: something is there that is no regular file, which a page would take the place of.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ConfigError(f"{path} is no regular file", expected="a name for a page, such as out.html")
    return target


def image_tag(picture: Image.Image, name: str) -> str:
    """A small copy of a picture, in the page itself.

    Args:
        picture: mode RGB.
        name: shown on hovering, and read to those who do not see; of a path the last part.
    """
    small = picture.copy()
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    shown = html.escape(Path(name).name.encode("utf-8", "replace").decode())
    return f"<img src='data:image/jpeg;base64,{data}' alt='{shown}' title='{shown}'>"
