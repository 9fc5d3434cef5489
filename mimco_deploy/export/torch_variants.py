"""The encoder in torch itself, for `mimco bench` to compare with: eager, and compiled."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mimco_deploy.bundle import EncoderSpec, Precision
from mimco_deploy.errors import ConfigError
from mimco_deploy.export.student import EncoderModule, fingerprint, from_checkpoint, from_model
from mimco_deploy.serving.agreement import Embeddings
from mimco_deploy.serving.bench import Embed, Variant
from mimco_deploy.serving.sample import Pixels
from mimco_deploy.training.checkpoint import is_checkpoint, read_checkpoint


def torch_variants(spec: EncoderSpec, source: str, device: str) -> list[Variant]:
    """Eager in fp32, and `torch.compile` in fp32 on a CPU or bf16 on a GPU.

    Args:
        spec: of the bundle to compare with.
        source: a checkpoint folder, or as for `student.from_model`.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: the source is another encoder than the bundle's.
        CheckpointError: there is none, or it cannot be loaded.
    """
    module = _load_module(source, spec.image_size_px)
    if (found := fingerprint(module)) != spec.fingerprint:
        raise ConfigError(f"{source} is encoder {found[:12]}", expected=f"{spec.fingerprint[:12]}, that of the bundle")
    size = sum(value.nbytes for value in module.state_dict().values()) / 2**20
    side = spec.image_size_px
    compiled: Precision = "bf16" if device == "cuda" else "fp32"
    return [
        Variant("torch eager", "fp32", device, _load, (source, side, device, False, "fp32"), size, in_bundle=False),
        Variant(
            "torch.compile", compiled, device, _load, (source, side, device, True, compiled), size, in_bundle=False
        ),
    ]


def _load_module(source: str, image_size_px: int) -> EncoderModule:
    path = Path(source)
    found = from_checkpoint(read_checkpoint(path)) if is_checkpoint(path) else from_model(source)
    found.backbone.resize(image_size_px)
    return EncoderModule(found.backbone, found.pooling)


def _load(source: str, image_size_px: int, device: str, compiled: bool, precision: str) -> tuple[Embed, str]:
    """Runs in a process of its own; see `Variant.load`."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    module = _load_module(source, image_size_px).to(device)
    run = torch.compile(module) if compiled else module
    half = precision == "bf16"

    def embed(images: Pixels) -> Embeddings:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            embeddings: Embeddings = run(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return embeddings

    return embed, f"torch {torch.__version__}, {device}"
