"""`mimco search`: the indexed pictures most like a query."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mimco_deploy.atomic import copy_new
from mimco_deploy.commands.common import (
    AnyPath,
    FiniteRange,
    Folder,
    FunctionT,
    IndexedFolder,
    json_option,
    load_encoder,
    new_page,
    print_json,
    printable,
    runtime_options,
)
from mimco_deploy.errors import ConfigError, ImageError, IndexStoreError, QueryError
from mimco_deploy.serving import MAX_WEIGHT
from mimco_deploy.stopwatch import Stopwatch
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.serving.encoders import Encoder
    from mimco_deploy.serving.index import Hit
_MAX_NAME_BYTES = 255
NOTHING_FOUND = 3
"""Exit code where no query has a hit."""


_TURN_S = 2e-4


@dataclass(frozen=True)
class _Answer:
    """What one query came to."""

    query: Path
    hits: list[Hit]
    encoder: Encoder
    error: str | None = None
    """Why it could not be searched for, where there are others."""


# As text: ./- is a file, and as a path it would be equal to -.
_TextPath = click.Path(path_type=str, dir_okay=False, allow_dash=True)


class _Weighted(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A picture with a weight, FILE or FILE:WEIGHT."""

    name = "FILE[:WEIGHT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        """Split at the last colon, where a number follows it."""
        if isinstance(value, tuple):
            return value
        if value == "-" or str(value).startswith("-:"):
            self.fail("standard input is read for the query alone; ./- is a file of that name", param, ctx)
        path, sign, weight = str(value).rpartition(":")
        try:
            number = float(weight) if sign and not Path(value).exists() else None
        except ValueError:
            number = None
        if number is None:
            return Path(value), 1.0
        if not 0 < number <= MAX_WEIGHT:
            self.fail(f"{weight} is no weight above 0 and up to {MAX_WEIGHT:g}", param, ctx)
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
    options = [
        click.option("--list", "listed", type=_TextPath, help="Queries, a path in each line; - reads them from stdin."),
        click.option("--crop", type=_CropType(), help="Search with this part of the query: pixels, or shares up to 1."),
        click.option("--plus", type=_Weighted(), multiple=True, help="And like this picture; repeatable."),
        click.option("--minus", type=_Weighted(), multiple=True, help="And unlike this picture; repeatable."),
        click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Number of hits."),
        click.option("--min-score", type=FiniteRange(-1, 1), default=-1.0, help="Least score of a hit."),
        click.option("--min-confidence", type=FiniteRange(0, 1), default=0.0, help="Least confidence of a hit."),
        click.option("--root", type=IndexedFolder, help="Only pictures in this folder or below."),
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
        click.option(
            "--sheet",
            type=click.Path(path_type=Path, dir_okay=False),
            callback=new_page,
            help="Write query and hits as HTML.",
        ),
        click.option("--why", is_flag=True, help="Show in the sheet which parts of query and hit are alike."),
        click.option("--rerank", is_flag=True, help="Order the best hits by how alike their parts are."),
        click.option("--copy-to", type=Folder, help="Copy the hits into this folder."),
        click.option("--timings", is_flag=True, help="Say where the time went, in ms."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("queries", nargs=-1, type=_TextPath)
@_query_options
@_output_options
@runtime_options
@json_option
@click.pass_context
def search(
    context: click.Context,
    /,
    queries: tuple[str, ...],
    listed: str | None,
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
    asked = [None if query == "-" else Path(query) for query in queries]
    asked += _read_list(listed) if listed is not None else []
    if not asked or as_json + as_jsonl + print0 > 1 or (sheet is not None and len(asked) > 1):
        raise click.UsageError("Give a query, at most one of --json, --jsonl and -0, and --sheet with one query only.")
    if (options["why"] and sheet is None) or asked.count(None) + (listed == "-") > 1:
        raise click.UsageError("--why goes with --sheet, and - can be given once.")
    if options["table"] is not None and not options["where"]:
        raise click.UsageError("--table goes with --where.")
    watch = Stopwatch()
    show = _printer(as_json, as_jsonl, print0)
    copies = None if copy_to is None else _Copies(copy_to)
    all_failed, found_any = True, False
    for answer in _answers(workspace, asked, sheet, watch, **options):
        all_failed, found_any = all_failed and answer.error is not None, found_any or bool(answer.hits)
        show(answer, watch.laps_ms if timings else {})
        if copies is not None:
            copies.take(answer.hits)
    if timings and not as_json:
        click.echo("ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in watch.laps_ms.items()), err=True)
    if all_failed or (copies is not None and copies.failed):
        context.exit(1)
    if not found_any:
        context.exit(NOTHING_FOUND)


def _answers(
    workspace: Workspace,
    queries: Sequence[Path | None],
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
) -> Iterator[_Answer]:
    with _short_turns(), ThreadPoolExecutor(1) as beside:
        # Most of it is hashing and ONNX Runtime's own work, which leaves the interpreter free to import the rest.
        loading = beside.submit(load_encoder, workspace, **runtime)
        from mimco_deploy.serving.filters import Filter
        from mimco_deploy.serving.generations import check_encoder
        from mimco_deploy.serving.index import ImageIndex
        from mimco_deploy.serving.query import Part, search_image

        if sheet is not None:
            from mimco_deploy.serving.sheet import write_sheet
            from mimco_deploy.serving.why import explain
        watch.lap("imports")
        try:
            index = ImageIndex.open(workspace.index)
        except IndexStoreError:
            loading.result()  # what is wrong with the encoder is said first
            raise
        watch.lap("index")
        encoder = loading.result()
    watch.lap("encoder")
    # A line end, so that a remark at the end of one does not take in the next.
    condition = Filter(where[0] if len(where) == 1 else " AND ".join(f"({one}\n)" for one in where), root, table)
    others = [Part(path, weight) for path, weight in plus] + [Part(path, -weight) for path, weight in minus]
    with index:
        check_encoder(index.path, index.fingerprint, encoder.spec.fingerprint)
        for query in queries:
            picture = sys.stdin.buffer.read() if query is None else query
            name = query or Path("-")
            parts = [Part(picture, crop=crop), *others]
            try:
                hits = search_image(
                    index, encoder, parts, k, condition,
                    min_score=min_score, min_confidence=min_confidence, rerank=rerank, watch=watch,
                )  # fmt: skip
            except (ImageError, ConfigError) as error:
                if len(queries) == 1 or not isinstance(error, ImageError | QueryError):
                    raise  # what is wrong with a condition is wrong for all
                click.echo(f"Error: {error}", err=True)
                yield _Answer(name, [], encoder, str(error))
                continue
            if min_confidence and any(hit.confidence is None for hit in hits):
                click.echo("too few pictures are indexed to tell confidence: --min-confidence left none out", err=True)
            if sheet is not None:
                write_sheet(sheet, parts, hits, explain(encoder, parts[0], [hit.path for hit in hits]) if why else [])
            yield _Answer(name, hits, encoder)


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """A thread that comes back to the interpreter waits 0.2 ms for it at most, not Python's usual 5."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _printer(as_json: bool, as_jsonl: bool, print0: bool) -> Callable[[_Answer, dict[str, float]], None]:
    def ranked(hits: list[Hit]) -> list[dict[str, Any]]:
        return [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]

    def document(answer: _Answer, laps: dict[str, float]) -> None:
        from mimco_deploy.commands.common import run_by

        more = {"timings_ms": laps} if laps else {}
        failed = {"error": answer.error} if answer.error is not None else {}
        print_json({"query": answer.query, "hits": ranked(answer.hits), **failed, **run_by(answer.encoder), **more})

    def lines(answer: _Answer, _: object) -> None:
        for hit in ranked(answer.hits):
            click.echo(json.dumps({"query": answer.query, **hit}, default=str))

    def paths(answer: _Answer, _: object) -> None:
        for hit in answer.hits:
            sys.stdout.buffer.write(os.fsencode(hit.path) + b"\0")

    return document if as_json else lines if as_jsonl else paths if print0 else _print_table


def _print_table(answer: _Answer, _: object) -> None:
    from mimco_deploy.serving.background import counted, in_words
    from mimco_deploy.serving.index import least_by_chance
    from mimco_deploy.terminal import print_thumbnail

    here = f"{Path.cwd()}{os.sep}"
    for rank, hit in enumerate(answer.hits, start=1):
        print_thumbnail(hit.path)
        path = printable(hit.path).removeprefix(here)
        click.echo(f"{rank:>3}  {hit.score:.4f}  {in_words(hit.confidence):<8}  {path}")
    best = least_by_chance(answer.hits)
    if not answer.hits and answer.error is None:
        click.echo(f"nothing found for {printable(answer.query)}", err=True)
    elif best is not None and best >= 1:
        click.echo(
            f"nothing really matches {printable(answer.query)}: about {counted(best)} would be as alike by chance",
            err=True,
        )


def _read_list(path: str) -> list[Path]:
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", expected="a list of pictures") from error
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = content.split(b"\0") if b"\0" in content else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    paths = [Path(os.fsdecode(line)) for line in lines if line.strip()]
    if not paths:
        raise ConfigError(f"{path} names no picture", expected="a path in each line")
    return paths


class _Copies:
    """Copies of hits in a folder, over nothing that was there before."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.failed = False
        self._folder = folder
        self._made: set[Path] = set()

    def take(self, hits: Sequence[Hit]) -> None:
        """Copy the hits of one query."""
        for rank, hit in enumerate(hits, start=1):
            target = self._place(rank, hit.path)
            try:
                copy_new(hit.path, target)
            except FileExistsError:  # also a link that leads nowhere
                click.echo(f"{printable(target)} exists and is kept", err=True)
            except OSError as error:
                self.failed = True
                click.echo(f"{printable(hit.path)} cannot be copied ({error.strerror})", err=True)
            else:
                self._made.add(target)

    def _place(self, rank: int, path: Path) -> Path:
        """Where a hit goes: another query's of the same rank and name gets a number."""
        for number in itertools.count(1):
            end = f"{'' if number == 1 else f' ({number})'}{path.suffix}"
            stem = path.stem
            while stem and len(os.fsencode(f"{rank:03d}-{stem}{end}")) > _MAX_NAME_BYTES:
                stem = stem[:-1]
            target = self._folder / f"{rank:03d}-{stem}{end}"
            if target not in self._made:
                break
        return target
