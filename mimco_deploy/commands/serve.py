"""`mimco serve`: the index behind HTTP, and its page; `mimco watch`: an index that follows its folders."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mimco_deploy.commands.common import (
    AnyPath,
    FiniteRange,
    IndexedFolder,
    encoder_path,
    extra,
    file_timeout_option,
    path_to_record,
    runtime_options,
)
from mimco_deploy.shipped import encoder_of
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.serving.encoders import Device


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--table", type=AnyPath, help="CSV or Parquet whose columns conditions may name.")
@click.option("--queue", type=click.IntRange(min=1), help="Most pictures waiting.  [default: by the encoder's pace]")
@click.option(
    "--max-upload", type=click.IntRange(1, 1024), default=32, show_default=True, metavar="MIB", help="Of one request."
)
@file_timeout_option(20.0)
@runtime_options
@click.pass_obj
def serve(
    workspace: Workspace,
    /,
    host: str,
    port: int,
    table: Path | None,
    queue: int | None,
    max_upload: int,
    file_timeout: float,
    encoder: Path | None,
    device: Device,
    strict: bool,
) -> None:
    """Answer searches over HTTP, for programs and for people: the page is at the address that is printed.

    Only this machine can ask. With a --host that others reach a token is needed: MIMCO_TOKEN, else a new one, which is
    printed.
    """
    with extra("serve"):
        from mimco_deploy.serving.http.server import listen, serve, token_for
        from mimco_deploy.serving.http.service import ServeSettings
    from mimco_deploy.serving.guarded import Limits

    token, is_new = token_for(host)
    settings = ServeSettings(
        device=device,
        strict=strict,
        encoder=encoder,
        table=table,
        queue=queue,
        max_upload_mib=max_upload,
        decode=Limits(seconds=file_timeout),
    )
    with listen(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.getsockname()[1]}/"
        shown = f"{address}#token={token}" if is_new else address
        serve(workspace.index, encoder_of(workspace), settings, listening, token, host, lambda: click.echo(shown))


@click.command()
@click.argument("folders", nargs=-1, type=IndexedFolder)
@click.option("--settle", type=FiniteRange(0.1, 3600), default=2.0, show_default=True, metavar="SECONDS",
              help="Without a change before it is indexed.")  # fmt: skip
@runtime_options
@click.pass_obj
def watch(workspace: Workspace, /, folders: tuple[Path, ...], settle: float, **runtime: Any) -> None:
    """Keep the index of FOLDERS current until Ctrl-C; without any, of all that are indexed.

    A service over the same index shows what is new at once.
    """
    from mimco_deploy.serving.encoders import LazyEncoder

    with extra("serve"):
        from mimco_deploy.serving.watch import watch_folders

    bundle = encoder_path(workspace, runtime["encoder"])
    encoder = LazyEncoder(bundle, runtime["device"], strict=runtime["strict"])
    reports = watch_folders(
        workspace.index, folders, encoder, settle_s=settle, encoder_path=path_to_record(workspace, bundle)
    )
    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # how it ends; the second is of SIGTERM
        for report in reports:
            click.echo(
                f"{report.counts.files} pictures indexed: {report.added} added, {report.changed} changed, "
                f"{report.removed} removed, {report.counts.problems} problems"
            )
