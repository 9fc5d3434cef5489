"""`mimco dupes`: pictures that are there more than once; `mimco leaks`: pictures of one folder in another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mimco_deploy.commands.common import FiniteRange, Folder, IndexedFolder, json_option, print_json, printable
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.serving.duplicates import Group, Keep, Member
    from mimco_deploy.serving.moves import Moves

_min_score_option = click.option(
    "--min-score",
    type=FiniteRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Cosine from which two pictures count as the same.",
)


@click.command()
@_min_score_option
@click.option("--root", type=IndexedFolder, help="Only below this folder.  [default: all that is indexed]")
@click.option(
    "--keep",
    type=click.Choice(["largest", "oldest", "first"]),
    default="largest",
    show_default=True,
    help="Which of a group to keep: by pixels, by date, by path.",
)
@click.option("--move-to", type=Folder, help="Move all but the kept ones there.")
@click.option("--undo", type=click.Path(path_type=Path, dir_okay=False), help="Move back what this list says.")
@json_option
@click.pass_context
def dupes(
    ctx: click.Context,
    /,
    min_score: float,
    root: Path | None,
    keep: Keep,
    move_to: Path | None,
    undo: Path | None,
    as_json: bool,
) -> None:
    """Group the indexed pictures that are the same, exactly or nearly, the one to keep first.

    Nothing is moved without --move-to, and nothing is ever deleted.
    """
    workspace: Workspace = ctx.obj
    if undo is not None:
        given = {"min_score", "root", "keep", "move_to"}
        if any(ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE for name in given):
            raise click.UsageError("--undo goes with no other option but --json")
        _undo(undo, as_json)
        return
    from mimco_deploy.serving.duplicates import find_duplicates

    groups = find_duplicates(workspace.index, min_score, root, keep)
    moves = None
    if move_to is not None:
        from mimco_deploy.serving.moves import move_duplicates

        moves = move_duplicates(workspace.index, groups, move_to)
    if as_json:
        document = {"min_score": min_score, "keep": keep, "groups": [_as_document(group) for group in groups]}
        print_json(document | ({} if moves is None else _moves_as_document(moves)))
        return
    _print_groups(groups)
    if moves is not None and move_to is not None:
        _print_moves(moves, f"moved to {_short(move_to)}")
        if moves.moved:
            from mimco_deploy.serving.moves import UNDO_FILE

            click.echo(f"back: mimco dupes --undo {_short(move_to / UNDO_FILE)}; then bring the index up to date")


@click.command()
@click.argument("a", type=IndexedFolder)
@click.argument("b", type=IndexedFolder)
@_min_score_option
@click.option("--fail", is_flag=True, help="Exit with 1 where a picture of A is in B.")
@json_option
@click.pass_context
def leaks(ctx: click.Context, /, a: Path, b: Path, min_score: float, fail: bool, as_json: bool) -> None:
    """List the pictures of folder A that are in folder B too, exactly or nearly.

    Both are indexed folders, or lie in one. What counts is what the index held at its last update.
    """
    from mimco_deploy.serving.duplicates import find_leaks

    workspace: Workspace = ctx.obj
    result = find_leaks(workspace.index, a, b, min_score)
    if as_json:
        found = [
            {"path": one.path, "other": one.other, "kind": "copy" if one.copy else "near", "score": one.score}
            for one in result.found
        ]
        print_json({"a": a, "b": b, "min_score": min_score, "pictures": result.pictures, "leaks": found})
    else:
        for one in result.found:
            label = "copy" if one.copy else f"{one.score:.4f}"
            click.echo(f"{label:<9}  {_short(one.path)}  =  {_short(one.other)}")
        copies = sum(one.copy for one in result.found)
        click.echo(
            f"{len(result.found)} of {_many(result.pictures, 'picture')} of {_short(a)} found in {_short(b)} too, "
            f"{_many(copies, 'copy')} among them"
        )
    if fail and result.found:
        ctx.exit(1)


def _undo(file: Path, as_json: bool) -> None:
    from mimco_deploy.serving.moves import undo_moves

    moves = undo_moves(file)
    if as_json:
        print_json(_moves_as_document(moves))
        return
    _print_moves(moves, "moved back")


def _print_groups(groups: list[Group]) -> None:
    for group in groups:
        click.echo(f"{'keep':<9}  {_short(group.kept.path)}")
        for member in group.others:
            click.echo(f"{_label(member):<9}  {_short(member.path)}")
        click.echo()
    spare = [member for group in groups for member in group.spare]
    copies = sum(member.kind == "copy" for member in spare)
    mib = sum(member.stamp.size for member in spare) / 2**20
    click.echo(
        f"{_many(len(groups), 'group')}, {_many(len(spare), 'picture')} too many ({_many(copies, 'copy')}), "
        f"{mib:,.1f} MiB"
    )


def _label(member: Member) -> str:
    return f"{member.score:.4f}" if member.kind == "near" else member.kind


def _print_moves(moves: Moves, what: str) -> None:
    for one in moves.skipped:
        click.echo(f"left {_short(one.path)}: {one.reason}", err=True)
    click.echo(
        f"{_many(len(moves.moved), 'picture')} {what}" + (f", {len(moves.skipped)} left" if moves.skipped else "")
    )


def _as_document(group: Group) -> dict[str, Any]:
    return {
        "kept": group.kept.path,
        "others": [{"path": one.path, "kind": one.kind, "score": one.score} for one in group.others],
    }


def _moves_as_document(moves: Moves) -> dict[str, Any]:
    return {
        "moved": [{"from": one.source, "to": one.target} for one in moves.moved],
        "skipped": [{"path": one.path, "reason": one.reason} for one in moves.skipped],
    }


def _many(count: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def _short(path: Path) -> str:
    return printable(path).removeprefix(f"{Path.cwd()}{os.sep}")
