from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery, tiny_bundle

SEARCH = """
import sys
from pathlib import Path
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.query import search_image
from mimco_deploy.serving.sheet import write_sheet
folder = Path(sys.argv[1])
encoder = load_encoder(folder / "encoder")
query = folder / "photos" / "0002.png"
hits = search_image(ImageIndex.open(folder / "index", encoder.spec.fingerprint), encoder, query, 3)
write_sheet(folder / "sheet.html", query, hits)
assert hits[0].path == query, hits
heavy = {"torch", "torchvision", "timm", "onnx", "onnxscript", "sklearn"}
ours = {f"mimco_deploy.{name}" for name in ("training", "export", "evaluation")}
print(sorted((heavy | ours) & sys.modules.keys()))
"""


def test_searching_imports_neither_torch_nor_what_needs_it(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 5)
    tiny_bundle(tmp_path / "encoder")
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    run = subprocess.run([sys.executable, "-c", SEARCH, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "")


def test_searching_loads_no_encoder_library_before_it_is_needed() -> None:
    code = "import sys, mimco_deploy.serving.update; print(sorted({'onnxruntime', 'faiss'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_searching_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    """ONNX Runtime reports to its maker unless told not to, and keeps the machine's id and what is yet to be sent."""
    home = tmp_path / "home"
    home.mkdir()
    code = "from mimco_deploy.serving.encoders import load_encoder, Path; load_encoder(Path('encoder'))"
    tiny_bundle(tmp_path / "encoder")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "HOME": str(home)},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert list(home.rglob("*")) == []
