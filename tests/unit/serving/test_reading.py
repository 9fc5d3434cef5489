"""Reading an index that is written meanwhile, or was when its writer was killed: no false damage, nobody waits."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving import catalog, index, inspect, interchange, moves
from mimco_deploy.serving import gallery as whole_gallery
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.duplicates import find_duplicates, find_leaks
from mimco_deploy.serving.generations import current_generation
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.inspect import fingerprint_of, recorded_encoder, status_of, verify
from mimco_deploy.serving.interchange import export_index
from mimco_deploy.serving.moves import Moves, move_duplicates
from mimco_deploy.serving.rewrite import compact
from mimco_deploy.serving.roots import forget_roots
from mimco_deploy.serving.tuning import Budget, tune_index
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, Embeddings, gallery, noise

COUNT = 60
BUDGET = Budget(latency_ms=0, recall=0.1)
"""So few pictures have an approximation."""
QUERY: Embeddings = CountingEncoder().embed(np.asarray(noise(3))[np.newaxis])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an index of two folders, one of which can be forgotten, and the encoder that made it."""
    gallery(tmp_path / "photos", COUNT)
    gallery(tmp_path / "more", 2, first=50)
    (tmp_path / "encoder").mkdir()
    folders = [tmp_path / "photos", tmp_path / "more"]
    update_index(tmp_path / "index", folders, CountingEncoder(), encoder_path=tmp_path / "encoder")
    return tmp_path


def before_first(patch: pytest.MonkeyPatch, module: object, step: str, act: Callable[[], object]) -> None:
    """Have something happen before a function is called for the first time."""
    waiting, real = [act], getattr(module, step)

    def call(*arguments: Any, **options: Any) -> Any:
        if waiting:
            waiting.pop()()
        return real(*arguments, **options)

    patch.setattr(module, step, call)


# ---------------------------------------------------------------------- readers and a rewrite


@pytest.mark.parametrize(
    ("module", "step"), [(inspect, "Catalog"), (inspect, "tuning_of"), (inspect, "read_vectors"), (inspect, "damage")]
)
def test_a_rewrite_meanwhile_is_no_damage(
    place: Path, monkeypatch: pytest.MonkeyPatch, module: object, step: str
) -> None:
    folder = place / "index"
    assert tune_index(folder, BUDGET).file
    reads: list[Callable[[Path], object]] = [verify, status_of, recorded_encoder, fingerprint_of]
    expected: list[object] = [[], COUNT + 2, place / "encoder", "f" * 64]
    for read, wanted in zip(reads, expected, strict=True):
        with monkeypatch.context() as patch:
            before_first(patch, module, step, partial(compact, folder))
            found = read(folder)
        assert (found.counts.files if isinstance(found, inspect.IndexStatus) else found) == wanted


@pytest.mark.parametrize("step", ["Catalog", "read_vectors"])
def test_a_rewrite_meanwhile_does_not_end_an_export(place: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before_first(monkeypatch, interchange, step, partial(compact, place / "index"))
    assert export_index(place / "index", place / "out.npy") == COUNT + 2


@pytest.mark.parametrize("step", ["Catalog", "read_vectors"])
def test_a_rewrite_meanwhile_does_not_end_a_look_for_duplicates(
    place: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = place / "index"
    with monkeypatch.context() as patch:
        before_first(patch, whole_gallery, step, partial(compact, folder))
        assert len(find_duplicates(folder)) == 2
    with monkeypatch.context() as patch:
        before_first(patch, whole_gallery, step, partial(compact, folder))
        assert len(find_leaks(folder, place / "more", place / "photos").found) == 2
    assert current_generation(folder).number == 3, "both times"


def test_a_rewrite_meanwhile_does_not_end_a_move_of_duplicates(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_first(monkeypatch, moves, "Catalog", partial(compact, place / "index"))
    assert move_duplicates(place / "index", [], place / "aside") == Moves([], [])
    assert current_generation(place / "index").number == 2


READS: dict[str, Callable[[ImageIndex, Path], object]] = {
    "search": lambda opened, place: opened.search(QUERY[0], 1)[0].path == place / "photos/0003.png",
    "picture_count": lambda opened, _: opened.picture_count() == COUNT,
    "embedding_of": lambda opened, place: opened.embedding_of(place / "photos/0003.png") is not None,
    "open": lambda _, place: ImageIndex.open(place / "index").picture_count() == COUNT,
}


@pytest.mark.parametrize("read", READS)
def test_a_rewrite_meanwhile_does_not_end_a_search(place: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    opened = ImageIndex.open(place / "index")
    forget_roots(place / "index", [place / "more"])  # so that it has to read the embeddings anew
    before_first(monkeypatch, index, "read_vectors", partial(compact, place / "index"))
    assert READS[read](opened, place)
    assert current_generation(place / "index").number == 2


def test_damage_is_told_once_and_for_all(place: Path) -> None:
    current_generation(place / "index").vectors.unlink()
    for read in (ImageIndex.open, partial(export_index, target=place / "out.npy")):
        with pytest.raises(IndexStoreError, match=r"vectors\.f32 cannot be read"):
            read(place / "index")
    assert len(verify(place / "index")) == 1


# ---------------------------------------------------------------------- long readers and an update


@pytest.mark.parametrize("read", [verify, export_index])
def test_an_update_waits_for_no_long_reader(
    place: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[..., Any]
) -> None:
    monkeypatch.setattr(catalog, "_WAIT_S", 0.1)
    gallery(place / "photos", 3, first=100)
    updated: list[int] = []

    def update() -> None:
        updated.append(update_index(place / "index", [], CountingEncoder()).added)

    if read is verify:
        before_first(monkeypatch, inspect, "damaged_rows", update)
        assert verify(place / "index") == []
    else:
        before_first(monkeypatch, interchange, "_portions", update)
        assert export_index(place / "index", place / "out.npy") == COUNT + 2, "it is as it was at the beginning"
    assert updated == [3]


def test_an_approximation_that_is_built_meanwhile_is_no_damage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune_index(place / "index", BUDGET).file
    before_first(monkeypatch, inspect, "damage", partial(tune_index, place / "index", BUDGET))
    assert verify(place / "index") == []


# ---------------------------------------------------------------------- a writer that was killed


def test_a_journal_that_only_the_owner_can_roll_back_is_explained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = current_generation(place / "index").catalog
    journal = file.with_name(f"{file.name}-journal")
    with Catalog(file) as writing, writing.transaction():
        writing.connection.execute("PRAGMA cache_size = 1")  # so that it writes before the end
        writing.connection.execute("UPDATE contents SET camera = ?", ("x" * 20_000,))
        saved = [(path, shutil.copy(path, place / path.name)) for path in (file, journal)]
    for path, copy in saved:
        shutil.copy(copy, path)  # as a kill would have left them
    real = catalog.connect
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "connect", lambda path, _: real(path, "ro"))  # root may write everywhere
        with pytest.raises(IndexStoreError) as refused:
            status_of(place / "index")
    expected = "its last writer was killed; expected its owner to run once: mimco index"
    assert str(refused.value) == f"{file}: {expected}"
    assert update_index(place / "index", [], CountingEncoder()).unchanged == COUNT + 2
    assert verify(place / "index") == []
    assert not journal.exists()


def test_a_private_copy_is_seen_by_nobody_else(place: Path) -> None:
    file = current_generation(place / "index").catalog
    with Catalog(file, private=True) as copy:
        with copy.transaction():
            copy.connection.execute("DELETE FROM files")
        with copy.snapshot():
            assert copy.counts().files == 0
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT count(*) FROM files").fetchone() == (COUNT + 2,)
