"""Does indexing keep up with the encoder, and does a second run cost no more than looking?

    python benchmarks/index_folder.py --encoder .mimco/encoder                      # JPEGs of noise, 500 × 375 px
    python benchmarks/index_folder.py --encoder .mimco/encoder --data photos --source timm/vit_small_patch16_224
    python benchmarks/index_folder.py --unchanged 100000                            # the second run alone, no encoder

Three ways over the same pictures, in turns, each in a process of its own:

- `encoder`: the bundle's graph alone on pixels that are ready, in the same batches: what is possible;
- `mimco`: `update_index` into a new index, from the start of the first decoder to the last commit;
- `plain`: the script that one writes first: Pillow, torch, one picture after the other, FAISS flat. Only where torch is
  installed and `--source` says with which weights; what it computes is the same model in fp32.

The second run: `update_index` over files that are all known against a walk by `os.scandir` with a `stat` of each.
Prints one JSON line with the machine and the versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import mimco_deploy
from mimco_deploy.bundle import EncoderSpec, read_bundle
from mimco_deploy.preprocess import read_pixels
from mimco_deploy.serving.catalog import Catalog, NewContent
from mimco_deploy.serving.encoders import LazyEncoder, load_encoder
from mimco_deploy.serving.generations import begin_generation, switch_to
from mimco_deploy.serving.roots import record_roots
from mimco_deploy.serving.scan import Stamp, scan_root
from mimco_deploy.serving.update import update_index
from mimco_deploy.serving.vectors import VectorWriter, crc32s

BATCH = 16
"""The best on two cores; of 1, 4, 8, 16, 32 and 64."""


def draw_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Pictures with the detail of photos: noise at several scales, JPEG at quality 85."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (size[1] // cell + 1, size[0] // cell + 1, 3), np.uint8)).resize(
                    size, Image.Resampling.BICUBIC
                ),
                np.float32,
            )
            for cell in (64, 16, 4)
        ]
        Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=85)


def run_encoder(bundle: Path, photos: Path) -> float:
    """Pictures a second of the graph alone."""
    encoder = load_encoder(bundle)
    spec = encoder.spec
    paths = sorted(photos.rglob("*.jpg"))
    pixels = [read_pixels(path, *spec.geometry) for path in paths]
    start = time.perf_counter()
    for first in range(0, len(pixels), BATCH):
        encoder.embed(np.stack(pixels[first : first + BATCH]))
    return len(pixels) / (time.perf_counter() - start)


def run_mimco(bundle: Path, photos: Path) -> float:
    """Pictures a second of a first `update_index`; loading the encoder is not counted, as it is not in the others."""
    encoder = load_encoder(bundle)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = update_index(Path(folder) / "index", [photos], encoder)
        return report.embedded / (time.perf_counter() - start)


def run_plain(source: str, bundle: Path, photos: Path) -> float:
    """Pictures a second of Pillow, torch and FAISS, one by one."""
    import faiss
    import torch
    from torchvision.transforms import v2

    from mimco_deploy.export.student import EncoderModule, from_model

    spec = read_bundle(bundle).spec
    found = from_model(source)
    found.backbone.resize(spec.image_size_px)
    model = EncoderModule(found.backbone, found.pooling)
    resize = v2.Resize(int(spec.image_size_px / spec.crop_share), v2.InterpolationMode.BICUBIC)
    crop = v2.CenterCrop(spec.image_size_px)
    index = faiss.IndexFlatIP(spec.embedding_dim)
    paths = sorted(photos.rglob("*.jpg"))
    start = time.perf_counter()
    with torch.inference_mode():
        for path in paths:
            picture = crop(resize(Image.open(path).convert("RGB")))
            pixels = torch.from_numpy(np.array(picture)).unsqueeze(0)  # [1, H, W, 3]
            index.add(model(pixels).numpy())
    return len(paths) / (time.perf_counter() - start)


def known_index(folder: Path, photos: Path) -> None:
    """An index that knows every file of a folder, with embeddings of its own."""
    generation = begin_generation(folder, SPEC.fingerprint, SPEC.embedding_dim)
    switch_to(folder, generation)
    with Catalog(generation.catalog) as catalog, VectorWriter(generation.vectors, SPEC.embedding_dim, 0) as writer:
        files = list(scan_root(photos).files)
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((len(files), SPEC.embedding_dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        writer.append(vectors)
        with catalog.transaction():
            (root,) = record_roots(catalog, [photos])
            hashes = [hashlib.sha256(path.encode()).digest() for path, _, _ in files]
            catalog.add_contents(0, map(NewContent, hashes, crc32s(vectors)))
            for row, (path, size, mtime_ns) in enumerate(files):
                catalog.put_file(root, path, Stamp(size, mtime_ns), row)


SPEC = EncoderSpec(
    architecture="none",
    image_size_px=224,
    crop_share=0.875,
    interpolation="bicubic",
    crop_mode="center",
    embedding_dim=384,
    pooling="cls",
    patch_grid=0,
    fingerprint="0" * 64,
    licence="none",
    weights_source="none",
    teacher_source="none",
    opset=22,
)


class NoEncoder:
    """Stands for an encoder that nobody asks for anything."""

    spec = SPEC
    provider = "none"
    precision = "fp32"

    def embed(self, _: Any) -> Any:
        """Fail: nothing was to be embedded."""
        raise AssertionError("something was embedded")


def walk(folder: Path) -> int:
    """What looking at each file costs at least."""
    waiting, count = [str(folder)], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    entry.stat()
                    count += 1
    return count


def time_unchanged(count: int, repeats: int) -> dict[str, Any]:
    """A walk and a second run, in turns."""
    with tempfile.TemporaryDirectory() as name:
        photos, index = Path(name).resolve() / "photos", Path(name) / "index"
        for number in range(count):
            folder = photos / f"{number // 1000:04d}"
            if number % 1000 == 0:
                folder.mkdir(parents=True)
            (folder / f"IMG_{number:06d}.jpg").write_bytes(b"x")
        known_index(index, photos)
        walks, updates = [], []
        for _ in range(repeats):
            walks.append(timed(lambda: walk(photos)))
            updates.append(timed(lambda: update_index(index, [], NoEncoder())))  # type: ignore[arg-type]
        ratios = [update / bare for update, bare in zip(updates, walks, strict=True)]
        return {"files": count, "walk_s": spread(walks), "second_run_s": spread(updates), "over_walk": spread(ratios)}


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "std": round(deviation, 4)}


def in_a_process(function: Callable[..., float], *arguments: object) -> float:
    """One measurement in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def time_first(bundle: Path, photos: Path, source: str | None, repeats: int) -> dict[str, Any]:
    """The three ways in turns."""
    rates: dict[str, list[float]] = {"encoder": [], "mimco": [], "plain": []}
    for _ in range(repeats):
        rates["encoder"].append(in_a_process(run_encoder, bundle, photos))
        rates["mimco"].append(in_a_process(run_mimco, bundle, photos))
        if source is not None:
            rates["plain"].append(in_a_process(run_plain, source, bundle, photos))
    result: dict[str, Any] = {f"{name}_images_per_s": spread(found) for name, found in rates.items() if found}
    result["share_of_encoder"] = spread([a / b for a, b in zip(rates["mimco"], rates["encoder"], strict=True)])
    if source is not None:
        result["over_plain"] = spread([a / b for a, b in zip(rates["mimco"], rates["plain"], strict=True)])
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--data", type=Path, help="folder of JPEGs; drawn where not given")
    parser.add_argument("--source", help="weights for the plain script, as for mimco export --model")
    parser.add_argument("--count", type=int, default=512, help="pictures to draw")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--unchanged", type=int, default=0, metavar="FILES", help="measure the second run over so many")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "index_folder"}
    if arguments.encoder is not None:
        with tempfile.TemporaryDirectory() as folder:
            photos = arguments.data or Path(folder) / "photos"
            if arguments.data is None:
                draw_photos(photos, arguments.count, (arguments.width, arguments.width * 3 // 4))
            encoder = LazyEncoder(arguments.encoder)
            result |= {
                "architecture": encoder.spec.architecture,
                "provider": encoder.provider,
                "precision": encoder.precision,
                "pictures": sum(1 for _ in photos.rglob("*.jpg")),
                "width_px": None if arguments.data else arguments.width,
                **time_first(arguments.encoder, photos, arguments.source, arguments.repeats),
            }
    if arguments.unchanged:
        result["unchanged"] = time_unchanged(arguments.unchanged, max(arguments.repeats, 5))
    result |= {
        "mimco": mimco_deploy.__version__,
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "free_gib": shutil.disk_usage(tempfile.gettempdir()).free >> 30,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
