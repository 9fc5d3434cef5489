"""`mimco train`: both stages, what follows them with labels, and the plan of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mimco_deploy.commands.common import IS_MAIN_PROCESS, AnyPath, FunctionT, extra, json_option, print_json
from mimco_deploy.errors import ConfigError
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.training.checkpoint import Checkpoint
    from mimco_deploy.training.config import Stage1Config, Stage2Config
    from mimco_deploy.training.finetune_config import FinetuneConfig, LinearConfig
    from mimco_deploy.training.loop import StepReport
    from mimco_deploy.training.supervised_checkpoint import SavedRun

    ConfigT = TypeVar("ConfigT", Stage1Config, Stage2Config, FinetuneConfig, LinearConfig)


@click.group()
def train() -> None:
    """Pre-train a backbone: first the teacher, then the student. With labels: fine-tune it, or probe it."""


class _MicroBatches(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A number of micro-batches, or `auto`."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Keep the text once it is one of the two."""
        if value != "auto" and not (value.isascii() and value.isdigit() and int(value) >= 1):
            self.fail(f"{value} is neither auto nor a number from 1 on", param, ctx)
        return str(value)


_ANY_RUN = (
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
)
"""Options of every command that trains."""


def _training_options(function: FunctionT) -> FunctionT:
    options = [
        click.option(
            "--data", multiple=True, type=click.Path(path_type=Path), help="Folder, picture or tar; repeatable."
        ),
        click.option("--preset", help="Settings for one backbone.  [default: by GPU or CPU; stage 2: the teacher's]"),
        click.option("--start-from", metavar="SOURCE", help="Weights that the encoder starts with, as for --teacher."),
        *_ANY_RUN,
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
    with extra("train"):
        from mimco_deploy.training.runs import Request, open_stage1
        from mimco_deploy.training.stages import train_stage1

    config, resume = open_stage1(workspace.stage1, Request(**_asked(options, plan)))
    if options["grad_accum"] == "auto" and resume is None:
        config = _fit_to_memory(config)
    if plan:
        _print_plan(config, resume, as_json)
        return
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
    with extra("train"):
        from mimco_deploy.training.runs import Request, open_stage2
        from mimco_deploy.training.stages import train_stage2

    config, resume = open_stage2(workspace.stage2, workspace.stage1, Request(**_asked(options, plan)))
    if options["grad_accum"] == "auto" and resume is None:
        config = _fit_to_memory(config)
    if plan:
        _print_plan(config, resume, as_json)
        return
    with _training_bar("stage 2") as show:
        train_stage2(config, workspace.stage2, resume=resume, on_step=show)
    _print_trained(workspace.stage2, as_json)


def _labelled_options(function: FunctionT) -> FunctionT:
    options = [
        click.option(
            "--from",
            "source",
            metavar="SOURCE",
            help="A checkpoint, a file of published weights, a folder of timm's, or timm/NAME.  [default: stage 2]",
        ),
        click.option(
            "--data", multiple=True, type=AnyPath, help="Folder of a folder for each class, or such a tar; repeatable."
        ),
        click.option("--val", multiple=True, type=AnyPath, help="The same classes, to measure on; repeatable."),
        *_ANY_RUN,
    ]
    for option in reversed(options):
        function = option(function)
    return function


@train.command()
@_labelled_options
@click.pass_obj
def finetune(workspace: Workspace, /, as_json: bool, plan: bool, **options: Any) -> None:
    """Train an encoder and a head on labelled pictures, and measure top-1 and top-5 after each epoch.

    \b
    mimco train finetune --data imagenet/train --val imagenet/val
    mimco train finetune --from timm/vit_small_patch16_224.dino --data train --val val --epochs 100
    mimco train finetune --data train --val val --set optim.layer_decay=0.75
    """
    with extra("train"):
        from mimco_deploy.training.supervised import train_with_labels
        from mimco_deploy.training.supervised_runs import LabelledRequest, open_finetune

    config, resume = open_finetune(
        workspace.finetune, workspace.stage2 / "last", LabelledRequest(**_asked(options, plan))
    )
    if options["grad_accum"] == "auto" and resume is None:
        config = _fit_to_memory(config)
    if plan:
        _print_plan(config, resume, as_json)
        return
    with _training_bar("fine-tuning") as show:
        train_with_labels(config, workspace.finetune, resume=resume, on_step=show)
    _print_measured(workspace.finetune, "finetune", as_json)


@train.command()
@_labelled_options
@click.pass_obj
def linear(workspace: Workspace, /, as_json: bool, plan: bool, **options: Any) -> None:
    """Train a linear layer on the frozen encoder, with crops and flips, and measure after each epoch.

    \b
    mimco train linear --data imagenet/train --val imagenet/val
    mimco train linear --from .mimco/stage1/last --data train --val val
    """
    with extra("train"):
        from mimco_deploy.training.supervised import train_with_labels
        from mimco_deploy.training.supervised_runs import LabelledRequest, open_linear

    config, resume = open_linear(workspace.linear, workspace.stage2 / "last", LabelledRequest(**_asked(options, plan)))
    if options["grad_accum"] == "auto" and resume is None:
        config = _fit_to_memory(config)
    if plan:
        _print_plan(config, resume, as_json)
        return
    with _training_bar("linear probe") as show:
        train_with_labels(config, workspace.linear, resume=resume, on_step=show)
    _print_measured(workspace.linear, "linear", as_json)


def _asked(options: dict[str, Any], plan: bool) -> dict[str, Any]:
    """The options as a request takes them: a plan writes nothing, so that a run that is there is not in its way."""
    return {**options, "fresh": options["fresh"] or (plan and not options["resume"])}


def _fit_to_memory(config: ConfigT) -> ConfigT:
    from mimco_deploy.training.plan import fit_to_memory

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--grad-accum auto in several processes", expected="a number; --plan in one process tells it")
    return fit_to_memory(config)


def _print_plan(
    config: Stage1Config | Stage2Config | FinetuneConfig | LinearConfig,
    resume: Checkpoint | SavedRun | None,
    as_json: bool,
) -> None:
    from mimco_deploy.training.plan import plan_run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--plan in several processes", expected="one, without torchrun: it measures a single device")
    plan = plan_run(config, resume)
    if as_json:
        print_json(asdict(plan))
        return
    fits = "fits" if plan.micro_batch <= plan.largest_micro_batch else "does not fit"
    rows = {
        "parameters": f"{plan.encoder_parameters:,} of the encoder, {plan.trained_parameters:,} trained with heads",
        "run": f"{plan.steps:,} steps{' left' if resume else ''} over {plan.pictures:,} pictures",
        "micro-batch": f"{plan.micro_batch} images × {plan.accumulate}; up to {plan.largest_micro_batch} at once fit",
        "memory": f"{plan.step_mib:,.0f} MiB a step of {plan.available_mib:,.0f} free ({plan.fixed_mib:,.0f} and "
        f"{plan.image_mib:.1f} an image): {fits}",
        "speed": f"{plan.images_per_s:,.0f} images/s, without loading and compiling",
        "time": f"{plan.hours:,.1f} hours at that speed",
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
        print_json({"checkpoint": checkpoint.path, "stage": checkpoint.stage, "step": checkpoint.step})
    else:
        click.echo(f"{checkpoint.stage}: {checkpoint.step} steps, checkpoint in {checkpoint.path}")


def _print_measured(folder: Path, kind: str, as_json: bool) -> None:
    from mimco_deploy.training.runs import LAST
    from mimco_deploy.training.supervised_checkpoint import read_run

    if not IS_MAIN_PROCESS:
        return
    saved = read_run(folder / LAST, kind)
    row = saved.progress.rows[-1]
    if as_json:
        print_json({"checkpoint": saved.path, "classes": len(saved.classes), **row})
        return
    click.echo(
        f"{kind}: top-1 {row['val_top1']:.2%}, top-5 {row['val_top5']:.2%} after {row['epoch']} epochs, "
        f"{len(saved.classes)} classes, checkpoint in {saved.path}"
    )
