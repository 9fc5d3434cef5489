"""Routes that take pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.filters import Filter
from mimco_deploy.serving.http.service import ServeSettings
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.query import Part, search_image
from tests.helpers import noise, save
from tests.unit.serving.http.conftest import COUNT, PatchEncoder, Place, client_of


def ask(client: TestClient, request: dict[str, Any] | None, *files: Path) -> Any:
    fields = {} if request is None else {"request": json.dumps(request)}
    return client.post("/v1/search", data=fields, files=[("file", path.read_bytes()) for path in files])


def in_python(place: Place, query: Path | list[Part], k: int, where: str = "") -> list[tuple[str, float]]:
    encoder = load_encoder(place.encoder)
    with ImageIndex.open(place.index, encoder.spec.fingerprint) as index:
        return [(str(hit.path), hit.score) for hit in search_image(index, encoder, query, k, Filter(where))]


def hits_of(answer: Any) -> list[tuple[str, float]]:
    assert answer.status_code == 200, answer.text
    return [(hit["path"], hit["score"]) for hit in answer.json()["hits"]]


def test_an_uploaded_picture_finds_what_python_finds(client: TestClient, place: Place) -> None:
    answer = ask(client, {"k": 9}, place.picture(5))
    expected = in_python(place, place.picture(5), 9)
    assert [path for path, _ in hits_of(answer)] == [path for path, _ in expected]
    assert np.allclose([score for _, score in hits_of(answer)], [score for _, score in expected], atol=1e-6)
    assert answer.json()["searched"] == COUNT
    assert {"decode", "wait", "embed", "search"} <= set(answer.json()["timings_ms"])
    assert answer.json()["hits"][0]["confidence_word"] == "clear"


def test_an_indexed_picture_is_found_by_its_id_and_its_path_without_the_encoder(
    client: TestClient, place: Place
) -> None:
    by_path = client.post("/v1/search", json={"parts": [{"path": str(place.picture(5))}], "k": 4})
    found = by_path.json()["hits"][0]["id"]
    by_id = client.post("/v1/search", json={"parts": [{"id": found}], "k": 4})
    assert hits_of(by_id) == hits_of(by_path)
    assert hits_of(by_path)[0][0] == str(place.picture(5))
    assert "embed" not in by_id.json()["timings_ms"]


def test_several_pictures_with_weights_are_one_query(client: TestClient, place: Place) -> None:
    parts = [{"upload": 0, "weight": 1.0}, {"upload": 1, "weight": -0.5}, {"path": str(place.picture(9)), "weight": 2}]
    answer = ask(client, {"parts": parts, "k": 5}, place.picture(1), place.picture(2))
    pictures = [Part(place.picture(1)), Part(place.picture(2), -0.5), Part(place.picture(9), 2.0)]
    expected = in_python(place, pictures, 5)
    assert [path for path, _ in hits_of(answer)] == [path for path, _ in expected]


def test_without_parts_all_files_are_the_query(client: TestClient, place: Place) -> None:
    answer = ask(client, None, place.picture(1), place.picture(2))
    expected = in_python(place, [Part(place.picture(1)), Part(place.picture(2))], 24)
    assert [path for path, _ in hits_of(answer)] == [path for path, _ in expected]


@pytest.mark.parametrize("source", ["upload", "path"])
def test_a_crop_of_an_upload_or_an_indexed_picture_is_searched_with(
    client: TestClient, place: Place, tmp_path: Path, source: str
) -> None:
    both = Image.new("RGB", (64, 32))
    both.paste(noise(3), (0, 0))
    both.paste(noise(9), (32, 0))
    both.save(tmp_path / "both.png")
    if source == "upload":
        answer = ask(client, {"parts": [{"upload": 0, "crop": [0.5, 0, 0.5, 1]}], "k": 1}, tmp_path / "both.png")
        assert hits_of(answer)[0][0] == str(place.picture(9))
    else:
        part = {"path": str(place.picture(9)), "crop": [0, 0, 1, 1]}
        answer = client.post("/v1/search", json={"parts": [part], "k": 1})
        assert hits_of(answer)[0][0] == str(place.picture(9))
        assert answer.json()["timings_ms"]["embed"] > 0


def test_conditions_and_least_scores_hold(client: TestClient, place: Place) -> None:
    where = "name glob '000*'"
    answer = ask(client, {"k": 100, "where": where, "min_score": -0.2}, place.picture(30))
    expected = [one for one in in_python(place, place.picture(30), 100, where) if one[1] >= -0.2]
    assert [path for path, _ in hits_of(answer)] == [path for path, _ in expected]
    below = ask(client, {"k": 5, "root": str(place.photos / "copies")}, place.picture(30))
    assert [path for path, _ in hits_of(below)] == [str(place.photos / "copies/same.png")]
    none = ask(client, {"k": 5, "min_confidence": 0.999, "where": "name = '0001.png'"}, place.picture(30))
    assert hits_of(none) == []


def test_a_batch_answers_each_of_its_queries(client: TestClient, place: Place) -> None:
    files = [("file", place.picture(number).read_bytes()) for number in (3, 4, 5)]
    answers = client.post("/v1/search/batch", files=files).json()["answers"]
    assert [one["hits"][0]["path"] for one in answers] == [str(place.picture(number)) for number in (3, 4, 5)]
    queries = {"queries": [{"parts": [{"path": str(place.picture(8))}], "k": 2}, {"parts": [{"upload": 0}], "k": 3}]}
    answer = client.post("/v1/search/batch", data={"request": json.dumps(queries)}, files=files[:1])
    assert [len(one["hits"]) for one in answer.json()["answers"]] == [2, 3]


def test_embeddings_come_as_json_and_as_bytes(client: TestClient, place: Place) -> None:
    files = [("file", place.picture(number).read_bytes()) for number in (3, 4)]
    listed = client.post("/v1/embed", files=files).json()
    accept = "application/json;q=0.5, Application/octet-stream; q=0.9"
    raw = client.post("/v1/embed", files=files, headers={"Accept": accept})
    embeddings = np.frombuffer(raw.content, "<f4").reshape(2, -1)
    assert raw.headers["x-mimco-shape"] == f"2x{listed['embedding_dim']}"
    assert np.allclose(listed["embeddings"], embeddings, atol=1e-7)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_an_encoder_without_patches_says_so(client: TestClient, place: Place) -> None:
    found = client.post("/v1/search", json={"parts": [{"path": str(place.picture(5))}], "k": 1}).json()["hits"][0]["id"]
    answer = client.post("/v1/why", json={"query": {"id": found}, "hit": found})
    assert answer.status_code == 409
    assert "patch tokens" in answer.json()["detail"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, "k"),
    ({"kk": 3}, "kk"),
    ({"where": "nonsense ="}, "nonsense"),
    ({"where": "path; drop table files"}, "cannot be used"),
    ({"where": "a\u0000b"}, "where"),
    ({"parts": []}, "parts"),
    ({"parts": [{"upload": 3}]}, "3"),
    ({"parts": [{"upload": 0, "id": "0" * 64}]}, "one of"),
    ({"parts": [{"upload": 0, "crop": [0, 0, 0, 1]}]}, "crop"),
    ({"parts": [{"upload": 0, "crop": [0, 0, 2, 1]}]}, "crop"),
    ({"parts": [{"upload": 0}, {"upload": 0, "weight": -1}]}, "cancel"),
    ({"rerank": True, "k": 500}, "rerank"),
    ({"rerank": 1}, "rerank"),
]


@pytest.mark.parametrize(("request_", "named"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_a_wrong_query_is_refused_with_what_is_wrong(
    client: TestClient, place: Place, request_: dict[str, Any], named: str
) -> None:
    answer = ask(client, request_, place.picture(1))
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert named in answer.json()["detail"]
    assert answer.json()["status"] == 422


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        ({"where": "nonsense = 1"}, "condition"),
        ({"where": "path = 'a'", "parts": [{"upload": 0, "crop": [0, 0, 2, 1]}]}, "request"),
        ({"where": "path = 'a'", "parts": [{"upload": 0}, {"upload": 0, "weight": -1}]}, "query"),
        ({"where": "path = 'a'", "root": "/nowhere"}, "query"),
    ],
)
def test_programs_can_tell_a_wrong_condition_from_the_rest(
    client: TestClient, place: Place, request_: dict[str, Any], kind: str
) -> None:
    assert ask(client, request_, place.picture(1)).json()["type"] == f"urn:mimco:{kind}"


def test_what_is_no_picture_is_refused_with_the_reason(client: TestClient, place: Place) -> None:
    answer = ask(client, None, place.photos / "broken.jpg")
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:mimco:picture")
    assert client.post("/v1/search", json={"parts": [{"id": "0" * 64}]}).status_code == 404
    assert client.post("/v1/search", json={"parts": [{"path": "/etc/passwd"}]}).status_code == 404
    assert client.post("/v1/search", json={"parts": [{"path": "/etc/passwd", "crop": [0, 0, 1, 1]}]}).status_code == 404
    assert client.post("/v1/search", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert (
        client.post("/v1/search", files=[("other", save(place.index.parent / "q.png", 1).read_bytes())]).status_code
        == 422
    )


def test_with_patches_parts_are_compared_and_hits_reordered(place: Place, tmp_path: Path) -> None:
    both = Image.new("RGB", (64, 32))
    both.paste(noise(3), (0, 0))
    both.paste(noise(9), (32, 0))
    both.save(tmp_path / "both.png")
    with client_of(place) as client:
        service = client.app.state.context.service  # type: ignore[attr-defined]
        service._now.encoder = PatchEncoder(service.now.encoder)
        assert client.get("/v1/index").json()["patches"]
        found = client.post("/v1/search", json={"parts": [{"path": str(place.picture(9))}], "k": 1}).json()["hits"][0]
        request = {"query": {"upload": 0, "crop": [0.5, 0, 0.5, 1]}, "hit": found["id"]}
        files = [("file", (tmp_path / "both.png").read_bytes())]
        why = client.post("/v1/why", data={"request": json.dumps(request)}, files=files).json()
        assert why["score"] == pytest.approx(1.0, abs=1e-3)
        assert why["query"]["box"] == pytest.approx([0.5, 0, 0.5, 1])
        assert why["hit"]["box"] == pytest.approx([0, 0, 1, 1])
        assert np.shape(why["hit"]["heat"]) == (4, 4)
        ordered = ask(client, {"k": 5, "rerank": True}, place.picture(9))
        assert hits_of(ordered)[0][0] == str(place.picture(9))
        assert len(hits_of(ordered)) == 5
        assert "rerank" in ordered.json()["timings_ms"]


def test_queries_under_a_side_table_are_answered(place: Place, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("name,label\n0003.png,cat\n0004.png,dog\n")
    with client_of(place, ServeSettings(table=tmp_path / "labels.csv")) as client:
        assert [path for path, _ in hits_of(ask(client, {"where": "label = 'dog'"}, place.picture(3)))] == [
            str(place.picture(4))
        ]
        assert {"camera", "label"} <= set(client.get("/v1/index").json()["columns"])
    with client_of(place, ServeSettings(table=tmp_path / "missing.csv")) as client:
        assert "camera" in client.get("/v1/index").json()["columns"]
