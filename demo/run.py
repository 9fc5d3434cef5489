"""The whole chain on one machine, in minutes: pictures → two stages of training → export → index → search → a page.

    make demo                 on pictures that mimco draws
    make demo IMAGES=~/photos on your own

Every step is a command that works by itself; this script prints each and runs it. All of it stays in demo/out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from mimco_deploy.drawings import KINDS, draw, draw_gallery
from mimco_deploy.errors import ImageError
from mimco_deploy.images import IMAGE_SUFFIXES, read_image

OUT = Path(__file__).parent / "out"
DRAWN_PER_KIND = 50
QUERY_SEED = 10_000
"""Beyond the gallery's seeds: the query is a new picture of a kind that the gallery holds."""
VIEWS_STAGE1, VIEWS_STAGE2 = 28_000, 24_000
"""Pictures seen in training: four minutes of both stages on one CPU core."""
SHORT_STAGE1 = ("--set", "method.momentum=0.9")
SHORT_STAGE2 = (
    *("--set", "method.pooling=cls"),
    *("--set", "method.patch.temperature=0.1"),
    *("--set", "method.image.temperature=0.1"),
)
"""A few hundred steps want a momentum encoder that follows sooner, and sharper losses. k-NN of the drawn kinds by the
student after 20,000 and 24,000 views, one seed, 300 queries: 0.23 with the preset's values, 0.36 with these (standard
error 0.03)."""


def main() -> None:
    """Run the chain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of pictures; drawn ones by default")
    images: Path | None = parser.parse_args().images
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    gallery, query, count = use_folder(images) if images else draw_pictures()

    size = ("--batch-size", min(64, 1 << (count.bit_length() - 1)))
    small = ("--preset", "vit_tiny_debug", *size, "--epochs", epochs(VIEWS_STAGE1, count))
    mimco("train", "stage1", "--data", gallery, *small, *SHORT_STAGE1)
    mimco("train", "stage2", *size, "--epochs", epochs(VIEWS_STAGE2, count), *SHORT_STAGE2)
    mimco("export", "--format", "onnx")
    mimco("index", gallery)
    sheet = OUT / "hits.html"
    mimco("search", query, "-k", 12, "--sheet", sheet)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Open {sheet}")


def draw_pictures() -> tuple[Path, Path, int]:
    """A gallery of drawn pictures, and a query of one of its kinds that is not in it."""
    gallery, query = OUT / "pictures", OUT / "query.png"
    paths = draw_gallery(gallery, DRAWN_PER_KIND, size_px=96)
    draw(KINDS[3], QUERY_SEED, size_px=96).save(query)
    print(f"Drew {len(paths)} pictures of {len(KINDS)} kinds; the query, a new one of '{KINDS[3]}', is not among them.")
    return gallery, query, len(paths)


def use_folder(folder: Path) -> tuple[Path, Path, int]:
    """The user's folder, and a query made from one of its pictures: its centre, mirrored, should find it."""
    if not folder.is_dir():
        sys.exit(f"{folder} is no folder; run: make demo IMAGES=dir")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    for path in paths:
        try:
            picture = read_image(path)
        except ImageError:
            continue
        width, height = picture.size
        box = (width // 8, height // 8, width - width // 8, height - height // 8)
        query = OUT / "query.png"
        picture.crop(box).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(query)
        print(f"{len(paths)} pictures in {folder}; the query is the centre of {path.name}, mirrored.")
        return folder, query, len(paths)
    sys.exit(f"no picture in {folder}; run: make demo IMAGES=dir")


def epochs(views: int, pictures: int) -> int:
    """Passes over the pictures that come near `views`; two at least."""
    return max(2, round(views / pictures))


def mimco(*arguments: object) -> None:
    """Print a command as a person would type it, and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ mimco {' '.join(words)}", flush=True)
    environment = {**os.environ, "MIMCO_WORKSPACE": str(OUT / ".mimco")}
    done = subprocess.run([str(Path(sys.executable).with_name("mimco")), *words], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
