"""Where artefacts live."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.errors import WorkspaceError
from mimco_deploy.workspace import ENVIRONMENT_VARIABLE, FOLDER_NAME, Workspace, find_workspace, set_aside


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_the_nearest_workspace_upward_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".mimco").mkdir()
    (tmp_path / "a" / "b" / ".mimco").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    for start, expected in (
        ("a/b/c/d", "a/b/.mimco"),
        ("a/b", "a/b/.mimco"),
        ("a", ".mimco"),
        ("", ".mimco"),
    ):
        assert find_workspace(start=tmp_path / start).path == tmp_path / expected


def test_the_current_folder_is_where_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".mimco").mkdir()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert find_workspace().path == tmp_path / ".mimco"


def test_without_any_it_would_be_made_here_and_is_not_made_yet(tmp_path: Path) -> None:
    assert find_workspace(start=tmp_path).path == tmp_path / ".mimco"
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_that_name_further_up_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".mimco").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".mimco").write_text("", encoding="utf-8")
    (tmp_path / "a" / "b").mkdir()
    assert find_workspace(start=tmp_path / "a" / "b").path == tmp_path / ".mimco"


def test_the_variable_comes_before_the_search_and_the_option_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".mimco").mkdir()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "named"))
    assert find_workspace(start=tmp_path).path == tmp_path / "named"
    assert find_workspace(tmp_path / "explicit", tmp_path).path == tmp_path / "explicit"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert find_workspace(start=tmp_path).path == tmp_path / ".mimco"


@pytest.mark.parametrize(
    ("mine", "owner", "above", "is_refused"),
    [
        (1000, 1000, 0, False),
        (1000, 0, 0, False),
        (1000, 1001, 1001, False),  # a colleague's folder, with the workspace in it
        (0, 1000, 1000, False),  # a container's root, and the folder of its user
        (1000, 1001, 0, True),  # /tmp/.mimco
        (0, 1001, 0, True),
        (1000, 1001, 1002, True),
    ],
)
def test_a_workspace_that_others_may_have_put_there_is_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: int, owner: int, above: int, is_refused: bool
) -> None:
    found = tmp_path / FOLDER_NAME
    found.mkdir()
    real = Path.stat

    def owned(path: Path, **_: Any) -> os.stat_result:
        status = real(path)
        return os.stat_result((*status[:4], owner if path == found else above, *status[5:10]))

    monkeypatch.setattr(os, "geteuid", lambda: mine)
    monkeypatch.setattr(Path, "stat", owned)
    workspace = find_workspace(start=tmp_path)
    assert workspace.path == found
    if is_refused:
        with pytest.raises(WorkspaceError, match=r"belongs to another user; .*run: export MIMCO_WORKSPACE="):
            _ = workspace.index
    else:
        assert workspace.index == found / "index"
    assert find_workspace(found).index == found / "index"  # who names it trusts it
    monkeypatch.setenv("MIMCO_WORKSPACE", str(found))
    assert find_workspace(start=tmp_path).index == found / "index"


def test_a_file_in_its_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(WorkspaceError, match=f"{file} is a file; expected a workspace folder"):
        find_workspace(file)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(file))
    with pytest.raises(WorkspaceError, match="is a file"):
        find_workspace(start=tmp_path)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    (tmp_path / ".mimco").write_text("", encoding="utf-8")
    with pytest.raises(WorkspaceError, match=r"\.mimco is a file"):
        find_workspace(start=tmp_path)


def test_each_artefact_has_its_place(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert [workspace.stage1, workspace.stage2, workspace.encoder, workspace.index] == [
        tmp_path / name for name in ("stage1", "stage2", "encoder", "index")
    ]


def test_setting_aside_takes_the_first_free_number(tmp_path: Path) -> None:
    folder = tmp_path / "stage1"
    (tmp_path / "stage1-2").mkdir()
    for content, number in (("a", 1), ("b", 3), ("c", 4)):
        folder.mkdir()
        (folder / "file").write_text(content, encoding="utf-8")
        aside = set_aside(folder)
        assert aside == tmp_path / f"stage1-{number}"
        assert (aside / "file").read_text(encoding="utf-8") == content
        assert not folder.exists()
    assert list((tmp_path / "stage1-2").iterdir()) == []
