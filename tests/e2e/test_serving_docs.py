"""docs/serving.md by its word: each line of curl is typed at a running `mimco serve`, which then ends as it should."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mimco_deploy.bundle import write_contract
from tests.e2e.commands import MIMCO, mimco
from tests.helpers import gallery, save, tiny_bundle, tiny_graph, tiny_spec

PAGE = Path(__file__).parents[2] / "docs/serving.md"
SHOWN = "http://127.0.0.1:8000"
COUNT = 60
GRID = 8
TYPED = """
set -o pipefail
curl() { command curl -sS --fail-with-body --max-time 30 --write-out '%{stderr}status %{http_code}\\n' "$@"; }
"""


def lines_of_curl() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("curl ")]


def bundle_with_patches(folder: Path) -> Path:
    """`tiny_bundle`, whose cells are its patches."""
    from onnx import TensorProto, helper, numpy_helper

    model = tiny_graph()
    shape = helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["batch", GRID * GRID, 3])
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, GRID * GRID, 3], np.int64), "tokens"))
    model.graph.node.append(helper.make_node("Reshape", ["means", "tokens"], ["patches"]))
    model.graph.output.append(shape)
    tiny_bundle(folder, graph=model)
    write_contract(folder, replace(tiny_spec(), patch_grid=GRID))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("served").resolve()
    gallery(home / "images", COUNT)
    (home / "images/broken.jpg").write_bytes(b"no picture")
    save(home / "query.jpg", 3)
    bundle_with_patches(home / ".mimco/encoder")
    mimco(home, "index", "./images")
    return home


@contextmanager
def serving(home: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service of its own process, and its address."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MIMCO_WORKSPACE", "MIMCO_TOKEN")}
    command = [str(MIMCO), "serve", "--port", "0", *map(str, options)]
    with (home / "log.txt").open("w") as log:
        service = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert service.stdout is not None
    with service:
        try:
            url = service.stdout.readline().strip().rstrip("/")
            assert url.startswith("http://127.0.0.1:"), (home / "log.txt").read_text()
            answer = httpx.get(f"{url}/readyz", timeout=60, trust_env=False)
            assert answer.status_code == 200, answer.text
            yield service, url
        finally:
            if service.poll() is None:
                service.kill()


def type_line(line: str, home: Path, **names: str) -> tuple[str, str, int]:
    """Type a line; what came on stdout and stderr, and the status of HTTP."""
    environment = {"PATH": os.environ["PATH"], "MIMCO_TOKEN": "a token that nobody asks for", **names}
    done = subprocess.run(
        ["bash", "-c", TYPED + line], cwd=home, env=environment, capture_output=True, check=False, timeout=60
    )
    out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    assert done.returncode == 0, f"{line}\nended with {done.returncode}\n{out}\n{err}"
    (status,) = re.findall(r"^status (\d+)$", err, re.MULTILINE)
    return out, err, int(status)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_line_of_curl_is_answered(home: Path) -> None:
    lines = lines_of_curl()
    assert len(lines) >= 25
    names: dict[str, str] = {}
    asked = set()
    with serving(home) as (_, url):
        for line in lines:
            assert SHOWN in line, line
            out, _, status = type_line(line.replace(SHOWN, url), home, **names)
            assert status < 400, line
            asked |= {re.sub(r"[?\"].*", "", word) for word in re.findall(rf"{SHOWN}(/\S*)", line)}
            names = found_in(out) | names  # the first of each stays
        routes = json.loads(httpx.get(f"{url}/openapi.json", trust_env=False).text)["paths"]
    original = next((home / "images").glob("0003.png")).read_bytes()
    assert (home / "original").read_bytes() == original
    assert (home / "start").read_bytes() == original[:100]
    assert (home / "query.f32").stat().st_size == 4 * tiny_spec().embedding_dim
    shown = {route.replace("/jobs/{id}", "/jobs/$JOB").replace("{id}", "$ID") for route in routes}
    assert shown <= asked, "routes without an example"


def found_in(out: str) -> dict[str, str]:
    """What `$ID` and `$JOB` stand for."""
    try:
        answer: Any = json.loads(out)
    except ValueError:
        return {}
    if not isinstance(answer, dict):
        return {}
    if "state" in answer:
        return {"JOB": str(answer["id"])}
    return {"ID": str(answer["hits"][0]["id"])} if answer.get("hits") else {}


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_well_while_a_stream_is_open(home: Path, by: signal.Signals) -> None:
    more = gallery(home / "images", 1500, first=1000)
    try:
        with serving(home) as (service, url), httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            job = client.post("/v1/jobs", json={}).raise_for_status().json()
            with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
                states = (json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:"))
                assert next(states)["state"] == "running"
                service.send_signal(by)
                start = time.monotonic()
                seen = list(states)  # the stream ends, and not by a broken line
            assert service.wait(timeout=20) == 0, (home / "log.txt").read_text()
            assert time.monotonic() - start < 15
            assert not any(state["state"] == "failed" for state in seen)
            port = int(url.rpartition(":")[2])
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
        assert "Traceback" not in (home / "log.txt").read_text()
        mimco(home, "index", "verify")
    finally:
        for path in more:
            path.unlink()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux changes the limits of another process")
def test_without_free_descriptors_the_log_stays_short_and_it_answers_later(home: Path) -> None:
    told = "out of system resource"
    with serving(home) as (service, url):
        _, most = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
        taken = len(list(Path(f"/proc/{service.pid}/fd").iterdir()))
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (taken, most))
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10):
            deadline = time.monotonic() + 20
            while told not in (home / "log.txt").read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)  # all tries of one go
            resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (most, most))
            assert httpx.get(f"{url}/healthz", timeout=20, trust_env=False).status_code == 200
        assert 0 < (home / "log.txt").read_text().count(told) < 500


def test_without_an_index_it_ends_with_one_line(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / ".mimco/encoder")
    done = mimco(tmp_path, "serve", "--port", 0, code=1)
    assert done.err.splitlines()[-1].startswith("Error: no index in")
    assert "Traceback" not in done.err
