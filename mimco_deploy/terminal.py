"""Progress bars on stderr and tables, by rich. Used by the command line only; results are its own, on stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.color import Color
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mimco_deploy.errors import ImageError, plain

if TYPE_CHECKING:
    from mimco_deploy.serving.update import Progress as UpdateProgress
    from mimco_deploy.training.loop import StepReport

THUMBNAIL_CELLS = 24
talk = Console(stderr=True, highlight=False)


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; where that is no terminal, wide enough that nothing is cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title)
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 2**16).print(table)


def print_thumbnail(path: Path) -> None:
    """A picture in half blocks, two pixels in a cell, on a terminal of 16 million colours; elsewhere nothing."""
    console = Console(highlight=False)
    if not sys.stdout.isatty() or console.color_system != "truecolor":
        return
    from mimco_deploy.images import read_image

    try:
        picture = read_image(path, THUMBNAIL_CELLS)
    except ImageError:
        return  # the path is printed all the same
    picture.thumbnail((THUMBNAIL_CELLS, THUMBNAIL_CELLS))
    pixels = picture.load()
    assert pixels is not None
    for top in range(0, picture.height - 1, 2):
        line = Text("     ")
        for x in range(picture.width):
            upper, lower = (Color.from_rgb(*pixels[x, y]) for y in (top, top + 1))  # type: ignore[misc]
            line.append("▀", Style(color=upper, bgcolor=lower))
        console.print(line)


@contextlib.contextmanager
def training_bar(title: str, silent: bool) -> Iterator[Callable[[StepReport], None]]:
    """A bar with loss parts, images/s, share of waiting and time left; without a terminal, a line now and then."""
    with _bar(TextColumn("{task.fields[note]}"), silent=silent) as progress:
        task = progress.add_task(title, total=None, note="")

        def show(report: StepReport) -> None:
            metrics = " ".join(f"{name} {value:.3f}" for name, value in report.metrics.items())
            note = f"{metrics} · {report.images_per_s:.0f} images/s · {report.waiting:.0%} waiting"
            progress.update(task, completed=report.step, total=report.total_steps, note=note)
            tenth = max(1, report.total_steps // 10)
            if not talk.is_terminal and (report.step % tenth < 10 or report.step == report.total_steps):
                talk.print(f"{title}: step {report.step} of {report.total_steps}: {note}", soft_wrap=True)

        yield show


@contextlib.contextmanager
def counting_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for `done` of `total`."""
    with _bar() as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def indexing_bar() -> Iterator[Callable[[UpdateProgress], None]]:
    """A bar with images/s, share of waiting and time left; without a terminal, a line for each tenth."""
    with _bar(TextColumn("{task.fields[note]}")) as progress:
        task = progress.add_task("walking", total=None, note="")
        tenths = 0

        def show(update: UpdateProgress) -> None:
            nonlocal tenths
            note = f"{update.images_per_s:.0f} images/s · {update.waiting:.0%} waiting" if update.done else ""
            progress.update(
                task, description=update.doing, completed=update.done, total=update.total or None, note=note
            )
            if not talk.is_terminal and update.total and 10 * update.done // update.total > tenths:
                tenths = 10 * update.done // update.total
                talk.print(f"{update.doing}: {update.done} of {update.total}: {note}", soft_wrap=True)

        yield show


def _bar(*more: TextColumn, silent: bool = False) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *more,
    )
    return Progress(*columns, console=talk, disable=silent or not talk.is_terminal)
