"""`mimco search`: the indexed pictures most like a query."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mimco_deploy.commands.common import (
    AnyPath,
    Folder,
    FunctionT,
    json_option,
    load_encoder,
    print_json,
    runtime_options,
)
from mimco_deploy.errors import ConfigError, ImageError
from mimco_deploy.stopwatch import Stopwatch
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.serving.encoders import Encoder
    from mimco_deploy.serving.index import Hit
    from mimco_deploy.serving.query import Part

NOTHING_FOUND = 3
"""Exit code where no query has a hit."""


class _Weighted(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A picture with a weight, FILE or FILE:WEIGHT."""

    name = "FILE[:WEIGHT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        """Split at the last colon, where a number follows it."""
        if isinstance(value, tuple):
            return value
        path, sign, weight = str(value).rpartition(":")
        try:
            number = float(weight) if sign and not Path(value).exists() else None
        except ValueError:
            number = None
        if number is None:
            return Path(value), 1.0
        if not 0 < number < float("inf"):
            self.fail(f"{weight} is no weight above 0", param, ctx)
        return Path(path), number


class _CropType(click.ParamType):  # type: ignore[type-arg]
    """Four numbers with commas between them."""

    name = "X,Y,W,H"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Split at the commas."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(number) for number in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != 4 or not all(0 <= number < float("inf") for number in numbers):
            self.fail(f"{value} is not four numbers from 0 on", param, ctx)
        return numbers


def _query_options(function: FunctionT) -> FunctionT:
    file = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
    options = [
        click.option("--list", "listed", type=file, help="Queries, a path in each line; - reads them from stdin."),
        click.option("--crop", type=_CropType(), help="Search with this part of the query: pixels, or shares up to 1."),
        click.option("--plus", type=_Weighted(), multiple=True, help="And like this picture; repeatable."),
        click.option("--minus", type=_Weighted(), multiple=True, help="And unlike this picture; repeatable."),
        click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Number of hits."),
        click.option("--min-score", type=click.FloatRange(-1, 1), default=-1.0, help="Least score of a hit."),
        click.option("--min-confidence", type=click.FloatRange(0, 1), default=0.0, help="Least confidence of a hit."),
        click.option("--root", type=Folder, help="Only pictures in this folder or below."),
        click.option("--where", multiple=True, metavar="SQL", help="Only pictures for which this holds; repeatable."),
        click.option("--table", type=AnyPath, help="CSV or Parquet whose columns --where may name."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _output_options(function: FunctionT) -> FunctionT:
    options = [
        click.option("--jsonl", "as_jsonl", is_flag=True, help="Print a line of JSON for each hit."),
        click.option("-0", "--print0", is_flag=True, help="Print paths alone, each with a NUL behind it."),
        click.option("--sheet", type=click.Path(path_type=Path, dir_okay=False), help="Write query and hits as HTML."),
        click.option("--why", is_flag=True, help="Show in the sheet which parts of query and hit are alike."),
        click.option("--rerank", is_flag=True, help="Order the best hits by how alike their parts are."),
        click.option("--copy-to", type=Folder, help="Copy the hits into this folder."),
        click.option("--timings", is_flag=True, help="Say where the time went, in ms."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("queries", nargs=-1, type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@_query_options
@_output_options
@runtime_options
@json_option
@click.pass_context
def search(
    context: click.Context,
    /,
    queries: tuple[Path, ...],
    listed: Path | None,
    sheet: Path | None,
    copy_to: Path | None,
    timings: bool,
    as_json: bool,
    as_jsonl: bool,
    print0: bool,
    **options: Any,
) -> None:
    """Find the indexed pictures most like QUERIES. The score is the cosine: higher is better, 1 is the same.

    A query is a picture file, an indexed path, or - for a picture on stdin. Several are searched for one by one. Exits
    with 3 where nothing is found.
    """
    workspace: Workspace = context.obj
    queries += tuple(_read_list(listed)) if listed is not None else ()
    if not queries or as_json + as_jsonl + print0 > 1 or (sheet is not None and len(queries) > 1):
        raise click.UsageError("Give a query, at most one of --json, --jsonl and -0, and --sheet with one query only.")
    if (options["why"] and sheet is None) or list(queries).count(Path("-")) > 1:
        raise click.UsageError("--why goes with --sheet, and - can be given once.")
    watch = Stopwatch()
    found_any = False
    show = _printer(as_json, as_jsonl, print0)
    for query, hits, encoder in _answers(workspace, queries, sheet, watch, **options):
        found_any = found_any or bool(hits)
        show(query, hits, encoder, watch.laps_ms if timings else {})
        if copy_to is not None:
            _copy(hits, copy_to)
    if timings and not as_json:
        click.echo("ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in watch.laps_ms.items()), err=True)
    if not found_any:
        context.exit(NOTHING_FOUND)


def _answers(
    workspace: Workspace,
    queries: Sequence[Path],
    sheet: Path | None,
    watch: Stopwatch,
    *,
    crop: Any,
    plus: Sequence[tuple[Path, float]],
    minus: Sequence[tuple[Path, float]],
    k: int,
    min_score: float,
    min_confidence: float,
    root: Path | None,
    where: Sequence[str],
    table: Path | None,
    why: bool,
    rerank: bool,
    **runtime: Any,
) -> Iterator[tuple[Path, list[Hit], Encoder]]:
    from mimco_deploy.serving.filters import Filter
    from mimco_deploy.serving.index import ImageIndex
    from mimco_deploy.serving.query import Part, search_image

    watch.lap("imports")
    encoder = load_encoder(workspace, **runtime)
    watch.lap("encoder")
    condition = Filter(" AND ".join(f"({one}\n)" for one in where), root, table)
    others = [Part(path, weight) for path, weight in plus] + [Part(path, -weight) for path, weight in minus]
    with ImageIndex.open(workspace.index, encoder.spec.fingerprint) as index:
        watch.lap("index")
        for query in queries:
            picture = sys.stdin.buffer.read() if query == Path("-") else query
            parts = [Part(picture, crop=crop), *others]
            try:
                hits = search_image(
                    index, encoder, parts, k, condition, min_score=min_score, rerank=rerank, watch=watch
                )
            except ImageError as error:
                if len(queries) == 1:
                    raise
                click.echo(f"Error: {error}", err=True)
                hits = []
            hits = [hit for hit in hits if hit.confidence is None or hit.confidence >= min_confidence]
            if sheet is not None:
                _write_sheet(sheet, query, parts, hits, encoder if why else None)
            yield query, hits, encoder


def _write_sheet(sheet: Path, query: Path, parts: Sequence[Part], hits: list[Hit], encoder: Encoder | None) -> None:
    from mimco_deploy.serving.sheet import write_sheet
    from mimco_deploy.serving.why import explain

    reasons = [] if encoder is None else explain(encoder, parts[0], [hit.path for hit in hits])
    write_sheet(sheet, query if parts[0].picture == query else parts[0].picture, hits, reasons)


def _printer(
    as_json: bool, as_jsonl: bool, print0: bool
) -> Callable[[Path, list[Hit], Encoder, dict[str, float]], None]:
    def ranked(hits: list[Hit]) -> list[dict[str, Any]]:
        return [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]

    def document(query: Path, hits: list[Hit], encoder: Encoder, laps: dict[str, float]) -> None:
        from mimco_deploy.commands.common import run_by

        more = {"timings_ms": laps} if laps else {}
        print_json({"query": query, "hits": ranked(hits), **run_by(encoder), **more})

    def lines(query: Path, hits: list[Hit], *_: object) -> None:
        for hit in ranked(hits):
            click.echo(json.dumps({"query": query, **hit}, default=str))

    def paths(_: Path, hits: list[Hit], *__: object) -> None:
        for hit in hits:
            sys.stdout.buffer.write(os.fsencode(hit.path) + b"\0")

    return document if as_json else lines if as_jsonl else paths if print0 else _print_table


def _print_table(query: Path, hits: list[Hit], *_: object) -> None:
    from mimco_deploy.serving.background import in_words
    from mimco_deploy.serving.scan import readable
    from mimco_deploy.terminal import print_thumbnail

    here = f"{Path.cwd()}{os.sep}"
    for rank, hit in enumerate(hits, start=1):
        print_thumbnail(hit.path)
        path = readable(hit.path).removeprefix(here)
        click.echo(f"{rank:>3}  {hit.score:.4f}  {in_words(hit.confidence):<8}  {path}")
    best = hits[0].expected_by_chance if hits else None
    if not hits:
        click.echo(f"nothing found for {readable(query)}", err=True)
    elif best is not None and best >= 1:
        click.echo(
            f"nothing really matches {readable(query)}: about {best:,.0f} pictures would be as alike by chance",
            err=True,
        )


def _read_list(path: Path) -> Iterator[Path]:
    try:
        content = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", expected="a list of pictures") from error
    separator = b"\0" if b"\0" in content else b"\n"
    yield from (Path(os.fsdecode(line)) for line in content.split(separator) if line.strip())


def _copy(hits: Sequence[Hit], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, hit in enumerate(hits, start=1):
        target = folder / f"{rank:03d}-{hit.path.name}"
        if target.exists():
            click.echo(f"{target} exists and is kept", err=True)
            continue
        try:
            shutil.copy2(hit.path, target)
        except OSError as error:
            click.echo(f"{hit.path} cannot be copied ({error.strerror})", err=True)
