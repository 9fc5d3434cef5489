"""The command line: help of everything, one line for each error, nothing heavy before it is needed."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from mimco_deploy import __version__
from mimco_deploy.cli import main
from mimco_deploy.commands.train import train
from mimco_deploy.errors import ImageError, WorkspaceError
from mimco_deploy.serving.update import update_index
from mimco_deploy.training.presets import STAGE1_METHODS, STAGE2_METHODS
from tests.helpers import CountingEncoder, below, gallery, save, tiny_bundle

HEAVY = {"torch", "torchvision", "timm", "onnx", "onnxscript", "tensorboard", "safetensors"}
SERVING = {"numpy", "PIL", "faiss", "onnxruntime", "rich"}


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Each command sets the package's level."""
    logger = logging.getLogger("mimco_deploy")
    level = logger.level
    yield
    logger.setLevel(level)


def commands(command: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, child in below(command):
            yield from commands(child, (*path, name))


def mimco(workspace: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), *map(str, arguments)])


def refused(result: Result, *words: str) -> None:
    """Exit code 1, and one line on stderr that says all of `words`."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    for word in words:
        assert word in result.stderr


# ---------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("path", [*commands()], ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...], flag: str) -> None:
    result = CliRunner().invoke(main, [*path, flag], prog_name="mimco")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: {' '.join(('mimco', *path))}")
    assert result.stderr == ""


@pytest.mark.parametrize("path", [*commands()], ids=" ".join)
def test_every_option_has_a_word_of_help(path: tuple[str, ...]) -> None:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = dict(below(command))[name]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_version_is_the_packages() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"mimco, version {__version__}\n")


# ---------------------------------------------------------------------------------------------------- what is loaded


def imported(*arguments: str | Path) -> set[str]:
    """Top-level packages that a command brings in, as the interpreter itself reports them."""
    code = "from mimco_deploy.cli import main; main(prog_name='mimco')"
    words = [sys.executable, "-X", "importtime", "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("path", [(), ("train",), ("train", "stage1"), ("export",), ("index",), ("search",)])
def test_help_imports_nothing_but_click(path: tuple[str, ...]) -> None:
    seen = imported(*path, "--help")
    assert {"click", "mimco_deploy"} <= seen
    assert seen & HEAVY == set()
    assert seen & SERVING <= ({"rich"} if path else set())


def test_search_imports_no_torch(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 5)
    tiny_bundle(tmp_path / "encoder")
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    query, sheet = tmp_path / "photos/0002.png", tmp_path / "hits.html"
    seen = imported("--workspace", tmp_path, "search", query, "--sheet", sheet)
    assert {"onnxruntime", "faiss"} <= seen
    assert seen & HEAVY == set()
    assert sheet.is_file()


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("arguments", [("search", "query.jpg"), ("index", "."), ("index",)])
def test_a_student_that_is_not_exported_names_the_command_that_does(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "stage2").mkdir()
    refused(mimco(tmp_path, *arguments), "no encoder in", "run: mimco export --format onnx")


def test_a_missing_index_names_the_command_that_makes_it(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "encoder")
    refused(mimco(tmp_path, "search", "query.jpg"), "no index in", "run: mimco index DIR")
    refused(mimco(tmp_path, "index"), "no folder to index", "run: mimco index DIR")
    refused(mimco(tmp_path, "index", "forget", tmp_path), "no index in", "run: mimco index DIR")


def test_a_missing_teacher_names_the_command_that_trains_it(tmp_path: Path) -> None:
    refused(mimco(tmp_path, "train", "stage2"), "no teacher in", "run: mimco train stage1 --data DIR")
    refused(mimco(tmp_path, "train", "stage2", "--teacher", tmp_path / "nowhere"), "no file", "nowhere", "timm/NAME")


def test_a_missing_student_names_the_command_that_trains_it(tmp_path: Path) -> None:
    refused(mimco(tmp_path, "export", "--format", "onnx"), "no trained student in", "run: mimco train stage2")


def test_training_without_pictures_says_how_to_give_them(tmp_path: Path) -> None:
    refused(mimco(tmp_path, "train", "stage1"), "no pictures to train on", "mimco train stage1 --data DIR")
    refused(mimco(tmp_path, "train", "stage1", "--data", tmp_path / "nowhere"), "nowhere does not exist")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_resuming_without_a_run_is_refused(stage: str, tmp_path: Path) -> None:
    refused(mimco(tmp_path, "train", stage, "--resume"), "no run in", stage)


def test_an_unknown_preset_or_setting_is_answered_with_known_ones(tmp_path: Path) -> None:
    start = ("train", "stage1", "--data", tmp_path)
    refused(
        mimco(tmp_path, *start, "--preset", "vit_huge"), "vit_huge", "expected one of swin_tiny, vit_base, vit_small"
    )
    refused(mimco(tmp_path, *start, "--set", "run.epoch=3"), "no setting run.epoch;", "nearest run.epochs")
    refused(mimco(tmp_path, *start, "--set", "run.epochs=three"), "run.epochs=three", "a whole number")


def test_a_query_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 3)
    tiny_bundle(tmp_path / "encoder")
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    (tmp_path / "query.jpg").write_bytes(b"no picture")
    refused(mimco(tmp_path, "search", tmp_path / "query.jpg"), "query.jpg")
    refused(mimco(tmp_path, "search", tmp_path / "gone.jpg"), "gone.jpg does not exist")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (WorkspaceError("found", expected="wanted", command="do"), "found; expected wanted; run: do"),
        (ImageError("empty", "x"), "x"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(13, "Permission denied", "a.jpg"), "a.jpg: Permission denied"),
        (OSError("what a library says"), "what a library says"),
    ],
)
def test_an_error_is_one_line_without_traceback(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("mimco_deploy.cli.find_workspace", fail)
    result = mimco(tmp_path, "index")
    refused(result)
    assert result.stderr == f"Error: {line}\n"


def test_a_pipe_that_is_closed_ends_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("mimco_deploy.cli.find_workspace", fail)
    result = mimco(tmp_path, "index")
    assert (result.exit_code, result.output) == (1, "")


def test_a_defect_of_mimco_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("defect")

    monkeypatch.setattr("mimco_deploy.cli.find_workspace", fail)
    result = mimco(tmp_path, "index")
    assert isinstance(result.exception, RuntimeError)
    assert "Error:" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("train",),
        ("train", "stage3"),
        ("train", "stage1", "--batch-size", "1"),
        ("train", "stage1", "--teacher", "x"),
        ("export",),
        ("export", "--format", "pickle"),
        ("index", "--batch-size", "0"),
        ("index", "--batch-size", str(10**20)),
        ("index", "--file-timeout", "1e10"),
        ("index", "reindex", "--file-memory", "99999999999999"),
        ("index", __file__),
        ("search",),
        ("search", "query.jpg", "-k", "0"),
        ("search", "query.jpg", "--nonsense"),
        ("search", str(Path(__file__).parent)),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = mimco(tmp_path, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


def test_the_methods_on_offer_are_those_there_are() -> None:
    offered = {
        name: next(option.type.choices for option in command.params if option.name == "method")  # type: ignore[attr-defined]
        for name, command in train.commands.items()
        if name.startswith("stage")
    }
    assert {name: tuple(choices) for name, choices in offered.items()} == {
        "stage1": STAGE1_METHODS,
        "stage2": STAGE2_METHODS,
    }


def test_a_name_steers_no_terminal(tmp_path: Path) -> None:
    """In a list, a message and a warning: escape sequences of a file's name are shown as �."""
    folder = tmp_path / "a\x1b]0;title\x07"
    folder.mkdir()
    (folder / "\x1b[31mred.png").write_bytes(b"no picture")
    save(folder / "good.png", 1)
    run = CliRunner().invoke
    for words in (
        ["index", str(folder)],
        ["index", "problems"],
        ["index", "status"],
        ["index", "forget", str(folder / "x")],
    ):
        done = run(main, ["--workspace", str(tmp_path / "ws"), *words])
        assert "\x1b" not in done.output
        assert "\x07" not in done.output
        assert "�" in done.output or "\\x1b" in done.output


def in_shell(workspace: Path, redirection: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mimco_deploy", "--workspace", str(workspace), *map(str, words)]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    return subprocess.run(
        shell, capture_output=True, encoding="latin-1", check=False, env={**os.environ, **environment}, timeout=120
    )


def test_closed_standard_streams_disturb_nothing(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "encoder")
    photos = gallery(tmp_path / "photos", 3)
    assert in_shell(tmp_path, ">&- 2>&-", "index", tmp_path / "photos").returncode == 0
    assert in_shell(tmp_path, "2>&- <&-", "index", "verify").returncode == 0
    shown = in_shell(tmp_path, "2>&-", "search", photos[1])
    assert (shown.returncode, shown.stdout.count("\n")) == (0, 3)
    for flag in ("--json", "-0", "-k3"):
        assert in_shell(tmp_path, ">&-", "search", photos[1], flag).returncode == 0
    none = in_shell(tmp_path, "<&-", "search", "-")
    assert (none.returncode, none.stderr) == (1, "Error: query is empty (0 bytes)\n")


def test_a_terminal_that_has_not_all_letters_is_shown_those_it_has(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "encoder")
    photos = tmp_path / "photos"
    paths = [save(photos / name, number) for number, name in enumerate(("a写真.png", "ü.png"))]
    update_index(tmp_path / "index", [photos], CountingEncoder())
    shown = in_shell(tmp_path, "", "search", paths[0], PYTHONIOENCODING="latin-1")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [line.rpartition("/")[2] for line in shown.stdout.splitlines()] == ["a??.png", "ü.png"]
    raw = in_shell(tmp_path, "", "search", paths[0], "-0", "-k1", PYTHONIOENCODING="latin-1").stdout
    assert raw.encode("latin-1") == os.fsencode(paths[0]) + b"\0"


@pytest.mark.parametrize("command", ["eval", "index", "search", "watch"])
def test_sigterm_ends_what_unpacks_bundles_by_an_exit(command: str) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_update_says_what_it_did_not_find_and_where_the_index_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.cr2").touch()
    tiny_bundle(tmp_path / ".mimco/encoder")
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    told = run(main, ["index", "raw"]).stderr
    assert told.startswith("nothing there has the name of a picture, which end in .apng")
    save(tmp_path / "my photos/one.png", 1)
    save(tmp_path / "my photos/bad.png", 2).write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path / "my photos")
    told = run(main, ["index", "."]).stderr
    assert f"the index is in {tmp_path / '.mimco'}\n" in told
    assert "1 file is no picture, such as" in told
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").rename(tmp_path / "photos")
    told = run(main, ["index"]).stderr
    old = f"'{tmp_path / 'my photos'}'"
    assert f"kept 2 files of it; moved? mimco index --root {old}=NEW; gone? mimco index forget {old}\n" in told
