"""An evaluation as one HTML page: the numbers with their intervals, maps side by side, confused classes, hit strips.

Needs scikit-learn for the maps (t-SNE, van der Maaten and Hinton, 2008); without it they are left out. No script.
"""

from __future__ import annotations

import html
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.atomic import write_bytes
from mimco_deploy.errors import ImageError
from mimco_deploy.evaluation.compare import Comparison, table
from mimco_deploy.evaluation.evaluate import Evaluation, labels_of
from mimco_deploy.evaluation.knn import neighbour_confusion
from mimco_deploy.evaluation.measures import Measure
from mimco_deploy.html_page import build_page, image_tag, place_of_page
from mimco_deploy.sources import Picture

logger = logging.getLogger(__name__)

MAP_POINTS = 1000
"""Pictures on a map: t-SNE of so many takes seconds."""
STRIPS, HITS = 8, 7
MAX_CELLS = 40
"""Classes of which a table of neighbours can be read; of more, the pairs confused most are listed alone."""
MAX_CLASSES = 2000
"""Of more, whose neighbours are whose takes more memory than it tells."""
PAIRS = 12
NEIGHBOURS = 10
_COLOURS = (
    "#0b6e5f",
    "#c2571a",
    "#5b4bb7",
    "#b3305f",
    "#3c7a1f",
    "#1f6fb2",
    "#8a6d00",
    "#7a3fa0",
    "#0f8b8d",
    "#a33b20",
)
_SIDE = 320
_THUMBNAIL_PX = 168
_STYLE = """
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.number { text-align: right; white-space: nowrap; } .scroll { overflow-x: auto; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
.maps figure { max-width: 36rem; }
.maps circle { fill-opacity: .75; } .bar { width: 180px; height: 12px; margin: 0; display: inline-block; }
.bar rect { fill: var(--line); } .bar path { stroke: var(--mark); stroke-width: 2; } .bar circle { fill: var(--mark); }
.right img { outline: 3px solid var(--mark); outline-offset: -3px; }
.wrong img { outline: 3px solid var(--bad); outline-offset: -3px; }
.strip div:first-child img { outline: none; }
.cells rect { fill: var(--mark); } .key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .6rem 0; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border-radius: 50%; }
"""


def write_page(path: Path, found: Sequence[Evaluation], comparison: Comparison | None = None) -> None:
    """Write the page.

    Args:
        path: file, replaced whole.
        found: one evaluation, or two of the same pictures.
        comparison: of the two.
    """
    title = " and ".join(evaluation.name for evaluation in found)
    parts = [f"<h1>{html.escape(title)}</h1>", *(_about(evaluation) for evaluation in found)]
    parts.append("<h2>Measured</h2>" + _table(found))
    if comparison is not None:
        parts.append("<h2>The second less the first, picture by picture</h2>" + _differences(comparison))
    parts += [_maps(found), *(_confusion(evaluation) for evaluation in found), _strips(found)]
    write_bytes(place_of_page(path), build_page(f"mimco eval: {title}", parts, _STYLE))


def _about(evaluation: Evaluation) -> str:
    encoder = evaluation.encoder
    voters = f", {len(evaluation.voters.pictures):,} that vote" if evaluation.voters else ""
    classes = f", {len(evaluation.classes):,} classes" if evaluation.classes else ""
    text = (
        f"{evaluation.name}: {encoder['architecture']} at {encoder['image_size_px']} px, {encoder['precision']}, "
        f"{len(evaluation.pictures.pictures):,} pictures{voters}{classes}. {encoder['weights']}; "
        f"fingerprint {str(encoder['fingerprint'])[:12]}"
    )
    return f"<p class='soft'>{html.escape(text)}</p>"


def _table(found: Sequence[Evaluation]) -> str:
    """One line a measure, a column an encoder."""
    heads = "".join(f"<th colspan='2'>{html.escape(evaluation.name)}</th>" for evaluation in found)
    lines = [f"<tr><th>protocol</th><th>measure</th>{heads}<th>over</th></tr>"]
    for row in table(found):
        measure = row[0]
        assert measure is not None
        cells = "".join(f"<td class='number'>{_number(m)}</td><td>{_bar(m)}</td>" for m in row if m is not None)
        lines.append(
            f"<tr><td>{html.escape(measure.protocol)}</td><td>{html.escape(measure.name)}</td>{cells}"
            f"<td class='number'>{measure.count:,}</td></tr>"
        )
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def _differences(comparison: Comparison) -> str:
    lines = ["<tr><th>protocol</th><th>measure</th><th>difference</th><th></th></tr>"]
    agreement = [] if comparison.agreement is None else [comparison.agreement]
    for measure in (*comparison.differences, *agreement):
        surely = "beyond chance" if measure is not comparison.agreement and measure.beyond_chance else ""
        lines.append(
            f"<tr><td>{html.escape(measure.protocol)}</td><td>{html.escape(measure.name)}</td>"
            f"<td>{_number(measure)}</td><td>{surely}</td></tr>"
        )
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def _number(measure: Measure) -> str:
    return html.escape(measure.in_words())


def _bar(measure: Measure) -> str:
    """The interval on a line from 0 to 1; nothing for measures on other scales."""
    if not (measure.low >= 0 and measure.high <= 1):
        return ""
    low, high, value = (4 + 172 * number for number in (measure.low, measure.high, measure.value))
    return (
        "<svg class='bar' viewBox='0 0 180 12' aria-hidden='true'><rect x='4' y='5' width='172' height='2'/>"
        f"<path d='M{low:.1f} 6H{high:.1f}'/><circle cx='{value:.1f}' cy='6' r='3.5'/></svg>"
    )


def _maps(found: Sequence[Evaluation]) -> str:
    if importlib.util.find_spec("sklearn") is None:
        logger.warning('no maps: they need scikit-learn; pip install "mimco-deploy[eval]"')
        return ""
    count = len(found[0].pictures.pictures)
    if count < 5:
        return ""
    chosen = np.linspace(0, count - 1, min(count, MAP_POINTS)).astype(np.int64)
    labels = labels_of(found[0])
    colours = _by_class(None if labels is None else labels[chosen])
    figures = [
        f"<figure><figcaption>{html.escape(evaluation.name)}</figcaption>"
        f"{_scatter(_tsne(evaluation.pictures.embeddings[chosen]), colours, evaluation.name)}</figure>"
        for evaluation in found
    ]
    title = f"<h2>Maps of {len(chosen):,} pictures, by t-SNE</h2>"
    return f"{title}{_key(found[0])}<div class='maps'>{''.join(figures)}</div>"


def _tsne(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """[N, 2] in [0, 1]."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="random", random_state=0, metric="cosine").fit_transform(embeddings)
    spans: npt.NDArray[np.float64] = np.asarray(places, np.float64) - places.min(axis=0)
    return spans / max(float(spans.max()), 1e-12)


def _by_class(labels: npt.NDArray[np.int64] | None) -> list[str]:
    """A colour for the first classes, grey for the others: more cannot be told apart."""
    if labels is None:
        return []
    return [_COLOURS[label] if label < len(_COLOURS) else "#9b978f" for label in labels]


def _key(evaluation: Evaluation) -> str:
    entries = [
        f"<span><i style='background:{colour}'></i>{html.escape(name)}</span>"
        for name, colour in zip(evaluation.classes, _COLOURS, strict=False)
    ]
    rest = len(evaluation.classes) - len(_COLOURS)
    if rest > 0:
        entries.append(f"<span><i style='background:#9b978f'></i>{rest} other classes</span>")
    return f"<p class='key soft'>{''.join(entries)}</p>" if entries else ""


def _scatter(places: npt.NDArray[np.float64], colours: Sequence[str], name: str) -> str:
    dots = [
        f"<circle cx='{_SIDE * x:.1f}' cy='{_SIDE * y:.1f}' r='2.5'{colour}/>"
        for (x, y), colour in zip(places, [f" style='fill:{c}'" for c in colours] or [""] * len(places), strict=True)
    ]
    label = html.escape(f"map of pictures by {name}")
    return f"<svg viewBox='-6 -6 {_SIDE + 12} {_SIDE + 12}' role='img' aria-label='{label}'>{''.join(dots)}</svg>"


def _confusion(evaluation: Evaluation) -> str:
    """Whose neighbours are of which class: a table where it can be read, and the pairs confused most."""
    labels = labels_of(evaluation)
    if labels is None or not 2 <= len(evaluation.classes) <= MAX_CLASSES:
        return ""
    shares = _neighbour_classes(evaluation, labels)
    worst = np.nan_to_num(shares)
    np.fill_diagonal(worst, 0.0)
    order = np.argsort(-worst, axis=None)[:PAIRS]
    names = evaluation.classes
    pairs = [
        f"<tr><td>{html.escape(names[a])}</td><td>{html.escape(names[b])}</td>"
        f"<td class='number'>{worst[a, b]:.1%}</td></tr>"
        for a, b in zip(*np.unravel_index(order, worst.shape), strict=True)
        if worst[a, b] > 0
    ]
    heads = "<tr><th>class</th><th>has neighbours of</th><th>share</th></tr>"
    listed = f"<div class='scroll'><table>{heads}{''.join(pairs)}</table></div>"
    grid = _cells(shares, names) if len(names) <= MAX_CELLS else ""
    title = f"<h2>Classes of the neighbours, by {html.escape(evaluation.name)}</h2>"
    return f"{title}<div class='maps'>{grid}<div>{listed}</div></div>"


def _neighbour_classes(evaluation: Evaluation, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    queries, voters, classes = evaluation.pictures.embeddings, evaluation.voters, len(evaluation.classes)
    if voters is not None:
        gallery, theirs = voters.embeddings, voters.labels(evaluation.classes)
        return neighbour_confusion(gallery, theirs, queries, labels, classes, min(NEIGHBOURS, len(gallery)))
    return neighbour_confusion(queries, labels, queries, labels, classes, min(NEIGHBOURS, len(queries) - 1), among=True)


def _cells(shares: npt.NDArray[np.float64], names: Sequence[str]) -> str:
    side = _SIDE / len(names)
    cells = [
        f"<rect x='{column * side:.1f}' y='{row * side:.1f}' width='{side:.1f}' height='{side:.1f}' "
        f"fill-opacity='{shares[row, column]:.3f}'><title>{html.escape(names[row])}: {shares[row, column]:.1%} "
        f"{html.escape(names[column])}</title></rect>"
        for row in range(len(names))
        for column in range(len(names))
        if np.isfinite(shares[row, column]) and shares[row, column] > 0
    ]
    caption = "rows: the picture's class; columns: its neighbours'; darker is more"
    return (
        f"<figure class='cells'><svg viewBox='0 0 {_SIDE} {_SIDE}' role='img' aria-label='{caption}'>{''.join(cells)}"
        f"</svg><p class='soft'>{caption}</p></figure>"
    )


def _strips(found: Sequence[Evaluation]) -> str:
    """A few pictures, each with its nearest others by each encoder."""
    count = len(found[0].pictures.pictures)
    parts = ["<h2>Nearest pictures</h2>"]
    for number in np.unique(np.linspace(0, count - 1, min(count, STRIPS)).astype(np.int64)):
        for evaluation in found:
            parts.append(f"<p class='soft'>{html.escape(evaluation.name)}</p>" if len(found) > 1 else "")
            parts.append(_strip(evaluation, int(number)))
    return "".join(parts)


def _strip(evaluation: Evaluation, number: int) -> str:
    pictures, gallery = evaluation.pictures, evaluation.voters or evaluation.pictures
    cosines = gallery.embeddings @ pictures.embeddings[number]
    if evaluation.voters is None:
        cosines[number] = -np.inf
    shown = pictures.pictures[number]
    cells = [f"<div>{_thumbnail(shown)}{html.escape(shown.label or '')}</div>"]
    for hit in np.argsort(-cosines, kind="stable")[: min(HITS, len(cosines) - (evaluation.voters is None))]:
        picture = gallery.pictures[hit]
        kind = "" if not evaluation.classes else " class='right'" if picture.label == shown.label else " class='wrong'"
        cells.append(f"<div{kind}>{_thumbnail(picture)}{cosines[hit]:.3f}</div>")
    return f"<div class='strip'>{''.join(cells)}</div>"


def _thumbnail(picture: Picture) -> str:
    try:
        return image_tag(picture.decode(_THUMBNAIL_PX), picture.name)
    except ImageError as error:  # it was there when it was embedded
        return f"<span class='soft'>{html.escape(error.problem)}</span>"
