"""Who is answered, and with which headers."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from starlette.testclient import TestClient

from mimco_deploy.errors import ConfigError
from mimco_deploy.serving.http.server import is_loopback, listen, token_for
from tests.unit.serving.http.conftest import Place, client_of

TOKEN = "a token of enough letters"


@pytest.fixture(scope="module")
def guarded(place: Place) -> Any:
    with client_of(place, token=TOKEN) as client:
        yield client


def test_with_a_token_only_the_page_and_health_are_open(guarded: TestClient) -> None:
    for path in ("/", "/app.js", "/app.css", "/healthz", "/readyz"):
        assert guarded.get(path).status_code == 200, path
    for path in ("/v1/index", "/v1/pictures", "/metrics", "/openapi.json", "/v1/pictures/" + "0" * 64, "/nothing"):
        answer = guarded.get(path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
    assert guarded.post("/v1/search", files=[("file", b"x")]).status_code == 401


@pytest.mark.parametrize("given", [TOKEN[:-1], TOKEN + "x", "", "é"])
def test_what_is_not_the_token_is_refused(guarded: TestClient, given: str) -> None:
    headers = [(b"Authorization", f"Bearer {given}".encode())]
    assert guarded.get("/v1/index", headers=headers).status_code == 401
    assert guarded.post("/v1/session", headers=headers).status_code == 401
    assert guarded.get("/v1/index", headers=[(b"Cookie", f"mimco_session={given}".encode())]).status_code == 401


def test_the_token_opens_and_is_exchanged_for_a_cookie_that_scripts_do_not_see(place: Place) -> None:
    with client_of(place, token=TOKEN) as client:
        assert client.get("/v1/index", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        session = client.post("/v1/session", headers={"Authorization": f"Bearer {TOKEN}"})
        assert session.status_code == 204
        cookie = session.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert TOKEN not in cookie
        assert client.get("/v1/index").status_code == 200, "by the cookie"
        client.delete("/v1/session")
        assert client.get("/v1/index").status_code == 401


def test_without_a_token_only_names_of_this_machine_are_answered(client: TestClient) -> None:
    for host in ("127.0.0.1", "127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST"):
        assert client.get("/v1/index", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", ""):
        assert client.get("/v1/index", headers={"Host": host}).status_code == 421, host


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_requests_from_pages_of_other_sites_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/v1/jobs", json={}, headers=headers).status_code == 403
    assert client.get("/v1/index", headers=headers).status_code == 403
    assert client.get("/v1/jobs").json() == []


def test_a_link_from_elsewhere_leads_to_the_page(client: TestClient) -> None:
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=linked).status_code == 200
    assert client.get("/v1/index", headers=linked).status_code == 403


def test_every_answer_has_the_headers_of_safety_and_none_for_other_origins(client: TestClient) -> None:
    for path in ("/", "/v1/index", "/nothing", "/v1/pictures/x", "/openapi.json"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert len(headers["x-request-id"]) == 36
        assert not [name for name in headers if name.startswith("access-control")]


def test_beyond_loopback_a_token_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIMCO_TOKEN", raising=False)
    assert token_for("127.0.0.1") == (None, False)
    assert token_for("::1") == (None, False)
    token, new = token_for("0.0.0.0")
    assert new
    assert token is not None
    assert len(token) >= 40
    assert token_for("0.0.0.0")[0] != token
    monkeypatch.setenv("MIMCO_TOKEN", TOKEN)
    assert token_for("127.0.0.1") == (TOKEN, False)
    monkeypatch.setenv("MIMCO_TOKEN", "short")
    with pytest.raises(ConfigError, match="too weak"):
        token_for("0.0.0.0")


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True),
                                                ("::1", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
                                                ("host.example", False)])  # fmt: skip
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_port_that_is_taken_is_told_in_a_line() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot be listened on"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_answers_are_not_held_back_by_nagle() -> None:
    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP, "asyncio looks at it before it sets TCP_NODELAY"


def test_nothing_is_asked_of_any_other_machine(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was to leave this machine")

    with client_of(place) as client:
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        assert client.post("/v1/search", files=[("file", place.picture(3).read_bytes())]).status_code == 200
        assert client.get("/v1/map").status_code == 200
        assert client.get("/v1/duplicates").status_code == 200


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/jobs", "GET, POST"),
        ("/v1/jobs/0000000000000000", "DELETE, GET"),
        ("/v1/session", "DELETE, POST"),
        ("/v1/search", "POST"),
    ],
)
def test_an_address_tells_all_that_it_answers_to(client: TestClient, path: str, methods: str) -> None:
    answer = client.request("PATCH", path)
    assert (answer.status_code, answer.headers["allow"]) == (405, methods)
    assert answer.json()["status"] == 405
