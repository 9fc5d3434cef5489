"""What several files of commands share: types, options, the encoder they load, and how they print and fail."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mimco_deploy.errors import MimcoError, MissingExtraError, plain
from mimco_deploy.shipped import NAME, SHIPPED_ENCODER, encoder_of
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.serving.encoders import Device, Encoder

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Folder = click.Path(path_type=Path, file_okay=False)
IndexedFolder = click.Path(path_type=Path, file_okay=False, readable=False)
"""One that cannot be read is told of in words of ours, if it has to be read at all."""
AnyPath = click.Path(path_type=Path)
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
"""False in the processes that torchrun starts beside the first."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class FiniteRange(click.FloatRange):
    """A number in a range; NaN, which no comparison refuses, is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as click does, and refuse what is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def new_page(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Callback of an option that names a page to write: nothing but a page is meant to be written over."""
    if value is None:
        return None
    from mimco_deploy.html_page import place_of_page  # takes a while
    from mimco_deploy.images import IMAGE_SUFFIXES

    if {value.suffix.lower(), place_of_page(value).suffix.lower()} & IMAGE_SUFFIXES:
        raise click.BadParameter(
            f"{value} has the name of a picture; expected one such as out.html", context, parameter
        )
    return value


def printable(path: Path) -> str:
    """A path as text for a terminal: what is no text, and what would steer the terminal, becomes `�`."""
    from mimco_deploy.serving.scan import readable

    return plain(readable(path)).replace("\n", "�")


def _make_plain(record: logging.LogRecord) -> bool:
    record.msg, record.args = plain(record.getMessage()), None
    return True


class Group(click.Group):
    """Ends with one line, not a traceback, where the user's input is at fault."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of the user's becomes click's."""
        try:
            return super().invoke(ctx)
        except MimcoError as error:
            raise click.ClickException(plain(str(error))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # click's to handle
                raise
            place = "" if error.filename is None else f"{error.filename}: "
            raise click.ClickException(plain(f"{place}{error.strerror or error}")) from error


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the install line where an import of the block is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        command = f'pip install "mimco-deploy[{name}]"'
        raise MissingExtraError(f"the package {error.name} is not installed", command=command) from error


def set_up_streams() -> None:
    """Open what the shell closed of the standard streams, and let stdout take names that its encoding has not."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # The lowest number that is free is the stream's own, which else a file of an index would get, and what
            # libraries and the processes that decode write there.
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def set_up_logging(verbose: bool, silent: bool = False) -> None:
    """Send warnings to stderr without disturbing a bar; with `verbose`, all that the package says; `silent`, errors."""
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():  # without one, rich would fold lines at 80 columns, and it takes a while to import
        with contextlib.suppress(ImportError):  # `mimco doctor` tells where rich is broken
            from rich.logging import RichHandler

            from mimco_deploy.terminal import talk

            handler = RichHandler(console=talk, show_time=False, show_path=False, show_level=False, markup=False)
    handler.addFilter(_make_plain)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("timm").setLevel(logging.ERROR)  # speaks of schedules of a few steps
    logging.getLogger("huggingface_hub").propagate = False  # writes to stderr itself
    level = logging.ERROR if silent else logging.INFO if verbose else logging.WARNING
    logging.getLogger("mimco_deploy").setLevel(level)


def print_json(document: object) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, default=str))


device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Where the encoder runs.",
)


def runtime_options(function: FunctionT, default: str = "the index's, else the workspace's, else mimco's") -> FunctionT:
    """Options that say which encoder runs, by default as `default` says, and where; `load_encoder` takes them."""
    options = [
        click.option("--encoder", type=AnyPath, help=f"Bundle: folder, .zip or .tar.  [default: {default}]"),
        device_option,
        click.option("--strict", is_flag=True, help="Fail where the encoder does not run on that device."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def encoder_path(workspace: Workspace, given: Path | None) -> Path:
    """The bundle to use: the one given, else the one that the index was made with, else the workspace's.

    Where the workspace has none, the one that comes with mimco.
    """
    from mimco_deploy.serving.inspect import recorded_encoder

    return given or recorded_encoder(workspace.index) or encoder_of(workspace)


def say_if_shipped(bundle: Path) -> None:
    """Tell in one line that the encoder is the one that comes with mimco."""
    if bundle == SHIPPED_ENCODER:
        click.echo(
            f"no encoder here yet: {NAME} is used, small and general, which comes with mimco; "
            "`mimco train stage1 --data DIR` begins one of your own",
            err=True,
        )


def path_to_record(workspace: Workspace, bundle: Path) -> Path | None:
    """What an index notes of its encoder: nothing where it is the workspace's own, which may be moved with it.

    Nor where it is the one that comes with mimco: that is found without, and one of the workspace's own shall not be
    passed over for it later.
    """
    return None if bundle.absolute() in (workspace.encoder.absolute(), SHIPPED_ENCODER) else bundle


def file_timeout_option(default_s: float) -> Callable[[FunctionT], FunctionT]:
    """The option that bounds the decoding of a file."""
    return click.option(
        "--file-timeout",
        type=FiniteRange(0.1, 86_400),
        default=default_s,
        show_default=True,
        metavar="SECONDS",
        help="After which a file is given up.",
    )


def load_encoder(workspace: Workspace, encoder: Path | None, device: Device, strict: bool) -> Encoder:
    """The encoder that `runtime_options` ask for."""
    from mimco_deploy.serving.encoders import load_encoder as load

    return load(encoder_path(workspace, encoder), device, strict=strict)


def run_by(encoder: Encoder) -> dict[str, str]:
    """What a JSON document says of the encoder that ran."""
    return {
        "provider": encoder.provider,
        "precision": encoder.precision,
        "fingerprint": encoder.spec.fingerprint,
    }
