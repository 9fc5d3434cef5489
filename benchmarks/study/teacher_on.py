"""What would one epoch more have given the teacher? Trains it on, as a control for the student that starts as it.

    python benchmarks/study/teacher_on.py --teacher run/stage1/last --train tiny/train-*.tar --out /tmp/teacher-on
    python benchmarks/study/run.py methods --rows teacher --teacher /tmp/teacher-on/last … --results raw/teacher-on

All of its state goes on (predictor, projections, momentum encoder) under its own recipe, with a fresh optimiser and a
schedule over the new epochs alone, as the student has: warm-up over a tenth, then a cosine.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

import torch

from mimco_deploy.training.checkpoint import read_checkpoint
from mimco_deploy.training.config import Stage1Config
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.distributed import process_group
from mimco_deploy.training.loop import StepReport, train
from mimco_deploy.training.stages import build_stage1


def say(report: StepReport) -> None:
    """Every fifty steps."""
    if report.step % 50 < 10:
        logging.info("step %d of %d, %s", report.step, report.total_steps, report.metrics)


def main() -> None:
    """Train on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a checkpoint of stage 1")
    parser.add_argument("--train", nargs="+", required=True, help="folders or tars")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    checkpoint = read_checkpoint(arguments.teacher)
    config, replace = checkpoint.config, dataclasses.replace
    if not isinstance(config, Stage1Config):
        sys.exit(f"{arguments.teacher} is of {checkpoint.stage}, expected stage1")
    config = replace(
        config,
        run=replace(config.run, epochs=arguments.epochs, seed=arguments.seed),
        optim=replace(config.optim, warmup_epochs=arguments.epochs / 10),
        data=replace(config.data, sources=tuple(arguments.train)),
    )
    arguments.out.mkdir(parents=True)
    with process_group() as device:
        torch.manual_seed(arguments.seed)
        method, make_views = build_stage1(config)
        method.load_state_dict(checkpoint.load_model())
        corpus = load_corpus(config.data)
        train(method.to(device), config, corpus, make_views, arguments.out, asked=config, on_step=say)


if __name__ == "__main__":
    main()
