"""What a review did to the service, each once: it is refused, and the service goes on."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from mimco_deploy.serving import duplicates
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.http.access import COOKIE, LOOPBACK, Access
from mimco_deploy.serving.http.metrics import Metrics
from mimco_deploy.serving.http.requests import Requests
from mimco_deploy.serving.update import update_index
from tests.helpers import gallery, tiny_bundle
from tests.unit.serving.http.conftest import Place, client_of

TOKEN = "a token of enough letters"


def nested(letters: str, times: int) -> str:
    text = f"'{letters}'"
    for _ in range(times):
        text = f"replace({text}, 'a', '{letters}')"
    return text


def test_a_condition_cannot_grow_beyond_what_one_step_bears(client: TestClient) -> None:
    big = nested("a" * 32, 4)
    for where in (f"instr({big}, substr({big}, 1, 9999999) || 'b') > 0", f"length(hex(hex({big}))) > 0"):
        start = time.monotonic()
        answer = client.get("/v1/pictures", params={"where": where})
        assert (answer.status_code, "too big" in answer.json()["detail"]) == (422, True)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "where",
    [
        "x'00' || name glob '" + "*[" + "x" * 120 + "a]" * 20 + "'",
        " or ".join(["name || hex(zeroblob(3000)) glob '*" + "0*" * 100 + "a'"] * 10),
        "x||0||name glob '*'||substr('" + "x" * 3000 + "',1,3000)||'b'",
    ],
)
def test_patterns_cost_no_more_than_one_step_may(client: TestClient, where: str) -> None:
    start = time.monotonic()
    assert client.get("/v1/pictures", params={"where": where}).status_code in (200, 422)
    assert time.monotonic() - start < 10


def test_computations_that_nobody_waits_for_do_not_pile_up(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(duplicates, "find_duplicates", lambda *_: release.wait(20) and [])
    with ThreadPoolExecutor(10) as pool:
        scores = [0.6 + number / 100 for number in range(10)]
        asked = [pool.submit(client.get, "/v1/duplicates", params={"min_score": score}) for score in scores]
        deadline = time.monotonic() + 10
        while sum(one.done() for one in asked) < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        refused = [one.result() for one in asked if one.done()]
        release.set()
        assert [answer.status_code for answer in refused] == [503] * 6
        assert sorted(one.result().status_code for one in asked) == [200] * 4 + [503] * 6


def test_long_conditions_end_and_hold_up_only_each_other(client: TestClient) -> None:
    where = (
        "exists(select 1 from files a, files b, files c, files d, files e where a.size+b.size+c.size+d.size+e.size<0)"
    )
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(client.get, "/v1/pictures", params={"where": where}) for _ in range(12)]
        time.sleep(0.5)
        assert client.get("/readyz").status_code == 200
        assert not all(one.done() for one in asked), "it was answered beside them"
        codes = sorted(one.result().status_code for one in asked)
    assert set(codes) == {422, 503}
    assert client.get("/v1/pictures", params={"where": "bytes > 0"}).status_code == 200


@pytest.mark.parametrize("table", ["settings", "sqlite_master", "problems"])
def test_a_condition_reads_no_other_table(client: TestClient, table: str) -> None:
    answer = client.get("/v1/pictures", params={"where": f"exists(select 1 from {table})"})
    assert answer.status_code == 422


def test_cookies_of_other_programs_neither_cost_time_nor_hide_ours(place: Place) -> None:
    with client_of(place, token=TOKEN) as client:
        cookie = client.app.state.context.access.cookie  # type: ignore[attr-defined]
        for other in ("theme=dark mode", 'a={"x":1}', "flag", "a[b]=c"):
            headers = {"Cookie": f"{other}; {COOKIE}={cookie}"}
            assert client.get("/v1/version", headers=headers).status_code == 200, other
        start = time.monotonic()
        assert client.get("/v1/version", headers={"Cookie": 'a="' + "\\a" * 30_000 + '"'}).status_code == 401
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("origin", ["http://[", "//[", "http://", "x" * 1000])
def test_an_origin_that_is_none_is_refused(client: TestClient, origin: str) -> None:
    answer = client.get("/v1/index", headers={"Origin": origin})
    assert (answer.status_code, answer.headers["content-type"]) == (403, "application/problem+json")


def test_a_large_upload_may_be_named_by_several_parts(client: TestClient, tmp_path: Path) -> None:
    Image.frombytes("RGB", (700, 700), os.urandom(700 * 700 * 3)).save(tmp_path / "large.png")
    content = (tmp_path / "large.png").read_bytes()
    assert len(content) > 2**20, "so it lies on the disk"
    parts = [{"upload": 0}, {"upload": 0, "crop": [0, 0, 0.5, 0.5]}, {"upload": 0, "crop": [0.5, 0, 0.5, 0.5]}]
    for _ in range(4):
        answer = client.post("/v1/search", data={"request": json.dumps({"parts": parts})}, files=[("file", content)])
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\r\n--B", b"\r\n--B-", b"\r\n--C--\r\n"])
def test_a_form_that_is_cut_off_is_not_taken_for_whole(client: TestClient, place: Place, end: bytes) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + place.picture(1).read_bytes()
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    whole = client.post("/v1/search", content=head + b"\r\n--B--\r\nwhatever follows", headers=headers)
    assert whole.status_code == 200
    answer = client.post("/v1/search", content=head + end, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")


def test_the_end_of_a_form_is_seen_where_it_comes_in_pieces(client: TestClient, place: Place) -> None:
    form = (
        b'--B0\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        + place.picture(1).read_bytes()
        + b"\r\n--B0--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=B0"}
    for cut in range(1, 12):
        pieces = [form[:-cut], form[-cut:]]
        assert client.post("/v1/search", content=iter(pieces), headers=headers).status_code == 200, cut


def test_a_file_without_a_name_is_told_so(client: TestClient) -> None:
    answer = client.post("/v1/search", files=[("file", (None, b"x"))])
    assert (answer.status_code, answer.json()["detail"]) == (422, "file: has no filename")


@pytest.mark.parametrize("charset", ["punycode", "undefined", "utf-7", "utf-16"])
def test_a_form_in_another_encoding_is_refused(client: TestClient, charset: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary=B; charset={charset}"}
    assert client.post("/v1/search", content=b"--B--\r\n", headers=headers).status_code == 415


def test_the_case_of_a_content_type_changes_no_limit(client: TestClient) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + b"x" * 2**20 + b"\r\n--B--\r\n"
    answer = client.post("/v1/search", content=body, headers={"Content-Type": "Multipart/Form-Data; boundary=B"})
    assert answer.json()["type"] == "urn:mimco:picture"


@pytest.mark.parametrize("path", ["photos/0001.png", "../x", "", "/loop/x"])
def test_paths_that_lead_nowhere_are_not_there(client: TestClient, tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    if path == "/loop/x":
        path = str(tmp_path / "loop/x")
    answer = client.post("/v1/search", json={"parts": [{"path": path}]})
    assert answer.status_code == 404, answer.text


def test_folders_of_a_request_are_absolute_and_indexed(client: TestClient, place: Place) -> None:
    query = {"parts": [{"path": str(place.picture(1))}], "root": "photos"}
    assert client.post("/v1/search", json=query).status_code == 422
    assert client.get("/v1/pictures", params={"root": "photos"}).status_code == 422
    assert client.get("/v1/duplicates", params={"root": "/etc"}).status_code == 422


def test_a_text_that_is_a_picture_in_name_costs_no_time(client: TestClient) -> None:
    content = b"P3\n1600 1600\n255\n" + b"#a\n" * 2**20
    start = time.monotonic()
    answer = client.post("/v1/embed", files=[("file", content)])
    assert (answer.status_code, "plain text" in answer.json()["detail"]) == (422, True)
    assert time.monotonic() - start < 5


def test_details_are_short_whatever_was_asked(client: TestClient) -> None:
    answer = client.post("/v1/jobs", json={"x" * 100_000: 1})
    assert answer.status_code == 422
    assert len(answer.text) < 2000


def test_a_body_of_a_job_that_is_too_long_is_told_so(client: TestClient) -> None:
    def chunks() -> Any:
        yield from (b"x" * 2**16 for _ in range(20))

    answer = client.post("/v1/jobs", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_client_that_leaves_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        del scope, receive, send
        raise ClientDisconnect

    metrics = Metrics()

    async def ask() -> None:
        middleware = Requests(app, access=Access(None, LOOPBACK, ()), metrics=metrics, max_bytes=1, upload_s=1)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}

        async def nothing(*_: Any) -> Any:
            raise AssertionError("nobody is there")

        await middleware(scope, nothing, nothing)

    asyncio.run(ask())
    assert 'status="499"' in metrics.text().decode()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_date_of_the_far_future_is_indexed_and_given_out(tmp_path: Path) -> None:
    place = Place(tmp_path / "index", tiny_bundle(tmp_path / "encoder"), tmp_path / "photos")
    gallery(place.photos, 3)
    far = 2**34
    try:
        os.utime(place.picture(1), (far, far))
    except OSError:
        pytest.skip("this file system has no such dates")
    report = update_index(place.index, [place.photos], load_encoder(place.encoder))
    assert (report.counts.files, report.problems) == (3, ())
    assert update_index(place.index, [], load_encoder(place.encoder)).unchanged == 3
    with client_of(place) as client:
        found = client.get("/v1/pictures").json()["pictures"]
        assert [client.get(f"/v1/pictures/{one['id']}/file").status_code for one in found] == [200] * 3
