"""The fine-tune column: each encoder of the study, trained on with labels by `mimco train finetune`'s own loop.

    python benchmarks/study/finetune.py --runs /tmp/study --teacher run/stage1/last --train tiny/train-*.tar \
        --val tiny/val.tar --results docs/study/raw/finetune
    python benchmarks/study/tables.py docs/study/raw > docs/study/tables.md

Every row gets the same labelled pictures, those that vote in k-NN and train the linear probe (run.py's `PER_CLASS` of
each class), in the same order, under `finetune_preset` of its backbone with the mean of the patch tokens. Validation
is read once an epoch and nothing is chosen by it: what counts is the last epoch. Rows whose run is not in `--runs` are
passed over and named; what is there already is not run again, and what was made in another way is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.study.rows import TABLES
from benchmarks.study.run import PER_CLASS, first_of_each_class, machine
from mimco_deploy.atomic import write_bytes
from mimco_deploy.evaluation.measures import mean_of
from mimco_deploy.sources import Picture, find_pictures
from mimco_deploy.training.backbone import Backbone, save_as_timm
from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.finetune_config import FinetuneConfig, finetune_preset
from mimco_deploy.training.runs import LAST
from mimco_deploy.training.settings import apply_settings, to_document
from mimco_deploy.training.supervised import train_with_labels
from mimco_deploy.training.supervised_checkpoint import read_run

ALL = tuple(dict.fromkeys(row for rows in TABLES.values() for row in rows if row != "pixels"))


def finetune(config: FinetuneConfig, folder: Path) -> list[dict[str, float]]:
    """Train, or go on where it was interrupted; the rows of its log, one an epoch."""
    last = folder / LAST
    resume = read_run(last, "finetune") if last.exists() else None
    if resume is not None and resume.config != config:
        sys.exit(f"{folder} holds a run of other settings: remove it")
    if resume is None or resume.progress.step < resume.progress.total_steps:
        train_with_labels(config, folder, resume=resume)
    return read_run(last, "finetune").progress.rows


def random_encoder(backbone: BackboneConfig, seed: int, folder: Path) -> Path:
    """Random weights as run.py's row has them, where fine-tuning finds an encoder."""
    torch.manual_seed(seed)
    save_as_timm(Backbone(backbone), folder, "unstated")
    return folder


def copy_pictures(pictures: list[Picture], folder: Path) -> Path:
    """The labelled pictures as a folder of <class>/<number>.jpg, and nothing else; left alone where it is that."""
    wanted = {folder / str(one.label) / f"{number:06}.jpg": one for number, one in enumerate(pictures)}
    there = {path: path.stat().st_size for path in folder.glob("*/*")}
    if there != {path: picture.size for path, picture in wanted.items()}:
        shutil.rmtree(folder, ignore_errors=True)
        for path, picture in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.read())
    return folder


def main() -> None:
    """Parse, then run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="run.py's --out")
    parser.add_argument("--teacher", type=Path, required=True, help="a checkpoint of stage 1")
    parser.add_argument("--train", nargs="+", required=True, help="folders or tars with <class>/<picture>")
    parser.add_argument("--val", nargs="+", required=True)
    parser.add_argument("--results", type=Path, required=True, help="folder for what was measured, and the logs")
    parser.add_argument("--rows", nargs="+", default=ALL, help="only these, in this order")
    parser.add_argument("--seed", type=int, default=0, help="of the rows, and of their fine-tuning")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    labelled = first_of_each_class(find_pictures(arguments.train), PER_CLASS)
    folder = copy_pictures(labelled, arguments.runs / "labelled")
    count, backbone = len(find_pictures(arguments.val)), read_checkpoint(arguments.teacher).config.backbone
    made_with = {"epochs": arguments.epochs, "labelled": len(labelled), "val": count}
    arguments.results.mkdir(parents=True, exist_ok=True)
    for row in arguments.rows:
        name = f"{row}-seed{arguments.seed}"
        result = arguments.results / f"{name}.json"
        if row == "teacher" and arguments.seed:
            continue  # the one given, of no seed of theirs
        if result.exists():
            if json.loads(result.read_text(encoding="utf-8"))["made with"] != made_with:
                sys.exit(f"{result} was made with another length or set of pictures")
            continue
        encoder = arguments.teacher if row == "teacher" else arguments.runs / name / LAST
        if row == "random":
            encoder = random_encoder(backbone, arguments.seed, arguments.runs / name / "timm")
        if not encoder.exists():
            logging.warning("%s: no run in %s", row, encoder)
            continue
        config = finetune_preset(backbone)
        settings = [f"run.epochs={arguments.epochs}", f"run.seed={arguments.seed}"]
        config = apply_settings(config, [*settings, f"optim.warmup_epochs={arguments.epochs / 10:g}"])
        data = dataclasses.replace(config.data, sources=(str(folder),))
        config = dataclasses.replace(config, data=data, val=tuple(arguments.val), encoder=str(encoder))
        run = arguments.runs / f"{name}-finetune"
        last = finetune(config, run)[-1]
        measures = [
            mean_of("finetune", shown, np.arange(count) < round(last[key] * count)).as_row()
            for key, shown in (("val_top1", "top-1"), ("val_top5", "top-5"))
        ]
        kept = {key: value for key, value in to_document(config).items() if key not in ("data", "val", "encoder")}
        document = {"row": row, "seed": arguments.seed, "made with": made_with, "machine": machine(), "config": kept}
        write_bytes(result, (json.dumps({**document, "measures": measures}, indent=1) + "\n").encode())
        shutil.copyfile(run / "log.jsonl", arguments.results / f"{name}.log.jsonl")
        logging.info("%s: top-1 %.4f", result, last["val_top1"])


if __name__ == "__main__":
    main()
