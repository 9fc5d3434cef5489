"""`mimco search`: the indexed pictures most like a query."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mimco_deploy.commands.common import json_option, load_encoder, print_json, run_by, runtime_options
from mimco_deploy.workspace import Workspace


@click.command()
@click.argument("query", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Number of hits.")
@click.option("--sheet", type=click.Path(path_type=Path, dir_okay=False), help="Write query and hits as one HTML page.")
@runtime_options
@json_option
@click.pass_obj
def search(workspace: Workspace, /, query: Path, k: int, sheet: Path | None, as_json: bool, **runtime: Any) -> None:
    """Find the indexed pictures most like QUERY. The score is the cosine: higher is better, 1 is the same."""
    from mimco_deploy.serving.index import ImageIndex, search_image
    from mimco_deploy.serving.scan import readable

    encoder = load_encoder(workspace, **runtime)
    image_index = ImageIndex.open(workspace.index, encoder.spec.fingerprint)
    hits = search_image(image_index, encoder, query, k)
    if sheet is not None:
        from mimco_deploy.serving.sheet import write_sheet

        write_sheet(sheet, query, hits)
    if as_json:
        ranked = [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]
        print_json({"query": query, "hits": ranked, **run_by(encoder)})
        return
    here = f"{Path.cwd()}{os.sep}"
    for rank, hit in enumerate(hits, start=1):
        click.echo(f"{rank:>3}  {hit.score:.4f}  {readable(hit.path).removeprefix(here)}")
