"""Does it learn? k-NN of each stage against random weights and raw pixels, over several seeds.

    python benchmarks/learn_small.py --train tiny/train-00.tar … --val tiny/val.tar --out /tmp/learn

Trains both stages on the train pictures of a few classes, exports each, embeds train and val pictures through the
exported bundle, and reports weighted k-NN top-1 (DINO's rule, k = 20, T = 0.07) as one JSON line: the mean and standard
deviation over seeds, the standard error over val pictures, the seconds that each stage took, machine and versions.
Labels are used for this number only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import timm
import torch

from mimco_deploy.evaluation.knn import knn_accuracy
from mimco_deploy.export.pipeline import export_encoder
from mimco_deploy.export.student import EncoderModule, from_checkpoint
from mimco_deploy.preprocess import preprocess
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.sources import Picture, find_pictures
from mimco_deploy.training.backbone import CROP_SHARE, Backbone
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.loop import StepReport
from mimco_deploy.training.presets import PRESETS, Recipe
from mimco_deploy.training.settings import apply_settings
from mimco_deploy.training.stages import train_stage1, train_stage2

Pixels = npt.NDArray[np.uint8]
Embed = Callable[[Pixels], npt.NDArray[np.float32]]
RAW_SIDE_PX = 16


class Task:
    """The labelled pictures of a few classes, decoded once for each size they are asked for."""

    def __init__(self, train: list[Picture], val: list[Picture]) -> None:
        names = sorted({picture.label for picture in train if picture.label})
        number = {name: index for index, name in enumerate(names)}
        self.train, self.val = train, val
        self.labels = np.array([number[str(picture.label)] for picture in train])
        self.truth = np.array([number[str(picture.label)] for picture in val])
        self._pixels: dict[int, tuple[Pixels, Pixels]] = {}

    def accuracy(self, embed: Embed, side_px: int) -> tuple[float, float]:
        """k-NN top-1 and its standard error over val pictures."""
        if side_px not in self._pixels:
            decoded = [
                np.stack(
                    [preprocess(picture.decode(short_side_px=4 * side_px), side_px, CROP_SHARE) for picture in pictures]
                )
                for pictures in (self.train, self.val)
            ]
            self._pixels[side_px] = (decoded[0], decoded[1])
        gallery, queries = (
            np.concatenate([embed(pixels[start : start + 250]) for start in range(0, len(pixels), 250)])
            for pixels in self._pixels[side_px]
        )
        return knn_accuracy(gallery, self.labels, queries, self.truth)


def choose_classes(train: list[str], val: list[str], count: int) -> Task:
    """Every n-th class by name, so that `count` of them are spread over all."""
    train_pictures, val_pictures = find_pictures(train), find_pictures(val)
    names = sorted({picture.label for picture in train_pictures if picture.label})
    chosen = set(names[:: max(1, len(names) // count)][:count])
    return Task(
        [picture for picture in train_pictures if picture.label in chosen],
        [picture for picture in val_pictures if picture.label in chosen],
    )


def copy_pictures(pictures: list[Picture], folder: Path) -> Path:
    """Write the chosen pictures as files, without their labels: what a user's folder looks like."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        (folder / f"{number:06d}.jpg").write_bytes(picture.read())
    return folder


def raw_pixels(images: Pixels) -> npt.NDArray[np.float32]:
    """Baseline: the pixels themselves, centred and L2-normalised."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    norms: npt.NDArray[np.float32] = np.linalg.norm(flat, axis=1, keepdims=True)
    centred: npt.NDArray[np.float32] = (flat / np.maximum(norms, 1e-6)).astype(np.float32)
    return centred


def random_weights(recipe: Recipe, pooling: str, seed: int) -> Embed:
    """Baseline: the untrained encoder."""
    torch.manual_seed(seed)
    module = EncoderModule(Backbone(recipe.stage2.backbone), pooling)

    def embed(images: Pixels) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            result: npt.NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return result

    return embed


def run_seed(recipe: Recipe, task: Task, data: Path, out: Path, seed: int) -> dict[str, float]:
    """Both stages with one seed: accuracies, and seconds of training."""

    def measure(name: str, embed: Embed, side_px: int) -> None:
        result[name], result[f"{name} stderr"] = task.accuracy(embed, side_px)
        logging.info("seed %d: %s %.3f", seed, name, result[name])

    def say(report: StepReport) -> None:
        if report.step % 50 < 10:
            metrics = ", ".join(f"{name} {value:.3f}" for name, value in report.metrics.items())
            logging.info("seed %d: step %d of %d, %s", seed, report.step, report.total_steps, metrics)

    result: dict[str, float] = {}
    side = recipe.stage2.backbone.image_size_px
    for pooling in ("mean", "cls"):
        measure(f"random weights, {pooling}", random_weights(recipe, pooling, seed), side)
    settings = [f"run.seed={seed}", f"data.sources={data}"]

    start = time.perf_counter()
    train_stage1(apply_settings(recipe.stage1, settings), out / "stage1", on_step=say)
    result["stage 1 seconds"] = time.perf_counter() - start
    export_encoder(from_checkpoint(read_checkpoint(out / "stage1/last")), out / "encoder1")
    measure("stage 1", load_encoder(out / "encoder1").embed, side)

    start = time.perf_counter()
    stage2 = dataclasses.replace(apply_settings(recipe.stage2, settings), teacher=str(out / "stage1/last"))
    train_stage2(stage2, out / "stage2", on_step=say)
    result["stage 2 seconds"] = time.perf_counter() - start
    export_encoder(from_checkpoint(read_checkpoint(out / "stage2/last")), out / "encoder2")
    measure("stage 2", load_encoder(out / "encoder2").embed, side)
    return result


def main() -> None:
    """Parse, run the seeds, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="folders or tars with <class>/<picture>")
    parser.add_argument("--val", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and bundles")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="vit_tiny_debug")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set1", action="append", default=[], help="setting of stage 1, such as run.epochs=12")
    parser.add_argument("--set2", action="append", default=[], help="setting of stage 2")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    preset = PRESETS[arguments.preset]()
    recipe = Recipe(
        stage1=apply_settings(preset.stage1, arguments.set1), stage2=apply_settings(preset.stage2, arguments.set2)
    )
    task = choose_classes(arguments.train, arguments.val, arguments.classes)
    data = copy_pictures(task.train, arguments.out / "pictures")
    raw, raw_error = task.accuracy(raw_pixels, RAW_SIDE_PX)
    rows = [run_seed(recipe, task, data, arguments.out / f"seed{seed}", seed) for seed in arguments.seeds]
    print(
        json.dumps(
            {
                "benchmark": "learn_small",
                "preset": arguments.preset,
                "set1": arguments.set1,
                "set2": arguments.set2,
                "train_pictures": len(task.train),
                "val_pictures": len(task.val),
                "raw 16×16 pixels": raw,
                "raw stderr": raw_error,
                "seeds": arguments.seeds,
                "mean": {name: statistics.mean(row[name] for row in rows) for name in rows[0]},
                "std": {name: statistics.stdev(row[name] for row in rows) for name in rows[0]} if len(rows) > 1 else {},
                "rows": rows,
                "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "timm": timm.__version__,
                    "onnxruntime": onnxruntime.__version__,
                },
            },
            ensure_ascii=False,
        )
    )


if __name__ == "__main__":
    main()
