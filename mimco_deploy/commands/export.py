"""`mimco export`: the student as a bundle, and engines in it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from mimco_deploy.atomic import current_dir
from mimco_deploy.bundle_archive import is_archive
from mimco_deploy.commands.common import AnyPath, Folder, extra, json_option, print_json, printable
from mimco_deploy.errors import ConfigError, WorkspaceError
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.bundle import Precision
    from mimco_deploy.export.pipeline import Exported
    from mimco_deploy.serving.trt import Flavour

_MAX_SIDE_PX = 2048
"""A proof embeds 32 pictures at once, which take several GiB there; a bundle's golden pictures end at 3344 px."""


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


@click.command()
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
@click.option(
    "--image-size", type=click.IntRange(1, _MAX_SIDE_PX), help="Side of the input in px.  [default: as trained]"
)
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
    if options["model"] == "":
        raise click.UsageError("--model is empty; give timm/NAME, a folder of timm's or a file of weights.")
    folder = output or workspace.encoder
    engine = {name: options.pop(name) for name in ("profile", "workspace_mib", "compute_capability", "emit_trtexec")}
    if target == "onnx" and triton is not None and is_archive(folder):
        raise click.UsageError("--triton takes a folder as --output.")
    if target == "onnx" and (engine["emit_trtexec"] or engine["compute_capability"] or engine["workspace_mib"]):
        raise click.UsageError("Options of engines go with --format tensorrt or tensorrt-rtx.")
    if target == "onnx":
        _check_profile(engine["profile"], triton)
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
        print_json({"bundle": folder, "format": target, **exported.document()})
    else:
        _print_exported(folder, exported)
    exported.check()


def _check_profile(profile: tuple[int, int, int], triton: Path | None) -> None:
    """Of a graph, which takes any batch: it tells Triton the largest."""
    given = click.get_current_context().get_parameter_source("profile") is not ParameterSource.DEFAULT
    if given and triton is None:
        raise click.UsageError("--profile goes with --format tensorrt or tensorrt-rtx, or with --triton.")
    from mimco_deploy.export.to_tensorrt import EngineOptions

    EngineOptions(profile=profile)  # refuses what cannot be meant


def _print_exported(folder: Path, exported: Exported) -> None:
    from mimco_deploy.terminal import print_table

    click.echo(f"onnx: bundle in {printable(folder)}, licence {exported.spec.licence}")
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
    with extra("train,export"):
        from mimco_deploy.export.pipeline import ExportOptions, export_encoder
        from mimco_deploy.export.student import from_checkpoint, from_model
        from mimco_deploy.training.checkpoint import read_checkpoint

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
    _check_engine_usage(target, folder, engine, as_json, triton, len(wanted))
    trt = None if engine["emit_trtexec"] else load_trt(target)  # before anything that takes long
    if trt is not None:
        gpus_to_build_for(trt, target, wanted[0])
    given = any(source.values())
    if given or not bundle_is_current(folder, precisions, workspace.stage2 / "last"):
        exported = _export_onnx(workspace, folder, precisions, **source)
        exported.check()
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
            print_json({"bundle": folder, "format": target, **built.document()})
        else:
            click.echo(built.sentence())


def _check_engine_usage(
    target: str, folder: Path, engine: dict[str, Any], as_json: bool, triton: Path | None, precisions: int
) -> None:
    """Options that say nothing together are refused, not ignored."""
    if is_archive(folder):
        raise ConfigError(f"an engine in the archive {folder}", expected="a folder as --output")
    if engine["emit_trtexec"] and (target != "tensorrt" or as_json or triton or engine["compute_capability"]):
        raise click.UsageError("--emit-trtexec goes with --format tensorrt, and prints a command alone.")
    if triton is not None and precisions > 1:
        raise click.UsageError("--triton takes one --precision.")
    if triton is not None and (target == "tensorrt-rtx" or engine["profile"][0] > 1):
        raise click.UsageError("--triton serves plans of --format tensorrt whose least batch is 1.")


def _trained_student(workspace: Workspace) -> Path:
    folder = current_dir(workspace.stage2 / "last")
    if not folder.is_dir():
        raise WorkspaceError(f"no trained student in {folder}", expected="a checkpoint", command="mimco train stage2")
    return folder
