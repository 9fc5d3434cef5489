"""A real browser for the tests of pages."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_S = 15.0
MARKS = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
    # Playwright's loop and its driver's pipes are closed after the test that opened them.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def until(page: Any, expression: str) -> None:
    """Wait for it to be true. The policy of the pages forbids what Playwright does for that, as it should."""
    deadline = time.monotonic() + WAIT_S
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)
