"""Does an encoder find more than raw pixels do? Query by query on the same photos, which tells more than two intervals.

    python benchmarks/study/pixels.py mimco_deploy/encoders/mimco-vit-tiny-64 --photos photos/clothing \
        --random "patch_size_px=16 embed_dim=256 depth=6 num_heads=4 image_size_px=64" \
        --result docs/study/raw/beside-pixels.json

Beside pixels of several sizes, with the mean of each picture taken off and without, and the same network untrained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.study.measure import random_encoder
from benchmarks.study.run import RawPixels, machine
from mimco_deploy.atomic import write_bytes
from mimco_deploy.evaluation.evaluate import Evaluation, evaluate
from mimco_deploy.evaluation.measures import difference
from mimco_deploy.serving.encoders import Encoder, load_encoder
from mimco_deploy.sources import find_pictures

SIDES_PX = (8, 16, 32, 64)
MEASURES = (("retrieval", "mAP"), ("retrieval", "recall@1"), ("copies", "recall@1, all edits"))


def measured(encoder: Encoder, name: str, photos: Path) -> list[Evaluation]:
    """Queries in a gallery by kind, and edited copies among all photos."""
    queries, gallery = (find_pictures([str(photos / part)]) for part in ("query", "gallery"))
    everything = sorted(queries + gallery, key=lambda picture: picture.name)
    return [
        evaluate(encoder, name, queries, gallery, ("retrieval",)),
        evaluate(encoder, name, everything, (), ("copies",)),
    ]


def compared(ours: list[Evaluation], others: list[Evaluation]) -> dict[str, object]:
    """Each measure of the others, and by how much ours is higher."""
    rows: dict[str, object] = {}
    for wanted in MEASURES:
        mine, theirs = (
            next(one for found in both for one in found.measures if (one.protocol, one.name) == wanted)
            for both in (ours, others)
        )
        apart = difference(theirs, mine)
        rows[", ".join(wanted)] = {"theirs": theirs.as_row(), "ours higher by": apart and apart.as_row()}
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--random", required=True, help="sizes of the same network, to be left untrained")
    parser.add_argument("--photos", type=Path, required=True, help="a folder with gallery/<class> and query/<class>")
    parser.add_argument("--result", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    encoder = load_encoder(options.bundle)
    ours = measured(encoder, "ours", options.photos)
    baselines: dict[str, Encoder] = {
        f"{side} px{', centred' if centred else ''}": RawPixels(side, centred=centred)
        for side in SIDES_PX
        for centred in (False, True)
    }
    with tempfile.TemporaryDirectory() as name:
        baselines["random weights"] = load_encoder(random_encoder(options.random.split(), Path(name)))
        rows = {name: compared(ours, measured(one, name, options.photos)) for name, one in baselines.items()}
    document = {
        "bundle": encoder.spec.fingerprint,
        "machine": machine(),
        "ours": [one.as_row() for found in ours for one in found.measures],
        "beside": rows,
    }
    write_bytes(options.result, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
