"""`MODEL_CARD.md`: what a bundle is, from facts alone; and what its licence can be."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from mimco_deploy.bundle import MODEL_FILES, EncoderSpec
from mimco_deploy.export.parity import ArtefactParity
from mimco_deploy.export.student import Source
from mimco_deploy.serving.scan import readable
from mimco_deploy.training.backbone import UNSTATED

logger = logging.getLogger(__name__)

# Among timm's: Apple's and SEER's are for research alone.
_NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial|research[- ]only|\bamlr\b|\bseer-license\b", re.IGNORECASE)


def bundle_licence(source: Source, stated: str | None) -> str:
    """The licence to write into a bundle: what is stated, unless the weights come from what forbids commercial use.

    Args:
        source: the weights; `backbone.licence` is of those that were loaded, or of those behind trained ones.
        stated: by the one who exports, or None.
    """
    known, stated = source.backbone.licence, readable(stated or "")
    if not _NON_COMMERCIAL.search(known):
        inherited = UNSTATED if _behind(source) else known  # a permissive teacher says nothing of the student
        return stated or inherited
    origin = _behind(source) or source.weights
    logger.warning("the weights come from %s, which is %s: so is the bundle", origin, known)
    return f"{known}, by {origin}" + (f"; stated for the rest: {stated}" if stated else "")


def _behind(source: Source) -> str:
    """The weights that trained ones learnt from or started as; empty where there are none."""
    teacher = f"the teacher ({source.teacher})" if source.teacher != "none" else ""
    start = f"what it started as ({source.start})" if source.start else ""
    return " and ".join(filter(None, (teacher, start)))


def model_card(spec: EncoderSpec, source: Source, artefacts: Sequence[ArtefactParity]) -> str:
    """The card as Markdown."""
    facts = {
        "Architecture": f"{spec.architecture}, {spec.image_size_px} px, pooling `{spec.pooling}`",
        "Embedding": f"{spec.embedding_dim} numbers, L2-normalised",
        "Fingerprint": f"`{spec.fingerprint}`",
        "Weights": spec.weights_source,
        "Teacher": spec.teacher_source,
        **({"Started as": source.start} if source.start else {}),
        "Licence of the weights behind it": source.backbone.licence if _behind(source) else "there are none",
        "Licence": spec.licence,
        **(source.recipe or {"Data and recipe": "not known to mimco"}),
    }
    proofs = [
        f"| `{MODEL_FILES[proof.precision]}` | {proof.max_abs:.1e} | {proof.min_cosine:.6f} | "
        f"{_share(proof.neighbours.overlap)} | {proof.neighbours.pictures} {_origin(proof)} | {proof.provider} |"
        for proof in artefacts
    ]
    lines = [
        f"# Model card: {spec.architecture}",
        "",
        "An image encoder that maps a picture to an embedding; the nearer two embeddings by cosine, the more alike the",
        "pictures to this encoder. Written by `mimco export` from what it knows; edit it freely.",
        "",
        *(f"- **{name}**: {fact}" for name, fact in facts.items()),
        "",
        "## Graphs, compared with torch in float32",
        "",
        "| file | largest difference | least cosine | top-10 overlap | pictures | run by |",
        "| --- | --- | --- | --- | --- | --- |",
        *proofs,
        "",
        "## Limits",
        "",
        "- How well it tells pictures apart was not measured by the export.",
        f"- It sees the centre of a picture in {spec.image_size_px} × {spec.image_size_px} px: small things are lost.",
        "- What it takes for alike follows from the pictures that it was trained on, with their biases.",
        "- A score is a cosine, not a probability, and means something else under another fingerprint.",
        "",
    ]
    return "\n".join(lines)


def _origin(proof: ArtefactParity) -> str:
    return "drawn by mimco" if proof.pictures_from == "drawn" else "of the exporter's"


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
