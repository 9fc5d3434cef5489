"""The two stages, from settings to a finished run: wiring only, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from mimco_deploy.errors import ConfigError
from mimco_deploy.training.augment import MaskedView, TwoViews
from mimco_deploy.training.checkpoint import Checkpoint, load_encoder, read_checkpoint
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.corpus import Corpus, load_corpus
from mimco_deploy.training.distributed import is_main, process_group, world_size
from mimco_deploy.training.loop import StepReport, fit_batch, train
from mimco_deploy.training.masking import mask_shape
from mimco_deploy.training.methods.mimco import MimCo
from mimco_deploy.training.methods.mocov3 import MoCoV3
from mimco_deploy.training.schedules import check_warmup
from mimco_deploy.workspace import set_aside

logger = logging.getLogger(__name__)

FEW_STEPS = 100
"""Below this a run hardly leaves its random weights."""

StageConfig = TypeVar("StageConfig", Stage1Config, Stage2Config)
OnStep = Callable[[StepReport], None]


def train_stage1(
    config: Stage1Config, folder: Path, *, resume: Checkpoint | None = None, on_step: OnStep = lambda _: None
) -> None:
    """Train the contrastive teacher with MoCo v3.

    Args:
        config: settings; those of the checkpoint where the run is resumed.
        folder: of the run; its `last/` is the teacher for stage 2.
        resume: where to go on from.
        on_step: called at every logged step.

    Raises:
        MimcoError: see `load_corpus` and `loop.train`.
    """
    with process_group() as device:
        corpus = load_corpus(config.data)
        config = _fit(config, corpus, resume)
        torch.manual_seed(config.run.seed)
        method = MoCoV3(config.backbone, config.method).to(device)
        make_views = TwoViews(config.backbone.image_size_px, config.views)
        _prepare_folder(folder, resume)
        train(method, config, corpus, make_views, folder, resume=resume, on_step=on_step)


def train_stage2(
    config: Stage2Config, folder: Path, *, resume: Checkpoint | None = None, on_step: OnStep = lambda _: None
) -> None:
    """Train the student with MimCo against the frozen teacher that `config.teacher` names.

    Args:
        config: settings; those of the checkpoint where the run is resumed.
        folder: of the run; its `last/` is what gets exported.
        resume: where to go on from.
        on_step: called at every logged step.

    Raises:
        MimcoError: see `load_corpus`, `checkpoint.load_encoder` and `loop.train`.
    """
    with process_group() as device:
        teacher, teacher_pooling = load_encoder(read_checkpoint(Path(config.teacher)))
        corpus = load_corpus(config.data)
        config = _fit(config, corpus, resume)
        torch.manual_seed(config.run.seed)
        masked = mask_shape(config.backbone, config.mask).masked_patches
        method = MimCo(config.backbone, teacher, teacher_pooling, masked, config.method).to(device)
        make_views = MaskedView(config.backbone, config.mask)
        _prepare_folder(folder, resume)
        train(method, config, corpus, make_views, folder, resume=resume, on_step=on_step)


def _prepare_folder(folder: Path, resume: Checkpoint | None) -> None:
    """Make the run's folder; a run that is there and not resumed is moved aside, once nothing else can be refused."""
    if not is_main():
        return
    if resume is None and folder.exists():
        logger.warning("the run that was in %s is now in %s", folder, set_aside(folder))
    folder.mkdir(parents=True, exist_ok=True)


def _fit(config: StageConfig, corpus: Corpus, resume: Checkpoint | None) -> StageConfig:
    run = config.run
    check_warmup(config.optim, run.epochs)
    batch = fit_batch(run, len(corpus))
    if batch < run.global_batch_size:
        logger.warning("global batch of %d instead of %d: %d pictures", batch, run.global_batch_size, len(corpus))
        config = dataclasses.replace(config, run=dataclasses.replace(run, global_batch_size=batch))
    steps = len(corpus) // batch * run.epochs
    if steps < FEW_STEPS and resume is None:
        logger.warning(
            "only %d steps with %d pictures: --epochs or a smaller --batch-size give more", steps, len(corpus)
        )
    parts = run.accumulate * world_size()
    if batch % parts or batch // parts < 2:
        raise ConfigError(
            f"run.global_batch_size {batch} over {world_size()} processes × {run.accumulate} micro-batches",
            expected="at least 2 pictures in each, evenly; a contrastive loss needs negatives",
        )
    return config
