"""Where the tests' numbers and pictures come from."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", type=Path, default=HERE / "golden", help="numbers computed by the papers' authors' code; any seeds"
    )
    parser.addoption(
        "--data-dir",
        type=Path,
        default=HERE.parent.parent / "shared" / "data",
        help="pictures that are not in the repository",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.golden("moco-v3/contrastive_seed*.npz")` runs a test once for each file, as `golden_file`."""
    for mark in metafunc.definition.iter_markers("golden"):
        folder: Path = metafunc.config.getoption("--golden")
        files = sorted(folder.glob(mark.args[0]))
        assert files, f"no golden file {mark.args[0]} in {folder}"
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Path:
    """Folder of golden numbers."""
    folder: Path = request.config.getoption("--golden")
    return folder


@pytest.fixture
def shared_data(request: pytest.FixtureRequest) -> Path:
    """Folder of pictures for building and testing; tests that need it are skipped where it is not."""
    folder: Path = request.config.getoption("--data-dir")
    if not folder.is_dir():
        pytest.skip(f"no pictures in {folder}; give --data-dir")
    return folder
