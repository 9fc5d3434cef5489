"""Export as one transaction: load → convert → prove → put the bundle in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mimco_deploy.atomic import staged_dir
from mimco_deploy.bundle import MODEL_FILE, PARITY_FILE, EncoderSpec, Golden, read_bundle, write_contract, write_golden
from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.export.parity import ParityReport, check_parity
from mimco_deploy.export.student import EncoderModule, fingerprint, weights_hash
from mimco_deploy.export.to_onnx import OPSET, convert
from mimco_deploy.preprocess import preprocess
from mimco_deploy.serving.encoders.onnx import OnnxEncoder
from mimco_deploy.training.backbone import CROP_SHARE
from mimco_deploy.training.checkpoint import Checkpoint, load_encoder

GOLDEN_PICTURES = 8


def export_encoder(checkpoint: Checkpoint, target: Path, licence: str) -> ParityReport:
    """Turn a trained encoder into a bundle. A bundle that fails its proof does not appear; an older one stays.

    Args:
        checkpoint: of a stage-2 run, or of a stage-1 run to export the teacher.
        target: the bundle's folder.
        licence: of the weights, in words.

    Returns:
        The proof.

    Raises:
        CheckpointError: the weights are missing or do not fit.
        ParityError: the graph does not answer as torch does.
    """
    backbone, pooling = load_encoder(checkpoint)
    module = EncoderModule(backbone, pooling)
    config = checkpoint.config
    size = config.backbone.image_size_px
    golden = make_golden(module, size)
    spec = EncoderSpec(
        architecture=config.backbone.name,
        image_size_px=size,
        crop_share=CROP_SHARE,
        embedding_dim=golden.embeddings.shape[1],
        pooling=pooling,
        fingerprint=fingerprint(module),
        licence=licence,
        weights_source=f"mimco {checkpoint.stage}, step {checkpoint.step} of {checkpoint.total_steps}",
        teacher_source=_teacher_source(checkpoint),
        opset=OPSET,
    )
    with staged_dir(target) as staging:
        convert(module, size, staging / MODEL_FILE)
        write_golden(staging, golden)
        write_contract(staging, spec)
        report = check_parity(OnnxEncoder(read_bundle(staging)), golden)
        report.write(staging / PARITY_FILE)
        write_contract(staging, spec)
    return report


def _teacher_source(checkpoint: Checkpoint) -> str:
    """The teacher by its weights: a path would mean nothing where the bundle goes."""
    prefix = "teacher."
    state = {key: value for key, value in checkpoint.load_model().items() if key.startswith(prefix)}
    return f"weights with SHA-256 {weights_hash(state)}" if state else "none"


def make_golden(module: EncoderModule, image_size_px: int) -> Golden:
    """Draw the golden pictures, so that no picture of the user's leaves with the bundle, and embed them with torch."""
    pictures = (draw(kind, seed=2209, size_px=2 * image_size_px) for kind in KINDS[:GOLDEN_PICTURES])
    images: npt.NDArray[np.uint8] = np.stack([preprocess(picture, image_size_px, CROP_SHARE) for picture in pictures])
    with torch.inference_mode():
        embeddings = module(torch.from_numpy(images)).numpy()
    return Golden(images, embeddings)
