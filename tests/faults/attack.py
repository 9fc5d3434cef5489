"""Send the service what nobody should, and see that it answers in order: long by hand, for a short while in the suite.

    python tests/faults/attack.py --requests 10000 [HOSTILE …]

Starts a real `mimco serve` over a small index and sends it, from several threads and in a random but fixed order:
hostile pictures (those of the folders named, and damaged ones made here) to every operation that takes one, JSON of
wrong types and sizes, forms cut off and mixed up, paths and conditions that try to lead elsewhere, ranges, headers and
methods without sense, bytes that are no HTTP, bodies that trickle and clients that leave. Every answer must be one that
OpenAPI could have told (2xx to 4xx, or 503 with Retry-After), every error a problem document; afterwards the service
must answer a search as it did before, without a traceback in its log. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.update import update_index
from tests.helpers import gallery, save, tiny_bundle

THREADS = 6
MOST_BYTES = 4 * 2**20
PATHS = (
    "/", "/v1", "/v1/search/", "//v1/index", "/v1/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/pictures/%00",
    "/v1/pictures/../../../etc/passwd/file", "/v1/pictures/" + "0" * 64 + "/file", "/v1/jobs/" + "f" * 16,
    "/static/../app.py", "/static/%2e%2e%2fapp.py", "/v1/pictures/" + "g" * 64, "/" + "a" * 8000, "/\udc80",
    "/v1/jobs/" + "0" * 16 + "/events", "/metrics/../v1/index", "/openapi.json/", "/v1/thumbnail", "/favicon.ico",
)  # fmt: skip
TEXTS = (
    "", "\x00", "\ud800", "'", '"', "' OR 1=1 --", "1; DROP TABLE files", "bytes > ", "path GLOB '*'",
    "load_extension('x')", "randomblob(1e9)", "exists(select 1 from settings)", "(" * 500, "a" * 5000, "../../passwd",
    "/etc/passwd", "C:\\x", "\u202e", "🦊" * 100, "NaN", "-1", "1e999", "file:///etc/passwd", "http://127.0.0.1/",
    "${jndi:x}", "%s%n", "bytes > 0",
)  # fmt: skip
NUMBERS = (0, -1, 1, 1.5, 2**31, 2**63, 2**200, -(2**63), 1e308, 0.1, True)


def values(rng: random.Random) -> Any:
    """A value of any type."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(NUMBERS),
        lambda: None,
        lambda: [values(rng) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(KEYS): values(rng) for _ in range(rng.randrange(4))},
    )
    return rng.choice(kinds)()


KEYS = (
    "parts", "k", "where", "root", "min_score", "min_confidence", "rerank", "upload", "id", "path", "crop", "weight",
    "queries", "query", "hit", "retry_problems", "format", "x", "", "__class__",
)  # fmt: skip
HEADERS = ("Range", "If-None-Match", "If-Range", "Accept", "Cookie", "Origin", "Authorization", "X-Forwarded-For")
HEADER_VALUES = (
    "bytes=0-0", "bytes=5-1", "bytes=-", "bytes=99999999999-", "bytes=" + "0-1," * 200, "bytes=0-,-1", "lines=1", "*",
    "a" * 4000, "Bearer x", "http://evil.example", "null", '"' * 100, "\t",
)  # fmt: skip
NO_HTTP = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(2000)) + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n",
    b"GET /v1/index HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
)
POSTS = ("/v1/search", "/v1/search/batch", "/v1/embed", "/v1/why", "/v1/jobs", "/v1/session")
GETS = ("/v1/pictures", "/v1/problems", "/v1/duplicates", "/v1/map", "/v1/index", "/v1/jobs", "/v1/version", "/metrics")


@dataclass
class Seen:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, what: str, answer: httpx.Response) -> None:
        """Judge one answer."""
        kind = answer.headers.get("content-type", "")
        fault = ""
        if answer.status_code >= 500 and (answer.status_code != 503 or "retry-after" not in answer.headers):
            fault = "of a broken service"
        elif answer.status_code >= 400 and answer.request.method != "HEAD":
            if not kind.startswith("application/problem+json"):
                fault = f"an error as {kind}"
            elif answer.json()["status"] != answer.status_code:
                fault = "another status in the document"
        self.note(
            str(answer.status_code), f"{what}: {answer.status_code} {fault}: {answer.text[:200]}" if fault else ""
        )

    def note(self, status: str, wrong: str = "") -> None:
        """Count one."""
        with self.lock:
            self.statuses[status] += 1
            if wrong:
                self.wrong.append(wrong)


@dataclass(frozen=True)
class Target:
    """The service, and what it is asked with."""

    address: str
    port: int
    pictures: list[bytes]
    ids: list[str]

    def some_picture(self, rng: random.Random) -> bytes:
        content = rng.choice(self.pictures)
        fate = rng.random()
        if fate < 0.2:
            return content[: rng.randrange(len(content) + 1)]
        if fate < 0.4 and content:
            damaged = bytearray(content)
            for _ in range(rng.randrange(1, 20)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            return bytes(damaged)
        return content


def upload(client: httpx.Client, target: Target, rng: random.Random, seen: Seen) -> None:
    """Pictures of any kind to what takes pictures, with a request beside them that may make sense."""
    path = rng.choice(("/v1/search", "/v1/embed", "/v1/search/batch", "/v1/why"))
    names = ("file", "file", "file", "files", "request", "")
    files = [
        (rng.choice(names), (rng.choice(("a.jpg", "../../x", "\x00", "ü" * 300)), target.some_picture(rng)))
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 9, 40)))
    ]
    data = {}
    if rng.random() < 0.4:
        data["request"] = json.dumps(
            {"parts": [{"upload": rng.randrange(3), "weight": rng.choice(NUMBERS)}], "k": rng.choice(NUMBERS)}
            if rng.random() < 0.5
            else values(rng)
        )
    seen.answer(f"upload {path}", client.post(path, files=files, data=data))


def wrong_json(client: httpx.Client, target: Target, rng: random.Random, seen: Seen) -> None:
    """JSON of any shape, or none."""
    path = rng.choice(POSTS)
    body: bytes
    fate = rng.random()
    if fate < 0.15:
        body = rng.choice((b"", b"{", b"[" * 20_000, b"\xff\xfe", b"null", b'{"k": 1e999}', b'{"k": NaN}', b"1" * 5000))
    else:
        document = {rng.choice(KEYS): values(rng) for _ in range(rng.randrange(1, 5))}
        if fate < 0.5:
            part = {"id": rng.choice([*target.ids, "0" * 64]), rng.choice(KEYS): values(rng)}
            document = {"parts": [part], rng.choice(KEYS): values(rng)}
        body = json.dumps(document).encode()
    kind = rng.choice(
        ("application/json", "application/json", "application/json", "text/plain", "multipart/form-data", "x")
    )
    seen.answer(f"json {path}", client.post(path, content=body, headers={"Content-Type": kind}))


def query(client: httpx.Client, target: Target, rng: random.Random, seen: Seen) -> None:
    """What is read, with parameters of any kind."""
    path = rng.choice(
        (*GETS, f"/v1/pictures/{rng.choice(target.ids)}/thumbnail", f"/v1/pictures/{rng.choice(target.ids)}")
    )
    names = ("where", "root", "limit", "after", "min_score", "px", "where")
    wanted = {rng.choice(names): rng.choice((*TEXTS, *NUMBERS)) for _ in range(rng.randrange(3))}
    texts = {key: str(value).encode("utf-8", "surrogatepass") for key, value in wanted.items()}
    address = httpx.URL(path).copy_with(query="&".join(f"{k}={quote(v)}" for k, v in texts.items()).encode())
    seen.answer(f"get {address}", client.get(address))


def quote(content: bytes) -> str:
    return "".join(f"%{letter:02x}" for letter in content)


def odd(client: httpx.Client, target: Target, rng: random.Random, seen: Seen) -> None:
    """Methods, headers, ranges and hosts without sense."""
    method = rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"))
    path = rng.choice((*POSTS, *GETS, f"/v1/pictures/{rng.choice(target.ids)}/file"))
    headers = {rng.choice(HEADERS): rng.choice(HEADER_VALUES)}
    if rng.random() < 0.1:
        headers["Host"] = rng.choice(("evil.example", "", "127.0.0.1:1", "[::1", "a" * 1000))
    seen.answer(f"{method} {path} {headers}", client.request(method, path, headers=headers))


def path(client: httpx.Client, target: Target, rng: random.Random, seen: Seen) -> None:
    """Paths as no client would send them."""
    del client
    line = f"{rng.choice(('GET', 'POST', 'HEAD'))} {rng.choice(PATHS)} HTTP/1.1\r\n"
    content = line.encode("utf-8", "surrogateescape") + b"Host: 127.0.0.1\r\nConnection: close\r\n\r\n"
    raw(target, content, seen)


def no_http(client: httpx.Client, target: Target, rng: random.Random, seen: Seen) -> None:
    """Bytes that are no request, or two at once that contradict themselves."""
    del client
    raw(target, rng.choice((rng.randbytes(200), *NO_HTTP)), seen)


def trickles(client: httpx.Client, target: Target, rng: random.Random, seen: Seen) -> None:
    """A body that comes letter by letter is given up, long before it would be whole."""
    del client, rng
    kind = b"Content-Type: multipart/form-data; boundary=B\r\nContent-Length: 1000\r\n"
    try:
        with socket.create_connection(("127.0.0.1", target.port), timeout=30) as connection:
            connection.sendall(b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\n" + kind + b"\r\n")
            for _ in range(60):
                connection.sendall(b"-")
                time.sleep(0.2)
        seen.note("trickled", "a body trickled for 12 seconds and was borne with")
    except (BrokenPipeError, ConnectionResetError):
        seen.note("closed")


def leaves(client: httpx.Client, target: Target, rng: random.Random, seen: Seen) -> None:
    """Forms that are cut off: the client leaves, or says that this was all, or only trickles on for a while."""
    del client
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + target.some_picture(rng)
    said = len(head) + rng.choice((0, 0, 100, 10_000))
    kind = b"Content-Type: multipart/form-data; boundary=B\r\nConnection: close\r\n"
    line = b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n" % said + kind + b"\r\n"
    try:
        with socket.create_connection(("127.0.0.1", target.port), timeout=30) as connection:
            connection.sendall(line + head)
            for _ in range(rng.randrange(3)):
                time.sleep(0.05)
                connection.sendall(b"x")
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                seen.note("left")
                return
            end(connection)
            judge(connection, seen)
    except (BrokenPipeError, ConnectionResetError):
        seen.note("closed")


def end(connection: socket.socket) -> None:
    """Say that nothing more comes, where the other side still listens."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def raw(target: Target, content: bytes, seen: Seen) -> None:
    """Send bytes, and read what comes."""
    try:
        with socket.create_connection(("127.0.0.1", target.port), timeout=30) as connection:
            connection.sendall(content)
            end(connection)
            judge(connection, seen)
    except (BrokenPipeError, ConnectionResetError):
        seen.note("closed")


def judge(connection: socket.socket, seen: Seen) -> None:
    """The status of what comes, which uvicorn may have answered by itself."""
    found = b""
    while part := connection.recv(65_536):
        found += part
    status = re.match(rb"HTTP/1\.1 (\d{3})", found)
    number = status[1].decode() if status else "closed"
    seen.note(number, f"raw: {found[:200]!r}" if number.startswith("5") and b"etry-" not in found else "")


WAYS: dict[Callable[[httpx.Client, Target, random.Random, Seen], None], float] = {
    upload: 30,
    wrong_json: 25,
    query: 20,
    odd: 12,
    path: 5,
    no_http: 4,
    leaves: 4,
    trickles: 0.2,
}


def damaged_pictures() -> list[bytes]:
    """A few of our own: whole, of other kinds, and bombs."""
    picture = Image.effect_noise((64, 48), 80).convert("RGB")
    found = [b"", b"\x00" * 1000, b"\xff\xd8\xff", b"<svg/>", b"P3\n9 9\n255\n" + b"#\n" * 1000]
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        encoded = io.BytesIO()
        picture.save(encoded, kind)
        found.append(encoded.getvalue())
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    return [*found, bomb.getvalue()]


@contextlib.contextmanager
def serving(workspace: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service of its own process, and its address; its log lies in `log.txt`."""
    environment = {key: value for key, value in os.environ.items() if key != "MIMCO_TOKEN"}
    with (workspace / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mimco_deploy", "--workspace", str(workspace), "serve", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    with process:
        try:
            yield process, process.stdout.readline().strip().rstrip("/")
        finally:
            if process.poll() is None:
                process.kill()


def attack(folder: Path, hostile: list[Path], requests: int, seed: int = 0) -> dict[str, Any]:
    """Attack a service over an index in a folder.

    Args:
        folder: empty.
        hostile: folders of pictures to send.
        requests: how many.
        seed: of what is sent.

    Returns:
        How often each status came, and what was wrong.
    """
    pictures = make_index(folder, hostile)
    seen = Seen()
    with serving(folder) as (process, address), httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
        client.get("/readyz").raise_for_status()
        ids = [one["id"] for one in client.get("/v1/pictures").json()["pictures"]]
        target = Target(address, int(address.rsplit(":", 1)[1]), pictures, ids)
        query = [("file", (folder / "query.png").read_bytes())]
        before = client.post("/v1/search", files=query).raise_for_status().json()["hits"]
        with ThreadPoolExecutor(THREADS) as pool:
            for asked in [pool.submit(send, client, target, f"{seed} {number}", seen) for number in range(requests)]:
                asked.result()
        if client.post("/v1/search", files=query).raise_for_status().json()["hits"] != before:
            seen.wrong.append("the search after it found something else")
        memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            seen.wrong.append(f"it ended with {process.returncode}")
    log = (folder / "log.txt").read_text()
    if "Traceback" in log:
        seen.wrong.append(log[log.index("Traceback") :][:2000])
    return {
        "benchmark": "attack",
        "requests": requests,
        "statuses": dict(sorted(seen.statuses.items())),
        "wrong": seen.wrong,
        "memory_mib": round(int(memory[1]) / 1024) if memory else None,
    }


def make_index(folder: Path, hostile: list[Path]) -> list[bytes]:
    """An index, an encoder and a query in a folder; and the pictures to attack with."""
    gallery(folder / "photos", 20)
    save(folder / "query.png", 7)
    tiny_bundle(folder / "encoder")
    update_index(folder / "index", [folder / "photos"], load_encoder(folder / "encoder"))
    files = sorted(path for root in hostile for path in root.rglob("*") if path.is_file())
    return [*damaged_pictures(), *(path.read_bytes() for path in files if path.stat().st_size <= MOST_BYTES)]


def send(client: httpx.Client, target: Target, seed: str, seen: Seen) -> None:
    """One request, a function of the seed."""
    rng = random.Random(seed)
    (way,) = rng.choices(list(WAYS), list(WAYS.values()))
    try:
        way(client, target, rng, seen)
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        seen.note("closed")
    except (httpx.LocalProtocolError, httpx.InvalidURL):
        seen.note("not sent")  # the client itself refuses to


def main() -> None:
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hostile", nargs="*", type=Path, help="folders of pictures")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = attack(Path(name), options.hostile, options.requests, options.seed)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
