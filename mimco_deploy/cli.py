"""The command line: the root and its options, and the commands from commands/. Nothing heavy: help is instant."""

from __future__ import annotations

from pathlib import Path

import click

from mimco_deploy import __version__
from mimco_deploy.commands.bench import bench, doctor
from mimco_deploy.commands.common import IS_MAIN_PROCESS, Folder, Group, set_up_logging
from mimco_deploy.commands.dupes import dupes, leaks
from mimco_deploy.commands.eval import eval_
from mimco_deploy.commands.export import export
from mimco_deploy.commands.index import index
from mimco_deploy.commands.map import map_
from mimco_deploy.commands.search import search
from mimco_deploy.commands.serve import serve, watch
from mimco_deploy.commands.train import train
from mimco_deploy.workspace import find_workspace


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--workspace", type=Folder, help="Folder of all artefacts.  [default: the nearest .mimco/ upward]")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@click.version_option(__version__, prog_name="mimco")
@click.pass_context
def main(ctx: click.Context, workspace: Path | None, verbose: bool) -> None:
    """From a folder of unlabelled photos to a search engine over them.

    \b
    mimco train stage1 --data ./photos    a contrastive teacher
    mimco train stage2                    the student, against that teacher
    mimco export --format onnx            the student as a bundle that proves itself
    mimco eval ./photos                   how well it does, with classes or without
    mimco index ./photos                  an index over folders
    mimco search query.jpg                the pictures most like this one
    mimco serve                           the same over HTTP, and in a page
    """
    set_up_logging(verbose, silent=not IS_MAIN_PROCESS)
    ctx.obj = find_workspace(workspace)


main.add_command(train)
main.add_command(export)
main.add_command(eval_)
main.add_command(bench)
main.add_command(doctor)
main.add_command(index)
main.add_command(search)
main.add_command(dupes)
main.add_command(leaks)
main.add_command(map_)
main.add_command(serve)
main.add_command(watch)
