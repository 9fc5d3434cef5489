"""`mimco bench` and `mimco doctor`: how fast an encoder is on this machine, and what the machine can run."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mimco_deploy.atomic import current_dir
from mimco_deploy.commands.common import AnyPath, Folder, json_option, print_json
from mimco_deploy.errors import ConfigError, MimcoError, ProviderError
from mimco_deploy.shipped import SHIPPED_ENCODER, encoder_of
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.bundle import EncoderSpec
    from mimco_deploy.serving.bench import Variant

logger = logging.getLogger(__name__)


@click.command()
@click.option("--encoder", type=AnyPath, help="Bundle.  [default: the workspace's encoder, else mimco's]")
@click.option("--check", type=Folder, help="Count neighbours among pictures of this folder.  [default: drawn ones]")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1, 4096),
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
    from mimco_deploy.serving.agreement import MIN_PICTURES
    from mimco_deploy.serving.sample import draw_pictures, sample_folder
    from mimco_deploy.terminal import counting_bar, print_table

    path = encoder or encoder_of(workspace)
    bundle = read_bundle(path)
    if pick and path == SHIPPED_ENCODER:
        raise ConfigError("--pick for the encoder that comes with mimco", expected="one of your own: --encoder BUNDLE")
    if pick:
        benching.check_can_pick(path)
    spec = bundle.spec
    pictures = (
        draw_pictures(benching.DRAWN_PICTURES, *spec.geometry)
        if check is None
        else sample_folder(check, benching.SAMPLED_PICTURES, *spec.geometry)
    )
    devices = benching.devices_here() if device == "auto" else ["cpu", "tensorrt"] if device == "tensorrt" else [device]
    variants = benching.bundle_variants(path, bundle, devices)
    for name in ("cpu", "cuda"):
        if name in devices:
            variants += _torch_variants(workspace, spec, source, name)
    with counting_bar("bench") as show:
        rows, failures = benching.measure(variants, pictures, batch_sizes, show)
    if not any(row.in_bundle for row in rows):
        command = "mimco doctor"
        found = failures[0].found.removesuffix(f"; run: {command}") if failures else "nothing ran"
        raise ProviderError(found, command=command)
    if pick and all(row.overlap is None for row in rows):
        logger.warning(
            "%d pictures are too few to compare neighbours, expected %d: only fp32 is picked",
            len(pictures),
            MIN_PICTURES,
        )
    defaults = benching.pick(path, rows) if pick else dict(bundle.defaults)
    if as_json:
        print_json({**benching.document(rows, failures, len(pictures), check), "defaults": defaults})
    else:
        print_table(*benching.table(rows, failures))
        click.echo(f"defaults: {', '.join(f'{name} {kind}' for name, kind in defaults.items()) or 'fp32'}")


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


@click.command()
@json_option
@click.pass_context
def doctor(context: click.Context, /, as_json: bool) -> None:
    """Say what this machine can run, and the next command for each problem."""
    from mimco_deploy.serving.doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = [[one.name, one.state, one.found, one.command] for one in findings]
        try:
            from mimco_deploy.terminal import print_table
        except ImportError:  # rich itself is broken
            click.echo("\n".join(map("  ".join, rows)))
        else:
            print_table(["", "state", "found", "next"], rows)
    if any(one.state == "problem" for one in findings):
        context.exit(1)
