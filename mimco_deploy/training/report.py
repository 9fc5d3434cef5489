"""A run as one HTML page that needs nothing else, written anew as the run goes: no script, no file beside it."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from mimco_deploy.atomic import write_bytes
from mimco_deploy.html_page import build_page, image_tag
from mimco_deploy.training.probe import Probe, Sight

CHARTS = {
    "loss": "what is minimised",
    "patch_loss": "masked patches, before its weight",
    "image_loss": "whole images, before its weight",
    "contrastive_loss": "the other view, before its weight",
    "positive_similarity": "cosine of a query with its own key",
    "patch_accuracy": "share of masked patches whose own token is nearest",
    "image_accuracy": "share of images whose own key is nearest",
    "feature_spread": "of a batch: 0 is collapse, 1 is even on the sphere",
    "val_top1": "share of --val recognised at first",
    "val_top5": "share of --val recognised in five guesses",
    "lr": "learning rate",
    "images_per_s": "images a second",
    "waiting": "share of the time spent waiting for data",
}
_WIDTH, _HEIGHT = 320, 120


def write_report(
    folder: Path,
    title: str,
    progress: str,
    *,
    sights: Sequence[Sight] = (),
    probe: Probe | None = None,
    masked: Sequence[tuple[Tensor, Tensor]] = (),
    alarm: str = "",
) -> None:
    """Write `report.html` into a run's folder.

    Args:
        folder: of the run; its `log.jsonl`, a line for some steps or, with labels, for each epoch, gives the charts.
        title: what runs.
        progress: how far it is, in words.
        sights: what the probe saw so far.
        probe: the pictures that the sights are of.
        masked: pictures as the method sees them: uint8 [3, H, W], and bool [h, w] with True = masked.
        alarm: why the run ended, if it did so badly.
    """
    rows = _read_log(folder / "log.jsonl")
    parts = [f"<h1>{html.escape(title)}</h1><p class='soft'>{html.escape(progress)}</p>"]
    if alarm:
        parts.append(f"<p class='alarm' role='alert'>{html.escape(alarm)}</p>")
    if rows:
        parts.append("<h2>Training</h2><div class='charts'>")
        unit = "epoch" if "epoch" in rows[0] else "step"
        for name, meaning in CHARTS.items():
            points = [(row["epoch"] if unit == "epoch" else row["step"] + 1, row[name]) for row in rows if name in row]
            parts.append(_chart(name, meaning, points, unit))
        parts.append("</div>")
    if sights:
        seen = f"{len(probe.pictures)} fixed pictures" if probe else "fixed pictures"
        parts.append(f"<h2>Embeddings of {seen}</h2><div class='charts'>")
        parts.append(_chart("spread", "0 is collapse, 1 is even on the sphere", [(s.step, s.spread) for s in sights]))
        rank = [(s.step, s.effective_rank) for s in sights]
        parts.append(_chart("effective rank", "directions over which they spread", rank))
        knn = [(s.step, s.knn) for s in sights if s.knn is not None]
        parts.append(_chart("k-NN", "folders as classes, each picture left out in turn", knn))
        parts.append("</div>")
    if sights and probe:
        parts.append(_strips(sights[-1], probe))
    if masked:
        parts.append("<h2>Masks</h2><div class='strip'>")
        parts += [f"<div>{image_tag(_overlay(pixels, mask), 'a masked picture')}</div>" for pixels, mask in masked]
        parts.append("</div>")
    write_bytes(folder / "report.html", build_page(title, parts))


def _read_log(path: Path) -> list[dict[str, float]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line that a crash cut short
            continue
    return rows


def _chart(name: str, meaning: str, points: Sequence[tuple[float, float]], unit: str = "step") -> str:
    """One line over the steps or epochs; nothing where there is nothing to show."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return ""
    points = _thin(points)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    across, up = (max(xs) - min(xs)) or 1.0, (high - low) or 1.0
    line = " ".join(
        f"{_WIDTH * (x - min(xs)) / across:.1f},{_HEIGHT - _HEIGHT * (y - low) / up:.1f}" for x, y in points
    )
    last = line.rpartition(" ")[2].split(",")
    label = html.escape(f"{name}: {ys[-1]:.4g} at {unit} {xs[-1]:.0f}, from {low:.4g} to {high:.4g}")
    return (
        f"<figure><figcaption>{html.escape(name)}<b>{ys[-1]:.4g}</b></figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{label}'>"
        f"<line x1='0' y1='{_HEIGHT}' x2='{_WIDTH}' y2='{_HEIGHT}'/><polyline points='{line}'/>"
        f"<circle cx='{last[0]}' cy='{last[1]}' r='3'/></svg>"
        f"<p class='soft'>{html.escape(meaning)}; {low:.4g} to {high:.4g}</p></figure>"
    )


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Few enough to draw: of each part of the line its least and its greatest value, so that no spike is lost."""
    size = math.ceil(len(points) / 400)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    kept = [sorted({min(part, key=_value), max(part, key=_value)}) for part in parts]
    return list(dict.fromkeys([*itertools.chain(*kept), points[-1]]))


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _strips(sight: Sight, probe: Probe) -> str:
    """Each shown picture, then its neighbours."""
    parts = [f"<h2>Nearest of the others, after step {sight.step}</h2>"]
    for shown, neighbours, scores in zip(probe.shown, sight.neighbours, sight.scores, strict=True):
        cells = [f"<div>{image_tag(probe.pictures[shown], probe.names[shown])}</div>"]
        for number, score in zip(neighbours, scores, strict=True):
            cells.append(f"<div>{image_tag(probe.pictures[number], probe.names[number])}{score:.3f}</div>")
        parts.append(f"<div class='strip'>{''.join(cells)}</div>")
    return "".join(parts)


def _overlay(pixels: Tensor, mask: Tensor) -> Image.Image:
    """A picture whose masked units are dimmed."""
    patch = pixels.shape[1] // mask.shape[0]
    hidden = mask.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    shown = pixels.float() * (~hidden) + (0.25 * pixels.float() + 90.0) * hidden
    return Image.fromarray(shown.byte().permute(1, 2, 0).numpy())
