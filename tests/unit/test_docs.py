"""The docs say what is there: commands, options, settings, values, links and code are tried, not trusted."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mimco_deploy.cli import main
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.update import update_index
from mimco_deploy.shipped import SHIPPED_ENCODER
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.finetune_config import FinetuneConfig, LinearConfig, finetune_preset, linear_preset
from mimco_deploy.training.presets import PRESETS
from mimco_deploy.training.settings import leaves
from tests.helpers import below, gallery, save

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])
WRITTEN = [page for page in PAGES if page.name != "cli.md"]
"""Pages by hand."""
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=NAMES)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SETTING = re.compile(r"(?<![\w.])(?:backbone|run|optim|data|views|mask|method)(?:\.[a-z]\w*)+")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def leaf_commands(command: click.Command = main, path: str = "mimco") -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, child in below(command):
            yield from leaf_commands(child, f"{path} {name}")
    else:
        yield path, command


def groups(command: click.Command = main, path: str = "mimco") -> Iterator[tuple[str, click.Group]]:
    if isinstance(command, click.Group):
        yield path, command
        for name, child in below(command):
            yield from groups(child, f"{path} {name}")


def setting_names(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for member in members:
            if dataclasses.is_dataclass(member):
                yield from setting_names(member, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"


# ---------------------------------------------------------------------------------------------------- command line


def test_the_page_of_commands_is_what_help_says() -> None:
    check = [sys.executable, str(ROOT / "docs/make_cli.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("path", "command"), [*leaf_commands(), *groups()])
def test_every_command_and_option_is_explained(path: str, command: click.Command) -> None:
    prose = "\n".join(map(text_of, WRITTEN))
    assert path in prose
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        for name in (*option.opts, *option.secondary_opts):
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", prose), f"{path} {name}"


def command_lines(page: Path) -> list[str]:
    """What a page tells people to type; in running text the bare name of a command is a mention."""
    text = text_of(page)
    blocks = (match[2].replace("\\\n", " ") for match in FENCE.finditer(text))
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines = [line[line.index("mimco ") :] if line.startswith("torchrun ") else line for line in lines]
    mentions = {path for path, _ in [*leaf_commands(), *groups()]}
    spans = [span for span in SPAN.findall(FENCE.sub("", text)) if span not in mentions]
    return [line.split("   ")[0] for line in (*lines, *spans) if re.match(r"mimco +[-a-z]", line)]


@ALL_PAGES
def test_every_command_line_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, command in [*leaf_commands(), *groups()]:
        monkeypatch.setattr(command, "callback", lambda *_, **__: None)
    for line in command_lines(page):
        result = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_command_lines_are_found_where_they_stand() -> None:
    readme = iter(command_lines(ROOT / "README.md"))
    wanted = ["train stage1 --data DIR", "train stage2", "export --format onnx", "index ./images", "search query.jpg"]
    assert all(f"mimco {line}" in readme for line in wanted)  # in this order, others between them


# ---------------------------------------------------------------------------------------------------- settings


@ALL_PAGES
def test_every_setting_that_is_named_exists(page: Path) -> None:
    kinds = (Stage1Config, Stage2Config, FinetuneConfig, LinearConfig)
    known = {name for kind in kinds for name in setting_names(kind)}
    text = text_of(page)
    pieces = [*SPAN.findall(FENCE.sub("", text)), *(match[2] for match in FENCE.finditer(text))]
    named = {name for piece in pieces for name in SETTING.findall(piece) if not name.endswith(".py")}
    assert named <= known


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(shown, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value) or "–"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_table_of_settings_has_the_values_of_the_presets(stage: str) -> None:
    section = text_of(ROOT / "docs/training.md").split(f"### Stage {stage[-1]}\n")[1].split("\n##")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line]
    small, paper = (dict(leaves(getattr(PRESETS[name](), stage))) for name in ("vit_tiny_debug", "vit_small"))
    header, *values = rows
    assert header[:3] == ["setting", "`vit_tiny_debug`", "`vit_small`"]
    assert {row[0].strip("`"): (row[1], row[2]) for row in values} == {
        name: (shown(small[name]), shown(paper[name])) for name in small
    }
    assert all(row[3] for row in values)


@pytest.mark.parametrize(("title", "preset"), [("Fine-tuning", finetune_preset), ("Linear probe", linear_preset)])
def test_the_tables_of_runs_with_labels_have_the_values_of_their_presets(title: str, preset: Any) -> None:
    section = text_of(ROOT / "docs/training.md").split(f"### {title}\n")[1].split("\n##")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line]
    small, paper = (dict(leaves(preset(PRESETS[name]().stage2.backbone))) for name in ("vit_tiny_debug", "vit_small"))
    values = {row[0].strip("`"): row[1:] for row in rows[1:]}
    assert {name: row[:2] for name, row in values.items()} == {
        name: [shown(small[name]), shown(paper[name])] for name in values
    }
    assert {name for name in small if name.startswith(("optim.", "views.", "method."))} <= values.keys()
    assert all(row[2] for row in values.values())


# ---------------------------------------------------------------------------------------------------- links and code


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@ALL_PAGES
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(FENCE.sub("", text_of(page))) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


PYTHON = [
    pytest.param(match[2], id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, match in enumerate(FENCE.finditer(text_of(page)))
    if match[1] == "python"
]


SERVICE = "http://127.0.0.1:8000"


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a service over the index of a folder."""
    command = [sys.executable, "-m", "mimco_deploy", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        try:
            yield service.stdout.readline().strip().rstrip("/")
        finally:
            service.terminate()


@pytest.mark.parametrize("code", PYTHON)
def test_every_python_example_runs(code: str, tmp_path: Path) -> None:
    gallery(tmp_path / "images", 6)
    save(tmp_path / "query.jpg", 3)
    save(tmp_path / "images/copy.png", 3)
    save(tmp_path / "images/another.png", 3)
    update_index(tmp_path / ".mimco/index", [tmp_path / "images"], load_encoder(SHIPPED_ENCODER))
    with served(tmp_path) if SERVICE in code else contextlib.nullcontext(SERVICE) as url:
        run = [sys.executable, "-W", "error", "-c", code.replace(SERVICE, url)]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = "recall@1" if "evaluate(" in code else ".png"
    assert found in done.stdout


def test_examples_are_found() -> None:
    assert len(PYTHON) >= 3


@ALL_PAGES
def test_no_page_names_a_path_of_one_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(?:work|root|tmp|Users)\b", text_of(page))
