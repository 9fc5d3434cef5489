"""Kill the indexer again and again, and see that nothing is lost: long by hand, for a short while in the suite.

    python tests/faults/harness.py --kills 300 PHOTOS [HOSTILE …]

Copies the pictures, then in turns changes the folder a little (adds, renames, rewrites and deletes files) and runs the
real command, `mimco index` for the most part, `reindex`, `compact`, `tune` and `repair` now and then, and kills it with
SIGKILL at a random moment. After every kill the index must open, `verify` must find nothing wrong, and every listed
file that is unchanged must find itself. In the end the index must be equal to one built in one go: the same files, the
same embeddings, the same problems.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mimco_deploy.serving.generations import has_index
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.inspect import verify
from mimco_deploy.serving.interchange import export_index
from tests.helpers import noise, tiny_bundle

REPOSITORY = Path(__file__).parent.parent.parent
COMMIT_AT_ONCE = (
    "import mimco_deploy.serving.update as u; u.COMMIT_EVERY_S = 0; from mimco_deploy.cli import main; main()"
)


@dataclass
class Count:
    """What a run of the harness came to."""

    kills: int = 0
    finished: int = 0
    files: int = 0
    by_command: dict[str, int] = field(default_factory=dict)


def command(workspace: Path, *words: str) -> list[str]:
    return [sys.executable, "-c", COMMIT_AT_ONCE, "--workspace", str(workspace), "index", *words]


def run_and_kill(line: list[str], after_s: float) -> bool:
    """Whether it was killed, and not done before."""
    with subprocess.Popen(
        line, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        threading.Event().wait(after_s)
        process.kill()
        complaint = process.communicate()[1]
    assert process.returncode in (0, -9), complaint
    return process.returncode == -9


def change_a_little(photos: Path, rng: random.Random, number: int) -> None:
    """Add, rename, rewrite and delete files."""
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    noise(10_000 + number).save(photos / f"new-{number}.png")
    rng.choice(files).rename(photos / f"moved-{number}{rng.choice(files).suffix}")
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    shutil.copyfile(rng.choice(files), photos / f"copy-{number}.jpg")
    rng.choice(files).write_bytes(rng.choice(files).read_bytes())
    rng.choice(files).unlink()


def content_of(index: Path, folder: Path) -> dict[str, tuple[str, bytes]]:
    """SHA-256 and embedding, rounded as two runs may differ, by path."""
    folder.mkdir(exist_ok=True)
    export_index(index, folder / "all.npy")
    embeddings = np.load(folder / "all.npy")
    lines = (folder / "all.npy.jsonl").read_text().splitlines()[1:]
    records = [json.loads(line) for line in lines]
    return {
        record["path"]: (record["sha256"], np.round(embedding, 4).tobytes())
        for record, embedding in zip(records, embeddings, strict=True)
    }


def check(index: Path) -> None:
    """The index opens, is whole, and lists nothing twice."""
    if not has_index(index):
        return
    assert verify(index) == []
    with ImageIndex.open(index) as opened:
        files = opened.files()
        assert len(files) == len(set(files))


def harness(sources: list[Path], kills: int, seed: int, folder: Path) -> Count:
    """Run until so many were killed; raises AssertionError where something is lost."""
    rng = random.Random(seed)
    photos, workspace = folder / "photos", folder / "workspace"
    for number, source in enumerate(sources):
        shutil.copytree(source, photos / str(number))
    tiny_bundle(workspace / "encoder")
    count = Count()
    start = time.perf_counter()
    subprocess.run(command(folder / "trial", "status"), cwd=REPOSITORY, capture_output=True, check=False)
    startup_s = time.perf_counter() - start
    while count.kills < kills:
        change_a_little(photos, rng, count.kills + count.finished)
        others = [["reindex"], ["compact"], ["tune", "--latency-ms", "0"], ["repair"]]
        known = has_index(workspace / "index")
        words = rng.choice(others) if known and rng.random() < 0.25 else [str(photos)]
        killed = run_and_kill(command(workspace, *words), startup_s * rng.uniform(0.4, 2.2))
        count.kills += killed
        count.finished += not killed
        if killed:
            name = "update" if words == [str(photos)] else words[0]
            count.by_command[name] = count.by_command.get(name, 0) + 1
        check(workspace / "index")
    for place in (workspace, folder / "one-go"):
        if place != workspace:
            tiny_bundle(place / "encoder")
        subprocess.run(command(place, str(photos)), cwd=REPOSITORY, capture_output=True, check=True)
        check(place / "index")
    survivor = content_of(workspace / "index", folder / "a")
    whole = content_of(folder / "one-go" / "index", folder / "b")
    assert survivor == whole
    with ImageIndex.open(workspace / "index") as first, ImageIndex.open(folder / "one-go" / "index") as second:
        assert first.problems() == second.problems()
    count.files = len(survivor)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        count = harness(options.sources, options.kills, options.seed, Path(name).resolve())
    print(count)  # noqa: T201


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
