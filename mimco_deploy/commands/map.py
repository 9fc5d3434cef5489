"""`mimco map`: the whole collection as one page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mimco_deploy.commands.common import json_option, new_page, print_json
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.serving.map import Method


@click.command("map")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False), default=Path("map.html"), callback=new_page)
@click.option(
    "--method",
    type=click.Choice(["auto", "pca", "umap"]),
    default="auto",
    show_default=True,
    help="How pictures get their places; auto is UMAP where it is installed and they are not too many, else PCA.",
)
@click.option(
    "--thumbnails",
    type=click.IntRange(0, 10_000),
    default=2000,
    show_default=True,
    help="Most pictures that are shown as such; the others are dots.",
)
@json_option
@click.pass_obj
def map_(workspace: Workspace, /, output: Path, method: Method, thumbnails: int, as_json: bool) -> None:
    """Draw all indexed pictures as a map, one HTML page at OUTPUT: those that look alike lie close together.

    OUTPUT is map.html where it is not given.
    """
    from mimco_deploy.serving.map import write_map
    from mimco_deploy.terminal import counting_bar

    with counting_bar("thumbnails") as tell:
        report = write_map(output, workspace.index, method, thumbnails, tell)
    if as_json:
        print_json({"path": output.absolute(), **asdict(report)})
        return
    copies = f" in {report.files:,} files" if report.files > report.points else ""
    click.echo(
        f"{output}: {report.points:,} pictures{copies}, {report.thumbnails:,} of them with thumbnails,"
        f" by {report.method.upper()}, {report.bytes / 2**20:.1f} MiB"
    )
    if report.unreadable:
        click.echo(f"{report.unreadable:,} could not be read and are dots; the page says why", err=True)
