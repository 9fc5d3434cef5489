"""The encoder bundle: one folder that holds an encoder, its contract and its proof.

    encoder/
    ├── encoder.json   the contract (`EncoderSpec`) and the SHA-256 of the other files
    ├── model.onnx     image uint8 [batch, H, W, 3] → embedding float32 [batch, D], L2-normalised
    ├── golden.npz     images uint8 [G, H, W, 3], embeddings float32 [G, D] as torch computed them
    └── parity.json    how far the graph is from torch

`docs/formats.md` gives the bytes. Standard library and NumPy only: this is read where torch is not installed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimco_deploy.atomic import current_dir
from mimco_deploy.errors import BundleError

FORMAT_VERSION = 1
SPEC_FILE = "encoder.json"
MODEL_FILE = "model.onnx"
GOLDEN_FILE = "golden.npz"
PARITY_FILE = "parity.json"

# Farthest that any artefact may be from the reference embeddings (both sides L2-normalised), where the artefact is
# fp32. Measured for ViTs of 6 to 12 blocks: 2e-7 to 2e-6; another normalisation or pooling shows as 1e-2 and more.
MAX_ABS_FP32 = 1e-4


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What a backend must know to use the encoder, and what a person must know to trust it."""

    architecture: str
    """timm's name of the backbone."""
    image_size_px: int
    """Side of the square input."""
    crop_share: float
    """Side of the centre crop over the short side of the resized picture, in (0, 1]."""
    embedding_dim: int
    """D, length of an embedding."""
    pooling: str
    """How tokens become one vector: `mean` of the patch tokens, or `cls`."""
    fingerprint: str
    """SHA-256 over weights, architecture, pooling and geometry: equal fingerprints give comparable embeddings."""
    licence: str
    """Licence of the weights, as the one who trained them stated it."""
    weights_source: str
    """Where the weights come from."""
    teacher_source: str
    """Where the teacher of those weights comes from."""
    opset: int
    """ONNX opset of the graph."""


@dataclass(frozen=True)
class Golden:
    """Pictures with their reference embeddings."""

    images: npt.NDArray[np.uint8]
    """[G, H, W, 3]"""
    embeddings: npt.NDArray[np.float32]
    """[G, D], L2-normalised, computed by torch in float32."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose contract was read and whose files have the hashes it states."""

    path: Path
    spec: EncoderSpec
    golden: Golden

    @property
    def model(self) -> Path:
        """The fp32 ONNX graph."""
        return self.path / MODEL_FILE


def write_contract(folder: Path, spec: EncoderSpec) -> None:
    """Write `encoder.json`, hashing the other files of `folder`: the last step of making a bundle."""
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != SPEC_FILE}
    document = {"format_version": FORMAT_VERSION, **asdict(spec), "files": files}
    (folder / SPEC_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_golden(folder: Path, golden: Golden) -> None:
    """Write `golden.npz`."""
    np.savez(folder / GOLDEN_FILE, images=golden.images, embeddings=golden.embeddings)


def read_bundle(path: Path) -> Bundle:
    """Read and check a bundle; the graph itself is not run here (`serving.encoders` does that).

    Raises:
        BundleError: the folder is missing, of another format, incomplete, or a file has another hash than stated.
    """
    path = current_dir(path)
    contract = path / SPEC_FILE
    if not contract.is_file():
        raise BundleError(f"no encoder in {path}", expected=SPEC_FILE, command="mimco export --format onnx")
    again = "mimco export --format onnx"
    try:
        document: dict[str, Any] = json.loads(contract.read_text(encoding="utf-8"))
        version = document.pop("format_version")
        stated: dict[str, str] = document.pop("files")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BundleError(
            f"{contract} cannot be read ({error!r})", expected="an encoder contract", command=again
        ) from error
    if version != FORMAT_VERSION:
        raise BundleError(f"{contract} has format version {version}", expected=str(FORMAT_VERSION), command=again)
    names = {field.name for field in fields(EncoderSpec)}
    if set(document) != names:
        difference = ", ".join(sorted(set(document) ^ names))
        raise BundleError(
            f"{contract} differs in its keys ({difference})", expected="those of the format", command=again
        )
    for name in {MODEL_FILE, GOLDEN_FILE, *stated}:
        if not (path / name).is_file():
            raise BundleError(f"{path / name} is missing", expected="a whole bundle", command=again)
        if (found := _sha256(path / name)) != stated.get(name):
            raise BundleError(
                f"{path / name} has SHA-256 {found[:12]}…", expected=f"{stated.get(name, 'none')[:12]}…", command=again
            )
    with np.load(path / GOLDEN_FILE, allow_pickle=False) as arrays:
        golden = Golden(arrays["images"], arrays["embeddings"])
    return Bundle(path, EncoderSpec(**document), golden)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
