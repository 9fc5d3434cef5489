"""What several tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.training.labelled import draw_labelled


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no GPU: what is compared bit for bit is computed in one way."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `draw_labelled`."""
    return draw_labelled(tmp_path_factory.mktemp("labelled"))
