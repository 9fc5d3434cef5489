"""Status and verification of an index: what is there is counted, and every kind of damage is found."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mimco_deploy.cli import main
from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.generations import Generation, current_generation
from mimco_deploy.serving.inspect import RootStatus, recorded_encoder, status_of, verify
from mimco_deploy.serving.update import update_index
from tests.helpers import DIM, CountingEncoder, gallery, tiny_bundle


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    gallery(tmp_path / "photos", 12)
    (tmp_path / "photos/copy.png").write_bytes((tmp_path / "photos/0003.png").read_bytes())
    (tmp_path / "photos/broken.jpg").write_bytes(b"\xff\xd8 and no more")
    gallery(tmp_path / "more", 3, first=50)
    update_index(tmp_path / "ws/index", [tmp_path / "photos", tmp_path / "more"], CountingEncoder())
    return tmp_path / "ws"


@pytest.fixture
def generation(workspace: Path) -> Generation:
    return current_generation(workspace / "index")


def run(workspace: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), "index", *arguments])


def rows_of(generation: Generation) -> np.memmap[tuple[int, ...], np.dtype[np.float32]]:
    size = generation.vectors.stat().st_size
    header = size - 15 * DIM * 4
    return np.memmap(generation.vectors, np.float32, "r+", header, (15, DIM))


def test_status_counts_folder_by_folder(workspace: Path, tmp_path: Path) -> None:
    found = status_of(workspace / "index")
    assert (found.counts.files, found.counts.contents, found.counts.dead, found.counts.problems) == (16, 15, 0, 1)
    assert (found.embedding_dim, found.generation, found.fingerprint) == (DIM, 1, "f" * 64)
    assert found.roots == (
        RootStatus(tmp_path / "more", reachable=True, files=3, problems=0),
        RootStatus(tmp_path / "photos", reachable=True, files=13, problems=1),
    )
    (tmp_path / "more").rename(tmp_path / "gone")
    assert [root.reachable for root in status_of(workspace / "index").roots] == [False, True]


@pytest.mark.parametrize("closed", ["more", "above"])
def test_a_folder_that_cannot_be_read_is_told_and_can_be_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    more, bundle = tmp_path / "above/more", str(tiny_bundle(tmp_path / "encoder"))
    gallery(more, 3)
    update_index(tmp_path / "ws/index", [more], CountingEncoder())
    access, is_dir = os.access, Path.is_dir

    def may_enter(path: Path) -> bool:
        if closed in path.parent.parts:
            raise PermissionError(13, "Permission denied")
        return is_dir(path)

    monkeypatch.setattr(os, "access", lambda path, mode: closed not in Path(path).parts and access(path, mode))
    monkeypatch.setattr(Path, "is_dir", may_enter)  # root may enter everywhere
    assert "cannot be reached" in run(tmp_path / "ws", "status").stdout
    (root,) = status_of(tmp_path / "ws/index").roots
    assert root == RootStatus(more, reachable=False, files=3, problems=0)
    if closed == "more":
        assert run(tmp_path / "ws", str(more), "--encoder", bundle).exit_code == 0
    assert run(tmp_path / "ws", "forget", str(more)).output == "3 pictures dropped from the index\n"


def test_a_folder_whose_place_a_file_has_can_be_forgotten(workspace: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "more")
    (tmp_path / "more").write_text("no folder")
    assert run(workspace, "forget", str(tmp_path / "more")).output == "3 pictures dropped from the index\n"


def test_a_sound_index_has_nothing_wrong(workspace: Path) -> None:
    assert verify(workspace / "index") == []


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.9])
def test_a_damaged_embedding_is_found_with_its_row(workspace: Path, generation: Generation, value: float) -> None:
    rows_of(generation)[4, 2] = value
    assert verify(workspace / "index") == ["1 embeddings are damaged (rows 4), 1 of them of files"]


def test_embeddings_that_are_missing_are_found(workspace: Path, generation: Generation) -> None:
    content = generation.vectors.read_bytes()
    generation.vectors.write_bytes(content[:-1])
    assert len(verify(workspace / "index")) == 1


def test_a_content_that_is_missing_is_found(workspace: Path, generation: Generation) -> None:
    with sqlite3.connect(generation.catalog) as connection:
        connection.execute("DELETE FROM contents WHERE row = 5")
    found = verify(workspace / "index")
    assert any("names a row of contents that is not there" in line for line in found)
    assert any("1 of 15 rows have no content" in line for line in found)


def test_a_background_of_rows_that_are_not_there_is_found(workspace: Path, generation: Generation) -> None:
    with contextlib.closing(sqlite3.connect(generation.catalog)) as catalog, catalog:
        background = {"rows": 15, "reference": [99], "z": [], "tail": 1}
        catalog.execute("INSERT INTO settings VALUES ('background', ?)", (json.dumps(background),))
    assert verify(workspace / "index") == ["the background of the index names rows that it has not"]


def test_a_damaged_page_of_the_catalogue_is_found(workspace: Path, generation: Generation) -> None:
    content = bytearray(generation.catalog.read_bytes())
    page = len(content) // 4096 - 1
    content[page * 4096 : page * 4096 + 64] = bytes(range(64))
    generation.catalog.write_bytes(content)
    try:
        found = verify(workspace / "index")
    except IndexStoreError:
        return  # so damaged that nothing can be read is an error of its own
    assert found != []


def test_the_commands_answer(workspace: Path, tmp_path: Path, generation: Generation) -> None:
    assert "16 pictures (15 different ones) and 1 problems" in run(workspace, "status").output
    assert json.loads(run(workspace, "status", "--json").stdout)["counts"]["files"] == 16
    (problem,) = json.loads(run(workspace, "problems", "--json").stdout)
    assert problem["path"] == str(tmp_path / "photos/broken.jpg")
    assert run(workspace, "problems").output.split()[0] == problem["problem"]
    assert run(workspace, "tune", "--latency-ms", "0").output == "exact, since there is little to read\n"
    assert run(workspace, "verify").output == "the index is whole\n"
    assert json.loads(run(workspace, "verify", "--json").stdout)["wrong"] == []
    assert run(workspace, "forget", str(tmp_path / "more")).output == "3 pictures dropped from the index\n"
    assert json.loads(run(workspace, "status", "--json").stdout)["counts"]["dead"] == 3
    rows_of(generation)[4, 2] = np.nan
    damaged = run(workspace, "verify")
    assert damaged.exit_code == 1
    assert "run: mimco index repair" in damaged.output


def test_a_long_path_is_whole_where_status_goes_into_a_pipe(workspace: Path, tmp_path: Path) -> None:
    long = tmp_path / ("a" * 200) / ("b" * 200)
    gallery(long, 1, first=90)
    update_index(workspace / "index", [long], CountingEncoder())
    assert f"{long} " in run(workspace, "status").output


def test_a_rebuild_tells_of_another_encoder(workspace: Path, tmp_path: Path) -> None:
    tiny_bundle(workspace / "encoder")
    other = tiny_bundle(tmp_path / "other", seed=1, fingerprint="0" * 64)
    line = f"embedded by another encoder than before: 000000000000 of {other}, not ffffffffffff\n"
    assert line not in run(workspace, "reindex").stderr
    assert run(workspace, "reindex", "--encoder", str(other)).stderr.endswith(line)
    back = run(workspace, "reindex").stderr  # the index's own is not asked
    assert f"before: ffffffffffff of {workspace / 'encoder'}, not 000000000000\n" in back
    text = " ".join(run(workspace, "reindex", "--help").output.split())
    assert "[default: the workspace's, else mimco's]" in text
    assert "index's, else" not in text


def test_where_the_encoder_lies_is_recorded_although_nothing_is_embedded(workspace: Path, tmp_path: Path) -> None:
    bundle, index = tiny_bundle(tmp_path / "bundle"), workspace / "index"
    for moved in (bundle, tmp_path / "moved", workspace / "encoder"):
        bundle = bundle.rename(moved)
        assert "; 0 embedded\n" in run(workspace, "--encoder", str(bundle)).stdout
        assert recorded_encoder(index) == (None if bundle.parent == workspace else bundle)
        assert run(workspace, "update").exit_code == 0, "it is found again"
    assert status_of(index).made_by == {"provider": "NumPy", "precision": "fp32"}


def test_an_encoder_that_is_gone_is_named(workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    run(workspace, "--encoder", str(bundle))
    bundle.rename(tmp_path / "elsewhere")
    gone = f"{bundle}, with which the index was made, is gone; if it lies elsewhere: mimco index --encoder PATH"
    run(workspace, "update")
    assert caplog.messages == [gone]
    assert run(workspace, "--encoder", str(tmp_path / "elsewhere")).exit_code == 0
    assert caplog.messages == [gone]


@pytest.mark.parametrize("command", ["status", "problems", "verify"])
def test_without_an_index_each_says_how_to_make_one(tmp_path: Path, command: str) -> None:
    done = run(tmp_path, command)
    assert done.exit_code == 1
    assert "no index in" in done.output
    assert "run: mimco index DIR" in done.output


def test_folders_need_no_command(workspace: Path, tmp_path: Path) -> None:
    (workspace / "stage2").mkdir()  # a student that was not exported: no encoder stands in for it
    help_of = {
        name: run(workspace, *name).output for name in ((), ("update",), ("--retry-problems",), (str(tmp_path),))
    }
    assert len(set(help_of.values())) == 1  # all of them ask for the encoder that is not there
    assert "no encoder in" in help_of[()]
    assert "COMMAND" in run(workspace, "--help").output
