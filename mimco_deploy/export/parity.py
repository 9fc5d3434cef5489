"""Torch against each artefact, through the encoder class that serves it in production."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from mimco_deploy.bundle import MODEL_FILES, TOLERANCES, Bundle, Golden, Precision, Tolerance
from mimco_deploy.errors import ParityError
from mimco_deploy.export.half import in_fp32
from mimco_deploy.serving.agreement import Agreement, compare
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.serving.encoders.onnx import OnnxEncoder

BATCH_SIZES = (1, 2, 5)
MAX_BATCH = 32
PATCH_PICTURES = 2
EMULATED = "rounding emulated"


@dataclass(frozen=True)
class BatchParity:
    """How far an artefact is from torch on the golden pictures at one batch size."""

    batch_size: int
    max_abs: float
    """Largest absolute difference of any component."""
    min_cosine: float
    """Smallest cosine of an embedding with its reference."""


@dataclass(frozen=True)
class ArtefactParity:
    """The proof of one graph."""

    precision: Precision
    provider: str
    """What ran it."""
    tolerance: Tolerance
    batches: tuple[BatchParity, ...]
    pictures_from: str
    """Where the pictures of `neighbours` come from: `drawn` by mimco, or a `folder` of the user's."""
    neighbours: Agreement
    """On those pictures, in batches of `MAX_BATCH`."""
    speed_against_fp32: float | None = None
    """Images/s over those of fp32 on this machine at batch 8; of int8, which ships for nothing else."""

    @property
    def max_abs(self) -> float:
        """The worst difference of all."""
        return float(np.max([self.neighbours.max_abs, *(batch.max_abs for batch in self.batches)]))  # NaN stays NaN

    @property
    def min_cosine(self) -> float:
        """The least cosine of all."""
        return float(np.min([self.neighbours.min_cosine, *(batch.min_cosine for batch in self.batches)]))

    def breaches(self) -> list[str]:
        """What is outside the tolerance, in words."""
        worst = dataclasses.replace(self.neighbours, max_abs=self.max_abs, min_cosine=self.min_cosine)
        return worst.breaches(self.tolerance)


@dataclass(frozen=True)
class Pictures:
    """What neighbours are looked for among, with torch's embeddings."""

    origin: str
    """`drawn` or `folder`"""
    images: npt.NDArray[np.uint8]
    """[N, H, W, 3]"""
    embeddings: npt.NDArray[np.float32]
    """[N, D]"""
    golden_patches: npt.NDArray[np.float32] | None = None
    """[`PATCH_PICTURES`, L, width], patch tokens of the first golden pictures, where the graph gives them."""


def check_parity(encoder: Encoder, golden: Golden, pictures: Pictures) -> ArtefactParity:
    """Embed the golden pictures at several batch sizes, and the others in large batches, and compare with torch.

    Raises:
        ParityError: something is outside the tolerance of the precision; says what and by how much.
    """
    precision, batches, errors = encoder.precision, [], []
    for size in BATCH_SIZES:
        embeddings = _in_batches(encoder, golden.images, size)
        errors.append(np.abs(embeddings - golden.embeddings).max(axis=1))
        found = compare(embeddings, golden.embeddings)
        batches.append(BatchParity(size, found.max_abs, found.min_cosine))
    embeddings = _in_batches(encoder, pictures.images, MAX_BATCH)
    neighbours = compare(embeddings, pictures.embeddings)
    report = ArtefactParity(
        precision, encoder.provider, TOLERANCES[precision], tuple(batches), pictures.origin, neighbours
    )
    breaches = report.breaches()
    if pictures.golden_patches is not None and isinstance(encoder, OnnxEncoder):
        cosine = _least_cosine(encoder.embed_with_patches(golden.images[:PATCH_PICTURES])[1], pictures.golden_patches)
        if not cosine >= TOLERANCES[precision].min_cosine:
            breaches.append(f"patch tokens have cosine {cosine:.6f} (at least {TOLERANCES[precision].min_cosine})")
    if breaches:
        worst = [*np.max(errors, axis=0), *np.abs(embeddings - pictures.embeddings).max(axis=1)]
        far = sum(not error <= TOLERANCES[precision].max_abs for error in worst)
        raise ParityError(
            f"the {precision} graph is not what torch computes, on {encoder.provider}: {', '.join(breaches)}; "
            f"{far} of {len(worst)} pictures by more than {TOLERANCES[precision].max_abs:.0e}",
            expected="the tolerance of its precision",
        )
    return report


def check_half_without_gpu(bundle: Bundle, precision: Precision, golden: Golden, pictures: Pictures) -> ArtefactParity:
    """The same for fp16 or bf16 on a CPU, which has no such operators: by the roundings of the file's own graph.

    ONNX Runtime would run an fp16 graph there, but in fp32 and without rounding: an activation that overflows on a GPU
    would pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = in_fp32(onnx.load(bundle.model(precision)))
        (Path(folder) / MODEL_FILES[precision]).write_bytes(model.SerializeToString())
        encoder = OnnxEncoder(dataclasses.replace(bundle, path=Path(folder)), precision, "cpu")
        report = check_parity(encoder, golden, pictures)
    return dataclasses.replace(report, provider=f"{report.provider}, {EMULATED}")


def write_parity(path: Path, artefacts: Sequence[ArtefactParity]) -> None:
    """Write `parity.json`."""
    document = {"artefacts": [asdict(artefact) for artefact in artefacts]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_parity(path: Path) -> tuple[ArtefactParity, ...]:
    """The inverse of `write_parity`, for a file whose hash was checked."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return tuple(
        ArtefactParity(
            **{
                **entry,
                "tolerance": Tolerance(**entry["tolerance"]),
                "batches": tuple(BatchParity(**batch) for batch in entry["batches"]),
                "neighbours": Agreement(**entry["neighbours"]),
            }
        )
        for entry in document["artefacts"]
    )


def _least_cosine(found: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Of pictures' patch tokens, all those of a picture together: single ones can be next to nothing."""
    pairs = zip(found.astype(np.float64), reference.astype(np.float64), strict=True)
    return float(np.min([np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]))


def _in_batches(encoder: Encoder, images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    return np.concatenate([encoder.embed(images[start : start + size]) for start in range(0, len(images), size)])
