"""`kill -9` at random moments while indexing: nothing committed is lost, no file is given another's embedding."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving.generations import has_index
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.update import update_index
from tests.faults.harness import harness
from tests.helpers import CountingEncoder, Embeddings, gallery, noise

REPOSITORY = Path(__file__).parent.parent.parent
PICTURES = 200
SCRIPT = """
import sys
import time
from pathlib import Path
from mimco_deploy.serving import update
from tests.helpers import CountingEncoder
update.COMMIT_EVERY_S = 0
index, root, rebuild, seed, fingerprint = sys.argv[1:]
print("ready", flush=True)
class SlowEncoder(CountingEncoder):
    def embed(self, images):
        time.sleep(0.01)  # so that a kill comes before the end on any machine
        return super().embed(images)
encoder = SlowEncoder(int(seed), fingerprint)
def tell(progress):
    print(progress.done, progress.total, flush=True)
update.update_index(Path(index), [Path(root)], encoder, batch_size=8, rebuild=rebuild == "True", on_progress=tell)
"""


def killed(index: Path, root: Path, rng: np.random.Generator, *, rebuild: bool = False, seed: int = 0) -> bool:
    """Index in another process and kill it at a random moment; False where it was done before that."""
    arguments = [str(index), str(root), str(rebuild), str(seed), str(seed) * 64]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(1 + int(rng.integers(0, 3))):  # ready, then up to two commits
            process.stdout.readline()
        threading.Event().wait(float(rng.uniform(0, 0.03)))
        process.kill()
        process.communicate()
    assert process.returncode in (0, -9)
    return process.returncode == -9


def queries(encoder: CountingEncoder, seeds: list[int]) -> Embeddings:
    return encoder.embed(np.stack([np.asarray(noise(seed)) for seed in seeds]))


def check_what_is_there(index: Path, encoder: CountingEncoder) -> int:
    """Every file that is listed is there once and finds itself; returns how many there are."""
    if not has_index(index):
        return 0
    opened = ImageIndex.open(index, encoder.spec.fingerprint)
    files = opened.files()
    assert len(files) == len(set(files))
    if not files:
        with pytest.raises(IndexStoreError, match="holds no picture"):
            opened.search(np.zeros(16, np.float32), 1)
        return 0
    best = opened.search_many(queries(encoder, [int(path.stem) for path in files]), 1)
    assert [hits[0].path for hits in best] == files
    return len(files)


@pytest.mark.timeout(600)
def test_an_index_that_was_killed_again_and_again_is_that_of_one_go(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", PICTURES)
    encoder = CountingEncoder(0, "0" * 64)
    rng = np.random.default_rng(20)
    committed, kills = 0, 0
    for _ in range(20):
        if not killed(tmp_path / "index", tmp_path / "photos", rng):
            break
        kills += 1
        now = check_what_is_there(tmp_path / "index", encoder)
        assert now >= committed, "what was committed is lost"
        committed = now
    assert kills >= 4, "the runs ended too early to prove anything"

    embedded = update_index(tmp_path / "index", [tmp_path / "photos"], encoder, batch_size=8).embedded
    assert embedded == PICTURES - committed
    update_index(tmp_path / "whole", [tmp_path / "photos"], encoder, batch_size=8)
    survivor, whole = ImageIndex.open(tmp_path / "index"), ImageIndex.open(tmp_path / "whole")
    assert survivor.files() == whole.files() == paths
    assert survivor.counts() == whole.counts()
    embeddings = queries(encoder, list(range(PICTURES)))
    found, expected = (
        [[(hit.path, hit.score, hit.content) for hit in hits] for hits in index.search_many(embeddings, 10)]
        for index in (survivor, whole)
    )
    assert found == expected


@pytest.mark.timeout(600)
def test_the_old_index_answers_while_its_rebuild_is_killed(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", PICTURES)
    old, new = CountingEncoder(0, "0" * 64), CountingEncoder(1, "1" * 64)
    update_index(tmp_path / "index", [tmp_path / "photos"], old, batch_size=8)
    rng = np.random.default_rng(6)
    for kills in range(4):
        if not killed(tmp_path / "index", tmp_path / "photos", rng, rebuild=True, seed=1):
            assert kills > 0, "the rebuild ended too early to prove anything"
            break
        assert check_what_is_there(tmp_path / "index", old) == PICTURES
    report = update_index(tmp_path / "index", [], new, batch_size=8, rebuild=True)
    assert report.embedded < PICTURES, "the rebuild went on where it had been killed"
    assert check_what_is_there(tmp_path / "index", new) == PICTURES


@pytest.mark.timeout(300)
def test_the_command_that_is_killed_while_files_come_and_go_loses_nothing(tmp_path: Path) -> None:
    gallery(tmp_path / "source", 60)
    count = harness([tmp_path / "source"], kills=8, seed=3, folder=tmp_path.resolve() / "work")
    assert count.kills == 8
    assert count.files > 60
