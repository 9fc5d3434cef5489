"""Write docs/cli.md from the commands' own help, or compare with `--check`.

python docs/make_cli.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mimco_deploy.cli import main as mimco

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
HEAD = """# Command line

Written by `make docs` from `--help`. Exit codes: 0 done, 1 an error that you can mend, 2 wrong usage.
"""


def contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Contexts of a command and all below it, groups before their commands."""
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            child = command.get_command(context, child_name)
            assert child is not None
            yield from contexts(child, child_name, context)


def page() -> str:
    """The whole page."""
    sections = [
        f"## {context.command_path}\n\n```\n{context.get_help()}\n```\n" for context in contexts(mimco, "mimco")
    ]
    return "\n".join([HEAD, *sections])


def main(arguments: list[str]) -> int:
    """Write, or with `--check` compare; words count and line breaks do not, which differ between versions of click."""
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8").split() == page().split():
            return 0
        click.echo(f"{PAGE.name} is not what --help says; run: make docs", err=True)
        return 1
    if arguments:
        click.echo("usage: python docs/make_cli.py [--check]", err=True)
        return 2
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
