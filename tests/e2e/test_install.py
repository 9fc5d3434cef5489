"""A wheel with base and `cpu` alone indexes and searches, where torch cannot be imported."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.e2e.commands import Chain, run

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.install
def test_a_wheel_without_torch_indexes_and_searches(chain: Chain, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("mimco_deploy-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run([python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]"], tmp_path)

    missing = run([python, "-c", "import torch"], tmp_path, code=1)
    assert "ModuleNotFoundError" in missing.err
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "encoder").symlink_to(chain.home / ".mimco/encoder")
    mimco = [tmp_path / "venv/bin/mimco", "--workspace", workspace]
    indexed = run([*mimco, "index", chain.home / "images", "--json"], tmp_path).json()
    assert indexed["counts"]["files"] == len(chain.pictures)
    hits = run(
        [*mimco, "search", chain.pictures[3], "-k", "1", "--sheet", tmp_path / "s.html", "--json"], tmp_path
    ).json()["hits"]
    assert Path(hits[0]["path"]) == chain.pictures[3]

    bare = [tmp_path / "venv/bin/mimco", "--workspace", tmp_path / "bare"]  # nothing but the wheel: its own encoder
    assert "mimco-vit" in run([*bare, "index", chain.home / "images"], tmp_path).err
    found = run([*bare, "search", chain.pictures[5], "-k", "1", "--json"], tmp_path).json()["hits"]
    assert Path(found[0]["path"]) == chain.pictures[5]

    refused = run([*mimco, "train", "stage1", "--data", chain.home / "images"], tmp_path, code=1)
    assert 'pip install "mimco-deploy[train]"' in refused.err
