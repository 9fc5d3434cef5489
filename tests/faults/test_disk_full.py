"""A full disk: the run ends with a MimcoError, and the index holds what was committed."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving import generations, update
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.query import search_image
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery

REPOSITORY = Path(__file__).parent.parent.parent
LIMITED = """
import resource, sys
from pathlib import Path
from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving import update
from tests.helpers import CountingEncoder
update.COMMIT_EVERY_S = 0
index, root, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
try:
    update.update_index(Path(index), [Path(root)], CountingEncoder(), batch_size=4)
except IndexStoreError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize("room_bytes", [0, 1, 100, 300, 700])
def test_a_disk_that_fills_up_leaves_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_bytes: int
) -> None:
    paths = gallery(tmp_path / "photos", 20)
    encoder = CountingEncoder()
    real, left = os.write, [room_bytes]
    monkeypatch.setattr(update, "COMMIT_EVERY_S", 0.0)

    def write(file: int, content: memoryview) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(file, content[: left[0]])
        left[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(IndexStoreError, match="No space left on device"):
            update_index(tmp_path / "index", [tmp_path / "photos"], encoder, batch_size=4)
    index = ImageIndex.open(tmp_path / "index")
    committed = room_bytes // (4 * 16 * 4) * 4
    assert index.files() == paths[:committed]
    update_index(tmp_path / "index", [], encoder, batch_size=4)
    assert [search_image(index, encoder, path, 1)[0].path for path in paths] == paths


@pytest.mark.parametrize("limit_bytes", [1_000, 20_000, 60_000, 65_000, 70_000])
def test_a_limit_on_the_size_of_files_leaves_what_was_committed(tmp_path: Path, limit_bytes: int) -> None:
    paths = gallery(tmp_path / "photos", 300)
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "index"), str(tmp_path / "photos"), str(limit_bytes)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (1, "")
    assert "expected room on the disk" in run.stdout
    if generations.has_index(tmp_path / "index"):
        files = ImageIndex.open(tmp_path / "index").files()
        assert files == paths[: len(files)]
        assert len(files) < 300
    encoder = CountingEncoder()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    update_index(tmp_path / "index", [tmp_path / "photos"], encoder)
    index = ImageIndex.open(tmp_path / "index")
    assert index.files() == paths
    assert [search_image(index, encoder, path, 1)[0].path for path in paths[::29]] == paths[::29]


COMMAND = """
import resource, sys
from mimco_deploy.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


@pytest.mark.parametrize("words", [("export", "out.npy"), ("export", "out.parquet"), ("compact",), ("repair",)])
@pytest.mark.parametrize("limit_bytes", [10, 5_000])
def test_what_writes_an_index_anew_ends_with_one_line(tmp_path: Path, words: tuple[str, ...], limit_bytes: int) -> None:
    paths = gallery(tmp_path / "photos", 200)
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, str(limit_bytes), "--workspace", str(tmp_path), "index", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert (run.stderr.count("\n"), run.stderr[:7]) == (1, "Error: ")
    assert "expected room on the disk" in run.stderr
    assert ".tmp" not in run.stderr
    assert ImageIndex.open(tmp_path / "index").files() == paths
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "index"}
