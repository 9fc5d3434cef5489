"""What a person asked for → what will run: presets, changes to them, resuming, starting anew."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mimco_deploy.atomic import current_dir
from mimco_deploy.errors import CheckpointError, ConfigError, WorkspaceError
from mimco_deploy.training.checkpoint import Checkpoint, read_checkpoint
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.presets import PRESETS, Recipe
from mimco_deploy.training.settings import apply_settings

StageT = TypeVar("StageT", Stage1Config, Stage2Config)

LAST = "last"
"""Name of the checkpoint in a run's folder."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a training command; what is None or empty is left to the preset."""

    data: tuple[Path, ...] = ()
    preset: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    settings: tuple[str, ...] = ()
    """`section.field=value`, applied last."""
    resume: bool = False
    fresh: bool = False
    teacher: Path | None = None
    init_from_teacher: bool | None = None

    def all_settings(self) -> list[str]:
        """Every option that is a setting, as one."""
        named = {
            "run.epochs": self.epochs,
            "run.global_batch_size": self.batch_size,
            "method.init_from_teacher": self.init_from_teacher,
        }
        return [*(f"{key}={value}" for key, value in named.items() if value is not None), *self.settings]

    def apply(self, config: StageT) -> StageT:
        """The config with every option of the request in it."""
        if self.epochs is not None:  # a shorter run warms up for the same share of itself
            warmup = config.optim.warmup_epochs * self.epochs / config.run.epochs
            config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_epochs=warmup))
        config = apply_settings(config, self.all_settings())
        if not self.data:
            return config
        sources = tuple(str(path.resolve()) for path in self.data)  # the workspace may be used from another folder
        return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def open_stage1(folder: Path, request: Request) -> tuple[Stage1Config, Checkpoint | None]:
    """Settings of a stage-1 run, and the checkpoint to go on from, if that was asked for.

    Raises:
        MimcoError: nothing to resume, a run that would be overwritten, no data, or a setting that does not exist.
    """
    checkpoint = _open_folder(folder, "stage1", request)
    if checkpoint is not None:
        assert isinstance(checkpoint.config, Stage1Config)
        return checkpoint.config, checkpoint
    if not request.data:
        raise ConfigError("no pictures to train on", command="mimco train stage1 --data DIR")
    recipe = _preset(request.preset or ("vit_small" if torch.cuda.is_available() else "vit_tiny_debug"))
    return request.apply(recipe.stage1), None


def open_stage2(folder: Path, teacher: Path, request: Request) -> tuple[Stage2Config, Checkpoint | None]:
    """The same for stage 2. Pictures, preset and backbone follow the teacher's where none are given.

    Args:
        folder: of the stage-2 run.
        teacher: of the stage-1 run, where the request names no teacher.
        request: the options.

    Raises:
        MimcoError: as for stage 1, or there is no teacher.
    """
    checkpoint = _open_folder(folder, "stage2", request)
    if checkpoint is not None:
        assert isinstance(checkpoint.config, Stage2Config)
        return checkpoint.config, checkpoint
    source = (request.teacher or teacher / LAST).resolve()
    if not current_dir(source).is_dir():
        raise WorkspaceError(
            f"no teacher in {source}", expected="a checkpoint", command="mimco train stage1 --data DIR"
        )
    teacher_run = read_checkpoint(source)
    teacher_run.warn_if_unfinished()
    trained = teacher_run.config
    recipe = _preset(request.preset or _preset_of(trained.backbone.name))
    config = dataclasses.replace(recipe.stage2, backbone=trained.backbone, data=trained.data, teacher=str(source))
    return request.apply(config), None


def _open_folder(folder: Path, stage: str, request: Request) -> Checkpoint | None:
    last = current_dir(folder / LAST)
    if request.resume:
        changed = dataclasses.replace(request, resume=False) != Request()
        if changed:
            raise ConfigError("--resume with other options", expected="--resume alone: a run keeps its settings")
        if not last.exists():
            command = "mimco train stage1 --data DIR" if stage == "stage1" else "mimco train stage2"
            raise CheckpointError(f"no run in {folder} to resume", command=command)
        checkpoint = read_checkpoint(last)
        if checkpoint.stage != stage:
            raise CheckpointError(f"{checkpoint.path} is of {checkpoint.stage}", expected=stage)
        return checkpoint
    if last.exists() and not request.fresh:
        raise CheckpointError(f"{folder} already holds a run", expected="--resume to go on or --fresh to start anew")
    return None


def _preset(name: str) -> Recipe:
    if name not in PRESETS:
        raise ConfigError(f"no preset {name}", expected=f"one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def _preset_of(backbone: str) -> str:
    for name, make in PRESETS.items():
        if make().stage1.backbone.name == backbone:
            return name
    raise ConfigError(f"no preset for the teacher's {backbone}", expected=f"--preset {' or '.join(sorted(PRESETS))}")
