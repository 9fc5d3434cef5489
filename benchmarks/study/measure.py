"""The study's figures for one bundle, such as the encoder that ships; and for the same network with random weights.

    python benchmarks/study/measure.py mimco_deploy/encoders/mimco-vit-tiny-64 --train tiny/train-*.tar \
        --val tiny/val.tar --photos photos/clothing --result docs/study/raw/mimco-vit-tiny-64.json
    python benchmarks/study/measure.py --random "patch_size_px=16 embed_dim=256 depth=6 num_heads=4 image_size_px=64" …

Protocols and pictures are those of `run.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.study.run import PER_CLASS, Task, first_of_each_class, machine
from mimco_deploy.atomic import write_bytes
from mimco_deploy.export.pipeline import export_encoder
from mimco_deploy.export.student import Source
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.sources import find_pictures
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.presets import PRESETS
from mimco_deploy.training.settings import apply_settings


def random_encoder(settings: list[str], folder: Path) -> Path:
    """A bundle of a ViT of these sizes that nothing was taught."""
    config = apply_settings(PRESETS["vit_tiny_debug"]().stage2, [f"backbone.{one}" for one in settings])
    torch.manual_seed(0)
    export_encoder(Source(Backbone(config.backbone), "mean", "random weights"), folder / "encoder")
    return folder / "encoder"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--random", help="sizes of a network with random weights, in place of a bundle")
    parser.add_argument("--train", nargs="+", required=True, help="folders or tars with <class>/<picture>")
    parser.add_argument("--val", nargs="+", required=True)
    parser.add_argument("--photos", type=Path, help="a folder with gallery/<class> and query/<class>")
    parser.add_argument("--result", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    if (options.bundle is None) == (options.random is None):
        sys.exit("a bundle or --random")
    gallery = first_of_each_class(find_pictures(options.train), PER_CLASS)
    task = Task(gallery, find_pictures(options.val), options.photos)
    with tempfile.TemporaryDirectory() as name:
        encoder = load_encoder(options.bundle or random_encoder(options.random.split(), Path(name)))
        found = task.measure(encoder, options.result.stem)
    document = {
        "bundle": encoder.spec.fingerprint,
        "weights": encoder.spec.weights_source,
        "machine": machine(),
        **found,
    }
    write_bytes(options.result, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
