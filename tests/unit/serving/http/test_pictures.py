"""Routes that read the index: pictures, lists, the map."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.testclient import TestClient

from tests.helpers import noise, save
from tests.unit.serving.http.conftest import COUNT, PatchEncoder, Place, client_of, make_place


def id_of(client: TestClient, path: Path) -> str:
    found: str = client.post("/v1/search", json={"parts": [{"path": str(path)}], "k": 1}).json()["hits"][0]["id"]
    return found


def test_every_file_is_listed_once_page_by_page(client: TestClient) -> None:
    paths: list[str] = []
    after: str | None = None
    while True:
        page = client.get("/v1/pictures", params={"limit": 7} | ({"after": after} if after else {})).json()
        paths += [picture["paths"][0] for picture in page["pictures"]]
        after = page["next"]
        if after is None:
            break
    assert paths == sorted(paths)
    assert len(set(paths)) == len(paths) == COUNT + 1
    some = client.get("/v1/pictures", params={"where": "name like '000%'", "limit": 500}).json()["pictures"]
    assert len(some) == 10
    assert client.get("/v1/pictures", params={"after": "nonsense"}).status_code == 422


def test_a_picture_is_known_with_all_its_paths(client: TestClient, place: Place) -> None:
    found = client.get(f"/v1/pictures/{id_of(client, place.picture(7))}").json()
    assert found["paths"] == [str(place.picture(7)), str(place.photos / "copies/same.png")]
    assert (found["width_px"], found["height_px"]) == (32, 32)
    assert found["bytes"] == place.picture(7).stat().st_size


def test_the_original_comes_whole_in_parts_and_not_at_all_where_it_is_known(client: TestClient, place: Place) -> None:
    content = place.picture(5).read_bytes()
    address = f"/v1/pictures/{id_of(client, place.picture(5))}/file"
    whole = client.get(address)
    assert whole.content == content
    assert whole.headers["content-type"] == "image/png"
    assert "immutable" in whole.headers["cache-control"]
    assert "sandbox" in whole.headers["content-security-policy"]
    part = client.get(address, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    beyond = client.get(address, headers={"Range": f"bytes={10**9}-"})
    assert (beyond.status_code, beyond.json()["status"]) == (416, 416)
    assert beyond.headers["content-range"] == f"bytes */{len(client.get(address).content)}"
    for unread in ("lines=1-2", "bytes", "bytes=", "bytes=9-3"):
        answer = client.get(address, headers={"Range": unread})
        assert answer.status_code == 400, unread
        assert answer.headers["content-type"] == "application/problem+json"
    again = client.get(address, headers={"If-None-Match": whole.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = client.head(address)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(content)))


def test_thumbnails_are_small_and_kept(client: TestClient, place: Place) -> None:
    address = f"/v1/pictures/{id_of(client, place.picture(5))}/thumbnail"
    first = client.get(address, params={"px": "64"})
    assert first.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(first.content)).size == (32, 32)
    assert client.get(address, params={"px": "64"}).content == first.content
    assert 'mimco_thumbnails_total{from="cache"} 1.0' in client.get("/metrics").text
    assert client.get(address, params={"px": "65"}).status_code == 422


def test_only_what_is_as_it_was_indexed_is_given_out(tmp_path: Path) -> None:
    place = make_place(tmp_path.resolve(), 12)
    with client_of(place) as client:
        ids = {number: id_of(client, place.picture(number)) for number in (3, 4, 7)}
        place.picture(3).unlink()
        place.picture(4).write_bytes(b"something else")
        place.picture(7).unlink()
        for number in (3, 4):
            for what in ("file", "thumbnail"):
                answer = client.get(f"/v1/pictures/{ids[number]}/{what}")
                assert (answer.status_code, answer.json()["type"]) == (410, "urn:mimco:gone")
        assert client.get(f"/v1/pictures/{ids[7]}/file").status_code == 200, "there is a copy"
        assert client.get(f"/v1/pictures/{'0' * 64}/file").status_code == 404


def test_a_link_to_another_file_of_the_same_size_and_date_is_not_followed(tmp_path: Path) -> None:
    """Whoever may write in an indexed folder gets nothing of a file that the service alone may read."""
    place = make_place(tmp_path.resolve(), 12)
    picture, other = place.picture(3), place.picture(4)
    stamp = picture.stat()
    secret = tmp_path / "secret"
    noise(3).point(lambda value: value // 2 + 64).save(secret, "PNG", optimize=True)
    secret.write_bytes(secret.read_bytes().ljust(stamp.st_size, b"\0"))
    os.utime(secret, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert secret.stat().st_size == stamp.st_size
    with client_of(place) as client:
        found, aside = id_of(client, picture), id_of(client, other)
        service = client.app.state.context.service  # type: ignore[attr-defined]
        service._now.encoder = PatchEncoder(service.now.encoder)

        def asked() -> list[Any]:
            part = {"id": found, "crop": [0, 0, 1, 1]}
            return [
                *(client.get(f"/v1/pictures/{found}/{what}") for what in ("file", "thumbnail", "thumbnail?px=64")),
                client.post("/v1/search", json={"parts": [part]}),
                client.post("/v1/why", json={"query": part, "hit": aside}),
                client.post("/v1/why", json={"query": {"id": aside}, "hit": found}),
            ]

        query = picture.read_bytes()

        def best_by_parts() -> str:
            request = {"where": f"name in ('{picture.name}', '{other.name}')", "rerank": True}
            answer = client.post("/v1/search", data={"request": json.dumps(request)}, files=[("file", query)])
            return str(answer.json()["hits"][0]["path"])

        true = client.get(f"/v1/pictures/{found}/thumbnail?px=128").content  # nothing is enlarged
        assert client.get(f"/v1/pictures/{found}/file").status_code == 200
        assert best_by_parts() == str(picture)
        picture.rename(tmp_path / "true")
        picture.symlink_to(secret)
        for answer in asked():
            assert (answer.status_code, answer.json()["type"]) == (410, "urn:mimco:gone"), answer.url
            assert answer.headers["cache-control"] == "no-store"
        assert best_by_parts() == str(other), "what cannot be read any more is last"
        picture.unlink()
        os.mkfifo(picture)
        assert {answer.status_code for answer in asked()} == {410}
        picture.unlink()
        (tmp_path / "true").rename(picture)
        assert {answer.status_code for answer in asked()} == {200}
        assert client.get(f"/v1/pictures/{found}/thumbnail").content == true


def test_what_is_open_is_closed(client: TestClient, place: Place) -> None:
    address = f"/v1/pictures/{id_of(client, place.picture(5))}/file"
    client.get(address)
    before = len(list(Path("/dev/fd").iterdir()))
    for headers in ({}, {"Range": "bytes=0-9"}, {"Range": "bytes=9999999-"}, {"Range": "x"}, {"If-None-Match": "*"}):
        client.get(address, headers=headers)
        client.head(address, headers=headers)
    assert len(list(Path("/dev/fd").iterdir())) <= before + 1


def test_nothing_but_an_id_names_a_file(client: TestClient, place: Place) -> None:
    for name in ("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "0001.png", "A" * 64, str(place.picture(1))):
        assert client.get(f"/v1/pictures/{name}/file").status_code in (404, 422)
    assert client.get("/../pyproject.toml").status_code == 404
    assert client.get("/schemas.py").status_code == 404


def test_status_problems_and_duplicates_say_what_the_index_holds(client: TestClient, place: Place) -> None:
    status = client.get("/v1/index").json()
    assert (status["files"], status["contents"], status["problems"]) == (COUNT + 1, COUNT, 1)
    assert status["roots"] == [{"path": str(place.photos), "reachable": True, "files": COUNT + 1, "problems": 1}]
    assert status["writer"] is None
    assert "camera" in status["columns"]
    problems = client.get("/v1/problems").json()
    assert (problems["total"], problems["next"]) == (1, None)
    assert problems["problems"][0]["path"] == str(place.photos / "broken.jpg")
    duplicates = client.get("/v1/duplicates", params={"min_score": 1}).json()
    assert duplicates["total"] == 1
    assert {os.path.basename(file["path"]) for file in duplicates["groups"][0]["files"]} == {"0007.png", "same.png"}  # noqa: PTH119


def test_the_map_places_every_content(client: TestClient) -> None:
    found = client.get("/v1/map").json()
    assert len(found["ids"]) == len(set(found["ids"])) == len(found["x"]) == len(found["y"]) == COUNT
    assert min(found["x"] + found["y"]) >= 0
    assert max(found["x"] + found["y"]) <= 1
    assert client.get(f"/v1/pictures/{found['ids'][0]}").status_code == 200


def test_an_empty_index_answers_with_nothing(tmp_path: Path) -> None:
    place = make_place(tmp_path.resolve(), 1)
    for path in (place.picture(0), place.photos / "copies/same.png"):
        path.unlink()
    with client_of(place) as client:
        job = client.post("/v1/jobs", json={}).json()["id"]
        with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
            assert '"state":"done"' in list(stream.iter_lines())[-2]
        query = save(tmp_path / "query.png", 1)
        answer = client.post("/v1/search", files=[("file", query.read_bytes())])
        assert answer.json()["hits"] == []
        assert client.get("/v1/map").json()["ids"] == []
        assert client.get("/v1/duplicates").json()["groups"] == []
        assert client.get("/v1/pictures").json() == {"pictures": [], "next": None}
