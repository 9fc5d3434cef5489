"""The page of a map: what it holds and how. `map.css` and `map.js` beside this file are its style and its script.

The page must work alone, from the disk, years later, so everything is in it, and a content security policy keeps it so:
its own script and style, known by their hashes, run, and pictures come from `data:` alone. Names of files are foreign
text; they stand in a block of JSON that cannot end its element, and the script shows them as text only.
"""

from __future__ import annotations

import base64
import calendar
import hashlib
import html
import io
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mimco_deploy.errors import ImageError
from mimco_deploy.images import read_image
from mimco_deploy.serving.catalog import Listed
from mimco_deploy.serving.scan import readable

Pixels = npt.NDArray[np.uint8]

SHEET_PX = 1024
"""Side of a sprite sheet: 4 MiB decoded, which every browser takes."""
CELL_PX, LARGE_CELL_PX = 64, 128
"""Longest side of a thumbnail. Both divide the sheet, and are multiples of the 8 pixels that JPEG codes as one."""
_FEW = 500
"""So many thumbnails may be large: with them a page has the pixels of 2,000 small ones."""
_JPEG_QUALITY = 80
_THREADS = min(4, os.cpu_count() or 1)
"""Decoding threads; each may hold a picture of 67 million pixels."""
MAX_GROUPS = 8
"""Folders with a colour of their own: about as many as can be told apart."""
_LAST_MINUTE = 2**32 - 1


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures, packed."""

    points: list[int]
    """Whose they are, coarse to fine; the n-th lies in cell n mod cells of sheet n div cells."""
    sizes: list[tuple[int, int]]
    """Width and height of each, at the top left of its cell."""
    cell_px: int
    sheets: list[bytes]
    """JPEG."""
    problems: dict[int, str]
    """Points that have none because no file of theirs could be read, and why."""


def draw_thumbnails(
    points: Sequence[Sequence[Listed]], chosen: Sequence[int], tell: Callable[[int, int], None] | None = None
) -> Thumbnails:
    """Decode pictures and pack them. Never fails: what cannot be read is left out, with the reason.

    Args:
        points: the files of each content.
        chosen: points to draw.
        tell: called with how many are done, and of how many.
    """
    cell_px = LARGE_CELL_PX if len(chosen) <= _FEW else CELL_PX
    a_sheet = (SHEET_PX // cell_px) ** 2
    drawn, sizes, cells, sheets, problems = [], [], [], [], {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(chosen), a_sheet):  # not all at once: decoded pictures wait in memory
            some = chosen[start : start + a_sheet]
            for done, (point, found) in enumerate(
                zip(some, pool.map(lambda point: _thumbnail(points[point], cell_px), some), strict=True), start + 1
            ):
                if isinstance(found, str):
                    problems[point] = found
                else:
                    drawn.append(point)
                    sizes.append(found.size)
                    cells.append(_padded(found, cell_px))
                if tell is not None:
                    tell(done, len(chosen))
            while len(cells) >= a_sheet:
                sheets.append(_sheet(cells[:a_sheet], cell_px))
                del cells[:a_sheet]
    if cells:
        sheets.append(_sheet(cells, cell_px))
    return Thumbnails(drawn, sizes, cell_px, sheets, problems)


def build_page(
    points: Sequence[Sequence[Listed]], places: npt.NDArray[np.float32], thumbnails: Thumbnails, method: str
) -> bytes:
    """Put a page together.

    Args:
        points: the files of each content, at least one each.
        places: [N, 2] in [0, 1].
        thumbnails: of some of them.
        method: what laid them out.

    Returns:
        HTML, UTF-8. It says nothing of when it was made: the same index gives the same page.
    """
    style, script = _own("map.css"), _own("map.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)};"
        " base-uri 'none'; form-action 'none'"
    )
    data = _as_json(_document(points, places, thumbnails, method))
    count = _number(len(points), "picture")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mimco">
<title>Map of {count}</title>
<style>{style}</style>
</head>
<body>
<main id="stage">
<canvas id="dots" aria-hidden="true"></canvas>
<canvas id="view" role="application" tabindex="0" aria-describedby="help"
 aria-label="Map of {count}: those that look alike lie close together"></canvas>
</main>
<header>
<h1>{count}</h1>
<p id="help">Those that look alike lie close together. Drag to move, scroll or pinch to zoom; or arrows, +, −, 0.</p>
<div class="search"><input id="query" type="search" placeholder="Part of a path" autocomplete="off" spellcheck="false"
 aria-label="Highlight paths that contain"><output id="found" for="query"></output></div>
<details id="legend" open><summary>Folders</summary>
<div id="groups" role="group" aria-label="Folders shown"></div></details>
<details id="listing"><summary id="status" aria-live="polite"></summary><ol id="list"></ol></details>
</header>
<nav aria-label="Zoom"><button id="in" title="Zoom in (+)" aria-label="Zoom in">+</button>
<button id="out" title="Zoom out (−)" aria-label="Zoom out">−</button>
<button id="fit" title="Show all (0)" aria-label="Show all">⤢</button></nav>
<aside id="card" hidden><canvas id="large" aria-hidden="true"></canvas><div><p id="name"></p><p id="folder"></p>
<p id="date"></p><p id="note"></p><ul id="copies"></ul>
<a id="open" target="_blank" rel="noopener">Open</a></div></aside>
<noscript><p class="noscript">This map is drawn by the script in this page; scripts are off.</p></noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
""".encode()


# ---------------------------------------------------------------------------------------------------- thumbnails


def _thumbnail(files: Sequence[Listed], side_px: int) -> Image.Image | str:
    """A small picture, of the first copy that can be read, or why there is none."""
    reason = ""
    for file in files:
        try:
            picture = read_image(Path(file.root) / file.path, side_px)
        except ImageError as error:
            reason = reason or ("no longer there" if error.problem == "missing" else error.problem.replace("_", " "))
        else:
            picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
            return picture
    return reason


def _padded(picture: Image.Image, side_px: int) -> Pixels:
    """To a square; the edge goes on, so that the picture's own pixels do not mix with a foreign colour in JPEG."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, side_px - height), (0, side_px - width), (0, 0)), "edge")


def _sheet(cells: Sequence[Pixels], cell_px: int) -> bytes:
    across = SHEET_PX // cell_px
    sheet = np.zeros((-(-len(cells) // across) * cell_px, SHEET_PX, 3), np.uint8)
    for number, cell in enumerate(cells):
        top, left = number // across * cell_px, number % across * cell_px
        sheet[top : top + cell_px, left : left + cell_px] = cell
    encoded = io.BytesIO()
    # Colour at full resolution: decoders would smooth it across the borders of cells.
    Image.fromarray(sheet).save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return encoded.getvalue()


# ---------------------------------------------------------------------------------------------------- data


def _document(
    points: Sequence[Sequence[Listed]], places: npt.NDArray[np.float32], thumbnails: Thumbnails, method: str
) -> dict[str, Any]:
    """All that the script draws. Numbers that each point has are base64 of little-endian arrays."""
    folders: dict[tuple[str, str], int] = {}

    def folder_of(file: Listed) -> int:
        return folders.setdefault((file.root, file.path.rpartition("/")[0]), len(folders))

    firsts = [files[0] for files in points]
    folder_of_points = [folder_of(file) for file in firsts]
    copies = [
        [point, folder_of(file), readable(_name(file))] for point, files in enumerate(points) for file in files[1:]
    ]
    groups, group_of = group_folders(list(folders), folder_of_points)
    roots = {root: number for number, root in enumerate(dict.fromkeys(root for root, _ in folders))}
    dates = [_minute(file) for file in firsts]
    return {
        "method": method,
        "places": _base64(np.rint(places.astype(np.float64) * 65535), "<u2"),
        "roots": [readable(root) for root in roots],
        "folders": [
            [roots[root], readable(below), group] for (root, below), group in zip(folders, group_of, strict=True)
        ],
        "groups": groups,
        "folderOf": _base64(folder_of_points, "<u4"),
        "names": [readable(_name(file)) for file in firsts],
        "copies": copies,
        "links": {point: _link(file) for point, file in enumerate(firsts) if not _is_text(file)},
        "dates": _base64([minute for minute, _ in dates], "<u4"),
        "taken": _base64([taken for _, taken in dates], "u1"),
        "thumbs": _base64(thumbnails.points, "<u4"),
        "sizes": _base64(thumbnails.sizes, "u1"),
        "cell": thumbnails.cell_px,
        "across": SHEET_PX // thumbnails.cell_px,
        "sheets": [base64.b64encode(sheet).decode("ascii") for sheet in thumbnails.sheets],
        "problems": thumbnails.problems,
    }


def group_folders(
    folders: Sequence[tuple[str, str]], folder_of: Sequence[int]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Sort folders into few groups, each with a colour.

    From the folder that encloses all, the largest group is split into the folders below it as long as no more than
    `MAX_GROUPS` come out; the first split is made in any case, and the smaller groups then share one colour.

    Args:
        folders: root and folder below it.
        folder_of: [N], folder of each point.

    Returns:
        Groups, `name` and `count`, largest first, and the group of each folder; the group `MAX_GROUPS` is all others.
    """
    paths = [tuple(part for part in f"{root}/{below}".split("/") if part) for root, below in folders]
    counts = Counter(folder_of)
    common = _common(paths)
    groups: dict[tuple[str, ...], list[int]] = {common: list(range(len(paths)))}
    done: set[tuple[str, ...]] = set()

    def size(key: tuple[str, ...]) -> int:
        return sum(counts[folder] for folder in groups[key])

    while waiting := sorted(groups.keys() - done, key=lambda key: (-size(key), key)):
        key = waiting[0]
        parts: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for folder in groups[key]:
            parts[paths[folder][: len(key) + 1]].append(folder)
        done |= {key} if len(parts) == 1 and key in parts else set()
        if key not in done and (len(groups) == 1 or len(groups) - 1 + len(parts) <= MAX_GROUPS):
            del groups[key]
            groups |= parts
            done |= {key} & parts.keys()  # what lies directly in the folder that was split
        else:
            done.add(key)
    ranked = sorted(groups, key=lambda key: (-size(key), key))
    group_of = [0] * len(folders)
    for rank, key in enumerate(ranked):
        for folder in groups[key]:
            group_of[folder] = min(rank, MAX_GROUPS)
    named = [{"name": _label(key, common), "count": size(key)} for key in ranked[:MAX_GROUPS]]
    if others := ranked[MAX_GROUPS:]:
        named.append({"name": f"{len(others)} other folders", "count": sum(map(size, others))})
    return named, group_of


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The parts with which all begin: those of the first and the last in order."""
    first, last = min(paths), max(paths)
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _label(key: tuple[str, ...], common: tuple[str, ...]) -> str:
    return readable("/".join(key[len(common) :]) or (common[-1] if common else "/"))


def _name(file: Listed) -> str:
    return file.path.rpartition("/")[2]


def _is_text(file: Listed) -> bool:
    return f"{file.root}{file.path}".isascii() or all(readable(part) == part for part in (file.root, file.path))


def _link(file: Listed) -> str:
    return (Path(file.root) / file.path).as_uri()


def _minute(file: Listed) -> tuple[int, bool]:
    """Minutes since 1970 by the clock on the wall, and whether the camera says so; else the file's, 0 where unknown."""
    if file.facts.taken:
        try:
            minute = calendar.timegm(datetime.fromisoformat(file.facts.taken).timetuple()) // 60
        except ValueError:  # of an import, which may hold anything
            minute = 0
        if 0 < minute <= _LAST_MINUTE:
            return minute, True
    try:
        minute = calendar.timegm(time.localtime(file.stamp.mtime_ns // 10**9)) // 60
    except (OverflowError, OSError, ValueError):
        return 0, False
    return (minute, False) if 0 < minute <= _LAST_MINUTE else (0, False)


def _base64(values: npt.ArrayLike, kind: str) -> str:
    return base64.b64encode(np.asarray(values).astype(kind).tobytes()).decode("ascii")


def _as_json(document: dict[str, Any]) -> str:
    """JSON that may stand in a script element: no `<`, so neither `</script` nor `<!--`; and `&` and `>` for good."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _own(name: str) -> str:
    return resources.files("mimco_deploy.serving").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
