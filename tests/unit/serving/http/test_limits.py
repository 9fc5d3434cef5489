"""What a request may take: bytes, time, places in the queue."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from starlette.testclient import TestClient

from mimco_deploy.serving.guarded import Limits
from mimco_deploy.serving.http import requests
from mimco_deploy.serving.http.access import LOOPBACK, Access
from mimco_deploy.serving.http.batching import MOST, Batcher, BusyError, Pace
from mimco_deploy.serving.http.metrics import Metrics
from mimco_deploy.serving.http.requests import MAX_JSON_BYTES, Requests
from mimco_deploy.serving.http.service import ServeSettings
from tests.unit.serving.http.conftest import Place, client_of


def test_a_body_that_says_or_turns_out_to_be_too_long_is_refused(place: Place) -> None:
    with client_of(place, ServeSettings(max_upload_mib=1)) as client:
        answer = client.post("/v1/search", files=[("file", b"x" * 2**20)])
        assert (answer.status_code, answer.json()["status"]) == (413, 413)

        def chunks() -> Iterator[bytes]:
            yield from (b"x" * 2**16 for _ in range(40))

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        assert client.post("/v1/search", content=chunks(), headers=headers).status_code == 413
        large = json.dumps({"where": "x" * MAX_JSON_BYTES})
        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/search", content=large, headers=headers).status_code == 413
        assert client.get("/readyz").status_code == 200


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        del scope, send
        while True:
            await receive()

    sent: list[Any] = []

    async def ask() -> None:
        middleware = Requests(app, access=Access(None, LOOPBACK, ()), metrics=Metrics(), max_bytes=100, upload_s=0.05)
        headers = [(b"host", b"127.0.0.1"), (b"content-length", b"50"), (b"content-type", b"multipart/form-data")]
        scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": headers}

        async def receive() -> Any:
            await asyncio.sleep(3600)

        async def send(message: Any) -> None:
            sent.append(message)

        await middleware(scope, receive, send)
        assert middleware._bodies == 0

    asyncio.run(ask())
    assert sent[0]["status"] == 408


def test_a_body_that_trickles_keeps_its_place_for_a_grace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_GRACE_S", 0.1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del scope
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def status_of(bytes_each: int) -> int:
        middleware = Requests(app, access=Access(None, LOOPBACK, ()), metrics=Metrics(), max_bytes=2**20, upload_s=30)
        headers = [
            (b"host", b"127.0.0.1"),
            (b"transfer-encoding", b"chunked"),
            (b"content-type", b"multipart/form-data"),
        ]
        scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": headers}
        left = 20
        sent: list[Any] = []

        async def receive() -> Any:
            nonlocal left
            await asyncio.sleep(0.02)
            left -= 1
            return {"type": "http.request", "body": b"x" * bytes_each, "more_body": left > 0}

        async def send(message: Any) -> None:
            sent.append(message)

        await middleware(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(status_of(1)) == 408
    assert asyncio.run(status_of(4096)) == 200, "it comes at 200 KiB a second"


def test_a_picture_that_takes_too_long_is_refused_and_the_next_is_answered(place: Place) -> None:
    with client_of(place, ServeSettings(decode=Limits(seconds=0.000001))) as client:
        answer = client.post("/v1/search", files=[("file", place.picture(1).read_bytes())])
        assert answer.status_code == 422
        assert "took more than" in answer.json()["detail"]
        assert client.get("/v1/index").status_code == 200


def test_an_upload_without_room_on_the_disk_comes_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)  # into which a form lays files of more than 1 MiB
    answer = client.post("/v1/search", files=[("file", b"x" * 2**21)])
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:mimco:busy")
    assert "retry-after" in answer.headers
    assert "No space left" in caplog.text


def test_too_many_files_and_fields_are_refused(client: TestClient) -> None:
    answer = client.post("/v1/search", files=[("file", b"x")] * 9)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.post("/v1/search", data={"request": ["{}", "{}"]}, files=[("file", b"x")]).status_code == 400


def test_when_the_queue_is_full_the_others_are_told_when_to_come_again(place: Place) -> None:
    with client_of(place, ServeSettings(queue=2)) as client:
        service = client.app.state.context.service  # type: ignore[attr-defined]
        release = threading.Event()
        embed = service.now.batcher._embed

        def slow(pixels: npt.NDArray[np.uint8]) -> Any:
            release.wait(30)
            return embed(pixels)

        service.now.batcher._embed = slow

        def search(number: int) -> Any:
            return client.post("/v1/search", files=[("file", place.picture(number).read_bytes())])

        with ThreadPoolExecutor(2) as pool:
            first = [pool.submit(search, number) for number in (1, 2)]
            deadline = time.monotonic() + 20
            while service.now.batcher.admitted < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            refused = search(3)
            assert (refused.status_code, refused.json()["type"]) == (503, "urn:mimco:busy")
            assert int(refused.headers["retry-after"]) >= 1
            stored = client.post("/v1/search", json={"parts": [{"path": str(place.picture(1))}]})
            assert stored.status_code == 200, "what is indexed needs no encoder"
            assert client.get("/v1/index").status_code == 200, "what needs no encoder is answered"
            release.set()
            assert [one.result().status_code for one in first] == [200, 200]
        assert service.now.batcher.admitted == 0
        assert search(3).status_code == 200


def test_the_description_of_the_api_is_no_unknown_route(client: TestClient) -> None:
    assert client.get("/openapi.json").status_code == client.head("/openapi.json").status_code == 200
    assert 'mimco_request_seconds_count{route="/openapi.json"}' in client.get("/metrics").text


def test_the_log_says_what_was_asked_and_not_with_what(
    client: TestClient, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mimco_deploy.access")
    answer = client.get("/v1/pictures", params={"where": "name = 'a secret'"})
    client.post("/v1/search", files=[("file", place.picture(1).read_bytes())])
    lines = [json.loads(record.message) for record in caplog.records if record.name == "mimco_deploy.access"]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("GET", "/v1/pictures", 200),
        ("POST", "/v1/search", 200),
    ]
    assert lines[0]["request"] == answer.headers["x-request-id"]
    assert "secret" not in caplog.text


def test_metrics_count_requests_steps_and_batches(client: TestClient, place: Place) -> None:
    client.post("/v1/search", files=[("file", place.picture(1).read_bytes())])
    text = client.get("/metrics").text
    for name in ("requests_total{", "request_seconds_bucket{", 'step_seconds_count{step="embed"}',
                 "batch_pictures_count", "index_generation 1.0", "pictures_admitted 0.0"):  # fmt: skip
        assert f"mimco_{name}" in text, name


# ------------------------------------------------------------------------------------------------ the batcher


def embed_by_sum(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.asarray(pixels.reshape(len(pixels), -1).sum(axis=1)[:, np.newaxis], np.float32)


def picture(value: int) -> npt.NDArray[np.uint8]:
    return np.full((2, 2, 3), value, np.uint8)


PACE = Pace(lone_s=0.01, images_per_s=1000.0)


def test_what_waits_together_is_embedded_together_and_nobody_gets_anothers() -> None:
    sizes: list[int] = []

    async def run() -> list[float]:
        batcher = Batcher(embed_by_sum, PACE, window_s=0.02, room=64, on_batch=sizes.append)
        batcher.start()

        async def one(value: int) -> float:
            async with batcher.admit(1):
                return float((await batcher.embed([picture(value)]))[0][0, 0])

        found = await asyncio.gather(*(one(value) for value in range(40)))
        await batcher.stop()
        assert batcher.admitted == 0
        return found

    assert asyncio.run(run()) == [12.0 * value for value in range(40)]
    assert max(sizes) == MOST
    assert sum(sizes) == 40


def test_room_follows_the_pace_of_the_encoder() -> None:
    assert Pace(lone_s=0.05, images_per_s=20.0).room == 3, "two cores: batches gain nothing"
    assert Pace(lone_s=0.005, images_per_s=2000.0).room == 30, "a GPU"
    assert Pace(lone_s=2.0, images_per_s=0.5).room == 3


def test_who_does_not_fit_is_refused_or_waits_and_a_large_request_passes_alone() -> None:
    async def run() -> None:
        batcher = Batcher(embed_by_sum, PACE, room=3)
        async with batcher.admit(5):
            with pytest.raises(BusyError) as caught:
                async with batcher.admit(1):
                    pass
            assert caught.value.retry_after_s == 1
            waiting = asyncio.create_task(enter(batcher))
            await asyncio.sleep(0.01)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 5)

    async def enter(batcher: Batcher) -> None:
        async with batcher.admit(1, patient=True):
            pass

    asyncio.run(run())


def test_an_encoder_that_fails_fails_its_batch_alone() -> None:
    def embed(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if pixels.max() == 13:
            raise RuntimeError("the encoder broke")
        return embed_by_sum(pixels)

    async def run() -> None:
        batcher = Batcher(embed, PACE)
        batcher.start()
        async with batcher.admit(1):
            with pytest.raises(RuntimeError, match="broke"):
                await batcher.embed([picture(13)])
        async with batcher.admit(1):
            assert (await batcher.embed([picture(2)]))[0][0, 0] == 24
        await batcher.stop()

    asyncio.run(run())


def test_nobody_embeds_for_who_has_left() -> None:
    sizes: list[int] = []
    release = threading.Event()

    def embed(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        release.wait(10)
        return embed_by_sum(pixels)

    async def run() -> None:
        batcher = Batcher(embed, PACE, room=10, on_batch=sizes.append)
        batcher.start()
        first = asyncio.create_task(batcher.embed([picture(1)]))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(batcher.embed([picture(2)]))
        await asyncio.sleep(0.05)
        gone.cancel()
        release.set()
        await first
        await batcher.embed([picture(3)])
        await batcher.stop()

    asyncio.run(run())
    assert sizes == [1, 1]
