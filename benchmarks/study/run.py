"""Does MimCo separate better? Students of one teacher at equal cost, each measured through its exported bundle.

    python benchmarks/study/run.py methods --teacher run/stage1/last --train tiny/train-*.tar --val tiny/val.tar \
        --photos photos/clothing --out /tmp/study --results docs/study/raw --seeds 0 1 2
    python benchmarks/study/tables.py docs/study/raw > docs/study/tables.md

Trains what is missing of a table, one row and seed after the other, and writes for each a JSON file with what was
measured and the log of its training beside it; what is there already is not run again, and what was made in another
way is refused. All students see the same number of pictures in the same order, under the preset's optimiser with a
warm-up over a tenth of the run; masks and views are each method's own, but for FD, which gets MimCo's views and so is
MimCo without masks and contrast. What the teacher cost comes on top for the rows that have one, and is written down.
One teacher serves all seeds: a spread over seeds is that of stage 2. Labels are used to measure only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import timm
import torch

from benchmarks.study.rows import ROWS, TABLES, Row
from mimco_deploy.atomic import write_bytes
from mimco_deploy.bundle import EncoderSpec, Precision
from mimco_deploy.evaluation.evaluate import Evaluation, Protocol, evaluate
from mimco_deploy.export.pipeline import export_encoder
from mimco_deploy.export.student import Source, from_checkpoint
from mimco_deploy.serving.encoders import Encoder, load_encoder
from mimco_deploy.sources import Picture, find_pictures
from mimco_deploy.training.backbone import CROP_SHARE, Backbone, weights_hash
from mimco_deploy.training.checkpoint import Checkpoint, read_checkpoint
from mimco_deploy.training.config import Stage2Config
from mimco_deploy.training.loop import StepReport
from mimco_deploy.training.method_config import Pooling
from mimco_deploy.training.presets import PRESETS, WITH_TEACHER, with_stage2_method
from mimco_deploy.training.runs import LAST
from mimco_deploy.training.settings import apply_settings
from mimco_deploy.training.stages import train_stage2

RAW_SIDE_PX = 16
PER_CLASS = 50
"""Train pictures of each class that vote and train the probe; the first by name."""
PROTOCOLS: tuple[Protocol, ...] = ("knn", "linear", "few-shot", "spread")


class RawPixels:
    """The baseline: the pixels themselves, L2-normalised, as an encoder.

    Args:
        side_px: of the picture, scaled and cropped as for any encoder.
        centred: the mean of each picture is taken off first, so that brightness counts less.
    """

    provider = "numpy"
    precision: Precision = "fp32"

    def __init__(self, side_px: int = RAW_SIDE_PX, *, centred: bool = True) -> None:
        self.spec = EncoderSpec(
            architecture="pixels",
            image_size_px=side_px,
            crop_share=CROP_SHARE,
            interpolation="bicubic",
            crop_mode="center",
            embedding_dim=side_px * side_px * 3,
            pooling="none",
            patch_grid=0,
            fingerprint="pixels",
            licence="none",
            weights_source="none",
            teacher_source="none",
            opset=0,
        )
        self._centred = centred

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """[B, H·W·3], L2-normalised."""
        flat = images.reshape(len(images), -1).astype(np.float32)
        if self._centred:
            flat -= flat.mean(axis=1, keepdims=True)
        norms: npt.NDArray[np.float32] = np.linalg.norm(flat, axis=1, keepdims=True)
        unit: npt.NDArray[np.float32] = (flat / np.maximum(norms, 1e-6)).astype(np.float32)
        return unit


@dataclasses.dataclass(frozen=True)
class Task:
    """What every row is measured on."""

    gallery: list[Picture]
    queries: list[Picture]
    photos: Path | None

    def measure(self, encoder: Encoder, name: str) -> dict[str, object]:
        """Tiny-ImageNet by all protocols, and the photos by retrieval."""
        pooling = encoder.spec.pooling
        found = {f"tiny-imagenet, {pooling}": _document(evaluate(encoder, name, self.queries, self.gallery, PROTOCOLS))}
        if self.photos is not None:
            queries, gallery = (find_pictures([str(self.photos / part)]) for part in ("query", "gallery"))
            found["photos"] = _document(evaluate(encoder, name, queries, gallery, ("retrieval",)))
            everything = sorted(queries + gallery, key=lambda picture: picture.name)
            found["photos, copies"] = _document(evaluate(encoder, name, everything, (), ("copies",)))
        return {"pooling": pooling, **found}

    def knn(self, encoder: Encoder, name: str) -> dict[str, object]:
        """Tiny-ImageNet by weighted k-NN alone."""
        return _document(evaluate(encoder, name, self.queries, self.gallery, ("knn",)))


def _document(found: Evaluation) -> dict[str, object]:
    return {
        "pictures": len(found.pictures.pictures),
        "gallery": len(found.voters.pictures) if found.voters else 0,
        "measures": [measure.as_row() for measure in found.measures],
    }


def first_of_each_class(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """The first so many of every folder, by name."""
    seen: dict[str | None, int] = {}
    chosen = []
    for picture in pictures:
        seen[picture.label] = seen.get(picture.label, 0) + 1
        if seen[picture.label] <= count:
            chosen.append(picture)
    return chosen


def student_config(row: Row, seed: int, arguments: argparse.Namespace) -> Stage2Config:
    """The settings of a row: the preset, its method, a start at random unless the row says otherwise."""
    config = with_stage2_method(PRESETS[arguments.preset](), row.method)
    epochs, teacher, train = arguments.epochs, arguments.teacher, arguments.train
    shared = [f"run.epochs={epochs}", f"run.seed={seed}", f"optim.warmup_epochs={epochs / 10:g}", *arguments.set]
    if row.method == "mimco":
        shared.append("method.init_from_teacher=false")
    config = apply_settings(config, [*shared, *row.settings])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=tuple(train)))
    return dataclasses.replace(config, teacher=str(teacher)) if row.method in WITH_TEACHER else config


def differing(first: object, second: object) -> list[str]:
    """The sections in which two runs' settings differ; not where pictures and teacher lie, which a checkpoint knows."""
    names = [item.name for item in dataclasses.fields(second)]  # type: ignore[arg-type]
    names = [name for name in names if name not in ("data", "teacher")]
    return [name for name in names if getattr(first, name, None) != getattr(second, name)]


def train_row(config: Stage2Config, folder: Path) -> Checkpoint:
    """Train one student, or go on with one that was interrupted."""

    def say(report: StepReport) -> None:
        if report.step % 50 < 10:
            metrics = ", ".join(f"{name} {value:.3f}" for name, value in report.metrics.items())
            logging.info("%s: step %d of %d, %s", folder.name, report.step, report.total_steps, metrics)

    last = folder / LAST
    resume = read_checkpoint(last) if last.exists() else None
    if resume is not None and (differ := differing(resume.config, config)):
        sys.exit(f"{last} was trained with other {', '.join(differ)}: move it away, or name another --out")
    if resume is None or resume.step < resume.total_steps:
        train_stage2(resume.config if resume else config, folder, resume=resume, on_step=say)  # type: ignore[arg-type]
    return read_checkpoint(last)


def main() -> None:
    """Parse, then run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "all"])
    parser.add_argument("--teacher", type=Path, required=True, help="a checkpoint of stage 1")
    parser.add_argument("--train", nargs="+", required=True, help="folders or tars with <class>/<picture>")
    parser.add_argument("--val", nargs="+", required=True)
    parser.add_argument("--photos", type=Path, help="a folder with gallery/<class> and query/<class>")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and bundles")
    parser.add_argument("--results", type=Path, required=True, help="folder for what was measured, and the logs")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="vit_tiny_debug")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="any setting, for all rows")
    parser.add_argument("--rows", nargs="+", help="only these")
    parser.add_argument("--train-only", action="store_true", help="leave the runs in --out, to be measured elsewhere")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    task = Task(
        first_of_each_class(find_pictures(arguments.train), PER_CLASS), find_pictures(arguments.val), arguments.photos
    )
    every = dict.fromkeys(name for rows in TABLES.values() for name in rows)
    names = arguments.rows or (list(every) if arguments.table == "all" else TABLES[arguments.table])
    made_with = {
        "preset": arguments.preset,
        **({"set": arguments.set} if arguments.set else {}),
        "epochs": arguments.epochs,
        "teacher": weights_hash(read_checkpoint(arguments.teacher).load_model()),
        "pictures": {
            "gallery": len(task.gallery),
            "queries": len(task.queries),
            "photos": arguments.photos is not None,
        },
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for name in names:
            if name in ("pixels", "teacher") and seed != arguments.seeds[0]:
                continue  # pixels have no seed, and the teacher is the one given
            result = arguments.results / f"{name}-seed{seed}.json"
            if result.exists():
                if json.loads(result.read_text(encoding="utf-8"))["made with"] != made_with:
                    sys.exit(f"{result} was made with another teacher, preset, length or set of pictures")
                continue
            if arguments.train_only:
                if name in ROWS:  # the others are not trained here
                    train_row(student_config(ROWS[name], seed, arguments), arguments.out / f"{name}-seed{seed}")
                continue
            document = {"row": name, "seed": seed, "made with": made_with, **_run(name, seed, task, arguments)}
            write_bytes(result, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
            logging.info("%s is there", result)


def _run(name: str, seed: int, task: Task, arguments: argparse.Namespace) -> dict[str, object]:
    """Train and measure one row."""
    recipe, folder = PRESETS[arguments.preset](), arguments.out / f"{name}-seed{seed}"
    document: dict[str, object] = {"machine": machine()}
    if name == "pixels":
        return {**document, **task.measure(RawPixels(), name)}
    if name == "random":
        torch.manual_seed(seed)
        source = Source(Backbone(recipe.stage2.backbone), "mean", "random weights")
    else:
        checkpoint, log = read_checkpoint(arguments.teacher), arguments.teacher.parent / "log.jsonl"
        teacher_cost = _cost(checkpoint, log)
        if name != "teacher":
            row = ROWS[name]
            config = student_config(row, seed, arguments)
            checkpoint, log = train_row(config, folder), folder / "log.jsonl"
            document["settings"] = row.settings
            if row.method in WITH_TEACHER:
                document["teacher's training"] = teacher_cost
        document["training"] = _cost(checkpoint, log)
        settings = dataclasses.asdict(checkpoint.config)
        document["config"] = {key: value for key, value in settings.items() if key not in ("data", "teacher")}  # paths
        shutil.copyfile(log, arguments.results / f"{name}-seed{seed}.log.jsonl")
        source = from_checkpoint(checkpoint)
    export_encoder(source, folder / "encoder")
    document.update(task.measure(load_encoder(folder / "encoder"), name))
    other: Pooling = "mean" if source.pooling == "cls" else "cls"  # a loss on patches trains no CLS token
    export_encoder(dataclasses.replace(source, pooling=other), folder / f"encoder-{other}")
    document[f"tiny-imagenet, {other}"] = task.knn(load_encoder(folder / f"encoder-{other}"), name)
    return document


def machine() -> dict[str, object]:
    """What it ran on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _cost(checkpoint: Checkpoint, log: Path) -> dict[str, float]:
    batch = checkpoint.config.run.global_batch_size
    return {"steps": checkpoint.step, "images": checkpoint.step * batch, "seconds": _seconds(log, batch)}


def _seconds(log: Path, batch: int) -> float:
    """Of training by the log: images over images a second, summed over its lines."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = np.diff([-1] + [row["step"] for row in rows])
    return float(sum(n * batch / row["images_per_s"] for n, row in zip(steps, rows, strict=True)))


if __name__ == "__main__":
    main()
