"""Run the installed `mimco` as a person does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIMCO = Path(sys.executable).with_name("mimco")


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """What it printed, which must be one JSON document."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Chain:
    """A folder with a workspace, and what its commands said."""

    home: Path
    pictures: list[Path]
    steps: list[Done]


def run(command: list[object], cwd: Path, code: int | None = 0) -> Done:
    """Run a command without this process's workspace, and check its exit code; None takes any."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MIMCO_WORKSPACE", "PYTHONPATH")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert code is None or done.returncode == code, (
        f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return Done(done.returncode, done.stdout, done.stderr)


def mimco(cwd: Path, *arguments: object, code: int | None = 0) -> Done:
    """Run `mimco` in a folder."""
    return run([MIMCO, *arguments], cwd, code)
