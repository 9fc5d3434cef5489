"""Checkpoints: one folder, replaced as a whole.

last/
├── config.json         format version, stage, step, settings, fingerprint of the corpus, teacher's architecture
├── model.safetensors   the method's state: encoder, heads, teacher or momentum encoder, queue
├── optimizer.pt        AdamW's state, loaded with weights_only=True
└── timm/               the encoder alone, for timm.create_model("local-dir:…", pretrained=True)
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimco_deploy.atomic import current_dir, staged_dir
from mimco_deploy.errors import CheckpointError
from mimco_deploy.training.backbone import UNSTATED, Backbone, save_as_timm
from mimco_deploy.training.config import BackboneConfig, Stage1Config, Stage2Config
from mimco_deploy.training.method_config import Pooling, pooling_of
from mimco_deploy.training.settings import from_document, to_document
from mimco_deploy.training.teacher import Teacher

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4
_WITHOUT_LICENCE, _WITHOUT_START = 2, 3
STAGES: dict[str, type[Stage1Config] | type[Stage2Config]] = {"stage1": Stage1Config, "stage2": Stage2Config}


def stage_name(config: Stage1Config | Stage2Config) -> str:
    """`stage1` or `stage2`."""
    return next(name for name, kind in STAGES.items() if isinstance(config, kind))


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """What a stage-2 checkpoint says of the teacher whose weights it holds."""

    backbone: BackboneConfig
    pooling: Pooling
    licence: str
    """Of its weights."""


@dataclass(frozen=True, kw_only=True)
class StartSpec:
    """What a checkpoint says of the weights that its encoder started with."""

    weights: str
    """Architecture and SHA-256."""
    licence: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose `config.json` was read."""

    path: Path
    stage: str
    step: int
    total_steps: int
    corpus: str
    """Fingerprint of the corpus."""
    config: Stage1Config | Stage2Config
    teacher: TeacherSpec | None
    """None for methods without one."""
    start: StartSpec | None
    """None where the encoder started at random, or as the teacher."""

    def warn_if_unfinished(self) -> None:
        """Say so where somebody uses a run that was stopped half-way."""
        if self.step < self.total_steps:
            logger.warning("%s stopped at step %d of %d; --resume goes on", self.path, self.step, self.total_steps)

    def load_model(self) -> dict[str, Tensor]:
        """The method's state.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        try:
            return load_file(self.path / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / 'model.safetensors'}: {error}", expected="safetensors") from error

    def load_optimizer(self) -> dict[str, Any]:
        """The optimiser's state.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        path = self.path / "optimizer.pt"
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # an unpickler of broken bytes raises nearly anything, with advice over many lines
            raise CheckpointError(f"{path} cannot be read", expected="an optimiser's state") from error
        return state


def save_checkpoint(
    folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer, config: Stage1Config | Stage2Config, **state: Any
) -> None:
    """Replace `folder` by the present state of a run.

    Args:
        folder: the checkpoint, `last/` of a run.
        method: has the backbone as `encoder`, and where it has a frozen teacher that as `teacher`.
        optimizer: its AdamW.
        config: of the run.
        state: `step`, `total_steps` and `corpus` of `Checkpoint`.
    """
    teacher = getattr(method, "teacher", None)
    assert isinstance(method.encoder, Backbone)
    spec = start = None
    if isinstance(teacher, Teacher):
        licence = teacher.backbone.licence
        spec = TeacherSpec(backbone=teacher.built_as, pooling=teacher.pooling, licence=licence)
    if method.encoder.start:
        start = StartSpec(weights=method.encoder.start, licence=method.encoder.licence)
    document = {
        "format_version": FORMAT_VERSION,
        "stage": stage_name(config),
        **state,
        "config": to_document(config),
        "teacher": spec and to_document(spec),
        "start": start and to_document(start),
    }
    with written_whole(folder) as staging:
        (staging / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: value.contiguous() for name, value in method.state_dict().items()}, staging / "model.safetensors"
        )
        torch.save(optimizer.state_dict(), staging / "optimizer.pt")
        save_as_timm(method.encoder, staging / "timm", _licence(spec, start))
        mode = (staging / "config.json").stat().st_mode
        for path in staging.rglob("*.safetensors"):
            path.chmod(mode)  # safetensors writes for the owner alone, whatever the umask


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """`atomic.staged_dir` for a checkpoint.

    Raises:
        CheckpointError: it cannot be written, most often for want of room.
    """
    try:
        with staged_dir(folder) as staging:
            yield staging
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is how torch tells of a full disk
        free = shutil.disk_usage(folder.parent).free >> 20
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder} cannot be written ({reason}), with {free:,} MiB free on its disk",
            expected="room for two checkpoints; the last one that was written stays, and --resume goes on from it",
        ) from error


def _licence(teacher: TeacherSpec | None, start: StartSpec | None) -> str:
    """Of what was learnt from, and of what was started as: one forbids what the other allows."""
    known = [behind.licence for behind in (teacher, start) if behind is not None]
    return " and ".join(dict.fromkeys(known)) or UNSTATED


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's `config.json`.

    Raises:
        CheckpointError: there is none, or it is of another format.
    """
    folder = current_dir(folder)
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version, stage = document.pop("format_version"), document.pop("stage")
        if version not in (_WITHOUT_LICENCE, _WITHOUT_START, FORMAT_VERSION):
            raise CheckpointError(
                f"{path} has format version {version}",
                expected=str(FORMAT_VERSION),
                command=f"mimco train {stage} --fresh --data DIR",
            )
        settings, told = document.pop("config"), document.pop("teacher")
        if version < FORMAT_VERSION:
            settings["start_from"], document["start"] = "", None
        config = from_document(STAGES[stage], settings)
        if told and version == _WITHOUT_LICENCE:
            told["licence"] = UNSTATED
        teacher = from_document(TeacherSpec, told) if told else None
        begun = document.pop("start")
        start = from_document(StartSpec, begun) if begun else None
        return Checkpoint(folder, stage, config=config, teacher=teacher, start=start, **document)
    except OSError as error:
        raise CheckpointError(f"no checkpoint in {folder}", expected="config.json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}", expected="a checkpoint's config.json") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder says that it is a checkpoint of mimco's, readable or not."""
    path = current_dir(folder) / "config.json"
    try:
        return "format_version" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def load_encoder(checkpoint: Checkpoint) -> tuple[Backbone, Pooling]:
    """The trained encoder of a run, and the pooling that its loss trained.

    Of a MoCo v3 or MoBY run it is the online encoder, as in every published evaluation of them.

    Raises:
        CheckpointError: the weights do not fit the settings; names the keys.
    """
    backbone = Backbone(checkpoint.config.backbone)
    prefix = "encoder."
    state = {
        key.removeprefix(prefix): value for key, value in checkpoint.load_model().items() if key.startswith(prefix)
    }
    load_strictly(backbone, state, checkpoint.path)
    backbone.licence = _licence(checkpoint.teacher, checkpoint.start)
    return backbone, pooling_of(checkpoint.config.method, backbone.own_pooling)


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load weights that fit exactly.

    Raises:
        CheckpointError: keys are missing or surplus, or shapes differ; names them.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 600, placeholder=" …")  # a line for each key
        raise CheckpointError(f"{source}: {reason}", expected="weights that fit") from error
