"""Where the time of one command goes. Standard library only."""

from __future__ import annotations

import time


class Stopwatch:
    """Splits the time since it was made into named laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps_ms: dict[str, float] = {}
        """Milliseconds by name, in the order of the laps."""

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        now = time.perf_counter()
        self.laps_ms[name] = self.laps_ms.get(name, 0.0) + (now - self._last) * 1e3
        self._last = now
