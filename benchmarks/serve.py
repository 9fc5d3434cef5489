"""What does the service cost beyond the encoder and the index, and how does it bear more than it can do?

    python benchmarks/serve.py --encoder .mimco/encoder                  # 20,000 drawn embeddings, pictures of 500 px
    python benchmarks/serve.py --encoder .mimco/encoder --seconds 60

A real `mimco serve` on a free port, asked from this process:

- `alone`: one upload after the other, in turns with the same in Python in this process (decode, embed, search);
- `overload`: uploads at fixed times, twice as many a second as the encoder does alone; how many were answered, how
  many refused with 503, how long the answered ones took, and what memory the server had before and after.

Prints one JSON line with the machine and the versions.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

import mimco_deploy
from benchmarks.search import draw, write_export
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.interchange import import_index
from mimco_deploy.serving.query import Part, search_image

_WARM = 5
_BLOCK = 20
_PATIENCE_S = 60.0
_K = 10


def draw_pictures(count: int) -> list[bytes]:
    """JPEGs of 500 × 375 px."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        encoded = io.BytesIO()
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=85)
        found.append(encoded.getvalue())
    return found


def start(workspace: Path, encoder: Path) -> tuple[subprocess.Popen[str], str]:
    """A server, and its address once it answers."""
    command = [sys.executable, "-m", "mimco_deploy", "--workspace", str(workspace), "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--encoder", str(encoder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{address}readyz", trust_env=False).status_code == 200:
                return process, address
        except httpx.TransportError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("the server did not begin")


def memory_mib(process: int) -> float:
    """Resident memory of the server, without its decoders."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def ask(client: httpx.Client, address: str, picture: bytes) -> object:
    """One search."""
    answer = client.post(f"{address}v1/search", files=[("file", picture)], data={"request": json.dumps({"k": _K})})
    return answer.raise_for_status()


def time_alone(address: str, index: Path, bundle: Path, pictures: list[bytes], count: int) -> dict[str, Any]:
    """One after the other, by HTTP and in Python in turns of a block."""
    encoder = load_encoder(bundle)
    served: list[float] = []
    direct: list[float] = []
    with httpx.Client(trust_env=False) as client, ImageIndex.open(index, encoder.spec.fingerprint) as opened:

        def direct_search(picture: bytes) -> object:
            return search_image(opened, encoder, [Part(picture)], _K)

        for _ in range(count // _BLOCK):
            # In blocks: the threads of ONNX Runtime go on turning for a while, and would be felt in the other process.
            for way, times in ((lambda one: ask(client, address, one), served), (direct_search, direct)):
                for number in range(_WARM + _BLOCK):
                    begin = time.perf_counter()
                    way(pictures[number % len(pictures)])
                    if number >= _WARM:
                        times.append(time.perf_counter() - begin)
    return {
        "served_p50_ms": round(statistics.median(served) * 1e3, 2),
        "python_p50_ms": round(statistics.median(direct) * 1e3, 2),
        "over_python": round(statistics.median(served) / statistics.median(direct), 3),
    }


async def overload(
    address: str, pictures: list[bytes], rate: float, seconds: float
) -> tuple[Counter[str], list[float]]:
    """Ask at fixed times, whatever comes back; how it ended, and seconds of what was answered."""
    ends: Counter[str] = Counter()
    answered: list[float] = []

    async def one(client: httpx.AsyncClient, picture: bytes) -> None:
        begin = time.perf_counter()
        try:
            answer = await client.post(f"{address}v1/search", files=[("file", picture)])
        except httpx.TransportError as error:
            ends[type(error).__name__] += 1
            return
        ends[str(answer.status_code)] += 1
        if answer.status_code == 200:
            answered.append(time.perf_counter() - begin)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=_PATIENCE_S) as client:
        tasks = []
        begin = time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(one(client, pictures[number % len(pictures)])))
        await asyncio.gather(*tasks)
    return ends, answered


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--count", type=int, default=100, help="searches one after the other")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    options = parser.parse_args()
    encoder = load_encoder(options.encoder)
    pictures = draw_pictures(32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors = draw(options.rows, encoder.spec.embedding_dim, 1)
        write_export(folder / "vectors.npy", vectors, encoder.spec.fingerprint)
        import_index(folder / "index", folder / "vectors.npy")
        process, address = start(folder, options.encoder)
        try:
            alone = time_alone(address, folder / "index", options.encoder, pictures, options.count)
            capacity = 1e3 / alone["python_p50_ms"]
            before = memory_mib(process.pid)
            ends, answered = asyncio.run(overload(address, pictures, 2 * capacity, options.seconds))
            after = memory_mib(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_PATIENCE_S)
    p99 = float(np.quantile(answered, 0.99)) * 1e3 if answered else None
    result = {
        "benchmark": "serve",
        "rows": options.rows,
        "alone": alone,
        "overload": {
            "offered_per_s": round(2 * capacity, 1),
            "seconds": options.seconds,
            "ends": dict(ends),
            "answered_per_s": round(len(answered) / options.seconds, 1),
            "p50_ms": round(statistics.median(answered) * 1e3, 1) if answered else None,
            "p99_ms": None if p99 is None else round(p99, 1),
            "p99_over_alone_p50": None if p99 is None else round(p99 / alone["served_p50_ms"], 2),
            "memory_mib": [round(before, 1), round(after, 1)],
        },
        "mimco": mimco_deploy.__version__,
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
