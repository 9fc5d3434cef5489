"""The two stages, from settings to a finished run: wiring only, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn

from mimco_deploy.errors import CheckpointError, ConfigError
from mimco_deploy.training.augment import MaskedTwoViews, OneCrop, TwoViews
from mimco_deploy.training.backbone import Backbone, weights_hash
from mimco_deploy.training.checkpoint import Checkpoint
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.data import MakeViews, fit_batch
from mimco_deploy.training.distributed import process_group, world_size
from mimco_deploy.training.loop import StepReport, train
from mimco_deploy.training.method_config import (
    FDConfig,
    JointConfig,
    MAEConfig,
    MimCoConfig,
    MoBYConfig,
    MoCoV3Config,
    Pooling,
    SimMIMConfig,
)
from mimco_deploy.training.methods.fd import FD
from mimco_deploy.training.methods.joint import Joint
from mimco_deploy.training.methods.mae import MAE
from mimco_deploy.training.methods.mimco import MimCo
from mimco_deploy.training.methods.moby import MoBY
from mimco_deploy.training.methods.mocov3 import MoCoV3
from mimco_deploy.training.methods.simmim import SimMIM
from mimco_deploy.training.published import load_teacher
from mimco_deploy.training.run_folder import make_way, only_writer
from mimco_deploy.training.schedules import check_warmup
from mimco_deploy.training.step import Method, check_compiler

logger = logging.getLogger(__name__)

FEW_STEPS = 100
"""Below this a run hardly leaves its random weights."""

StageConfig = TypeVar("StageConfig", Stage1Config, Stage2Config)
OnStep = Callable[[StepReport], None]


def train_stage1(
    config: Stage1Config, folder: Path, *, resume: Checkpoint | None = None, on_step: OnStep = lambda _: None
) -> None:
    """Train the contrastive teacher with MoCo v3 or MoBY.

    Args:
        config: settings; those of the checkpoint where the run is resumed.
        folder: of the run; its `last/` is the teacher for stage 2.
        resume: where to go on from.
        on_step: called at every logged step.

    Raises:
        MimcoError: see `load_corpus` and `loop.train`.
    """
    with process_group() as device, only_writer(folder):
        corpus = load_corpus(config.data)
        asked, config = config, _fit_and_tell(config, len(corpus), resume)
        torch.manual_seed(config.run.seed)
        method, make_views = build_stage1(config)
        start_encoder(method, config.start_from, resume)
        check_compiler(config.run, device)
        make_way(folder, resuming=resume is not None)
        train(method.to(device), config, corpus, make_views, folder, asked=asked, resume=resume, on_step=on_step)


def train_stage2(
    config: Stage2Config, folder: Path, *, resume: Checkpoint | None = None, on_step: OnStep = lambda _: None
) -> None:
    """Train the student: with MimCo against the frozen teacher that `config.teacher` names, or with a control.

    Args:
        config: settings; those of the checkpoint where the run is resumed.
        folder: of the run; its `last/` is what gets exported.
        resume: where to go on from; it holds the teacher too.
        on_step: called at every logged step.

    Raises:
        MimcoError: see `load_corpus`, `published.load_teacher` and `loop.train`.
    """
    with process_group() as device, only_writer(folder):
        teacher = teacher_of(config, resume)
        corpus = load_corpus(config.data)
        asked, config = config, _fit_and_tell(config, len(corpus), resume)
        torch.manual_seed(config.run.seed)
        method, make_views = build_stage2(config, teacher)
        start_encoder(method, config.start_from, resume)
        check_compiler(config.run, device)
        make_way(folder, resuming=resume is not None)
        train(method.to(device), config, corpus, make_views, folder, asked=asked, resume=resume, on_step=on_step)


def build_stage1(config: Stage1Config) -> tuple[nn.Module, MakeViews]:
    """The method of stage 1 that `config` names, and the views that it takes.

    Raises:
        ConfigError: the backbone does not suit the method.
    """
    make_views = TwoViews(config.backbone.image_size_px, config.views, recipes=torch.cuda.is_available())
    match config.method:
        case MoCoV3Config():
            return MoCoV3(config.backbone, config.method), make_views
        case MoBYConfig():
            return MoBY(config.backbone, config.method), make_views


def build_stage2(config: Stage2Config, teacher: tuple[Backbone, Pooling] | None) -> tuple[nn.Module, MakeViews]:
    """The method of stage 2 that `config` names, and the views that it takes.

    Raises:
        ConfigError: backbone, teacher and masks do not fit each other.
    """
    backbone, mask, side, views = config.backbone, config.mask, config.backbone.image_size_px, config.views
    if mask.kind.startswith("attention") and not isinstance(config.method, MimCoConfig):
        raise ConfigError(f"mask.kind {mask.kind} for {config.method.name}", expected="random or rectangles")
    match config.method:
        case MimCoConfig():
            assert teacher is not None
            mimco = MimCo(backbone, *teacher, mask, config.method)
            return mimco, OneCrop(side, views, mimco.mask_shape, mask.kind)
        case FDConfig():
            assert teacher is not None
            return FD(backbone, *teacher, config.method), OneCrop(side, views)
        case SimMIMConfig():
            simmim = SimMIM(backbone, mask)
            return simmim, OneCrop(side, views, simmim.mask_shape, mask.kind)
        case MAEConfig():
            mae = MAE(backbone, mask, config.method)
            return mae, OneCrop(side, views, mae.mask_shape, mask.kind)
        case JointConfig():
            joint = Joint(backbone, mask, config.method)
            recipes = torch.cuda.is_available()
            return joint, MaskedTwoViews(side, views, joint.mask_shape, mask.kind, recipes=recipes)


def teacher_of(config: Stage2Config, resume: Checkpoint | None) -> tuple[Backbone, Pooling] | None:
    """The teacher from its source; of a resumed run a blank one, whose weights come with the checkpoint."""
    if not isinstance(config.method, MimCoConfig | FDConfig):
        return None
    if resume is None:
        return load_teacher(config.teacher)
    if resume.teacher is None:
        raise CheckpointError(f"{resume.path} tells of no teacher", expected="a checkpoint of a run with one")
    backbone = Backbone(resume.teacher.backbone)
    backbone.licence = resume.teacher.licence
    return backbone, resume.teacher.pooling


def start_encoder(method: nn.Module, source: str, resume: Checkpoint | None = None) -> None:
    """Give the encoder, and its momentum copy where there is one, the weights that the run starts from.

    A resumed run's come with its checkpoint, which also tells what they once started as.

    Raises:
        MimcoError: see `load_teacher`; or they do not fit the backbone.
    """
    encoder = cast(Method, method).encoder
    if resume is not None and resume.start is not None:
        encoder.start, encoder.licence = resume.start.weights, resume.start.licence
    if resume is not None or not source:
        return
    start, _ = load_teacher(source)
    words = f"{start.config.name}, weights with SHA-256 {weights_hash(start.state_dict())}"
    start.resize(encoder.config.image_size_px)
    for part in method.children():
        if isinstance(part, Backbone):
            part.start_as(start, "--start-from")
    encoder.start = words


def fit_stage(config: StageConfig, pictures: int) -> StageConfig:
    """The run with a batch that so many pictures fill.

    Raises:
        ConfigError: it cannot be divided as asked, or the warm-up leaves nothing.
    """
    run = fit_batch(config.run, pictures)
    check_warmup(config.optim, run.epochs)
    parts = run.accumulate * world_size()
    if run.global_batch_size % parts or run.global_batch_size // parts < 2:
        split = f"{world_size()} processes × {run.accumulate} micro-batches"
        raise ConfigError(
            f"run.global_batch_size {run.global_batch_size} over {split}",
            expected="at least 2 pictures in each, evenly; a contrastive loss needs negatives",
        )
    return dataclasses.replace(config, run=run)


def _fit_and_tell(config: StageConfig, pictures: int, resume: Checkpoint | None) -> StageConfig:
    fitted = fit_stage(config, pictures)
    batch, wanted = fitted.run.global_batch_size, config.run.global_batch_size
    if batch != wanted:
        logger.warning("global batch of %d instead of %d: %d pictures", batch, wanted, pictures)
    steps = pictures // batch * fitted.run.epochs
    if steps < FEW_STEPS and resume is None:
        logger.warning("only %d steps with %d pictures: --epochs or a smaller --batch-size give more", steps, pictures)
    return fitted
