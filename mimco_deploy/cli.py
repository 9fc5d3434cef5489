"""The command line: parse, call one function, print. Heavy imports stand inside the commands: help is instant."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mimco_deploy import __version__
from mimco_deploy.atomic import current_dir
from mimco_deploy.bundle_archive import is_archive
from mimco_deploy.errors import (
    ConfigError,
    IndexStoreError,
    MimcoError,
    MissingExtraError,
    ProviderError,
    WorkspaceError,
)
from mimco_deploy.workspace import Workspace, find_workspace

if TYPE_CHECKING:
    from mimco_deploy.bundle import EncoderSpec, Precision
    from mimco_deploy.export.pipeline import Exported
    from mimco_deploy.serving.bench import Variant
    from mimco_deploy.serving.encoders import Device, Encoder
    from mimco_deploy.serving.trt import Flavour
    from mimco_deploy.training.config import Stage1Config, Stage2Config
    from mimco_deploy.training.loop import StepReport

    ConfigT = TypeVar("ConfigT", Stage1Config, Stage2Config)

logger = logging.getLogger(__name__)

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Folder = click.Path(path_type=Path, file_okay=False)
AnyPath = click.Path(path_type=Path)
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


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """Whole numbers with commas between them.

    Args:
        count: how many; any number of them by default.
    """

    name = "numbers"

    def __init__(self, count: int | None = None) -> None:
        self._count = count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isascii() and part.isdigit() for part in parts) or len(parts) != (self._count or len(parts)):
            self.fail(f"{value} is not {self._count or 'one or more'} numbers with commas between them", param, ctx)
        return tuple(map(int, parts))


@main.command()
@click.option(
    "--format",
    "target",
    type=click.Choice(["onnx", "tensorrt", "tensorrt-rtx"]),
    required=True,
    help="A bundle with its ONNX graphs, or an engine in it.",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    multiple=True,
    help="Repeatable. ONNX: beside fp32, which is always made.  [default for engines: fp16]",
)
@click.option("--checkpoint", type=Folder, help="What to export.  [default: the workspace's stage 2]")
@click.option("--model", metavar="SOURCE", help="Export timm/NAME instead, a folder of timm's or a file of weights.")
@click.option("--image-size", type=click.IntRange(min=1), help="Side of the input in px.  [default: as trained]")
@click.option("--with-patches", is_flag=True, help="Give the patch tokens as a second output.")
@click.option(
    "--check", type=Folder, help="Prove neighbours on pictures of this folder, and calibrate int8 with others."
)
@click.option("--output", type=AnyPath, help="Folder, .zip or .tar of the bundle.  [default: the workspace's encoder]")
@click.option("--licence", help="Licence of the weights, kept in the bundle.")
@click.option(
    "--profile",
    type=_Numbers(3),
    default="1,32,256",
    show_default=True,
    metavar="MIN,OPT,MAX",
    help="Engines: least, most usual and largest batch.",
)
@click.option("--workspace-mib", type=click.IntRange(min=0), default=0, help="Engines: limit of scratch memory.")
@click.option(
    "--compute-capability",
    type=_Numbers(),
    default=(),
    metavar="N,…",
    help="tensorrt-rtx: of the GPUs to build for, such as 89,120.  [default: the GPU here]",
)
@click.option("--emit-trtexec", is_flag=True, help="Print the command of TensorRT's own tool instead of building.")
@click.option("--triton", type=Folder, help="Also write a model repository for Triton Inference Server there.")
@json_option
@click.pass_obj
def export(
    workspace: Workspace,
    /,
    target: Literal["onnx", "tensorrt", "tensorrt-rtx"],
    precisions: tuple[Precision, ...],
    output: Path | None,
    triton: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Export the student as an encoder bundle that proves itself, or build a TensorRT engine from the bundle.

    \b
    mimco export --format onnx
    mimco export --format onnx --precision int8 --check ./photos
    mimco export --format onnx --model timm/vit_small_patch16_224.dino
    mimco export --format tensorrt
    mimco export --format tensorrt-rtx --compute-capability 89,120
    """
    if options["checkpoint"] is not None and options["model"] is not None:
        raise click.UsageError("--checkpoint and --model are two sources; give one.")
    folder = output or workspace.encoder
    engine = {name: options.pop(name) for name in ("profile", "workspace_mib", "compute_capability", "emit_trtexec")}
    if target == "onnx" and triton is not None and is_archive(folder):
        raise click.UsageError("--triton takes a folder as --output.")
    if target == "onnx" and (engine["emit_trtexec"] or engine["compute_capability"] or engine["workspace_mib"]):
        raise click.UsageError("Options of engines go with --format tensorrt or tensorrt-rtx.")
    if target != "onnx":
        _export_engines(workspace, folder, target, precisions or ("fp16",), triton, as_json, engine, options)
        return
    exported = _export_onnx(workspace, folder, precisions, **options)
    if triton is not None:
        from mimco_deploy.bundle import read_bundle
        from mimco_deploy.export.triton import write_repository

        bundle = read_bundle(folder)
        write_repository(triton, bundle, bundle.model("fp32"), engine["profile"][2])
    if as_json:
        _print_json({"bundle": folder, "format": target, **exported.document()})
    else:
        _print_exported(folder, exported)
    if exported.refused:
        raise exported.refused[0]


def _print_exported(folder: Path, exported: Exported) -> None:
    from mimco_deploy.terminal import print_table

    click.echo(f"onnx: bundle in {folder}, licence {exported.spec.licence}")
    print_table(*exported.table())


def _export_onnx(
    workspace: Workspace,
    folder: Path,
    precisions: tuple[Precision, ...],
    checkpoint: Path | None,
    model: str | None,
    image_size: int | None,
    **options: Any,
) -> Exported:
    with _extra("train"):
        from mimco_deploy.training.checkpoint import read_checkpoint
    with _extra("export"):
        from mimco_deploy.export.pipeline import ExportOptions, export_encoder
        from mimco_deploy.export.student import from_checkpoint, from_model

    if model is not None:
        source = from_model(model)
    else:
        trained = read_checkpoint(checkpoint or _trained_student(workspace))
        trained.warn_if_unfinished()
        source = from_checkpoint(trained)
    return export_encoder(source, folder, ExportOptions(precisions=precisions, image_size_px=image_size, **options))


def _export_engines(
    workspace: Workspace,
    folder: Path,
    target: Flavour,
    precisions: tuple[Precision, ...],
    triton: Path | None,
    as_json: bool,
    engine: dict[str, Any],
    source: dict[str, Any],
) -> None:
    """Engines in a bundle, which is exported first where it is not there, or older than the student."""
    from mimco_deploy.bundle import read_bundle
    from mimco_deploy.export.engines import build_engine, bundle_is_current
    from mimco_deploy.export.to_tensorrt import EngineOptions, gpus_to_build_for, trtexec_command
    from mimco_deploy.serving.trt import load_trt
    from mimco_deploy.terminal import counting_bar

    wanted = [
        EngineOptions(
            precision=precision,
            profile=engine["profile"],
            workspace_mib=engine["workspace_mib"],
            compute_capabilities=engine["compute_capability"],
        )
        for precision in precisions
    ]
    _check_engine_usage(target, engine, as_json, triton, len(wanted))
    trt = None if engine["emit_trtexec"] else load_trt(target)  # before anything that takes long
    if trt is not None:
        gpus_to_build_for(trt, target, wanted[0])
    given = any(source.values())
    if given or not bundle_is_current(folder, precisions, workspace.stage2 / "last"):
        exported = _export_onnx(workspace, folder, precisions, **source)
        if exported.refused:
            raise exported.refused[0]
        if not as_json and trt is not None:
            _print_exported(folder, exported)
    if trt is None:
        for options in wanted:
            click.echo(shlex.join(trtexec_command(read_bundle(folder), options)))
        return
    for options in wanted:
        with counting_bar(f"{target} {options.precision}") as show:
            built = build_engine(trt, target, folder, options, triton, show)
        if as_json:
            _print_json({"bundle": folder, "format": target, **built.document()})
        else:
            click.echo(built.sentence())


def _check_engine_usage(
    target: str, engine: dict[str, Any], as_json: bool, triton: Path | None, precisions: int
) -> None:
    """Options that say nothing together are refused, not ignored."""
    if engine["emit_trtexec"] and (target != "tensorrt" or as_json or triton or engine["compute_capability"]):
        raise click.UsageError("--emit-trtexec goes with --format tensorrt, and prints a command alone.")
    if triton is not None and precisions > 1:
        raise click.UsageError("--triton takes one --precision.")


def _trained_student(workspace: Workspace) -> Path:
    folder = current_dir(workspace.stage2 / "last")
    if not folder.is_dir():
        raise WorkspaceError(f"no trained student in {folder}", expected="a checkpoint", command="mimco train stage2")
    return folder


def _runtime_options(function: FunctionT) -> FunctionT:
    options = [
        click.option(
            "--encoder", type=AnyPath, help="Bundle: folder, .zip or .tar.  [default: the workspace's encoder]"
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
            default="auto",
            show_default=True,
            help="Where the encoder runs.",
        ),
        click.option("--strict", is_flag=True, help="Fail where the encoder does not run on that device."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _load_encoder(workspace: Workspace, encoder: Path | None, device: Device, strict: bool) -> Encoder:
    from mimco_deploy.serving.encoders import load_encoder

    return load_encoder(encoder or workspace.encoder, device, strict=strict)


@main.command()
@click.option("--encoder", type=AnyPath, help="Bundle.  [default: the workspace's encoder]")
@click.option("--check", type=Folder, help="Count neighbours among pictures of this folder.  [default: drawn ones]")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 8, 32),
    show_default=True,
    help="Pictures at once; repeatable.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Where; auto is all there are.",
)
@click.option("--source", help="Weights to run in torch too, as for export.  [default: the workspace's stage 2]")
@click.option("--pick", is_flag=True, help="Make the fastest variant that passes the bundle's default.")
@json_option
@click.pass_obj
def bench(
    workspace: Workspace,
    /,
    encoder: Path | None,
    check: Path | None,
    batch_sizes: tuple[int, ...],
    device: str,
    source: str | None,
    pick: bool,
    as_json: bool,
) -> None:
    """Measure every variant of an encoder on this machine: speed, start, size, and neighbours kept."""
    from mimco_deploy.bundle import read_bundle
    from mimco_deploy.serving import bench as benching
    from mimco_deploy.serving.sample import draw_pictures, sample_folder
    from mimco_deploy.terminal import counting_bar, print_table

    path = encoder or workspace.encoder
    bundle = read_bundle(path)
    if pick:
        benching.check_can_pick(path)
    spec = bundle.spec
    geometry = (spec.image_size_px, spec.crop_share, spec.interpolation)
    pictures = (
        draw_pictures(benching.DRAWN_PICTURES, *geometry)
        if check is None
        else sample_folder(check, benching.SAMPLED_PICTURES, *geometry)
    )
    devices = benching.devices_here() if device == "auto" else ["cpu", "tensorrt"] if device == "tensorrt" else [device]
    variants = benching.bundle_variants(path, bundle, devices)
    for name in ("cpu", "cuda"):
        if name in devices:
            variants += _torch_variants(workspace, spec, source, name)
    with counting_bar("bench") as show:
        rows, failures = benching.measure(variants, pictures, batch_sizes, show)
    if not any(row.in_bundle for row in rows):
        raise ProviderError(failures[0].found if failures else "nothing ran", command="mimco doctor")
    defaults = benching.pick(path, rows) if pick else dict(bundle.defaults)
    if as_json:
        _print_json({**benching.document(rows, failures, len(pictures), check), "defaults": defaults})
    else:
        print_table(*benching.table(rows, failures))
        click.echo(f"defaults: {', '.join(f'{name} {kind}' for name, kind in defaults.items()) or 'fp32'}")


@main.command()
@json_option
@click.pass_context
def doctor(context: click.Context, /, as_json: bool) -> None:
    """Say what this machine can run, and the next command for each problem."""
    from mimco_deploy.serving.doctor import examine
    from mimco_deploy.terminal import print_table

    findings = examine()
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        print_table(["", "state", "found", "next"], [[one.name, one.state, one.found, one.command] for one in findings])
    if any(one.state == "problem" for one in findings):
        context.exit(1)


def _torch_variants(workspace: Workspace, spec: EncoderSpec, source: str | None, device: str) -> list[Variant]:
    """Rows for torch, where it is installed and the weights are at hand."""
    trained = current_dir(workspace.stage2 / "last")
    if source is None and not trained.is_dir():
        return []
    try:
        from mimco_deploy.export.torch_variants import torch_variants
    except ModuleNotFoundError:
        return []
    try:
        return torch_variants(spec, source or str(trained), device)
    except MimcoError as error:
        if source is not None:
            raise
        logger.warning("no rows for torch: %s", error)
        return []


def _run_by(encoder: Encoder) -> dict[str, str]:
    return {
        "provider": encoder.provider,
        "precision": encoder.precision,
        "fingerprint": encoder.spec.fingerprint,
    }


class _IndexGroup(click.Group):
    """Takes folders where a command could stand: `mimco index ./photos` is `mimco index update ./photos`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command in where there is none."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["update", *args]
        return super().parse_args(ctx, args)


@main.group(cls=_IndexGroup, subcommand_metavar="[FOLDERS]... | COMMAND [ARGS]...")
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
@_runtime_options
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

    encoder = _load_encoder(workspace, **runtime)
    with counting_bar("index") as show:
        report = update_index(
            workspace.index, folders, encoder, batch_size=batch_size, rebuild=rebuild, on_progress=show
        )
    if as_json:
        _print_json({**asdict(report), **_run_by(encoder)})
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
        _print_json({"forgotten": folders, "files": dropped})
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
        _print_json(asdict(found))
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
        _print_json([asdict(one) for one in listed])
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
        _print_json({"index": workspace.index, "wrong": wrong})
    elif not wrong:
        click.echo("the index is whole")
    if wrong:
        raise IndexStoreError(
            f"{workspace.index}: {'; '.join(wrong)}", expected="a whole index", command="mimco index --rebuild"
        )


@main.command()
@click.argument("query", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Number of hits.")
@click.option("--sheet", type=click.Path(path_type=Path, dir_okay=False), help="Write query and hits as one HTML page.")
@_runtime_options
@json_option
@click.pass_obj
def search(workspace: Workspace, /, query: Path, k: int, sheet: Path | None, as_json: bool, **runtime: Any) -> None:
    """Find the indexed pictures most like QUERY. The score is the cosine: higher is better, 1 is the same."""
    from mimco_deploy.serving.index import ImageIndex, search_image
    from mimco_deploy.serving.scan import readable

    encoder = _load_encoder(workspace, **runtime)
    image_index = ImageIndex.open(workspace.index, encoder.spec.fingerprint)
    hits = search_image(image_index, encoder, query, k)
    if sheet is not None:
        from mimco_deploy.serving.sheet import write_sheet

        write_sheet(sheet, query, hits)
    if as_json:
        ranked = [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]
        _print_json({"query": query, "hits": ranked, **_run_by(encoder)})
        return
    here = f"{Path.cwd()}{os.sep}"
    for rank, hit in enumerate(hits, start=1):
        click.echo(f"{rank:>3}  {hit.score:.4f}  {readable(hit.path).removeprefix(here)}")
