"""One small workspace, made by the real command line, that all end-to-end tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.drawings import draw_gallery
from tests.e2e.browser import CHROMIUM
from tests.e2e.commands import Chain, mimco


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Both stages, export and index over a drawn gallery, each by its command."""
    home = tmp_path_factory.mktemp("chain")
    pictures = draw_gallery(home / "images", per_kind=6, size_px=40)
    small = ("--epochs", "2", "--batch-size", "24", "--set", "data.workers=0")
    trained = [
        mimco(home, "train", "stage1", "--data", "images", "--preset", "vit_tiny_debug", *small, "--json"),
        mimco(home, "train", "stage2", *small, "--json"),
        mimco(home, "export", "--format", "onnx", "--licence", "CC0-1.0", "--json"),
        mimco(home, "index", "./images", "--json"),
    ]
    return Chain(home, pictures, trained)


@pytest.fixture
def query(tmp_path: Path) -> Path:
    """A picture that no gallery holds."""
    from mimco_deploy.drawings import KINDS, draw

    path = tmp_path / "query.jpg"
    draw(KINDS[0], seed=999, size_px=64).save(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
