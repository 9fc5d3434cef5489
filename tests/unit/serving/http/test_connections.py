"""Connections as a hostile or a dead client holds them, to a server of uvicorn with an application of a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from mimco_deploy.serving.http import connections
from mimco_deploy.serving.http.server import listen

LARGE = 64 * 2**20
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Gives `/large` much, else two bytes, once the body is there; `/early` does not wait for it, `/slow` longer."""
    more = scope["path"] != "/early"
    while more:
        message = await receive()
        more = message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    size = LARGE if scope["path"] == "/large" else 2
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    for start in range(0, size, 2**20):
        part = b"x" * min(2**20, size - start)
        await send({"type": "http.response.body", "body": part, "more_body": start + len(part) < size})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server that has little patience."""
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    monkeypatch.setattr(connections, "UNREAD_S", 0.3)
    monkeypatch.setattr(connections, "most_connections", lambda: 5)
    config = uvicorn.Config(
        application, http=connections.PatientProtocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=60
    )
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def connected(port: int, from_address: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(from_address, 0)) as client:
        yield client


def everything(client: socket.socket) -> bytes:
    """What comes until the other side ends it."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(2**20):
            found += part
    return found


def trickle(client: socket.socket, content: bytes) -> None:
    """Send a letter more often than the server loses patience."""
    for letter in content:
        client.sendall(bytes([letter]))
        time.sleep(0.05)


def answer_of(client: socket.socket, request: bytes = GET) -> bytes:
    """A short answer, whole."""
    client.sendall(request)
    found = b""
    while not found.endswith(b"\r\n\r\nxx"):
        part = client.recv(2**16)
        assert part, found
        found += part
    return found


def test_who_says_nothing_or_never_ends_its_head_is_let_go(port: int) -> None:
    with connected(port) as client:
        assert everything(client) == b""
    with connected(port) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            trickle(client, b"GET / HTTP/1.1\r\nX-Slow: " + b"x" * 100)
        assert everything(client) == b""


def test_a_second_head_on_the_same_connection_has_no_more_time(port: int) -> None:
    with connected(port) as client:
        assert answer_of(client).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)  # idle between two requests is uvicorn's matter
        client.sendall(b"GET / HT")
        start = time.monotonic()
        assert everything(client) == b""
        assert time.monotonic() - start < 5


def test_a_body_and_the_next_request_may_take_longer_than_a_head(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n")
        time.sleep(0.6)
        assert answer_of(client, b"ab").startswith(b"HTTP/1.1 200")
        time.sleep(0.6)
        assert answer_of(client).startswith(b"HTTP/1.1 200")


def test_what_comes_of_a_body_after_its_answer_has_no_more_time(port: int) -> None:
    post = b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with connected(port) as client:
        assert answer_of(client, post).startswith(b"HTTP/1.1 200")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            trickle(client, b"x" * 100)
    with connected(port) as client:
        assert answer_of(client, post).startswith(b"HTTP/1.1 200")
        client.sendall(b"x" * 1000)
        assert answer_of(client).startswith(b"HTTP/1.1 200")


def test_who_takes_nothing_of_its_answer_is_let_go_and_who_takes_it_slowly_is_not(port: int) -> None:
    large = GET.replace(b"/ ", b"/large ")
    with connected(port) as client:
        client.sendall(large)
        time.sleep(1.5)
        assert len(everything(client)) < LARGE
    with connected(port) as client:
        client.sendall(large)
        found = 0
        while found < LARGE:
            found += len(client.recv(2**20))
            time.sleep(0.01)
        assert found >= LARGE


def test_one_connection_too_many_is_told_so_and_a_place_comes_free(port: int) -> None:
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(connected(port)) for _ in range(5)]
        for client in clients:
            assert answer_of(client).startswith(b"HTTP/1.1 200")
        with connected(port) as client:
            client.sendall(GET)
            answer = everything(client)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1\r\n" in answer
        assert b"application/problem+json" in answer
        assert answer_of(clients[0]).startswith(b"HTTP/1.1 200")
    time.sleep(0.2)
    with connected(port) as client:
        assert answer_of(client).startswith(b"HTTP/1.1 200")


def test_who_holds_most_makes_room_for_others(port: int) -> None:
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(connected(port)) for _ in range(5)]
        assert answer_of(clients[4]).startswith(b"HTTP/1.1 200")  # and is kept alive
        clients[0].sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nha")
        others = [held.enter_context(connected(port, "127.0.0.2")) for _ in range(2)]
        for other in others:
            assert answer_of(other).startswith(b"HTTP/1.1 200")
        assert [everything(client) for client in clients[1:3]] == [b"", b""], "the oldest of those that do nothing"
        assert answer_of(clients[0], b"lf").startswith(b"HTTP/1.1 200")
        with connected(port) as client:
            client.sendall(GET)
            assert everything(client).startswith(b"HTTP/1.1 503"), "its own address holds most"
        assert answer_of(others[0]).startswith(b"HTTP/1.1 200")


def test_who_holds_no_more_than_a_newcomer_stays(port: int) -> None:
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(connected(port, f"127.0.0.{number}")) for number in range(2, 7)]
        for client in clients:
            assert answer_of(client).startswith(b"HTTP/1.1 200")
        with connected(port) as other:
            other.sendall(GET)
            assert everything(other).startswith(b"HTTP/1.1 503")
        for client in clients:
            assert answer_of(client).startswith(b"HTTP/1.1 200")


def test_a_burst_takes_no_more_places_than_there_are(port: int) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(5):
            held.enter_context(connected(port))
        burst = [held.enter_context(connected(port, f"127.0.0.{2 + number}")) for number in range(20)]
        still_open = 0
        for client in burst:
            client.settimeout(0.5)
            with contextlib.suppress(OSError):
                client.sendall(GET)
                still_open += client.recv(2**16).startswith(b"HTTP/1.1 200")
        assert 0 < still_open <= 5


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1.2.3.4", "1.2.3.4", True),
        ("1.2.3.4", "1.2.3.5", False),
        ("::ffff:1.2.3.4", "1.2.3.4", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "testclient", True),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    assert (connections._neighbourhood((one, 1)) == connections._neighbourhood((other, 1))) == same


def test_what_is_at_work_is_not_ended_for_others(port: int) -> None:
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(connected(port)) for _ in range(5)]
        for client in clients:
            client.sendall(GET.replace(b"/ ", b"/slow ", 1))
        time.sleep(0.2)
        with connected(port, "127.0.0.2") as other:
            other.sendall(GET)
            assert everything(other).startswith(b"HTTP/1.1 503")
        for client in clients:
            assert client.recv(2**16).startswith(b"HTTP/1.1 200")


def test_connections_leave_room_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((256, 85), (1024, 341), (1_000_000, 512), (resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert connections.most_connections() == most
