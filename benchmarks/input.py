"""Does the input keep up? Views a second of the loader that trains, against a plain torchvision pipeline.

    python benchmarks/input.py                                  # JPEGs of noise, 64 px and 500 px, folder and tar
    python benchmarks/input.py --data tiny/train-00.tar --side 64 --size 64

Both run in turns with as many data-loading processes, over the same pictures, for stage 1 (two augmented views) and
stage 2 (one crop with a mask). The plain pipeline is what one writes first: each picture opened and decoded by Pillow
when it is asked for, torchvision's transforms with Pillow's Gaussian blur as in MoCo v3's code, float tensors,
normalised, in torch's DataLoader. Prints one JSON line a case. Decoding the corpus into memory, which ours does once
before the first step, is timed apart.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mimco_deploy.sources import Picture, find_pictures
from mimco_deploy.training.augment import OneCrop, TwoViews
from mimco_deploy.training.config import DataConfig, MaskConfig, RunConfig, ViewsConfig
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.data import StepSampler, load_batches
from mimco_deploy.training.masking import draw_mask, mask_shape
from mimco_deploy.training.presets import vit_small

PREFETCHED = 4
"""Batches that a data-loading process works ahead, at most."""
MEAN, STD = vit_small().stage1.backbone.mean, vit_small().stage1.backbone.std


class Blur:
    """MoCo v3's blur, written as one would."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Blur by a random radius."""
        return picture.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


def plain_transforms(size: int, stage: int) -> list[v2.Compose]:
    """One transform a view."""
    last = [v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if stage == 2:
        return [v2.Compose([v2.RandomResizedCrop(size, scale=(0.67, 1.0)), *last])]
    first = [
        v2.RandomResizedCrop(size, scale=(0.08, 1.0)),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
    ]
    second = [v2.RandomApply([v2.Lambda(Blur())], p=0.1), v2.RandomSolarize(128, p=0.2)]
    return [v2.Compose([*first, v2.Lambda(Blur()), *last]), v2.Compose([*first, *second, *last])]


class PlainDataset(Dataset[tuple[Tensor, ...]]):
    """Pictures opened when they are asked for."""

    def __init__(self, pictures: list[Picture], size: int, stage: int) -> None:
        self._pictures, self._transforms = pictures, plain_transforms(size, stage)
        self._shape = mask_shape(size, size // 8, MaskConfig(mask_patch_size_px=size // 4)) if stage == 2 else None

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        picture = self._pictures[index]
        with picture.file.open("rb") as file:
            file.seek(picture.offset)
            content = file.read(picture.size)
        opened = Image.open(io.BytesIO(content)).convert("RGB")
        views = tuple(transform(opened) for transform in self._transforms)
        return views if self._shape is None else (*views, draw_mask(self._shape))


def plain(pictures: list[Picture], size: int, stage: int, batch: int, workers: int) -> Iterator[Any]:
    """Endless batches of the plain pipeline."""
    loader: Iterable[Any] = DataLoader(
        PlainDataset(pictures, size, stage), batch, shuffle=True, num_workers=workers, drop_last=True
    )
    while True:
        batches = iter(loader)
        try:
            yield from batches
        finally:
            del batches


def ours(corpus: Any, size: int, stage: int, batch: int, workers: int, epochs: int, *, recipes: bool) -> Iterator[Any]:
    """Batches of the loader that trains."""
    run = RunConfig(epochs=epochs, global_batch_size=batch)
    make_views: Any
    if stage == 1:
        make_views = TwoViews(size, ViewsConfig(min_crop_scale=0.08), recipes=recipes)
    else:
        shape = mask_shape(size, size // 8, MaskConfig(mask_patch_size_px=size // 4))
        make_views = OneCrop(size, ViewsConfig(min_crop_scale=0.67), shape)
    batches = load_batches(corpus, make_views, StepSampler(len(corpus), run), 0, workers)
    try:
        yield from batches
    finally:
        batches.close()


def rate(batches: Iterator[Any], count: int, images: int, workers: int) -> float:
    """Images a second over `count` batches, once all that is fetched ahead is used up; then its processes end."""
    for _ in range(PREFETCHED * max(1, workers)):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    elapsed = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return count * images / elapsed


def write_pictures(folder: Path, side: int, count: int, *, tar: bool) -> Path:
    """JPEGs with the detail of photographs: noise of several scales."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        layers = [rng.integers(0, 256, (max(2, side // s),) * 2 + (3,), dtype=np.uint8) for s in (64, 16, 4)]
        sized = [np.asarray(Image.fromarray(layer).resize((side, side)), np.float32) for layer in layers]
        picture = 0.6 * sized[0] + 0.3 * sized[1] + 0.1 * sized[2]
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=90)
    if not tar:
        return folder
    archive = folder.with_suffix(".tar")
    with tarfile.open(archive, "w") as file:
        file.add(folder, folder.name)
    return archive


def measure(source: Path, size: int, stage: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case: both pipelines in turns."""
    batch, workers = arguments.batch, arguments.workers
    pictures = find_pictures([str(source)])
    start = time.perf_counter()
    corpus = load_corpus(DataConfig(sources=(str(source),), memory_mib=arguments.memory_mib))
    loading_s = time.perf_counter() - start
    # Workers deliver in turns: of fewer batches than several turns only the burst would be seen.
    rounds, count = arguments.rounds, max(arguments.batches, 4 * workers)
    needed = (count + PREFETCHED * max(1, workers)) * batch
    epochs = 1 + needed // (len(corpus) // batch * batch)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        batches = ours(corpus, size, stage, batch, workers, epochs, recipes=arguments.recipes)
        rates["ours"].append(rate(batches, count, batch, workers))
        rates["plain"].append(rate(plain(pictures, size, stage, batch, workers), count, batch, workers))
    views = 2 if stage == 1 else 1
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "benchmark": "input",
        "stage": stage,
        "pictures": len(pictures),
        "view_px": size,
        "colours_on": "device" if arguments.recipes and stage == 1 else "workers",
        "in_memory": corpus.held is not None,
        "loading_s": round(loading_s, 2),
        "views_per_s": round(views * median["ours"]),
        "views_per_s_spread": [round(views * f(rates["ours"])) for f in (min, max)],
        "plain_views_per_s": round(views * median["plain"]),
        "times_plain": round(median["ours"] / median["plain"], 2),
    }


def main() -> None:
    """Parse, measure, print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders or tars instead of drawn pictures")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 224], help="side of the views, px")
    parser.add_argument("--side", type=int, nargs="+", default=[64, 500], help="side of drawn pictures, px")
    parser.add_argument("--count", type=int, default=1024, help="drawn pictures of each side")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=6, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--recipes", action="store_true", help="leave stage 1's colours to a GPU, as where there is one"
    )
    parser.add_argument("--memory-mib", type=int, default=DataConfig().memory_mib, help="0 decodes at each use")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sources = [(path, path.name, size) for path in arguments.data for size in arguments.size]
        if not arguments.data:
            for side, size in zip(arguments.side, arguments.size, strict=True):
                for tar in (False, True):
                    name = f"{side} px {'tar' if tar else 'folder'}"
                    source = write_pictures(Path(scratch) / name.replace(" ", "-"), side, arguments.count, tar=tar)
                    sources.append((source, name, size))
        for source, name, size in sources:
            for stage in (1, 2):
                row = measure(source, size, stage, arguments)
                machine = {"cores": os.cpu_count(), "workers": arguments.workers, "cpu": platform.processor() or "cpu"}
                versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
                print(json.dumps({"data": name, **row, **machine, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
