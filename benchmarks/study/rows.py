"""The rows of the study: what each trains, as the changes to one recipe. Names are file names in docs/study/raw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One student."""

    title: str
    method: str = "mimco"
    settings: tuple[str, ...] = ()
    """As for `--set`, over the recipe that all rows share."""


TABLES: dict[str, tuple[str, ...]] = {
    "methods": ("pixels", "random", "teacher", "simmim", "mae", "joint", "fd", "mimco", "mimco-from-teacher"),
    "levels": ("mimco", "patch-only", "image-only"),
    "losses": ("mimco", "patch-only", "l1", "l1-normalised", "smooth-l1", "cosine"),
    "dictionaries": ("mimco", "intra", "batch", "queue"),
    "weights": ("mimco", "patch-quarter", "image-quarter"),
}
"""Each table by its rows, in the order in which it is printed."""

_PATCH_ALONE = "method.image.weight=0"

ROWS: dict[str, Row] = {
    "simmim": Row("SimMIM: pixels of masked units, no teacher", "simmim"),
    "mae": Row("MAE: standardised pixels, no teacher", "mae"),
    "joint": Row("both pretexts at once, no frozen teacher", "joint"),
    "fd": Row("FD: the teacher's tokens, nothing masked", "fd", ("views.min_crop_scale=0.67",)),  # MimCo's views
    "mimco": Row("MimCo, both levels"),
    "mimco-from-teacher": Row("MimCo, both levels, starts as the teacher", settings=("method.init_from_teacher=true",)),
    "patch-only": Row("MimCo, patch level only", settings=(_PATCH_ALONE,)),
    "image-only": Row("MimCo, image level only", settings=("method.patch.weight=0",)),
    "l1": Row("patch level only, L1 on the teacher's tokens", settings=(_PATCH_ALONE, "method.patch.kind=l1")),
    "l1-normalised": Row(
        "patch level only, L1 on whitened tokens", settings=(_PATCH_ALONE, "method.patch.kind=l1_normalised")
    ),
    "smooth-l1": Row(
        "patch level only, smooth L1 on whitened tokens", settings=(_PATCH_ALONE, "method.patch.kind=smooth_l1")
    ),
    "cosine": Row("patch level only, 1 − cosine", settings=(_PATCH_ALONE, "method.patch.kind=cosine")),
    "intra": Row("MimCo, negatives of the same image", settings=("method.patch.dictionaries=intra",)),
    "batch": Row("MimCo, negatives of the batch", settings=("method.patch.dictionaries=batch",)),
    "queue": Row("MimCo, negatives of a queue", settings=("method.patch.dictionaries=queue",)),
    "patch-quarter": Row("MimCo, patch level × 0.25", settings=("method.patch.weight=0.25",)),
    "image-quarter": Row("MimCo, image level × 0.25", settings=("method.image.weight=0.25",)),
}
