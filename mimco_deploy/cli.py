"""The command line: parse, call one function, print. Heavy imports stand inside the commands: help is instant."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mimco_deploy import __version__
from mimco_deploy.atomic import current_dir
from mimco_deploy.errors import ConfigError, MimcoError, MissingExtraError, WorkspaceError
from mimco_deploy.workspace import Workspace, find_workspace

if TYPE_CHECKING:
    from mimco_deploy.training.config import Stage1Config, Stage2Config
    from mimco_deploy.training.loop import StepReport

    ConfigT = TypeVar("ConfigT", Stage1Config, Stage2Config)

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Folder = click.Path(path_type=Path, file_okay=False)
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
"""False in the processes that torchrun starts beside the first."""


class _Group(click.Group):
    """Ends with one line, not a traceback, where the user's input is at fault."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MimcoError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.filename is None:  # a broken pipe, for one, is click's to handle
                raise
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Name the install line where an import of the block is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        command = f'pip install "mimco-deploy[{name}]"'
        raise MissingExtraError(f"the package {error.name} is not installed", command=command) from error


def _print_json(document: object) -> None:
    click.echo(json.dumps(document, default=str))


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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
    mimco index ./photos                  an index over folders
    mimco search query.jpg                the pictures most like this one
    """
    from mimco_deploy.terminal import set_up_logging

    set_up_logging(verbose, silent=not IS_MAIN_PROCESS)
    ctx.obj = find_workspace(workspace)


@main.group()
def train() -> None:
    """Pre-train a backbone: first the teacher, then the student."""


class _MicroBatches(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A number of micro-batches, or `auto`."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Keep the text once it is one of the two."""
        if value != "auto" and not (value.isdigit() and int(value) >= 1):
            self.fail(f"{value} is neither auto nor a number from 1 on", param, ctx)
        return str(value)


def _training_options(function: FunctionT) -> FunctionT:
    options = [
        click.option(
            "--data", multiple=True, type=click.Path(path_type=Path), help="Folder, picture or tar; repeatable."
        ),
        click.option("--preset", help="Settings for one backbone.  [default: by GPU or CPU; stage 2: the teacher's]"),
        click.option("--epochs", type=click.IntRange(min=1), help="Passes over the pictures."),
        click.option("--batch-size", type=click.IntRange(min=2), help="Pictures in a step, over all processes."),
        click.option(
            "--grad-accum",
            type=_MicroBatches(),
            metavar="N|auto",
            help="Micro-batches in a step; auto takes as few as fit into memory.",
        ),
        click.option("--plan", is_flag=True, help="Say what the run will take, and stop: memory, speed, hours, disk."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable."),
        click.option("--resume", is_flag=True, help="Go on from the last checkpoint, with its settings."),
        click.option("--fresh", is_flag=True, help="Start anew; a run that is there is moved aside."),
        json_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


@train.command()
@click.option("--method", type=click.Choice(["mocov3", "moby"]), help="How.  [default: the preset's]")
@_training_options
@click.pass_obj
def stage1(workspace: Workspace, /, as_json: bool, plan: bool, **options: Any) -> None:
    """Train the teacher on unlabelled pictures: MoCo v3 for ViT, MoBY for Swin.

    \b
    mimco train stage1 --data ./photos
    mimco train stage1 --data ./photos --preset swin_tiny
    mimco train stage1 --data a.tar --data b.tar --epochs 50 --set optim.weight_decay=0.05
    torchrun --nproc-per-node 8 --no-python mimco train stage1 --data ./photos --preset vit_small
    """
    with _extra("train"):
        from mimco_deploy.training.runs import Request, open_stage1
        from mimco_deploy.training.stages import train_stage1

    config, resume = open_stage1(workspace.stage1, Request(**options))
    if plan:
        _print_plan(config, as_json)
        return
    if options["grad_accum"] == "auto" and resume is None:
        config = _fit_to_memory(config)
    with _training_bar("stage 1") as show:
        train_stage1(config, workspace.stage1, resume=resume, on_step=show)
    _print_trained(workspace.stage1, as_json)


@train.command()
@click.option(
    "--method",
    type=click.Choice(["mimco", "fd", "simmim", "mae", "joint"]),
    help="MimCo, or one of the controls.  [default: mimco]",
)
@click.option(
    "--teacher",
    metavar="SOURCE",
    help="A checkpoint, a file of published weights, a folder of timm's, or timm/NAME.  [default: stage 1]",
)
@click.option("--init-from-teacher/--init-at-random", default=None, help="Where the student starts.")
@_training_options
@click.pass_obj
def stage2(workspace: Workspace, /, as_json: bool, plan: bool, **options: Any) -> None:
    """Train the student: MimCo's masked image modelling against the frozen teacher, or a method to compare it with.

    Pictures and backbone are the teacher's, unless others are given.

    \b
    mimco train stage2
    mimco train stage2 --teacher vit-s-300ep.pth.tar --data ./photos
    mimco train stage2 --teacher timm/vit_small_patch16_224.dino --data ./photos
    mimco train stage2 --method simmim
    """
    with _extra("train"):
        from mimco_deploy.training.runs import Request, open_stage2
        from mimco_deploy.training.stages import train_stage2

    config, resume = open_stage2(workspace.stage2, workspace.stage1, Request(**options))
    if plan:
        _print_plan(config, as_json)
        return
    if options["grad_accum"] == "auto" and resume is None:
        config = _fit_to_memory(config)
    with _training_bar("stage 2") as show:
        train_stage2(config, workspace.stage2, resume=resume, on_step=show)
    _print_trained(workspace.stage2, as_json)


def _fit_to_memory(config: ConfigT) -> ConfigT:
    from mimco_deploy.training.plan import fit_to_memory

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--grad-accum auto in several processes", expected="a number; --plan in one process tells it")
    return fit_to_memory(config)


def _print_plan(config: Stage1Config | Stage2Config, as_json: bool) -> None:
    from mimco_deploy.training.plan import plan_run

    plan = plan_run(config)
    if as_json:
        _print_json(asdict(plan))
        return
    fits = "fits" if plan.micro_batch <= plan.largest_micro_batch else "does not fit"
    rows = {
        "parameters": f"{plan.encoder_parameters:,} of the encoder, {plan.trained_parameters:,} trained with heads",
        "run": f"{plan.steps:,} steps over {plan.pictures:,} pictures",
        "micro-batch": f"{plan.micro_batch} images × {plan.accumulate}; up to {plan.largest_micro_batch} at once fit",
        "memory": f"{plan.step_mib:,.0f} MiB a step of {plan.available_mib:,.0f} free ({plan.fixed_mib:,.0f} and "
        f"{plan.image_mib:.1f} an image): {fits}",
        "speed": f"{plan.images_per_s:,.0f} images/s in small steps, without loading",
        "time": f"{plan.hours:,.1f} hours",
        "disk": f"{plan.disk_mib:,.0f} MiB for checkpoints",
    }
    for name, text in rows.items():
        click.echo(f"{name:<12} {text}")


@contextlib.contextmanager
def _training_bar(title: str) -> Iterator[Callable[[StepReport], None]]:
    from mimco_deploy.terminal import training_bar

    with training_bar(title, silent=not IS_MAIN_PROCESS) as show:
        yield show


def _print_trained(folder: Path, as_json: bool) -> None:
    from mimco_deploy.training.checkpoint import read_checkpoint
    from mimco_deploy.training.runs import LAST

    if not IS_MAIN_PROCESS:
        return
    checkpoint = read_checkpoint(folder / LAST)
    if as_json:
        _print_json({"checkpoint": checkpoint.path, "stage": checkpoint.stage, "step": checkpoint.step})
    else:
        click.echo(f"{checkpoint.stage}: {checkpoint.step} steps, checkpoint in {checkpoint.path}")


@main.command()
@click.option("--format", "target", type=click.Choice(["onnx"]), required=True, help="What to make.")
@click.option("--checkpoint", type=Folder, help="What to export.  [default: the workspace's stage 2]")
@click.option("--output", type=Folder, help="Folder of the bundle.  [default: the workspace's encoder]")
@click.option("--licence", default="unstated", show_default=True, help="Licence of the weights, kept in the bundle.")
@json_option
@click.pass_obj
def export(
    workspace: Workspace, target: str, checkpoint: Path | None, output: Path | None, licence: str, as_json: bool
) -> None:
    """Export the student as an encoder bundle, and prove that it answers as torch does."""
    source = checkpoint or current_dir(workspace.stage2 / "last")
    if checkpoint is None and not source.is_dir():
        raise WorkspaceError(f"no trained student in {source}", expected="a checkpoint", command="mimco train stage2")
    with _extra("train"):
        from mimco_deploy.training.checkpoint import read_checkpoint
    with _extra("export"):
        from mimco_deploy.export.pipeline import export_encoder

    folder = output or workspace.encoder
    trained = read_checkpoint(source)
    trained.warn_if_unfinished()
    report = export_encoder(trained, folder, licence)
    if as_json:
        _print_json({"bundle": folder, "format": target, "parity": {**asdict(report), "passed": report.passed}})
        return
    click.echo(f"{target}: bundle in {folder}")
    click.echo(
        f"parity: passed, at most {report.max_abs:.1e} from torch on {report.pictures} pictures "
        f"({report.max_abs_allowed:.0e} allowed, {report.provider})"
    )


@main.command()
@click.argument("folders", nargs=-1, type=Folder)
@click.option("--forget", is_flag=True, help="Drop FOLDERS from the index instead; the pictures stay.")
@click.option("--rebuild", is_flag=True, help="Embed everything again, as after a change of encoder.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures in one commit.")
@json_option
@click.pass_obj
def index(
    workspace: Workspace, folders: tuple[Path, ...], forget: bool, rebuild: bool, batch_size: int, as_json: bool
) -> None:
    """Index FOLDERS, or bring those indexed before up to date.

    Only new and changed pictures are embedded; what is gone is dropped.
    """
    from mimco_deploy.serving.encoders import load_encoder
    from mimco_deploy.serving.roots import forget_root
    from mimco_deploy.serving.update import update_index
    from mimco_deploy.terminal import counting_bar

    if forget:
        if not folders or rebuild:
            raise click.UsageError("--forget takes the FOLDERS to drop, and no other option.")
        dropped = sum(forget_root(workspace.index, folder) for folder in folders)
        if as_json:
            _print_json({"forgotten": folders, "files": dropped})
        else:
            click.echo(f"{dropped} pictures dropped from the index")
        return
    encoder = load_encoder(workspace.encoder)
    with counting_bar("index") as show:
        report = update_index(
            workspace.index, folders, encoder, batch_size=batch_size, rebuild=rebuild, on_progress=show
        )
    if as_json:
        _print_json({**asdict(report), "provider": encoder.provider, "fingerprint": encoder.spec.fingerprint})
        return
    click.echo(
        f"{report.counts.files} pictures indexed: {report.added} added, {report.changed} changed, "
        f"{report.removed} removed, {report.unchanged} unchanged; {report.embedded} embedded ({encoder.provider})"
    )
    for folder in report.unreachable:
        click.echo(f"kept {folder.kept} pictures of {folder.path}, which cannot be read: {folder.reason}", err=True)
    if report.problems:
        click.echo(f"{len(report.problems)} files are no pictures, such as {report.problems[0].found}", err=True)


@main.command()
@click.argument("query", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Number of hits.")
@click.option("--sheet", type=click.Path(path_type=Path, dir_okay=False), help="Write query and hits as one HTML page.")
@json_option
@click.pass_obj
def search(workspace: Workspace, query: Path, k: int, sheet: Path | None, as_json: bool) -> None:
    """Find the indexed pictures most like QUERY. The score is the cosine: higher is better, 1 is the same."""
    from mimco_deploy.serving.encoders import load_encoder
    from mimco_deploy.serving.index import ImageIndex, search_image
    from mimco_deploy.serving.scan import readable

    encoder = load_encoder(workspace.encoder)
    image_index = ImageIndex.open(workspace.index, encoder.spec.fingerprint)
    hits = search_image(image_index, encoder, query, k)
    if sheet is not None:
        from mimco_deploy.serving.sheet import write_sheet

        write_sheet(sheet, query, hits)
    if as_json:
        ranked = [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]
        run_by = {"provider": encoder.provider, "fingerprint": encoder.spec.fingerprint}
        _print_json({"query": query, "hits": ranked, **run_by})
        return
    here = f"{Path.cwd()}{os.sep}"
    for rank, hit in enumerate(hits, start=1):
        click.echo(f"{rank:>3}  {hit.score:.4f}  {readable(hit.path).removeprefix(here)}")
