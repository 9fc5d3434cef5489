"""What cannot be read just now is not gone: it stays listed, it is told, and no rebuild takes its place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mimco_deploy.cli import main
from mimco_deploy.errors import ImageProblem, IndexStoreError, MimcoError
from mimco_deploy.serving.guarded import NEVER_OPENED, Content, DecodePool, RefusedError, VanishedError
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery, save, tiny_bundle

# Python runs it when it starts. A file of these bytes brings the process down that decodes it.
DEADLY = """
import os
from PIL import Image

decode = Image.open
Image.open = lambda file, *more, **named: os._exit(7) if file.getvalue() == b"DEADLY" else decode(file, *more, **named)
"""


def close(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let no folder of this name be listed."""
    real = os.open

    def opened(path: Path | str, *more: Any, **named: Any) -> int:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied")
        return real(path, *more, **named)

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No usable temporary directory found"), OSError(28, "no room")])
def test_without_a_folder_for_temporary_files_nothing_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    paths = gallery(tmp_path / "photos", 3)
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    for path in paths:
        os.utime(path)

    def fail() -> None:
        raise error

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(MimcoError) as caught:
        update_index(tmp_path / "index", [], CountingEncoder())
    assert str(caught.value) == f"the processes that decode pictures do not start ({error.strerror})"
    assert ImageIndex.open(tmp_path / "index").files() == paths


@pytest.mark.parametrize(("error", "left"), [(FileNotFoundError("some other file"), 1), (VanishedError("it"), 0)])
def test_only_the_process_that_reads_a_file_says_that_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, left: int
) -> None:
    (path,) = gallery(tmp_path / "photos", 1)
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    os.utime(path)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(DecodePool, "read", fail)
    with contextlib.nullcontext() if isinstance(error, VanishedError) else pytest.raises(FileNotFoundError):
        update_index(tmp_path / "index", [], CountingEncoder())
    assert len(ImageIndex.open(tmp_path / "index").files()) == left


def test_a_file_that_is_replaced_while_its_decoder_dies_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "startup"))
    path = tmp_path / "photos" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"DEADLY")
    bury, deaths = DecodePool._bury, list[int]()

    def replace_after_the_second(pool: DecodePool, worker: Any) -> int:
        code = bury(pool, worker)
        deaths.append(code)
        if deaths == [7, 7]:
            save(path, 1)
        return code

    with monkeypatch.context() as patch:
        patch.setattr(DecodePool, "_bury", replace_after_the_second)
        (problem,) = update_index(tmp_path / "index", [path.parent], CountingEncoder()).problems
    assert problem.problem == "crashed"
    report = update_index(tmp_path / "index", [], CountingEncoder())
    assert (report.added, report.problems) == (1, ())


def test_a_rebuild_does_not_take_the_place_of_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    paths = [*gallery(photos / "closed" / "below", 2), *gallery(photos / "open", 3, first=10)]
    update_index(index, [photos], CountingEncoder())
    other = CountingEncoder(1, "0" * 64)
    with monkeypatch.context() as patch:
        close(patch, "closed")
        message = (
            r"closed cannot be read \(Permission denied\), and a rebuild would lose its 2 files; .* index reindex$"
        )
        for _ in range(2):
            with pytest.raises(IndexStoreError, match=message):
                update_index(index, [], other, rebuild=True)
        opened = ImageIndex.open(index)
        assert (opened.files(), opened.fingerprint) == (paths, "f" * 64)
    shutil.rmtree(photos / "closed")
    assert update_index(index, [], other, rebuild=True).counts.files == 3, "gone for sure"


@pytest.mark.parametrize("problem", ["timeout", "crashed"])
def test_a_rebuild_whose_limits_are_too_tight_for_a_picture_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: ImageProblem
) -> None:
    index, paths = tmp_path / "index", gallery(tmp_path / "photos", 3)
    update_index(index, [tmp_path / "photos"], CountingEncoder())
    save(tmp_path / "photos/new.png", 9)  # nothing is lost with this one
    other, read = CountingEncoder(1, "0" * 64), DecodePool.read

    def give_up(pool: DecodePool, path: Path, *more: Any) -> Content:
        if path.name in ("0001.png", "new.png"):
            raise RefusedError(problem, f"{path} was given up", NEVER_OPENED)
        return read(pool, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(DecodePool, "read", give_up)
        for _ in range(2):
            with pytest.raises(IndexStoreError, match=r"0001.png was given up, and .* would lose 1 such files"):
                update_index(index, [], other, rebuild=True)
        assert ImageIndex.open(index, "f" * 64).files() == paths
    report = update_index(index, [], other, rebuild=True)
    assert (report.embedded, report.counts.files, report.problems) == (2, 4, ())


def test_a_rebuild_may_leave_out_a_closed_folder_of_which_the_index_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = gallery(tmp_path / "photos" / "open", 2)
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    save(tmp_path / "photos" / "closed" / "a.png", 20)
    close(monkeypatch, "closed")
    report = update_index(tmp_path / "index", [], CountingEncoder(), rebuild=True)
    assert [(folder.path.name, folder.kept) for folder in report.unreachable] == [("closed", 0)]
    assert ImageIndex.open(tmp_path / "index").files() == paths


def test_the_command_names_a_closed_folder_whether_or_not_anything_of_it_is_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path.resolve() / "photos"
    gallery(photos / "open", 2)
    save(photos / "closed" / "a.png", 20)
    words = ["--workspace", str(tmp_path / "work"), "index"]
    bundle = ["--encoder", str(tiny_bundle(tmp_path / "encoder"))]

    def run(*more: str) -> Any:
        found = CliRunner().invoke(main, [*words, *more, *bundle], catch_exceptions=False)
        assert found.exit_code == 0
        return found

    with monkeypatch.context() as patch:
        close(patch, "closed")
        told = f"{photos / 'closed'} cannot be read (Permission denied): "
        assert f"{told}nothing of it is indexed" in run(str(photos)).stderr
        (folder,) = json.loads(run("update", "--json").stdout)["unreachable"]
        assert folder == {"path": str(photos / "closed"), "reason": "Permission denied", "kept": 0}
    run("update")
    close(monkeypatch, "closed")
    assert f"{told}kept 1 files of it" in run("update").stderr
