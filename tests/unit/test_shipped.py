"""The encoder that comes with mimco: whole, small, and used where there is no other, which is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mimco_deploy.cli import main
from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.preprocess import preprocess
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.shipped import NAME, SHIPPED_ENCODER, encoder_of
from mimco_deploy.workspace import Workspace
from tests.helpers import tiny_bundle


def mimco(workspace: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), *map(str, arguments)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        draw(KINDS[number % 3], number, 96).save(folder / f"{KINDS[number % 3]}-{number}.jpg")
    return folder


def test_it_proves_itself_and_is_small() -> None:
    encoder = load_encoder(SHIPPED_ENCODER)  # which embeds its golden pictures
    assert encoder.spec.embedding_dim >= 64
    assert sum(path.stat().st_size for path in SHIPPED_ENCODER.rglob("*")) <= 25 * 10**6


def test_its_card_says_what_it_was_trained_on_and_what_for() -> None:
    card = (SHIPPED_ENCODER / "MODEL_CARD.md").read_text("utf-8")
    assert "Tiny-ImageNet" in card
    assert "research" in card


def test_a_new_folder_is_indexed_and_searched_with_nothing_else(photos: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    indexed = mimco(workspace, "index", photos)
    assert indexed.exit_code == 0, indexed.output
    assert indexed.stderr.count(NAME) == 1
    assert "6 pictures indexed" in indexed.stdout
    query = photos / f"{KINDS[0]}-0.jpg"
    found = mimco(workspace, "search", query, "--json")
    assert found.exit_code == 0, found.output
    best = json.loads(found.stdout)["hits"][0]
    assert best["path"] == str(query)
    assert best["score"] == pytest.approx(1.0, abs=1e-5)


def test_an_encoder_of_ones_own_takes_its_place(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert encoder_of(workspace) == SHIPPED_ENCODER
    tiny_bundle(workspace.encoder)
    assert encoder_of(workspace) == workspace.encoder


def test_it_does_not_stand_in_for_a_student_that_was_not_exported(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "workspace" / "stage2").mkdir(parents=True)
    refused = mimco(tmp_path / "workspace", "index", photos)
    assert refused.exit_code == 1
    assert "run: mimco export" in refused.stderr


def test_its_index_is_not_searched_with_ones_own_encoder(photos: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    assert mimco(workspace, "index", photos).exit_code == 0
    tiny_bundle(workspace / "encoder")
    refused = mimco(workspace, "search", photos / f"{KINDS[0]}-0.jpg")
    assert refused.exit_code == 1
    assert "mimco index reindex" in refused.stderr
    assert mimco(workspace, "index", "reindex").exit_code == 0
    assert mimco(workspace, "search", photos / f"{KINDS[0]}-0.jpg").exit_code == 0


def test_it_is_not_picked_for(tmp_path: Path) -> None:
    refused = mimco(tmp_path, "bench", "--pick")
    assert refused.exit_code == 1
    assert "one of your own" in refused.stderr


def test_it_tells_kinds_of_pictures_apart() -> None:
    """Drawings share no picture with its training; their colours and places say nothing of the kind."""
    encoder = load_encoder(SHIPPED_ENCODER)
    side = encoder.spec.image_size_px
    rows = np.stack([preprocess(draw(kind, 40 + n, 2 * side), side, 1.0) for kind in KINDS for n in range(12)])
    labels = np.repeat(np.arange(len(KINDS)), 12)
    cosines = (found := encoder.embed(rows)) @ found.T
    np.fill_diagonal(cosines, -1)
    right = (labels[cosines.argmax(axis=1)] == labels).mean()
    assert right > 0.45  # 0.08 by chance, 0.14 by the same network with random weights, 0.58 by this one
