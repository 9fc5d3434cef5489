"""A real browser for the tests of pages."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
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


@contextlib.contextmanager
def opened(browser: Any, address: str) -> Iterator[Any]:
    """A page of it, which fails where it logs an error or asks for anything elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(WAIT_S * 1e3)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "blob:", "data:")) else wrong.append(request.url),
    )
    page.goto(address)
    yield page
    context.close()
    assert wrong == []


def until(page: Any, expression: str) -> None:
    """Wait for it to be true. The policy of the pages forbids what Playwright does for that, as it should."""
    deadline = time.monotonic() + WAIT_S
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)
