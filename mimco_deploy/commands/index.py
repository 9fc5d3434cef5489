"""`mimco index`: index folders, and look after an index."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mimco_deploy.commands.common import Folder, json_option, load_encoder, print_json, run_by, runtime_options
from mimco_deploy.errors import IndexStoreError
from mimco_deploy.workspace import Workspace


class _IndexGroup(click.Group):
    """Takes folders where a command could stand: `mimco index ./photos` is `mimco index update ./photos`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command in where there is none."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["update", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_IndexGroup, subcommand_metavar="[FOLDERS]... | COMMAND [ARGS]...")
def index() -> None:
    """Index folders of pictures, or look after an index.

    \b
    mimco index ./photos           index a folder, or bring it up to date
    mimco index                    bring all folders up to date
    mimco index status             what the index holds
    mimco index problems --json    the files that are no pictures, and why
    """


@index.command()
@click.argument("folders", nargs=-1, type=Folder)
@click.option("--rebuild", is_flag=True, help="Embed everything again, as after a change of encoder.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures in one commit.")
@runtime_options
@json_option
@click.pass_obj
def update(
    workspace: Workspace,
    /,
    folders: tuple[Path, ...],
    rebuild: bool,
    batch_size: int,
    as_json: bool,
    **runtime: Any,
) -> None:
    """Index FOLDERS, or bring those indexed before up to date. `update` can be left out.

    Only new and changed pictures are embedded; what is gone is dropped.
    """
    from mimco_deploy.serving.update import update_index
    from mimco_deploy.terminal import counting_bar

    encoder = load_encoder(workspace, **runtime)
    with counting_bar("index") as show:
        report = update_index(
            workspace.index, folders, encoder, batch_size=batch_size, rebuild=rebuild, on_progress=show
        )
    if as_json:
        print_json({**asdict(report), **run_by(encoder)})
        return
    click.echo(
        f"{report.counts.files} pictures indexed: {report.added} added, {report.changed} changed, "
        f"{report.removed} removed, {report.unchanged} unchanged; {report.embedded} embedded "
        f"({encoder.provider}, {encoder.precision})"
    )
    for folder in report.unreachable:
        click.echo(f"kept {folder.kept} pictures of {folder.path}, which cannot be read: {folder.reason}", err=True)
    if report.problems:
        click.echo(
            f"{len(report.problems)} files are no pictures, such as {report.problems[0].found}; "
            "mimco index problems lists them",
            err=True,
        )


@index.command()
@click.argument("folders", nargs=-1, required=True, type=Folder)
@json_option
@click.pass_obj
def forget(workspace: Workspace, /, folders: tuple[Path, ...], as_json: bool) -> None:
    """Drop indexed FOLDERS, there or not; the pictures stay on the disk."""
    from mimco_deploy.serving.roots import forget_root

    dropped = sum(forget_root(workspace.index, folder) for folder in folders)
    if as_json:
        print_json({"forgotten": folders, "files": dropped})
    else:
        click.echo(f"{dropped} pictures dropped from the index")


@index.command()
@json_option
@click.pass_obj
def status(workspace: Workspace, /, as_json: bool) -> None:
    """Say what the index holds."""
    from mimco_deploy.serving.inspect import status_of
    from mimco_deploy.serving.scan import readable
    from mimco_deploy.terminal import print_table

    found = status_of(workspace.index)
    if as_json:
        print_json(asdict(found))
        return
    counts = found.counts
    click.echo(
        f"{counts.files} pictures ({counts.contents} different ones) and {counts.problems} problems, "
        f"{counts.dead} embeddings that no file needs, {found.bytes / 2**20:,.1f} MiB"
    )
    click.echo(f"encoder {found.fingerprint[:12]}, {found.embedding_dim} numbers each, generation {found.generation}")
    rows = [
        [readable(root.path), str(root.files), str(root.problems), "" if root.reachable else "cannot be reached"]
        for root in found.roots
    ]
    print_table(["folder", "pictures", "problems", ""], rows)


@index.command()
@json_option
@click.pass_obj
def problems(workspace: Workspace, /, as_json: bool) -> None:
    """List the files that could not be indexed, with the reason. They are tried again when they change."""
    from mimco_deploy.serving.index import ImageIndex

    listed = ImageIndex.open(workspace.index).problems()
    if as_json:
        print_json([asdict(one) for one in listed])
        return
    for one in listed:
        click.echo(f"{one.problem:<12} {one.found}")


@index.command()
@json_option
@click.pass_obj
def verify(workspace: Workspace, /, as_json: bool) -> None:
    """Read the whole index and say what is wrong with it. Exits with 1 where something is."""
    from mimco_deploy.serving.inspect import verify as verify_index

    wrong = verify_index(workspace.index)
    if as_json:
        print_json({"index": workspace.index, "wrong": wrong})
    elif not wrong:
        click.echo("the index is whole")
    if wrong:
        raise IndexStoreError(
            f"{workspace.index}: {'; '.join(wrong)}", expected="a whole index", command="mimco index --rebuild"
        )
