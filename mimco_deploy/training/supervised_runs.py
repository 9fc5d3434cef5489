"""What a person asked of a run with labels → what will run: values for the encoder, changes to them, resuming."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mimco_deploy.atomic import current_dir
from mimco_deploy.errors import CheckpointError, ConfigError, WorkspaceError
from mimco_deploy.training.checkpoint import is_checkpoint, read_checkpoint
from mimco_deploy.training.data import resize_batch
from mimco_deploy.training.finetune_config import FinetuneConfig, LinearConfig, finetune_preset, linear_preset
from mimco_deploy.training.published import load_teacher
from mimco_deploy.training.runs import LAST, MAY_CHANGE, whole
from mimco_deploy.training.settings import apply_settings, differences
from mimco_deploy.training.supervised_checkpoint import SavedRun, read_run

ConfigT = TypeVar("ConfigT", FinetuneConfig, LinearConfig)


@dataclass(frozen=True, kw_only=True)
class LabelledRequest:
    """The options of a command that trains with labels; what is None or empty is left to the encoder's values."""

    source: str | None = None
    """The encoder; by default the student."""
    data: tuple[Path, ...] = ()
    val: tuple[Path, ...] = ()
    epochs: int | None = None
    batch_size: int | None = None
    grad_accum: str | None = None
    """A number of micro-batches, or `auto`, which `plan.fit_to_memory` settles before a new run."""
    settings: tuple[str, ...] = ()
    """`section.field=value`, applied last."""
    resume: bool = False
    fresh: bool = False

    def apply(self, config: ConfigT) -> ConfigT:
        """The config with every option of the request in it."""
        run, optim, data = config.run, config.optim, config.data
        if self.epochs is not None and self.epochs != run.epochs:
            # a shorter run warms up for the same share of itself
            optim = dataclasses.replace(optim, warmup_epochs=optim.warmup_epochs * self.epochs / run.epochs)
            run = dataclasses.replace(run, epochs=self.epochs)
        if self.batch_size is not None and self.batch_size != run.global_batch_size:
            run = resize_batch(run, self.batch_size)
        if self.grad_accum not in (None, "auto"):
            run = dataclasses.replace(run, accumulate=int(str(self.grad_accum)))
        if self.data:
            data = dataclasses.replace(data, sources=_whole_paths(self.data))
        config = dataclasses.replace(config, run=run, optim=optim, data=data)
        if self.val:
            config = dataclasses.replace(config, val=_whole_paths(self.val))
        if self.source is not None:
            config = dataclasses.replace(config, encoder=whole(self.source))
        return apply_settings(config, self.settings)


def open_finetune(folder: Path, student: Path, request: LabelledRequest) -> tuple[FinetuneConfig, SavedRun | None]:
    """Settings of a run of fine-tuning, and the checkpoint to go on from, if that was asked for.

    Args:
        folder: of the run.
        student: the checkpoint to start from where the request names none.
        request: the options.

    Raises:
        MimcoError: nothing to resume, a run that would be overwritten, no encoder, no pictures, or a setting that does
            not exist.
    """
    saved = _open_folder(folder, "finetune", request)
    if saved is not None:
        assert isinstance(saved.config, FinetuneConfig)
        return _same(saved.config, request), saved
    source = _source(student, request, "finetune")
    encoder, _ = load_teacher(source)
    config = dataclasses.replace(finetune_preset(encoder.config), encoder=source)
    return request.apply(config), None


def open_linear(folder: Path, student: Path, request: LabelledRequest) -> tuple[LinearConfig, SavedRun | None]:
    """The same for a linear probe, which pools as the encoder's own loss did."""
    saved = _open_folder(folder, "linear", request)
    if saved is not None:
        assert isinstance(saved.config, LinearConfig)
        return _same(saved.config, request), saved
    source = _source(student, request, "linear")
    encoder, pooling = load_teacher(source)
    config = linear_preset(encoder.config)
    method = dataclasses.replace(config.method, pooling=pooling)
    return request.apply(dataclasses.replace(config, method=method, encoder=source)), None


def _open_folder(folder: Path, kind: str, request: LabelledRequest) -> SavedRun | None:
    last = folder / LAST
    if request.resume:
        if request.fresh:
            raise ConfigError("--resume with --fresh", expected="one of them")
        if not current_dir(last).exists():
            command = f"mimco train {kind} --data DIR --val DIR"
            raise CheckpointError(f"no run in {folder} to resume", command=command)
        return read_run(last, kind)
    if current_dir(last).exists() and not request.fresh:
        raise CheckpointError(f"{folder} already holds a run", expected="--resume to go on or --fresh to start anew")
    return None


def _source(student: Path, request: LabelledRequest, kind: str) -> str:
    """Where the encoder is, once the pictures are known to be named."""
    for name, given in (("train", request.data), ("measure", request.val)):
        if not given:
            raise ConfigError(f"no pictures to {name} on", command=f"mimco train {kind} --data DIR --val DIR")
    if request.source is None and not current_dir(student).is_dir():
        raise WorkspaceError(
            f"no encoder in {student}",
            expected=f"a checkpoint, or mimco train {kind} --from SOURCE",
            command="mimco train stage2",
        )
    source = whole(request.source if request.source is not None else str(student))
    if is_checkpoint(Path(source)):
        read_checkpoint(Path(source)).warn_if_unfinished()
    return source


def _same(kept: ConfigT, request: LabelledRequest) -> ConfigT:
    """What was asked for, if it is the run's own settings but for how fast it goes and how often it tells."""
    asked = request.apply(kept)
    for key, old, new in differences(kept, asked):
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"--resume with {key} {new}, where the run has {old}", expected="the same, or --fresh to start anew"
            )
    return asked


def _whole_paths(paths: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(str(path.resolve()) for path in paths)  # the workspace may be used from another folder
