"""`mimco search`: the indexed pictures most like a query."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mimco_deploy.commands.common import json_option, load_encoder, print_json, run_by, runtime_options
from mimco_deploy.stopwatch import Stopwatch
from mimco_deploy.workspace import Workspace


@click.command()
@click.argument("query", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Number of hits.")
@click.option("--sheet", type=click.Path(path_type=Path, dir_okay=False), help="Write query and hits as one HTML page.")
@click.option("--timings", is_flag=True, help="Say where the time went, in ms.")
@runtime_options
@json_option
@click.pass_obj
def search(
    workspace: Workspace, /, query: Path, k: int, sheet: Path | None, timings: bool, as_json: bool, **runtime: Any
) -> None:
    """Find the indexed pictures most like QUERY. The score is the cosine: higher is better, 1 is the same."""
    watch = Stopwatch()
    from mimco_deploy.serving.index import ImageIndex, search_image
    from mimco_deploy.serving.scan import readable

    watch.lap("imports")
    encoder = load_encoder(workspace, **runtime)
    watch.lap("encoder")
    with ImageIndex.open(workspace.index, encoder.spec.fingerprint) as image_index:
        watch.lap("index")
        hits = search_image(image_index, encoder, query, k, watch)
    if sheet is not None:
        from mimco_deploy.serving.sheet import write_sheet

        write_sheet(sheet, query, hits)
    if as_json:
        ranked = [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]
        laps = {"timings_ms": watch.laps_ms} if timings else {}
        print_json({"query": query, "hits": ranked, **run_by(encoder), **laps})
        return
    here = f"{Path.cwd()}{os.sep}"
    for rank, hit in enumerate(hits, start=1):
        click.echo(f"{rank:>3}  {hit.score:.4f}  {readable(hit.path).removeprefix(here)}")
    if timings:
        click.echo("ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in watch.laps_ms.items()), err=True)
