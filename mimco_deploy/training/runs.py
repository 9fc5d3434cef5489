"""What a person asked for → what will run: presets, changes to them, resuming, starting anew."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mimco_deploy.atomic import current_dir
from mimco_deploy.errors import CheckpointError, ConfigError, WorkspaceError
from mimco_deploy.training.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from mimco_deploy.training.config import BackboneConfig, DataConfig, Stage1Config, Stage2Config
from mimco_deploy.training.presets import PRESETS, WITH_TEACHER, Recipe, with_stage1_method, with_stage2_method
from mimco_deploy.training.published import load_teacher
from mimco_deploy.training.settings import apply_settings, differences

StageT = TypeVar("StageT", Stage1Config, Stage2Config)

_MAY_CHANGE = ("data.memory_mib", "data.workers", "run.checkpoint_every_steps", "run.log_every_steps")
"""Settings that a resumed run may be given anew: they do not change what is learned."""
LAST = "last"
"""Name of the checkpoint in a run's folder."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a training command; what is None or empty is left to the preset."""

    data: tuple[Path, ...] = ()
    preset: str | None = None
    method: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    settings: tuple[str, ...] = ()
    """`section.field=value`, applied last."""
    resume: bool = False
    fresh: bool = False
    teacher: str | None = None
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
        return _resumed(checkpoint.config, request), checkpoint
    if not request.data:
        raise ConfigError("no pictures to train on", command="mimco train stage1 --data DIR")
    config = _preset(request.preset or _default_preset()).stage1
    return request.apply(with_stage1_method(config, request.method or config.method.name)), None


def open_stage2(folder: Path, stage1: Path, request: Request) -> tuple[Stage2Config, Checkpoint | None]:
    """The same for stage 2. Pictures, preset and backbone follow the teacher's where none are given.

    Args:
        folder: of the stage-2 run.
        stage1: folder of the stage-1 run, which is the teacher where the request names none; methods without a teacher
            take its pictures and backbone if it is there.
        request: the options.

    Raises:
        MimcoError: as for stage 1, or there is no teacher.
    """
    checkpoint = _open_folder(folder, "stage2", request)
    if checkpoint is not None:
        assert isinstance(checkpoint.config, Stage2Config)
        return _resumed(checkpoint.config, request), checkpoint
    method = request.method or "mimco"
    source = _source(stage1, request.teacher, needed=method in WITH_TEACHER)
    backbone, data = _of_source(source) if source else (None, None)
    if request.preset or backbone is None:
        recipe = _preset(request.preset or _default_preset())
    else:
        recipe = _recipe_for(backbone)
    if data is None and not request.data:
        raise ConfigError("no pictures to train on", command="mimco train stage2 --data DIR")
    config = with_stage2_method(recipe, method)
    if method in WITH_TEACHER:
        config = dataclasses.replace(config, teacher=source)
    return request.apply(dataclasses.replace(config, data=data or config.data)), None


def _open_folder(folder: Path, stage: str, request: Request) -> Checkpoint | None:
    last = current_dir(folder / LAST)
    if request.resume:
        if request.fresh:
            raise ConfigError("--resume with --fresh", expected="one of them")
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


def _resumed(config: StageT, request: Request) -> StageT:
    """The run's own settings; what decides only how fast it goes and how often it tells may be asked for anew."""
    asked = request.apply(config)
    changes = list(differences(config, asked))
    if request.preset is not None:
        changes.append(("--preset", "settings of its own", request.preset))
    if request.method not in (None, config.method.name):
        changes.append(("--method", config.method.name, request.method))
    if isinstance(config, Stage2Config) and request.teacher is not None:
        teacher = _source(Path(), request.teacher, needed=True)
        if teacher != config.teacher:
            changes.append(("--teacher", config.teacher, teacher))
    for key, old, new in changes:
        if key not in _MAY_CHANGE:
            raise ConfigError(
                f"--resume with {key} {new}, where the run has {old}", expected="the same, or --fresh to start anew"
            )
    return asked


def _source(stage1: Path, given: str | None, *, needed: bool) -> str:
    """Where the teacher is: as given, a path made whole; else the stage-1 run; empty where there is none."""
    if given is not None:
        hub = given.startswith("timm/") and not Path(given).exists()
        return given if hub else str(Path(given).resolve())
    last = (stage1 / LAST).resolve()
    if current_dir(last).is_dir():
        return str(last)
    if needed:
        raise WorkspaceError(f"no teacher in {last}", expected="a checkpoint", command="mimco train stage1 --data DIR")
    return ""


def _of_source(source: str) -> tuple[BackboneConfig, DataConfig | None]:
    """Backbone of a teacher, and the pictures of its run if it is one of ours."""
    if is_checkpoint(Path(source)):
        run = read_checkpoint(Path(source))
        run.warn_if_unfinished()
        return run.config.backbone, run.config.data
    return load_teacher(source)[0].config, None


def _preset(name: str) -> Recipe:
    if name not in PRESETS:
        raise ConfigError(f"no preset {name}", expected=f"one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def _default_preset() -> str:
    return "vit_small" if torch.cuda.is_available() else "vit_tiny_debug"


def _recipe_for(backbone: BackboneConfig) -> Recipe:
    """The preset made for a teacher like this, with a student of the teacher's architecture and sizes."""
    same_name = [recipe for make in PRESETS.values() if (recipe := make()).stage2.backbone.name == backbone.name]
    same_size = [recipe for recipe in same_name if recipe.stage2.backbone.image_size_px == backbone.image_size_px]
    if not same_name:
        raise ConfigError(
            f"no preset for the teacher's {backbone.name}", expected=f"--preset {' or '.join(sorted(PRESETS))}"
        )
    recipe = (same_size or same_name)[0]
    plain = recipe.stage2.backbone
    student = dataclasses.replace(
        backbone, drop_path=plain.drop_path, global_pool=plain.global_pool, mean=plain.mean, std=plain.std
    )
    return dataclasses.replace(recipe, stage2=dataclasses.replace(recipe.stage2, backbone=student))
