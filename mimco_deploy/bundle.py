"""The encoder bundle: one folder, or a `.zip` or `.tar` of it, that holds an encoder, its contract and its proof.

    encoder/
    ├── encoder.json      the contract (`EncoderSpec`), the SHA-256 of the files below, and of itself
    ├── model.onnx        fp32: image uint8 [batch, H, W, 3] → embedding float32 [batch, D], L2-normalised
    ├── model.int8.onnx   the same in another precision, where it was exported; also model.fp16.onnx, model.bf16.onnx
    ├── golden.npz        images uint8 [G, H, W, 3], embeddings float32 [G, D] as torch computed them
    ├── parity.json       how far each graph is from torch
    └── MODEL_CARD.md     the facts for people; not hashed: yours to edit

`docs/formats.md` gives the bytes. Standard library and NumPy only: this is read where torch is not installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import typing
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mimco_deploy.atomic import current_dir, write_bytes
from mimco_deploy.bundle_archive import Unpacked, is_archive, unpack
from mimco_deploy.errors import BundleError
from mimco_deploy.preprocess import CropMode, Interpolation

FORMAT_VERSION = 3
_WITHOUT_CROP_MODE = 2
READABLE = (_WITHOUT_CROP_MODE, FORMAT_VERSION)
SPEC_FILE = "encoder.json"
GOLDEN_FILE = "golden.npz"
PARITY_FILE = "parity.json"
CARD_FILE = "MODEL_CARD.md"
Precision = Literal["fp32", "fp16", "bf16", "int8"]
MODEL_FILES: dict[Precision, str] = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "bf16": "model.bf16.onnx",
    "int8": "model.int8.onnx",
}
_HASHED = (*MODEL_FILES.values(), GOLDEN_FILE, PARITY_FILE)
_LEAST = {"image_size_px": 1, "crop_share": 1 / 16, "embedding_dim": 1}
"""Of a smaller share nearly nothing of a picture would be seen, for which all of it is enlarged."""
_MAX_CONTRACT_BYTES = 1 << 20
_MAX_GOLDEN_BYTES = 1 << 28
_EXPORT = "mimco export --format onnx"


@dataclass(frozen=True)
class Tolerance:
    """How far an artefact may be from torch in float32, both sides L2-normalised."""

    max_abs: float
    """Largest difference of any component."""
    min_cosine: float
    """Least cosine of any embedding with its reference."""
    min_overlap: float
    """Least share of the ten nearest neighbours that stay, mean over pictures."""


# The one place where tolerances stand. Measured in docs/decisions.md: right graphs are ten times nearer and more;
# another normalisation or pooling, or an activation that overflows, is far outside.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(max_abs=1e-4, min_cosine=0.99999, min_overlap=0.99),
    "fp16": Tolerance(max_abs=5e-3, min_cosine=0.999, min_overlap=0.98),
    "bf16": Tolerance(max_abs=3e-2, min_cosine=0.998, min_overlap=0.95),
    "int8": Tolerance(max_abs=5e-2, min_cosine=0.98, min_overlap=0.95),
}
_HASHED_AT_ONCE = 2**22


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What a backend must know to use the encoder, and what a person must know to trust it."""

    architecture: str
    """timm's name of the backbone."""
    image_size_px: int
    """Side of the square input."""
    crop_share: float
    """Side of the centre crop over the short side of the resized picture, in [1/16, 1]."""
    interpolation: Interpolation
    """Filter of the resize: `bicubic` or `bilinear`, Pillow's."""
    crop_mode: CropMode
    """`center`, or `squash` where the picture becomes a square before the crop."""
    embedding_dim: int
    """D, length of an embedding."""
    pooling: str
    """How tokens become one vector: `mean` of the patch tokens, or `cls`."""
    patch_grid: int
    """Patch tokens along one side in the second output, `patches`; 0 where the graph has no such output."""
    fingerprint: str
    """SHA-256 over weights, architecture, pooling and geometry: equal fingerprints give comparable embeddings."""
    licence: str
    """Licence of the weights, as stated at export, unless what they come from forbids more."""
    weights_source: str
    """Where the weights come from."""
    teacher_source: str
    """Where the teacher of those weights comes from."""
    opset: int
    """ONNX opset of the graphs."""

    @property
    def geometry(self) -> tuple[int, float, Interpolation, CropMode]:
        """What `preprocess` takes after a picture."""
        return self.image_size_px, self.crop_share, self.interpolation, self.crop_mode


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
    """Folder; of an archive, where it is unpacked as long as this object lives."""
    spec: EncoderSpec
    golden: Golden
    precisions: tuple[Precision, ...]
    """What there is a graph of; fp32 first."""
    defaults: Mapping[str, Precision]
    """Device → precision, as `mimco bench --pick` found it; fp32 where nothing is said."""
    _unpacked: Unpacked | None = field(default=None, repr=False, compare=False)

    def model(self, precision: Precision) -> Path:
        """The ONNX graph of a precision.

        Raises:
            BundleError: there is none.
        """
        if precision not in self.precisions:
            raise BundleError(
                f"{self.path} has no {precision}",
                expected=" or ".join(self.precisions),
                command=f"{_EXPORT} --precision {precision}",
            )
        return self.path / MODEL_FILES[precision]

    def precision_for(self, device: str) -> Precision:
        """What to run on a device (`cpu`, `cuda`, …) where nobody says."""
        return self.defaults.get(device, "fp32")


def write_contract(
    folder: Path,
    spec: EncoderSpec,
    defaults: Mapping[str, Precision] | None = None,
    precisions: Collection[Precision] = tuple(MODEL_FILES),
) -> None:
    """Write `encoder.json`, hashing the other files of `folder`: the last step of making or changing a bundle.

    Args:
        folder: of the bundle.
        spec: the contract.
        defaults: see `Bundle`.
        precisions: whose graphs count, where they are there.
    """
    others = [name for precision, name in MODEL_FILES.items() if precision not in precisions]
    files = {name: sha256_of(folder / name) for name in _HASHED if name not in others and (folder / name).is_file()}
    document = {"format_version": FORMAT_VERSION, **asdict(spec), "defaults": dict(defaults or {}), "files": files}
    document["checksum"] = checksum_of(document)
    write_bytes(folder / SPEC_FILE, (json.dumps(document, indent=2) + "\n").encode())


def write_golden(folder: Path, golden: Golden) -> None:
    """Write `golden.npz`."""
    np.savez(folder / GOLDEN_FILE, images=golden.images, embeddings=golden.embeddings)


def read_bundle(path: Path) -> Bundle:
    """Read and check a bundle; the graphs themselves are not run here (`serving.encoders` does that).

    Args:
        path: a folder, or a `.zip` or `.tar` of one.

    Raises:
        BundleError: it is missing, of another format, incomplete, or a file has another hash than stated.
    """
    unpacked = None
    if is_archive(path):
        unpacked = unpack(path)
        folder = unpacked.path
    else:
        folder = current_dir(path)
    contract = folder / SPEC_FILE
    if not contract.is_file():
        raise BundleError(f"no encoder in {path}", expected=SPEC_FILE, command=_EXPORT)
    spec, defaults, stated = _read_contract(contract)
    for name in {MODEL_FILES["fp32"], GOLDEN_FILE, *stated}:
        if not (folder / name).is_file():
            raise BundleError(f"{folder / name} is missing", expected="a whole bundle", command=_EXPORT)
        if (found := sha256_of(folder / name)) != stated.get(name):
            raise BundleError(
                f"{folder / name} has SHA-256 {found[:12]}…",
                expected=f"{str(stated.get(name, 'none'))[:12]}…",
                command=_EXPORT,
            )
    precisions = tuple(precision for precision, name in MODEL_FILES.items() if name in stated)
    golden = _read_golden(folder / GOLDEN_FILE, spec)
    return Bundle(folder, spec, golden, precisions, defaults, unpacked)


def _read_contract(path: Path) -> tuple[EncoderSpec, dict[str, Precision], dict[str, str]]:
    """The contract, the default precisions, and the hashes that are stated."""
    try:
        if path.stat().st_size > _MAX_CONTRACT_BYTES:
            raise ValueError(f"more than {_MAX_CONTRACT_BYTES:,} bytes")
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
        version = document["format_version"]
        if version not in READABLE:
            raise BundleError(f"{path} has format version {version}", expected=str(FORMAT_VERSION), command=_EXPORT)
        stated = document.pop("checksum")
        if stated != checksum_of(document):
            raise ValueError("its checksum is not that of its content")
        files, defaults = document.pop("files"), document.pop("defaults")
        there = {precision for precision, name in MODEL_FILES.items() if name in files}
        if not set(files.keys()) <= set(_HASHED) or not set(defaults.values()) <= there:
            raise ValueError("files that no bundle has, or a default precision that this one has not")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path} cannot be read ({error!r})", expected="an encoder contract", command=_EXPORT
        ) from error
    if document.pop("format_version") == _WITHOUT_CROP_MODE:
        document.setdefault("crop_mode", "center")
    hints = typing.get_type_hints(EncoderSpec)
    wrong = {item.name for item in fields(EncoderSpec)} ^ set(document)
    wrong |= {
        name for name, value in document.items() if name in hints and not _fits(hints[name], value, _LEAST.get(name, 0))
    }
    if not re.fullmatch("[0-9a-f]{64}", str(document.get("fingerprint"))):
        wrong.add("fingerprint")
    if wrong:
        raise BundleError(
            f"{path} differs in its keys ({', '.join(sorted(wrong))})", expected="those of the format", command=_EXPORT
        )
    return EncoderSpec(**document), defaults, files


def _fits(kind: Any, value: object, least: float) -> bool:
    if choices := typing.get_args(kind):
        return value in choices
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, float | int) and least <= value <= 1
    if kind is int:
        return isinstance(value, int) and least <= value < 1 << 20
    return isinstance(value, kind)


def _read_golden(path: Path, spec: EncoderSpec) -> Golden:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_GOLDEN_BYTES:
                raise ValueError(f"more than {_MAX_GOLDEN_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            images: Any = np.atleast_1d(arrays["images"])
            embeddings: Any = np.atleast_1d(arrays["embeddings"])
    except Exception as error:  # NumPy's reader of broken headers raises nearly anything
        raise BundleError(f"{path} cannot be read ({error})", expected="golden pictures", command=_EXPORT) from error
    count, side = len(images), spec.image_size_px
    if not (
        count > 0
        and (images.dtype, images.shape) == (np.uint8, (count, side, side, 3))
        and (embeddings.dtype, embeddings.shape) == (np.float32, (count, spec.embedding_dim))
    ):
        raise BundleError(
            f"{path} holds golden images {images.dtype} {list(images.shape)} and embeddings {embeddings.dtype} "
            f"{list(embeddings.shape)}",
            expected=f"uint8 [G, {side}, {side}, 3] and float32 [G, {spec.embedding_dim}]",
            command=_EXPORT,
        )
    return Golden(images, embeddings)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key comes twice, of which readers would see one or the other."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def checksum_of(document: Mapping[str, object]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    In larger parts than `hashlib.file_digest`'s: after each a thread waits for the interpreter, as a cold search does.
    Not as a memory map, in which a disk that fails ends the process.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        part = memoryview(bytearray(min(_HASHED_AT_ONCE, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(part):
            digest.update(part[:count])
    return digest.hexdigest()
