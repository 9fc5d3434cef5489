"""What does a search cost beyond bare FAISS on the same vectors, and how much of the truth does it find?

    python benchmarks/search.py --rows 100000                             # exact
    python benchmarks/search.py --rows 1000000                            # approximate
    python benchmarks/search.py --rows 100000 --encoder .mimco/encoder    # and the whole command, cold

The vectors are drawn: 2,000 clusters in 64 of the dimensions, a little noise in all, which is about how embeddings of
photos lie. They come in by `mimco index import`; the queries are drawn alike and are not in the index. In turns, one
query at a time, median:

- `ImageIndex.search`: hits with paths, as users get them; and the rows alone, without the catalogue;
- FAISS flat, and every index of FAISS that is usual for the size, each with the least effort that reaches recall@10 of
  0.95 against flat, built here too.

Then conditions that keep one picture in a hundred, by a column each: the first time (median), and when they are
remembered; their hits against a plain scan of those pictures. `--encoder` adds `mimco search q.jpg --json` as a command
against a script that imports ONNX Runtime, FAISS, NumPy and Pillow, opens the same graph and a flat index, and answers
once. Prints one JSON line with the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from PIL import Image

import mimco_deploy
from mimco_deploy.bundle import read_bundle
from mimco_deploy.serving.filters import Filter
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.interchange import import_index

Vectors = npt.NDArray[np.float32]
K = 10
FLOOR = 0.95
QUERIES = 300
TIMED = 100
FIRST_TIMES = 7
BARE = """
import json, sys
import faiss, numpy as np, onnxruntime
from PIL import Image
model, index, query, side, share = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
index = faiss.read_index(index, faiss.IO_FLAG_MMAP_IFC)
picture = Image.open(query).convert("RGB")
short = int(int(side) / float(share))
scale = short / min(picture.size)
picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
left, top = (picture.width - int(side)) // 2, (picture.height - int(side)) // 2
pixels = np.asarray(picture.crop((left, top, left + int(side), top + int(side))))[None]
scores, rows = index.search(session.run(["embedding"], {"image": pixels})[0], 10)
print(json.dumps({"rows": rows[0].tolist(), "scores": scores[0].tolist()}))
"""


def draw(count: int, dim: int, seed: int) -> Vectors:
    """Unit vectors in clusters."""
    shape = np.random.default_rng(0)
    basis = (shape.standard_normal((64, dim)) / 8).astype(np.float32)
    centres = shape.standard_normal((2000, 64)).astype(np.float32)
    rng = np.random.default_rng(seed)
    vectors = np.empty((count, dim), np.float32)
    for start in range(0, count, 65_536):
        part = vectors[start : start + 65_536]
        inner = centres[rng.integers(0, len(centres), len(part))]
        inner = inner + 0.7 * rng.standard_normal(inner.shape, np.float32)
        part[:] = inner @ basis + 0.05 * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def write_export(path: Path, vectors: Vectors, fingerprint: str) -> None:
    """As `mimco index export` writes it."""
    np.save(path, vectors)
    with path.with_name(f"{path.name}.jsonl").open("w") as lines:
        header = {"format_version": 1, "fingerprint": fingerprint, "embedding_dim": vectors.shape[1]}
        lines.write(json.dumps(header) + "\n")
        for number in range(len(vectors)):
            document = {"root": "/photos", "path": path_of(number), "sha256": f"{number:064x}"}
            lines.write(json.dumps({**document, "size": number, "mtime_ns": number * 10**9}) + "\n")


def path_of(number: int) -> str:
    """A thousand pictures in a folder, one in a hundred a PNG."""
    return f"{number // 1000:04d}/IMG_{number:07d}.{'jpg' if number % 100 else 'png'}"


def median_ms(search: Callable[[Vectors], object], queries: Vectors) -> float:
    """Of one query."""
    times = []
    for query in queries[:TIMED]:
        start = time.perf_counter()
        search(query[np.newaxis])
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def recall(found: npt.NDArray[np.int64], true: npt.NDArray[np.int64]) -> float:
    """Share of the true nearest that was found."""
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, true, strict=True)]))


def bare_indexes(
    vectors: Vectors, queries: Vectors, true: npt.NDArray[np.int64]
) -> dict[str, tuple[Callable[[Vectors], Any], dict[str, float]]]:
    """FAISS as one would use it: each usual index with the least effort that reaches the floor."""
    lists = 2 ** round(np.log2(4 * len(vectors) ** 0.5))
    found: dict[str, tuple[Callable[[Vectors], Any], dict[str, float]]] = {}
    for key in (f"IVF{lists},Flat", f"IVF{lists},SQ8", f"IVF{lists}_HNSW32,SQ8", "HNSW16,SQ8"):
        start = time.perf_counter()
        index: Any = faiss.index_factory(vectors.shape[1], key, faiss.METRIC_INNER_PRODUCT)
        if key.startswith("IVF"):
            index.cp.max_points_per_centroid = 48
        index.train(vectors[: 48 * lists])
        index.add(vectors)
        build_s = time.perf_counter() - start
        effort = 1
        while effort <= 1024:
            if key.startswith("IVF"):
                index.nprobe = effort
            else:
                index.hnsw.efSearch = max(effort, K)
            if (reached := recall(index.search(queries, K)[1], true)) >= FLOOR:
                break
            effort *= 2
        numbers = {"build_s": round(build_s, 1), "effort": effort, "recall": round(reached, 4)}
        found[key] = (lambda query, index=index: index.search(query, K), numbers)  # type: ignore[misc]
    return found


def time_filtered(index: ImageIndex, vectors: Vectors, queries: Vectors, unfiltered_ms: float) -> dict[str, Any]:
    """Conditions that keep one picture in a hundred, each for another column, and what a plain scan of those finds."""
    last = datetime.fromtimestamp(len(vectors) // 100 - 1, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    folders = [f"{number:04d}" for number in range(0, len(vectors) // 1000, 100)]
    every, hundredth, first = np.arange(len(vectors)), slice(0, None, 100), slice(0, len(vectors) // 100)
    of_folders = np.isin(every // 1000, [int(name) for name in folders])
    tests: dict[str, tuple[str, Any]] = {
        "path": (" or ".join(f"path glob '*/{name}/*'" for name in folders), of_folders),
        "folder": (" or ".join(f"folder glob '*/{name}'" for name in folders), of_folders),
        "name": ("name glob '*00.png'", hundredth),
        "suffix": ("suffix = '.png'", hundredth),
        "bytes": (f"bytes < {len(vectors) // 100}", first),
        "modified": (f"modified <= '{last}'", first),
        "date": (f"date <= '{last}'", first),
    }
    result: dict[str, Any] = {}
    for name, (test, which) in tests.items():
        kept, condition = every[which], Filter(test)
        true = kept[np.argsort(-(queries @ vectors[kept].T), axis=1)[:, :K]]
        times = []
        for number in range(FIRST_TIMES):  # a remark makes it another condition
            start = time.perf_counter()
            index.search(queries[number], K, Filter(f"{test} -- {number}"))
            times.append((time.perf_counter() - start) * 1e3)
        first_ms = statistics.median(times)
        hits = index.search_many(queries, K, condition)
        found = np.array([[int(hit.content, 16) for hit in one] for one in hits])
        again_ms = median_ms(lambda query: index.search(query[0], K, condition), queries)  # noqa: B023
        result[name] = {
            "kept": len(kept),
            "recall": round(recall(found, true), 4),
            "first_ms": round(first_ms, 2),
            "again_ms": round(again_ms, 3),
            "first_over_unfiltered": round(first_ms / unfiltered_ms, 2),
            "again_over_unfiltered": round(again_ms / unfiltered_ms, 2),
        }
    return result


def time_cold(encoder: Path, workspace: Path, vectors: Vectors, repeats: int) -> dict[str, Any]:
    """The whole command and the bare script, in turns."""
    bundle = read_bundle(encoder)
    with tempfile.TemporaryDirectory() as name:
        query, flat = Path(name) / "q.jpg", Path(name) / "flat.faiss"
        noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(query)
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        faiss.write_index(index, str(flat))
        spec = bundle.spec
        bare = [sys.executable, "-c", BARE, str(bundle.model("fp32")), str(flat), str(query)]
        bare += [str(spec.image_size_px), str(spec.crop_share)]
        ours = [sys.executable, "-m", "mimco_deploy", "--workspace", str(workspace), "search", str(query), "--json"]
        ours += ["--encoder", str(encoder), "--timings"]
        seconds: dict[str, list[float]] = {"bare": [], "mimco": []}
        for _ in range(repeats):
            for label, command in (("bare", bare), ("mimco", ours)):
                start = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds[label].append(time.perf_counter() - start)
        return {
            "bare_s": round(statistics.median(seconds["bare"]), 3),
            "mimco_s": round(statistics.median(seconds["mimco"]), 3),
            "over_bare": round(statistics.median(seconds["mimco"]) / statistics.median(seconds["bare"]), 3),
            "timings_ms": {name: round(ms, 1) for name, ms in json.loads(done.stdout)["timings_ms"].items()},
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    fingerprint = "0" * 64 if options.encoder is None else read_bundle(options.encoder).spec.fingerprint
    dim = options.dim if options.encoder is None else read_bundle(options.encoder).spec.embedding_dim
    vectors, queries = draw(options.rows, dim, 1), draw(QUERIES, dim, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_export(folder / "vectors.npy", vectors, fingerprint)
        start = time.perf_counter()
        import_index(folder / "index", folder / "vectors.npy")
        import_s = time.perf_counter() - start
        flat: Any = faiss.IndexFlatIP(dim)
        flat.add(vectors)
        true = flat.search(queries, K)[1]
        with ImageIndex.open(folder / "index") as index:
            tuning = index.tuning()
            hits = index.search_many(queries, K)
            rows = np.array([[int(hit.content, 16) for hit in found] for found in hits])
            searcher = index._state.searcher  # type: ignore[union-attr]
            bare = {"Flat": (lambda query: flat.search(query, K), {"recall": 1.0})}
            if tuning.file:
                bare |= bare_indexes(vectors, queries, true)
            ways = {
                "ImageIndex": lambda query: index.search(query[0], K),
                "rows": lambda query: searcher.search(query, K),
            }
            ways |= {key: search for key, (search, _) in bare.items()}
            times: dict[str, list[float]] = {key: [] for key in ways}
            for _ in range(options.repeats):
                for key, search in ways.items():
                    times[key].append(median_ms(search, queries))
            medians = {key: statistics.median(found) for key, found in times.items()}
            reach = [key for key, (_, numbers) in bare.items() if numbers["recall"] >= FLOOR]
            best = min(reach, key=lambda key: medians[key])
            result: dict[str, Any] = {
                "benchmark": "search",
                "rows": options.rows,
                "dim": dim,
                "kind": tuning.kind,
                "nprobe": tuning.nprobe,
                "recall_recorded": tuning.recall,
                "recall_on_fresh_queries": round(recall(rows, true), 4),
                "import_and_tune_s": round(import_s, 1),
                "index_mib": round(tuning.bytes / 2**20, 1),
                "query_ms": {key: round(value, 4) for key, value in medians.items()},
                "bare": {key: numbers for key, (_, numbers) in bare.items()},
                "best_bare": best,
                "over_best_bare": round(medians["ImageIndex"] / medians[best], 3),
                "rows_over_best_bare": round(medians["rows"] / medians[best], 3),
                "flat_over_ours": round(medians["Flat"] / medians["ImageIndex"], 2),
                "filtered": time_filtered(index, vectors, queries, medians["ImageIndex"]),
            }
        if options.encoder is not None:
            result["cold"] = time_cold(options.encoder, folder, vectors, options.repeats)
    result |= {
        "mimco": mimco_deploy.__version__,
        "faiss": faiss.__version__,
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
