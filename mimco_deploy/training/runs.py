"""What a person asked for → what will run: presets, changes to them, resuming, starting anew."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mimco_deploy.atomic import current_dir
from mimco_deploy.errors import CheckpointError, ConfigError, WorkspaceError
from mimco_deploy.training.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from mimco_deploy.training.config import BackboneConfig, Stage1Config, Stage2Config
from mimco_deploy.training.data import resize_batch
from mimco_deploy.training.method_config import FDConfig, MimCoConfig
from mimco_deploy.training.presets import PRESETS, WITH_TEACHER, Recipe, with_stage1_method, with_stage2_method
from mimco_deploy.training.published import load_teacher
from mimco_deploy.training.settings import apply_settings, differences

StageT = TypeVar("StageT", Stage1Config, Stage2Config)

MAY_CHANGE = (
    *("data.memory_mib", "data.workers"),
    *("run.checkpoint_every_steps", "run.log_every_steps", "run.compile", "run.grad_checkpointing"),
)
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
    grad_accum: str | None = None
    """A number of micro-batches, or `auto`, which `plan.fit_to_memory` settles before a new run."""
    settings: tuple[str, ...] = ()
    """`section.field=value`, applied last."""
    resume: bool = False
    fresh: bool = False
    teacher: str | None = None
    init_from_teacher: bool | None = None
    start_from: str | None = None

    def apply(self, config: StageT) -> StageT:
        """The config with every option of the request in it."""
        run, optim = config.run, config.optim
        if self.epochs is not None and self.epochs != run.epochs:
            # a shorter run warms up for the same share of itself
            optim = dataclasses.replace(optim, warmup_epochs=optim.warmup_epochs * self.epochs / run.epochs)
            run = dataclasses.replace(run, epochs=self.epochs)
        if self.batch_size is not None and self.batch_size != run.global_batch_size:
            run = resize_batch(run, self.batch_size)
        if self.grad_accum not in (None, "auto"):
            run = dataclasses.replace(run, accumulate=int(str(self.grad_accum)))
        config = dataclasses.replace(config, run=run, optim=optim)
        if self.data:
            sources = tuple(str(path.resolve()) for path in self.data)  # the workspace may be used from another folder
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
        start = self.init_from_teacher
        is_mimco = isinstance(config.method, MimCoConfig)
        flag = "--init-from-teacher" if start else "--init-at-random"
        if start is not None and not is_mimco:
            raise ConfigError(f"{flag} with --method {config.method.name}", expected="--method mimco")
        if self.start_from is not None:
            if start is not None:
                raise ConfigError(f"--start-from with {flag}", expected="one of them")
            start = False
            config = dataclasses.replace(config, start_from=whole(self.start_from))
        first = f"method.init_from_teacher={start}" if start is not None and is_mimco else ""
        config = apply_settings(config, filter(None, (first, *self.settings)))
        if isinstance(config.method, FDConfig) and any(setting.startswith("mask.") for setting in self.settings):
            raise ConfigError("a mask with --method fd", expected="another method: feature distillation hides nothing")
        if config.start_from and isinstance(config.method, MimCoConfig) and config.method.init_from_teacher:
            raise ConfigError("--start-from with method.init_from_teacher", expected="one of them")
        return config


def open_stage1(folder: Path, request: Request) -> tuple[Stage1Config, Checkpoint | None]:
    """Settings of a stage-1 run, and the checkpoint to go on from, if that was asked for.

    Raises:
        MimcoError: nothing to resume, a run that would be overwritten, no data, or a setting that does not exist.
    """
    checkpoint = _open_folder(folder, "stage1", request)
    if checkpoint is not None:
        assert isinstance(checkpoint.config, Stage1Config)
        kept = checkpoint.config
        base = kept
        if request.preset or request.method:
            preset = _preset(request.preset).stage1 if request.preset else kept
            base = with_stage1_method(preset, request.method or preset.method.name)
            base = dataclasses.replace(base, data=dataclasses.replace(base.data, sources=kept.data.sources))
        return _same(kept, base, request), checkpoint
    if not request.data:
        raise ConfigError("no pictures to train on", command="mimco train stage1 --data DIR")
    config = _recipe(request, "").stage1
    return request.apply(with_stage1_method(config, request.method or config.method.name)), None


def open_stage2(folder: Path, stage1: Path, request: Request) -> tuple[Stage2Config, Checkpoint | None]:
    """The same for stage 2. Pictures, preset and backbone follow the teacher's where none are given.

    Args:
        folder: of the stage-2 run.
        stage1: folder of the stage-1 run, which is the teacher where the request names none; methods without a teacher
            take its pictures and backbone where none are given.
        request: the options.

    Raises:
        MimcoError: as for stage 1, or there is no teacher.
    """
    method = request.method or "mimco"
    checkpoint = _open_folder(folder, "stage2", request)
    if checkpoint is not None:
        assert isinstance(checkpoint.config, Stage2Config)
        kept = checkpoint.config
        base = kept
        if request.preset or request.method not in (None, kept.method.name):
            recipe = _preset(request.preset) if request.preset else recipe_for(kept.backbone)
            base = with_stage2_method(recipe, request.method or kept.method.name)
            data = dataclasses.replace(base.data, sources=kept.data.sources) if request.preset else kept.data
            base = dataclasses.replace(base, data=data, teacher=kept.teacher)
        if request.teacher is not None:
            base = dataclasses.replace(base, teacher=whole(request.teacher))
        return _same(kept, base, request), checkpoint
    if method not in WITH_TEACHER:
        if request.teacher is not None:
            raise ConfigError(f"--teacher with --method {method}", expected=f"--method {' or '.join(WITH_TEACHER)}")
        source = str(stage1 / LAST) if current_dir(stage1 / LAST).is_dir() else ""
        config = with_stage2_method(_recipe(request, source), method)
        return _with_pictures(config, request, source), None
    source = whole(request.teacher) if request.teacher is not None else str((stage1 / LAST).resolve())
    if request.teacher is None and not current_dir(Path(source)).is_dir():
        raise WorkspaceError(
            f"no teacher in {source}", expected="a checkpoint", command="mimco train stage1 --data DIR"
        )
    config = dataclasses.replace(with_stage2_method(_recipe(request, source), method), teacher=source)
    return _with_pictures(config, request, source), None


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


def _same(kept: StageT, base: StageT, request: Request) -> StageT:
    """What was asked for, if it is the run's own settings but for how fast it goes and how often it tells."""
    asked = request.apply(base)
    if request.grad_accum == "auto":  # it was settled when the run began
        run = kept.run
        run = dataclasses.replace(asked.run, accumulate=run.accumulate, grad_checkpointing=run.grad_checkpointing)
        asked = dataclasses.replace(asked, run=run)
    changes = sorted(differences(kept, asked), key=lambda change: change[0] != "method.name")
    for key, old, new in changes:
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"--resume with {key} {new}, where the run has {'none' if old == '' else old}",
                expected="the same, or --fresh to start anew",
            )
    return asked


def whole(teacher: str) -> str:
    """A path made whole, for the workspace may be used from another folder; names of timm's hub stay."""
    hub = teacher.startswith("timm/") and not Path(teacher).exists()
    return teacher if hub else str(Path(teacher).resolve())


def _recipe(request: Request, source: str) -> Recipe:
    """The preset that was asked for, or the one that suits the start or else the teacher, with a backbone like it.

    Args:
        request: the options.
        source: of the teacher, or empty.
    """
    if request.start_from is not None:
        source = whole(request.start_from)
    if request.preset or not source:
        return _preset(request.preset or _default_preset())
    path = Path(source)
    if is_checkpoint(path):
        run = read_checkpoint(path)
        run.warn_if_unfinished()
        backbone = run.config.backbone
    else:
        backbone = load_teacher(source)[0].config
    recipe = recipe_for(backbone)
    if request.start_from is None:
        return recipe
    return dataclasses.replace(recipe, stage1=dataclasses.replace(recipe.stage1, backbone=recipe.stage2.backbone))


def _with_pictures(config: Stage2Config, request: Request, source: str) -> Stage2Config:
    """The request's pictures, or those of the teacher's run; with all of that run's data settings but for a preset."""
    path = Path(source)
    if source and is_checkpoint(path) and not (request.preset and request.data):
        data = read_checkpoint(path).config.data
        if request.preset:
            data = dataclasses.replace(config.data, sources=data.sources)
        config = dataclasses.replace(config, data=data)
    elif not request.data:
        raise ConfigError("no pictures to train on", command="mimco train stage2 --data DIR")
    return request.apply(config)


def _preset(name: str) -> Recipe:
    if name not in PRESETS:
        raise ConfigError(f"no preset {name}", expected=f"one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def _default_preset() -> str:
    return "vit_small" if torch.cuda.is_available() else "vit_tiny_debug"


def recipe_for(weights: BackboneConfig) -> Recipe:
    """The preset nearest to a teacher, or to a start, with a backbone of its architecture, sizes and normalisation."""
    family = "swin" if weights.name.startswith("swin") else "vit"
    if not any(part in weights.name for part in ("vit", "deit", "beit", "swin_")):
        raise ConfigError(
            f"no preset for {weights.name}, for what is trained is a ViT, BEiT or Swin",
            expected=f"a student of its own for such a teacher: --preset {' or '.join(sorted(PRESETS))}",
        )

    def distance(recipe: Recipe) -> tuple[float, float]:
        plain = recipe.stage2.backbone
        size = abs(math.log(plain.image_size_px / weights.image_size_px))
        return size, abs(math.log(plain.embed_dim / (weights.embed_dim or plain.embed_dim)))

    recipes = [make() for make in PRESETS.values()]
    recipe = min((one for one in recipes if one.stage2.backbone.name.startswith(family)), key=distance)
    plain, mask = recipe.stage2.backbone, recipe.stage2.mask
    backbone = dataclasses.replace(weights, drop_path=plain.drop_path, global_pool=plain.global_pool)
    unit, patch = mask.mask_patch_size_px, weights.patch_size_px or plain.patch_size_px
    if unit % patch or weights.image_size_px % unit:
        grid = weights.image_size_px // patch
        mask = dataclasses.replace(mask, mask_patch_size_px=patch if grid % 2 else 2 * patch)
    return dataclasses.replace(recipe, stage2=dataclasses.replace(recipe.stage2, backbone=backbone, mask=mask))
