"""Pictures that mimco draws itself: the demo's gallery, the tests, the golden pictures of a bundle.

Each kind is a pattern or scene that a person recognises, drawn in colours, sizes, angles and light that have nothing
to do with the kind, so that colour alone does not find the neighbours. The same arguments give the same picture; other
machines differ at most by the rounding of sines and by the JPEG library.

Standard library, NumPy and Pillow only.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from mimco_deploy.errors import ConfigError

_Field = npt.NDArray[np.float64]  # [S, S], a number for each point of the sheet
_Sheet = npt.NDArray[np.float64]  # [S, S, 3], RGB in [0, 1]
_FINER = 2  # drawn so many times finer, then averaged: smooth edges


def draw(kind: str, seed: int, size_px: int = 96) -> Image.Image:
    """Draw one picture.

    Args:
        kind: one of `KINDS`.
        seed: ≥ 0; other seeds give other colours, sizes, angles, places and light.
        size_px: side of the picture, ≥ 1. The same seed gives the same motif in every size.

    Returns:
        A square picture of mode RGB.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in _DRAWERS:
        raise ConfigError(f"no kind of drawing is called {kind!r}", expected=", ".join(KINDS))
    rng = np.random.Generator(np.random.PCG64([KINDS.index(kind), seed]))
    sheet = _DRAWERS[kind](rng, size_px * _FINER)
    sheet = _lit(rng, sheet)
    small = sheet.reshape(size_px, _FINER, size_px, _FINER, 3).mean(axis=(1, 3))  # [size_px, size_px, 3]
    small = small + rng.normal(0, rng.uniform(0.005, 0.03), small.shape)  # a camera's noise
    return Image.fromarray(np.rint(small.clip(0, 1) * 255).astype(np.uint8))


def draw_gallery(folder: Path, per_kind: int, size_px: int, seed: int = 0) -> list[Path]:
    """Write `<folder>/<kind>/<kind>-0001.jpg` and so on for every kind.

    Args:
        folder: made where it is missing; files of the same names are replaced.
        per_kind: pictures of each kind, at most 100,000.
        size_px: side of each picture.
        seed: galleries of different seeds share no picture.

    Returns:
        The files, kind by kind.
    """
    paths = []
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(per_kind):
            paths.append(folder / kind / f"{kind}-{number + 1:04d}.jpg")
            draw(kind, seed * 100_000 + number, size_px).save(paths[-1], quality=92)
    return paths


# --- what all kinds share ---------------------------------------------------------------------------------------------


def _lit(rng: np.random.Generator, sheet: _Sheet) -> _Sheet:
    x, _ = _plane(rng, len(sheet), 1.0)
    x = x - x.mean()
    brightened: _Sheet = sheet * (1 + rng.uniform(0, 0.5) * x[..., None])
    return np.power(brightened, rng.uniform(0.8, 1.25))


def _plane(rng: np.random.Generator, size: int, scale: float, tilt: float = math.tau) -> tuple[_Field, _Field]:
    """Coordinates of the sheet, `scale` units across, turned by a random angle within `tilt` and shifted."""
    angle = rng.uniform(-tilt / 2, tilt / 2)
    row, column = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    x = scale * (column * math.cos(angle) + row * math.sin(angle)) + rng.uniform(0, scale)
    y = scale * (row * math.cos(angle) - column * math.sin(angle)) + rng.uniform(0, scale)
    return x, y


def _colours(rng: np.random.Generator, count: int) -> _Sheet:
    """Colours [count, 3] in random order: free hues, lightness spread out so that they stand apart."""
    light = np.linspace(rng.uniform(0.2, 0.35), rng.uniform(0.8, 1.0), count)
    colours = [colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.85), value) for value in light]
    return rng.permutation(np.array(colours))


def _clouds(rng: np.random.Generator, size: int, cells: int, across: int | None = None) -> _Field:
    """Smooth noise in [0, 1] with about `cells` bumps down and `across` bumps across."""
    coarse = Image.fromarray(rng.random((cells + 1, (across or cells) + 1)).astype(np.float32))
    field: _Field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    low, high = float(field.min()), float(field.max())
    return (field - low) / (high - low)


def _mix(below: _Sheet, above: _Sheet, share: npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> _Sheet:
    return below + (above - below) * np.asarray(share, dtype=np.float64)[..., None]


# --- one function a kind ----------------------------------------------------------------------------------------------


def _stripes(rng: np.random.Generator, size: int) -> _Sheet:
    x, y = _plane(rng, size, rng.uniform(3, 8))
    x = x + rng.uniform(0, 0.15) * np.sin(y * rng.uniform(0.5, 2))
    first, second = _colours(rng, 2)
    return _mix(first, second, x % 1 < rng.uniform(0.3, 0.7))


def _dots(rng: np.random.Generator, size: int) -> _Sheet:
    x, y = _plane(rng, size, rng.uniform(3, 7))
    x = x + rng.choice([0.0, 0.5]) * (np.floor(y) % 2)  # in rows, or every other row moved
    paper, ink = _colours(rng, 2)
    return _mix(paper, ink, np.hypot(x % 1 - 0.5, y % 1 - 0.5) < rng.uniform(0.2, 0.4))


def _checks(rng: np.random.Generator, size: int) -> _Sheet:
    x, y = _plane(rng, size, rng.uniform(3, 9))
    first, second = _colours(rng, 2)
    return _mix(first, second, (np.floor(x) + np.floor(y * rng.uniform(0.8, 1.2))) % 2)


def _rings(rng: np.random.Generator, size: int) -> _Sheet:
    x, y = _plane(rng, size, 1.0)
    x, y = x - x.mean() + rng.uniform(-0.25, 0.25), y - y.mean() + rng.uniform(-0.25, 0.25)
    radius = np.hypot(x, y * rng.uniform(0.75, 1.25)) * rng.uniform(5, 12)
    first, second = _colours(rng, 2)
    return _mix(first, second, (radius + rng.random()) % 1 < rng.uniform(0.35, 0.65))


def _bursts(rng: np.random.Generator, size: int) -> _Sheet:
    x, y = _plane(rng, size, 1.0)
    x, y = x - x.mean() + rng.uniform(-0.25, 0.25), y - y.mean() + rng.uniform(-0.25, 0.25)
    rays = np.arctan2(y, x) / math.tau * rng.integers(6, 15)
    first, second, heart = _colours(rng, 3)
    sheet = _mix(first, second, (rays + np.hypot(x, y) * rng.uniform(-1, 1)) % 1 < 0.5)
    return _mix(sheet, heart, np.hypot(x, y) < rng.uniform(0.0, 0.15))


def _bricks(rng: np.random.Generator, size: int) -> _Sheet:
    x, y = _plane(rng, size, rng.uniform(4, 8), tilt=0.6)
    x = x * rng.uniform(0.4, 0.55) + 0.5 * (np.floor(y) % 2)
    tones = rng.normal(1, 0.1, (32, 32))[np.floor(x).astype(int) % 32, np.floor(y).astype(int) % 32]
    mortar, clay = _colours(rng, 2)
    joint = rng.uniform(0.1, 0.18)
    return _mix(mortar, clay * tones[..., None], (x % 1 > joint / 2) & (y % 1 > joint))


def _plaid(rng: np.random.Generator, size: int) -> _Sheet:
    x, y = _plane(rng, size, rng.uniform(1.5, 3.5), tilt=1.6)
    cloth, *threads = _colours(rng, 4)
    sheet = np.broadcast_to(cloth, (size, size, 3))
    for thread, start, width in zip(threads, rng.uniform(0, 0.9, 3), rng.uniform(0.06, 0.35, 3), strict=True):
        for along in (x, y):
            sheet = _mix(sheet, thread, 0.5 * ((along - start) % 1 < width))
    return sheet


def _blobs(rng: np.random.Generator, size: int) -> _Sheet:
    field = _clouds(rng, size, int(rng.integers(4, 9)))
    paper, edge, ink = _colours(rng, 3)
    level = rng.uniform(0.45, 0.6)
    return _mix(_mix(paper, edge, field > level), ink, field > level + rng.uniform(0.06, 0.15))


def _grain(rng: np.random.Generator, size: int) -> _Sheet:
    along, across = int(rng.integers(1, 4)), int(rng.integers(16, 40))
    field = 0.65 * _clouds(rng, size, along, across) + 0.35 * _clouds(rng, size, 3 * along, 2 * across)
    first, second = _colours(rng, 2)
    return _mix(first, second, field if rng.random() < 0.5 else field.T)


def _sky(rng: np.random.Generator, size: int) -> _Sheet:
    row, column = (np.mgrid[:size, :size] + 0.5) / size
    high, low, cloud, land = _colours(rng, 4)
    sheet = _mix(high, low, row)
    wisps = 0.6 * _clouds(rng, size, 5, 3) + 0.4 * _clouds(rng, size, 14, 7)
    sheet = _mix(sheet, cloud, ((wisps - rng.uniform(0.45, 0.6)) * 4).clip(0, 1))
    sun = np.hypot(row - rng.uniform(0.1, 0.45), column - rng.uniform(0.1, 0.9))
    sheet = _mix(sheet, np.array([1.0, 1.0, 0.9]), sun < rng.uniform(0.05, 0.12))
    hills = rng.uniform(0.65, 0.85) + 0.06 * np.sin(column * rng.uniform(3, 12) + rng.uniform(0, math.tau))
    return _mix(sheet, land * (1.2 - 0.6 * row)[..., None], row > hills)


def _triangles(rng: np.random.Generator, size: int) -> _Sheet:
    paper, *inks = _colours(rng, 4)
    return _scatter(rng, size, paper, inks, ["triangle"], int(rng.integers(5, 12)))


def _clutter(rng: np.random.Generator, size: int) -> _Sheet:
    paper, *inks = _colours(rng, 7)
    return _scatter(rng, size, paper, inks, ["triangle", "disc", "box", "rod", "rod"], int(rng.integers(25, 45)))


def _scatter(
    rng: np.random.Generator, size: int, paper: _Sheet, inks: list[_Sheet], shapes: list[str], count: int
) -> _Sheet:
    """Shapes thrown on paper at random."""
    picture = Image.new("RGB", (size, size), _ink(paper))
    pen = ImageDraw.Draw(picture)
    reach = size * rng.uniform(0.5, 0.65) / math.sqrt(count)
    for _ in range(count):
        shape = shapes[rng.integers(len(shapes))]
        ink = _ink(inks[rng.integers(len(inks))])
        radius = reach * rng.uniform(0.6, 1.2)
        x, y = rng.uniform(0, size, 2)
        turn = rng.uniform(0, math.tau)
        if shape == "disc":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
            continue
        angles = {"triangle": (0, 2.1, 4.2), "box": (0, 1.57, 3.14, 4.71), "rod": (0, 0.25, 3.14, 3.39)}[shape]
        pen.polygon([(x + radius * math.cos(turn + a), y + radius * math.sin(turn + a)) for a in angles], fill=ink)
    return np.asarray(picture) / 255.0


def _ink(colour: _Sheet) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(part)) for part in colour)
    return red, green, blue


_DRAWERS: dict[str, Callable[[np.random.Generator, int], _Sheet]] = {
    "blobs": _blobs,
    "bricks": _bricks,
    "bursts": _bursts,
    "checks": _checks,
    "clutter": _clutter,
    "dots": _dots,
    "grain": _grain,
    "plaid": _plaid,
    "rings": _rings,
    "sky": _sky,
    "stripes": _stripes,
    "triangles": _triangles,
}
KINDS: tuple[str, ...] = tuple(_DRAWERS)
"""What can be drawn. New kinds go to the end: a kind's place is part of its pictures' seed."""
