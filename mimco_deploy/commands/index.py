"""`mimco index`: index folders, and look after an index."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mimco_deploy.commands.common import (
    FiniteRange,
    FunctionT,
    IndexedFolder,
    encoder_path,
    file_timeout_option,
    json_option,
    path_to_record,
    print_json,
    printable,
    run_by,
    runtime_options,
    say_if_shipped,
)
from mimco_deploy.errors import IndexStoreError, plain
from mimco_deploy.shipped import encoder_of
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.serving.encoders import Device
    from mimco_deploy.serving.tuning import Tuning


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
    mimco index verify             whether all of it is as it was written
    """


class _Move(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """Two folders, OLD=NEW. Where to split is the index's to say: a name may hold the sign."""

    name = "OLD=NEW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Look for an equals sign between two names."""
        if "=" not in str(value)[1:-1]:
            self.fail(f"{value} is not of the form OLD=NEW", param, ctx)
        return str(value)


def _update_options(function: FunctionT, encoder_options: Callable[[Any], Any] = runtime_options) -> FunctionT:
    options = [
        click.option(
            "--batch-size",
            type=click.IntRange(min=1, max=65_536),
            help="Pictures embedded at once.  [default: 16 on a CPU, else 64]",
        ),
        file_timeout_option(60.0),
        click.option(
            "--file-memory",
            type=click.IntRange(256, 2**20),
            default=2048,
            show_default=True,
            metavar="MIB",
            help="That the process which decodes a file may take.",
        ),
        encoder_options,
        json_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _reindex_options(function: FunctionT) -> FunctionT:
    return _update_options(function, partial(runtime_options, default="the workspace's, else mimco's"))


@index.command()
@click.argument("folders", nargs=-1, type=IndexedFolder)
@click.option("--root", "moves", type=_Move(), multiple=True, help="An indexed folder lies elsewhere now; repeatable.")
@click.option("--retry-problems", is_flag=True, help="Read files again that were no pictures, although unchanged.")
@_update_options
@click.pass_obj
def update(
    workspace: Workspace,
    /,
    folders: tuple[Path, ...],
    moves: tuple[str, ...],
    retry_problems: bool,
    **options: Any,
) -> None:
    """Index FOLDERS, or bring those indexed before up to date. `update` can be left out.

    Only new and changed pictures are embedded; what is gone is dropped.
    """
    from mimco_deploy.serving.roots import move_roots, split_move

    if moves:
        move_roots(workspace.index, [split_move(workspace.index, move) for move in moves])
    _update(workspace, folders, encoder_path(workspace, options["encoder"]), retry_problems=retry_problems, **options)


@index.command()
@click.argument("folders", nargs=-1, type=IndexedFolder)
@_reindex_options
@click.pass_obj
def reindex(workspace: Workspace, /, folders: tuple[Path, ...], **options: Any) -> None:
    """Embed everything again, beside the index, and put it in place when it is whole: another encoder, a broken index.

    All indexed folders and FOLDERS. The encoder is the one given, else the workspace's, else mimco's, whichever made
    the old index. Searches see that meanwhile. What was cut short goes on where it stopped.
    """
    from mimco_deploy.serving.inspect import fingerprint_of

    bundle = options["encoder"] or encoder_of(workspace)
    before = fingerprint_of(workspace.index)
    _update(workspace, folders, bundle, rebuild=True, **options)
    after = fingerprint_of(workspace.index)
    if before is not None and after is not None and before != after:
        click.echo(f"embedded by another encoder than before: {after[:12]} of {bundle}, not {before[:12]}", err=True)


def _update(
    workspace: Workspace,
    folders: tuple[Path, ...],
    bundle: Path,
    *,
    device: Device,
    strict: bool,
    as_json: bool,
    file_timeout: float,
    file_memory: int,
    **options: Any,
) -> None:
    from mimco_deploy.images import IMAGE_SUFFIXES
    from mimco_deploy.serving.encoders import LazyEncoder
    from mimco_deploy.serving.guarded import Limits
    from mimco_deploy.serving.update import update_index
    from mimco_deploy.terminal import indexing_bar

    if workspace.path.parent in Path.cwd().parents:  # found on the way up: perhaps not the one that was meant
        click.echo(f"the index is in {printable(workspace.path)}", err=True)
    del options["encoder"]
    say_if_shipped(bundle)
    encoder = LazyEncoder(bundle, device, strict=strict)
    with indexing_bar() as show:
        report = update_index(
            workspace.index,
            folders,
            encoder,
            limits=Limits(seconds=file_timeout, memory_mib=file_memory),
            encoder_path=path_to_record(workspace, bundle),
            on_progress=show,
            **options,
        )
    ran = encoder.loaded
    if as_json:
        print_json({**asdict(report), "fingerprint": encoder.spec.fingerprint, **(run_by(ran) if ran else {})})
        return
    click.echo(
        f"{report.counts.files} pictures indexed: {report.added} added, {report.changed} changed, "
        f"{report.removed} removed, {report.unchanged} unchanged; {report.embedded} embedded"
        + (f" ({ran.provider}, {ran.precision})" if ran else "")
    )
    for folder in report.unreachable:
        kept = f"kept {folder.kept} files of it" if folder.kept else "nothing of it is indexed"
        name = shlex.quote(printable(folder.path))
        moved = (
            f"; moved? mimco index --root {name}=NEW; gone? mimco index forget {name}"
            if not os.path.lexists(folder.path)
            else ""
        )
        click.echo(f"{printable(folder.path)} cannot be read ({folder.reason}): {kept}{moved}", err=True)
    if not (report.counts.files or report.problems or report.unreachable):
        click.echo(
            f"nothing there has the name of a picture, which end in {', '.join(sorted(IMAGE_SUFFIXES))}", err=True
        )
    if report.problems:
        files = "1 file is no picture" if len(report.problems) == 1 else f"{len(report.problems)} files are no pictures"
        click.echo(
            f"{files}, such as {plain(report.problems[0].found)}; mimco index problems lists them",
            err=True,
        )


@index.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, readable=False))
@json_option
@click.pass_obj
def forget(workspace: Workspace, /, folders: tuple[Path, ...], as_json: bool) -> None:
    """Drop indexed FOLDERS, there or not; the pictures stay on the disk."""
    from mimco_deploy.serving.roots import forget_roots

    dropped = forget_roots(workspace.index, folders)
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
    made_by = ", ".join(f"{name} {value}" for name, value in found.made_by.items())
    click.echo(
        f"encoder {found.fingerprint[:12]}, {found.embedding_dim} numbers each{made_by and f', {made_by}'}; "
        f"generation {found.generation}"
    )
    click.echo(f"search: {_in_words(found.search)}")
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
        click.echo(f"{one.problem:<12} {plain(one.found)}")


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
            f"{workspace.index}: {'; '.join(wrong)}", expected="a whole index", command="mimco index repair"
        )


@index.command()
@json_option
@click.pass_obj
def repair(workspace: Workspace, /, as_json: bool) -> None:
    """Keep all of a damaged index that is sound, and say what the next update has to embed again."""
    from mimco_deploy.serving.rewrite import repair as repair_index

    report = repair_index(workspace.index)
    if as_json:
        print_json(asdict(report))
        return
    click.echo(f"{report.files} pictures kept, {report.dropped_embeddings} embeddings dropped")
    if report.lost_files:
        click.echo(f"{report.lost_files} pictures have to be embedded again; run: mimco index")


@index.command()
@json_option
@click.pass_obj
def compact(workspace: Workspace, /, as_json: bool) -> None:
    """Drop embeddings that no file needs any more. Nothing is embedded again."""
    from mimco_deploy.serving.rewrite import compact as compact_index

    report = compact_index(workspace.index)
    if as_json:
        print_json(asdict(report))
        return
    click.echo(
        f"{report.dropped_embeddings} embeddings dropped: "
        f"{report.bytes_before / 2**20:,.1f} MiB before, {report.bytes_after / 2**20:,.1f} MiB now"
    )


@index.command()
@click.option("--latency-ms", type=FiniteRange(min=0), default=50.0, show_default=True, help="For one query.")
@click.option("--memory-mib", type=click.IntRange(min=1), default=1024, show_default=True, help="For an approximation.")
@click.option(
    "--recall",
    type=FiniteRange(min=0, max=1, min_open=True),
    default=0.95,
    show_default=True,
    help="Least share of the true 10 nearest that a search finds.",
)
@json_option
@click.pass_obj
def tune(workspace: Workspace, /, latency_ms: float, memory_mib: int, recall: float, as_json: bool) -> None:
    """Say what a search may cost, and build what it takes; measured on the index itself. Updates keep to it.

    While reading every embedding stays within the latency, search is exact.
    """
    from mimco_deploy.serving.tuning import Budget, tune_index

    tuning = tune_index(workspace.index, Budget(latency_ms=latency_ms, memory_mib=memory_mib, recall=recall))
    if as_json:
        print_json(asdict(tuning))
    else:
        click.echo(_in_words(tuning))


@index.command("export")
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@json_option
@click.pass_obj
def export_command(workspace: Workspace, /, target: Path, as_json: bool) -> None:
    """Write all files and their embeddings to TARGET, a name that ends in .parquet or .npy."""
    from mimco_deploy.serving.interchange import export_index

    count = export_index(workspace.index, target)
    if as_json:
        print_json({"target": target, "files": count})
    else:
        click.echo(f"{count} pictures written to {target}")


@index.command("import")
@click.argument("source", type=click.Path(path_type=Path, dir_okay=False))
@json_option
@click.pass_obj
def import_command(workspace: Workspace, /, source: Path, as_json: bool) -> None:
    """Take the files and embeddings of an export into the index. Nothing is embedded."""
    from mimco_deploy.serving.interchange import import_index

    count = import_index(workspace.index, source)
    if as_json:
        print_json({"source": source, "files": count})
    else:
        click.echo(f"{count} pictures taken in")


def _in_words(tuning: Tuning) -> str:
    text = f"{tuning.kind}, since {tuning.reason}"
    if tuning.recall is None:
        return text
    return (
        f"{text}; finds {tuning.recall:.3f} ± {tuning.recall_error or 0:.3f} of the true 10 nearest in "
        f"{tuning.query_ms:.2f} ms, exact search takes {tuning.exact_ms:.1f} ms"
    )
