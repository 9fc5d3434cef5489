"""Runs of the indexer, and an index that changes under a service."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.generations import writer_lock
from mimco_deploy.serving.update import update_index
from tests.helpers import gallery, save, tiny_bundle
from tests.unit.serving.http.conftest import Place, client_of, make_place


@pytest.fixture
def own(tmp_path: Path) -> Place:
    return make_place(tmp_path.resolve(), 12)


def follow(client: TestClient, job: str) -> list[dict[str, Any]]:
    with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: ")]


def search(client: TestClient, path: Path) -> Any:
    return client.post("/v1/search", files=[("file", path.read_bytes())])


def test_a_job_brings_the_index_up_to_date_and_is_followed_to_its_end(own: Place) -> None:
    with client_of(own) as client:
        gallery(own.photos / "new", 5, first=100)
        before = client.get("/v1/index").json()
        started = client.post("/v1/jobs", json={})
        assert started.status_code == 202
        states = follow(client, started.json()["id"])
        assert states[-1]["state"] == "done"
        assert states[-1]["report"]["added"] == 5
        assert client.get(f"/v1/jobs/{states[-1]['id']}").json() == states[-1]
        after = client.get("/v1/index").json()
        assert after["files"] == before["files"] + 5
        assert after["revision"] > before["revision"]
        assert search(client, own.photos / "new/0103.png").json()["hits"][0]["path"].endswith("new/0103.png")


def test_a_job_is_cancelled_and_what_it_committed_stays(own: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery(own.photos / "new", 40, first=100)
    with client_of(own) as client:
        service = client.app.state.context.service  # type: ignore[attr-defined]
        at_work, release = threading.Event(), threading.Event()
        embed = service.now.encoder.embed

        def slow(images: Any) -> Any:
            at_work.set()
            release.wait(20)
            return embed(images)

        monkeypatch.setattr(service.now.encoder, "embed", slow)
        job = client.post("/v1/jobs", json={}).json()["id"]
        assert at_work.wait(20)
        second = client.post("/v1/jobs", json={})
        assert (second.status_code, second.json()["type"]) == (409, "urn:mimco:conflict")
        assert client.delete(f"/v1/jobs/{job}").json()["state"] == "cancelling"
        assert client.get(f"/v1/jobs/{job}").json()["state"] == "cancelling"
        assert client.post("/v1/jobs", json={}).status_code == 409
        release.set()
        assert follow(client, job)[-1]["state"] == "cancelled"
        again = client.post("/v1/jobs", json={}).json()["id"]
        assert follow(client, again)[-1]["state"] == "done"
        assert client.get("/v1/index").json()["files"] == 13 + 40


def test_only_folders_that_are_indexed_can_be_asked_for(own: Place, tmp_path: Path) -> None:
    with client_of(own) as client:
        answer = client.post("/v1/jobs", json={"root": str(tmp_path)})
        assert (answer.status_code, "not an indexed folder" in answer.json()["detail"]) == (409, True)
        assert client.post("/v1/jobs", json={"folders": ["/"]}).status_code == 422
        job = client.post("/v1/jobs", json={"root": str(own.photos), "retry_problems": True}).json()["id"]
        assert follow(client, job)[-1]["state"] == "done"
        assert client.get("/v1/jobs/" + "0" * 16).status_code == 404


def test_a_folder_that_cannot_be_read_is_counted(own: Place, tmp_path: Path) -> None:
    with client_of(own) as client:
        own.photos.rename(tmp_path / "away")
        job = client.post("/v1/jobs", json={}).json()["id"]
        end = follow(client, job)[-1]
        assert (end["state"], end["report"]["unreachable"]) == ("done", 1)


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_a_folder_whose_name_is_no_text_is_named_as_it_is_shown(own: Place, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd-\xff"))
    save(odd / "7.png", 7)
    update_index(own.index, [odd], load_encoder(own.encoder))
    with client_of(own) as client:
        shown = next(root["path"] for root in client.get("/v1/index").json()["roots"] if "\ufffd" in root["path"])
        (only,) = client.get("/v1/pictures", params={"root": shown}).json()["pictures"]
        assert only["paths"][-1] == f"{shown}/7.png"
        assert client.get("/v1/duplicates", params={"root": shown, "min_score": 1}).json()["total"] == 0
        hits = client.post("/v1/search", json={"parts": [{"id": only["id"]}], "root": shown}).json()["hits"]
        assert [hit["path"] for hit in hits] == [f"{shown}/7.png"]
        job = client.post("/v1/jobs", json={"root": shown}).json()["id"]
        assert follow(client, job)[-1]["report"]["unchanged"] == 1
        assert client.get("/v1/pictures", params={"root": "/\ufffd"}).status_code == 422


def test_a_job_beside_another_writer_fails_with_its_process(own: Place) -> None:
    with client_of(own) as client, writer_lock(own.index):
        assert client.get("/v1/index").json()["writer"] is not None
        job = client.post("/v1/jobs", json={}).json()["id"]
        end = follow(client, job)[-1]
        assert end["state"] == "failed"
        assert "is being written by process" in end["error"]


def test_an_index_made_anew_is_taken_up_without_a_refused_request(own: Place) -> None:
    with client_of(own) as client, ThreadPoolExecutor(1) as pool:
        stop = threading.Event()

        def keep_asking() -> list[int]:
            codes = []
            while not stop.is_set():
                codes.append(search(client, own.picture(3)).status_code)
            return codes

        asking = pool.submit(keep_asking)
        for _ in range(3):
            update_index(own.index, [], load_encoder(own.encoder), rebuild=True)
        stop.set()
        codes = asking.result()
        assert set(codes) == {200}
        assert len(codes) > 3
        assert client.get("/v1/version").json()["index_generation"] == 4


def test_an_index_deleted_and_made_anew_is_another_one(own: Place, tmp_path: Path) -> None:
    """It has the same generation and revision."""
    with client_of(own) as client:
        before = client.get("/v1/index").json()
        assert search(client, own.picture(3)).json()["hits"][0]["path"] == str(own.picture(3))
        assert len(client.get("/v1/map").json()["ids"]) == 12
        shutil.rmtree(own.index)
        gallery(tmp_path / "other", 5, first=100)
        update_index(own.index, [tmp_path / "other"], load_encoder(own.encoder))
        status = client.get("/v1/index").json()
        assert (status["generation"], status["revision"]) == (before["generation"], before["revision"])
        hit = search(client, tmp_path / "other/0102.png").json()["hits"][0]
        assert hit["path"] == str(tmp_path / "other/0102.png")
        assert hit["score"] == pytest.approx(1.0)
        assert client.get("/v1/map").json()["ids"] == [
            sha256((tmp_path / f"other/{number:04d}.png").read_bytes()).hexdigest() for number in range(100, 105)
        ]


def test_an_index_of_another_encoder_is_taken_up_with_that_encoder(own: Place, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", seed=1, fingerprint="e" * 64)
    with client_of(own) as client:
        assert client.get("/v1/version").json()["fingerprint"] == "f" * 64
        update_index(own.index, [], load_encoder(other), rebuild=True, encoder_path=other)
        answer = search(client, own.picture(3))
        assert answer.status_code == 200
        assert answer.json()["hits"][0]["path"] == str(own.picture(3))
        assert answer.json()["hits"][0]["score"] > 0.9999
        assert client.get("/v1/version").json()["fingerprint"] == "e" * 64
        assert client.get("/readyz").status_code == 200


def test_an_index_of_an_encoder_that_is_not_there_is_not_answered_from(own: Place, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", seed=1, fingerprint="e" * 64)
    with client_of(own) as client:
        update_index(own.index, [], load_encoder(other), rebuild=True, encoder_path=tmp_path / "nowhere")
        answer = search(client, own.picture(3))
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:mimco:encoder")
        assert "retry-after" in answer.headers


def test_openapi_names_every_route_and_every_reference_leads_somewhere(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    text = json.dumps(document)
    assert {"/v1/search", "/v1/embed", "/v1/why", "/v1/jobs/{id}/events", "/metrics"} <= set(document["paths"])
    for part in text.split('"$ref": "#/')[1:]:
        at: Any = document
        for step in part.partition('"')[0].split("/"):
            at = at[step]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert route["summary"], (path, method)
            assert "application/problem+json" in route["responses"]["422"]["content"], (path, method)
