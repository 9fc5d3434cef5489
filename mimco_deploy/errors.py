"""Every error that a user's input can cause.

Each is one line: what was found, what was expected, and the command that mends it. The command line prints that line
and exits with 1; anything that is not a `MimcoError` is a defect of mimco and keeps its traceback.

    MimcoError
    ├── WorkspaceError         an artefact that a command needs is not there
    ├── MissingExtraError      an optional dependency is not installed
    ├── ImageError             one picture cannot be turned into pixels
    ├── ConfigError            a setting that does not exist or does not fit
    │   └── ConditionError     a condition of a search that cannot be used
    ├── DataError              a training corpus that cannot be trained on
    ├── CheckpointError        a checkpoint that is missing, broken or of another kind
    ├── TrainingError          a run that diverged or collapsed
    ├── TrainingInterrupted    a run that was asked to stop, after its checkpoint was written
    ├── BundleError            an encoder bundle that is missing, broken or fails its own proof
    ├── ParityError            an exported graph that does not answer as torch does
    ├── EngineError            a TensorRT engine that is stale, foreign, broken or cannot be built
    ├── ProviderError          a device or runtime that was asked for and does not run
    ├── IndexStoreError        an index that is missing, broken or held by another writer
    │   └── IndexBusyError     an index that cannot be read or written for now
    │       └── IndexNewerError  or by this mimco
    ├── EncoderMismatchError   an index made by another encoder
    ├── EvaluationError        pictures, labels or a ground truth that cannot be measured with
    ├── MoveError              pictures that cannot be moved out of the way, or back
    └── ServiceError           `mimco serve` refused or does not answer (serving/client.py)
"""

from __future__ import annotations

import re
from typing import Literal

ImageProblem = Literal[
    "missing", "unreadable", "empty", "too_large", "unsupported", "truncated", "corrupt", "timeout", "crashed"
]
"""Why a file is no picture. The last two: its decoder did not come to an end in time, or brought its process down."""


_STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls but the line end, what parts lines or turns their direction, and halves of letters."""


def plain(text: str) -> str:
    """A text for a terminal: names of files are in it, and what would steer the terminal becomes `�`."""
    return _STEERING.sub("�", text)


class MimcoError(Exception):
    """Base of all errors a user can cause.

    Args:
        found: what is the case, naming the file, key or value.
        expected: what would have been right, or empty.
        command: the next command to run, or empty.
    """

    def __init__(self, found: str, *, expected: str = "", command: str = "") -> None:
        self.found = found
        self.expected = expected
        self.command = command
        parts = [found]
        if expected:
            parts.append(f"expected {expected}")
        if command:
            parts.append(f"run: {command}")
        super().__init__(" ".join("; ".join(parts).split("\n")))  # one line, whatever a name or a library holds


class WorkspaceError(MimcoError):
    """An artefact that a command needs is not in the workspace."""


class MissingExtraError(MimcoError):
    """An optional dependency is not installed."""


class ImageError(MimcoError):
    """One picture cannot be turned into pixels.

    Args:
        problem: the reason class, stable enough to count and store.
        found: the same in words.
    """

    def __init__(self, problem: ImageProblem, found: str) -> None:
        super().__init__(found)
        self.problem = problem

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return (ImageError, (self.problem, self.found))  # crosses process borders in data-loading workers


class ConfigError(MimcoError):
    """A setting that does not exist or does not fit the others."""


class ConditionError(ConfigError):
    """A condition of a search that is none, names what is not there, or takes too long."""


class DataError(MimcoError):
    """A training corpus that cannot be trained on."""


class CheckpointError(MimcoError):
    """A checkpoint that is missing, broken or of another kind."""


class TrainingError(MimcoError):
    """A run that diverged (NaN) or collapsed.

    Args:
        found: what is the case.
        expected: what would have been right, and what often helps.
        step: that went wrong, counted from 0.
    """

    def __init__(self, found: str, *, expected: str, step: int) -> None:
        super().__init__(found, expected=expected)
        self.step = step


class TrainingInterrupted(MimcoError):
    """A run that was asked to stop. Its checkpoint is written."""


class BundleError(MimcoError):
    """An encoder bundle that is missing, broken or fails its own proof."""


class ParityError(MimcoError):
    """An exported graph that does not answer as torch does."""


class EngineError(MimcoError):
    """A TensorRT engine that is stale, foreign, broken or cannot be built."""


class ProviderError(MimcoError):
    """A device or runtime that was asked for and does not run."""


class IndexStoreError(MimcoError):
    """An index that is missing, broken or held by another writer."""


class IndexBusyError(IndexStoreError):
    """An index that is sound, as far as is known, and cannot be read or written for now."""


class IndexNewerError(IndexBusyError):
    """An index that a newer mimco made."""


class QueryError(ConfigError):
    """A query of which its pictures, parts and weights make nothing to search with."""


class EncoderMismatchError(MimcoError):
    """An index made by another encoder than the one at hand."""


class EvaluationError(MimcoError):
    """Pictures, labels or a ground truth that cannot be measured with."""


class MoveError(MimcoError):
    """Pictures that cannot be moved out of the way, or back."""
