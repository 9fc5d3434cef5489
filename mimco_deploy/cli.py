"""The command line: the root and its options, and the commands from commands/. Nothing heavy: help is instant."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
from pathlib import Path

import click

from mimco_deploy import __version__
from mimco_deploy.commands.common import IS_MAIN_PROCESS, Folder, Group, set_up_logging, set_up_streams
from mimco_deploy.workspace import find_workspace

COMMANDS = {
    "train": "train:train",
    "export": "export:export",
    "eval": "eval:eval_",
    "bench": "bench:bench",
    "doctor": "bench:doctor",
    "index": "index:index",
    "search": "search:search",
    "dupes": "dupes:dupes",
    "leaks": "dupes:leaks",
    "map": "map:map_",
    "serve": "serve:serve",
    "watch": "serve:watch",
}
"""Each by its module in commands/ and its name there, in the order of the help."""

_TIDY = ("eval", "index", "search", "watch")
"""What SIGTERM lets come to an end of its own, so that a bundle that was unpacked is removed. Training and the service
have their own way; elsewhere it would wait, for TensorRT or for processes that are measured."""


class Commands(Group):
    """Imports a command when it is asked for: all of them take a third of the time that `mimco` takes to start."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of them, None where there is none of the name."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f"mimco_deploy.commands.{module}"), attribute)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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
    set_up_streams()
    if ctx.invoked_subcommand in _TIDY:
        with contextlib.suppress(ValueError):  # in a thread, which gets no signals
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    set_up_logging(verbose, silent=not IS_MAIN_PROCESS)
    ctx.obj = find_workspace(workspace)
