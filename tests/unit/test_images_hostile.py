"""The decoder over a set of odd, broken and hostile files: each a picture or a refusal, none at the memory's cost."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimco_deploy.images import read_image

MAX_RSS_MIB = 200
PROBLEMS = {"empty", "too_large", "unsupported", "truncated", "corrupt"}

# Reads paths from stdin. Before each file the kernel is told to forget the peak of the process (5 in clear_refs), after
# it the peak is read, so that each file is measured by itself: the interpreter's 30 MiB included.
WORKER = """
import json, pathlib, re, sys
from mimco_deploy.errors import ImageError
from mimco_deploy.images import read_image

proc = pathlib.Path("/proc/self")
for line in sys.stdin:
    (proc / "clear_refs").write_text("5")
    size, mode, problem = None, None, None
    try:
        picture = read_image(pathlib.Path(json.loads(line)))
        size, mode = picture.size, picture.mode
        del picture
    except ImageError as error:
        problem, lines = error.problem, str(error).splitlines()
        assert len(lines) == 1, lines
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", (proc / "status").read_text())[1]) / 1024
    print(json.dumps({"size": size, "mode": mode, "problem": problem, "peak_mib": peak}), flush=True)
"""


@cache
def _outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """What becomes of each file, decoded in one fresh process where warnings are errors."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    worker = subprocess.run(
        [sys.executable, "-W", "error", "-c", WORKER],
        input="".join(json.dumps(str(folder / name)) + "\n" for name in names),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
        check=False,
    )
    answers = worker.stdout.splitlines()
    assert worker.returncode == 0, f"{names[len(answers)]}: {worker.stderr[-2000:]}"
    return {name: json.loads(answer) for name, answer in zip(names, answers, strict=True)}


@pytest.fixture
def hostile(shared_data: Path) -> Path:
    folder = shared_data / "hostile"
    if not folder.is_dir():
        pytest.skip(f"no hostile pictures in {shared_data}")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peaks are measured through Linux' /proc/self/clear_refs")
    return folder


def test_every_file_is_a_picture_or_a_typed_refusal(hostile: Path) -> None:
    outcomes = _outcomes(hostile)
    count = Counter(outcome["problem"] or "picture" for outcome in outcomes.values())

    assert len(outcomes) > 700
    assert set(count) == PROBLEMS | {"picture"}
    assert {outcome["mode"] for outcome in outcomes.values()} == {"RGB", None}


def test_no_file_costs_much_memory(hostile: Path) -> None:
    peaks = {name: outcome["peak_mib"] for name, outcome in _outcomes(hostile).items()}
    worst = max(peaks, key=peaks.__getitem__)

    assert peaks[worst] < MAX_RSS_MIB, worst


def test_what_pillow_reads_in_a_supported_format_mimco_reads_upright(hostile: Path) -> None:
    outcomes = _outcomes(hostile)
    left_out = {"ICO", "JPEG2000"}
    with (hostile / "MANIFEST.tsv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["pillow13_outcome"] == "ok"]
    for row in rows:
        outcome = outcomes[row["path"]]
        if row["format"] in left_out:
            assert outcome["problem"] == "unsupported", row["path"]
        elif int(row["w"]) * int(row["h"]) > 10**8:
            assert outcome["problem"] == "too_large", row["path"]
        else:
            assert outcome["problem"] is None, row["path"]
            assert sorted(outcome["size"]) == sorted([int(row["w"]), int(row["h"])]), row["path"]


def test_the_orientations_of_one_photo_give_one_picture(hostile: Path) -> None:
    decoded = [np.asarray(read_image(hostile / f"generated/orientation-{n}.jpg"), float) for n in range(1, 9)]

    for other in decoded[1:]:
        assert np.abs(other - decoded[0]).mean() < 3  # JPEG was written anew for each


@pytest.mark.parametrize("name", ["gray16.png", "gray16.tif", "float32.tif"])
def test_16_bit_and_float_copies_look_like_the_8_bit_photo(hostile: Path, name: str) -> None:
    grey = np.asarray(read_image(hostile / "generated/gray.jpg"), float)

    assert np.abs(np.asarray(read_image(hostile / "generated" / name), float) - grey).mean() < 3


def test_12_bits_are_scaled_by_their_own_range_where_the_file_states_them(hostile: Path) -> None:
    stated, unstated = (read_image(hostile / f"pillow/{name}.tif") for name in ("12bit.cropped", "12in16bit"))

    assert np.asarray(stated).max() == 2  # 30 of 4095
    assert np.asarray(unstated).max() == 0  # 30 of 65535
