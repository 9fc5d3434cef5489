"""How long does it take to group the near duplicates of a collection, and how many pairs does that find?

    python benchmarks/dupes.py --rows 100000

The vectors are those of `search.py`; a fifth of the rows are near duplicates of others, at cosines spread evenly over
[0.95, 1], and a film: 100 rows that are all near each other. `groups_above` is timed as `mimco dupes` calls it, on a
mapped file, and once more where all rows are nearly equal. Then every row is compared with every other, by blocks of
products in float32, and each pair from the score on counts: it is found where both rows are in one group. `wrong_rows`
are rows whose group is not the one that the pairs of the full comparison make. Prints one JSON line with the machine
and the versions. Linux only, for the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from search import draw  # type: ignore[import-not-found,unused-ignore]

import mimco_deploy
from mimco_deploy.serving.pairs import groups_above

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
FILM = 100
BLOCK = 2048


def at_cosines(vectors: Vectors, cosines: npt.NDArray[np.float32], rng: np.random.Generator) -> Vectors:
    """Vectors at given cosines from others, aside in a direction of their own."""
    aside = rng.standard_normal(vectors.shape, np.float32)
    aside -= (aside * vectors).sum(axis=1, keepdims=True) * vectors
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    near = cosines[:, np.newaxis] * vectors + np.sqrt(1 - cosines[:, np.newaxis] ** 2) * aside
    return np.asarray(near / np.linalg.norm(near, axis=1, keepdims=True), np.float32)


def draw_with_duplicates(count: int, dim: int, min_score: float) -> Vectors:
    """The rows, in no order."""
    rng = np.random.default_rng(3)
    near = count // 5
    first: Vectors = draw(count - near - FILM, dim, 1)
    duplicates = at_cosines(
        first[rng.integers(0, len(first), near)], rng.uniform(min_score, 1, near).astype(np.float32), rng
    )
    film = at_cosines(np.repeat(first[:1], FILM, axis=0), np.full(FILM, 0.985, np.float32), rng)
    return np.ascontiguousarray(np.concatenate([first, duplicates, film])[rng.permutation(count)])


def all_pairs(vectors: Vectors, min_score: float) -> tuple[Rows, Rows]:
    """Every pair, the smaller row first."""
    found: list[tuple[Rows, Rows]] = []
    for row in range(0, len(vectors), BLOCK):
        for column in range(row, len(vectors), BLOCK):
            scores = vectors[row : row + BLOCK] @ vectors[column : column + BLOCK].T
            a, b = np.divmod(np.flatnonzero(scores >= min_score), scores.shape[1])
            above = a + row < b + column
            found.append((a[above] + row, b[above] + column))
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def connected(count: int, a: Rows, b: Rows) -> Rows:
    """The smallest row that pairs connect each row with."""
    label = np.arange(count)
    while True:
        low = np.minimum(label[a], label[b])
        lower = label.copy()
        np.minimum.at(lower, a, low)
        np.minimum.at(lower, b, low)
        lower = lower[lower]
        if bool((lower == label).all()):
            return label
        label = lower


def timed(vectors: Vectors, min_score: float) -> tuple[Rows, float]:
    """Groups and seconds."""
    start = time.perf_counter()
    groups = groups_above(vectors, np.arange(len(vectors)), min_score)
    return groups, time.perf_counter() - start


def resident_mib(key: str) -> float:
    """What Linux says of this process: memory now, or at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--min-score", type=float, default=0.95)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        np.save(Path(name) / "vectors.npy", draw_with_duplicates(options.rows, options.dim, options.min_score))
        vectors = np.asarray(np.load(Path(name) / "vectors.npy", mmap_mode="r"))
        int(np.isfinite(vectors).sum())  # the pages of the file count for both
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident_mib("VmRSS")
        groups, seconds = timed(vectors, options.min_score)
        extra_mib = resident_mib("VmHWM") - before
        start = time.perf_counter()
        a, b = all_pairs(vectors, options.min_score)
        full_s = time.perf_counter() - start
        crowd = vectors[:1] + np.float32(1e-3) * np.random.default_rng(5).standard_normal(vectors.shape, np.float32)
        crowd /= np.linalg.norm(crowd, axis=1, keepdims=True)
        crowd_groups, crowd_s = timed(crowd, options.min_score)
    result: dict[str, Any] = {
        "benchmark": "dupes",
        "rows": options.rows,
        "dim": options.dim,
        "min_score": options.min_score,
        "pairs": len(a),
        "pair_recall": round(float((groups[a] == groups[b]).mean()), 5),
        "groups": len(np.unique(groups)),
        "wrong_rows": int((groups != connected(options.rows, a, b)).sum()),
        "seconds": round(seconds, 2),
        "full_s": round(full_s, 2),
        "full_over_ours": round(full_s / seconds, 2),
        "extra_mib": round(extra_mib),
        "crowd_s": round(crowd_s, 2),
        "crowd_groups": len(np.unique(crowd_groups)),
        "mimco": mimco_deploy.__version__,
        "faiss": faiss.__version__,
        "numpy": np.__version__,
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
