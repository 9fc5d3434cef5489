from __future__ import annotations

import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from mimco_deploy.errors import ConfigError, EncoderMismatchError, ImageError, MimcoError
from mimco_deploy.serving.client import Client, Picture, ServiceError
from mimco_deploy.serving.http import schemas
from mimco_deploy.serving.http.app import create_app
from mimco_deploy.serving.http.server import listen
from mimco_deploy.serving.http.service import ServeSettings
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery, noise, save, tiny_bundle, tiny_embed

COUNT = 60
TOKEN = "a token of letters"
NOWHERE = "0" * 64
BAD = 2


def picture_bytes(seed: int) -> bytes:
    content = io.BytesIO()
    noise(seed).save(content, "PNG")
    return content.getvalue()


class Running:
    """A service in a thread of this process, over a real socket."""

    def __init__(self, workspace: Path, token: str | None = None) -> None:
        self._socket: socket.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        app = create_app(workspace / "index", workspace / "encoder", ServeSettings(device="cpu"), token=token)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        until = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive(), "it did not start"
            assert time.monotonic() < until
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("client").resolve()
    gallery(workspace / "photos", COUNT)
    shutil.copyfile(workspace / "photos/0005.png", workspace / "photos/copy.png")
    for number in range(BAD):
        (workspace / f"photos/bad{number}.png").write_bytes(b"no picture")
    tiny_bundle(workspace / "encoder")
    update_index(workspace / "index", [workspace / "photos"], CountingEncoder())
    return workspace


@pytest.fixture(scope="module")
def url(workspace: Path) -> Iterator[str]:
    with Running(workspace) as running:
        yield running.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def seven(client: Client, workspace: Path) -> str:
    """Id of picture 7."""
    return client.search(workspace / "photos/0007.png", k=1).hits[0].id


def names(answer: schemas.Answer) -> list[str]:
    return [Path(hit.path).name for hit in answer.hits]


# ------------------------------------------------------------------------------------------------ search


def test_a_file_its_bytes_and_its_id_find_the_same(client: Client, workspace: Path, seven: str) -> None:
    path = workspace / "photos/0007.png"
    by_file = client.search(path, k=5)
    assert by_file.searched == COUNT
    assert Path(by_file.hits[0].path) == path
    assert by_file.hits[0].score > 0.9999
    assert len(by_file.hits) == 5
    assert client.search(path.read_bytes(), k=5).hits == by_file.hits
    assert names(client.search(seven, k=5)) == names(by_file)


def test_weights_crops_and_conditions_are_sent(client: Client, workspace: Path, seven: str) -> None:
    one, two = workspace / "photos/0001.png", picture_bytes(2)
    assert names(client.search(one, two, weights=[100, 0.1], k=1)) == ["0001.png"]
    assert names(client.search(one, two, seven, weights=[0.1, 0.1, 100], k=1)) == ["0007.png"]
    assert names(client.search(one, two, weights=[0.1, -100], k=COUNT + 1))[-1] == "0002.png"
    both = Image.new("RGB", (64, 32))
    both.paste(noise(3), (0, 0))
    both.paste(noise(9), (32, 0))
    content = io.BytesIO()
    both.save(content, "PNG")
    assert names(client.search(content.getvalue(), crop=(0.5, 0, 0.5, 1), k=1)) == ["0009.png"]
    assert sorted(names(client.search(seven, where="name < '0003.png'"))) == ["0000.png", "0001.png", "0002.png"]
    with pytest.raises(ServiceError, match="holds no indexed picture"):
        client.search(seven, root=workspace / "encoder")
    assert len(client.search(seven, root=workspace / "photos", k=COUNT * 2).hits) == COUNT + 1
    every = client.search(seven, k=COUNT).hits
    assert client.search(seven, k=COUNT, min_score=every[4].score - 1e-9).hits == every[:5]
    sure = [hit for hit in every if hit.confidence is not None and hit.confidence >= 0.9]
    assert client.search(seven, k=COUNT, min_confidence=0.9).hits == sure


def test_numbers_of_numpy_are_sent_as_numbers(client: Client, workspace: Path, seven: str) -> None:
    file = workspace / "photos/0008.png"
    numbers: dict[str, Any] = {
        "weights": np.array([1, -0.5], np.float32), "k": np.int64(3), "min_score": np.float32(-0.5)
    }  # fmt: skip
    plain = client.search(seven, file, weights=[1, -0.5], k=3, min_score=-0.5)
    assert client.search(seven, file, **numbers).hits == plain.hits
    assert len(client.search(file, crop=tuple(np.array([0, 0, 0.5, 0.5], np.float32)), k=3).hits) == 3


def test_what_is_no_text_is_told(client: Client, seven: str) -> None:
    with pytest.raises(ConfigError, match="cannot be sent"):
        next(client.pictures(root=Path("caf\udce9")))
    with pytest.raises(ConfigError, match="cannot be sent"):
        client.duplicates(root="caf\udce9")
    for ask in (
        lambda: client.search(seven, where="name = '\udce9'"),
        lambda: client.picture("\udce9"),
        lambda: client.start_update(Path("caf\udce9")),
    ):
        with pytest.raises(ServiceError) as refused:
            ask()
        assert refused.value.status == 422


def test_what_cannot_be_searched_is_told(client: Client, workspace: Path, seven: str) -> None:
    with pytest.raises(ServiceError, match="is not in the index") as missing:
        client.search(NOWHERE)
    assert (missing.value.status, missing.value.kind) == (404, "not-found")
    with pytest.raises(ServiceError) as none:
        client.search(b"no picture")
    assert (none.value.status, none.value.kind) == (422, "picture")
    with pytest.raises(ServiceError, match="no such column") as condition:
        client.search(seven, where="colour = 'red'")
    assert (condition.value.status, condition.value.kind) == (422, "condition")
    for wrong in ({"k": 0}, {"min_score": float("nan")}, {"k": 49, "rerank": True}):
        with pytest.raises(ServiceError) as request:
            client.search(seven, **wrong)
        assert request.value.status == 422
    with pytest.raises(ServiceError, match="patch") as patches:
        client.search(seven, k=5, rerank=True)
    assert patches.value.status == 409
    with pytest.raises(ConfigError, match="1 weights"):
        client.search(seven, seven, weights=[1])
    with pytest.raises(ServiceError):
        client.search()
    with pytest.raises(ImageError, match="does not exist"):
        client.search(workspace / "nothing.png")
    with pytest.raises(ImageError, match="cannot be read"):
        client.search(workspace)
    assert isinstance(none.value, MimcoError)


def test_a_batch_has_an_answer_for_each(client: Client, workspace: Path, seven: str) -> None:
    pictures: list[Picture] = [workspace / "photos/0003.png", seven, *(picture_bytes(number) for number in range(33))]
    answers = client.search_batch(pictures, k=2)
    assert all(len(answer.hits) == 2 for answer in answers)
    first = ["0003.png", "0007.png", *(f"{number:04d}.png" for number in range(33))]
    assert [names(answer)[0] for answer in answers] == first
    assert client.search_batch([]) == []


# ------------------------------------------------------------------------------------------------- embed


def test_embeddings_are_those_of_the_encoder(client: Client, workspace: Path) -> None:
    files = sorted((workspace / "photos").glob("00*.png"))[:33]
    embeddings = client.embed([*files, picture_bytes(99)])
    pixels = np.stack([np.asarray(noise(seed)) for seed in (*range(33), 99)])
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (34, 16)
    np.testing.assert_allclose(embeddings, tiny_embed(pixels), atol=1e-5)
    embeddings[0] = 0  # the caller's own
    assert client.embed([]).shape == (0, 16)
    with pytest.raises(ServiceError):
        client.embed([b"no picture"])
    with pytest.raises(ConfigError, match="an id"):
        client.embed(["a" * 64, b""])  # type: ignore[list-item]


# ---------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_described_and_its_file_is_the_file(client: Client, workspace: Path, seven: str) -> None:
    path = workspace / "photos/0007.png"
    known = client.picture(seven)
    assert (known.id, known.paths, known.bytes) == (seven, [str(path)], path.stat().st_size)
    assert (known.width_px, known.height_px) == (32, 32)
    assert client.original(seven) == path.read_bytes()
    with Image.open(io.BytesIO(client.thumbnail(seven, 64))) as thumbnail:
        assert thumbnail.format == "JPEG"
        assert max(thumbnail.size) <= 64
    for ask in (client.picture, client.original, client.thumbnail):
        with pytest.raises(ServiceError) as missing:
            ask(NOWHERE)
        assert missing.value.status == 404
        with pytest.raises(ServiceError) as none:
            ask("../index?")
        assert none.value.status in (404, 422)
    with pytest.raises(ServiceError) as odd:
        client.thumbnail(seven, 65)
    assert odd.value.status == 422


def test_a_file_that_changed_is_gone(client: Client, tmp_path: Path, workspace: Path) -> None:
    path = workspace / "photos/0059.png"
    found = client.search(path, k=1).hits[0].id
    kept = path.rename(tmp_path / "kept.png")
    try:
        for ask in (client.original, client.thumbnail):
            with pytest.raises(ServiceError) as gone:
                ask(found)
            assert (gone.value.status, gone.value.kind) == (410, "gone")
    finally:
        kept.rename(path)


def test_pictures_come_in_pages(client: Client, workspace: Path) -> None:
    pages = list(client.pictures(page=25))
    assert [len(page.pictures) for page in pages] == [25, 25, 11]
    listed = [path for page in pages for picture in page.pictures for path in picture.paths]
    assert listed == sorted(listed)
    assert len(set(listed)) == COUNT + 1
    (page,) = client.pictures("name = 'copy.png'", workspace / "photos")
    assert [Path(picture.paths[0]).name for picture in page.pictures] == ["copy.png"]
    (nothing,) = client.pictures("1 = 0")
    assert (nothing.pictures, nothing.next) == ([], None)
    with pytest.raises(ServiceError, match="holds no indexed picture"):
        next(client.pictures(root=workspace / "encoder"))
    with pytest.raises(ServiceError):
        next(client.pictures("colour = 'red'"))


# ------------------------------------------------------------------------------------------------- index


def test_the_index_is_described(client: Client, workspace: Path) -> None:
    status = client.status()
    assert (status.files, status.contents, status.problems) == (COUNT + 1, COUNT, BAD)
    assert [root.path for root in status.roots] == [str(workspace / "photos")]
    version = client.version()
    assert (version.embedding_dim, version.fingerprint) == (16, status.fingerprint)
    assert [(Path(one.path).name, one.problem) for one in client.problems()] == [
        (f"bad{number}.png", "unsupported") for number in range(BAD)
    ]


def test_duplicates_are_found(client: Client, workspace: Path) -> None:
    found = client.duplicates(0.999)
    assert found.total == 1
    assert sorted(Path(file.path).name for file in found.groups[0].files) == ["0005.png", "copy.png"]
    assert client.duplicates(0.999, workspace / "photos", 1).total == 1
    with pytest.raises(ServiceError, match="no indexed folder lies in") as elsewhere:
        client.duplicates(0.999, workspace / "encoder")
    assert elsewhere.value.status == 422
    with pytest.raises(ServiceError):
        client.duplicates(0.1)


# -------------------------------------------------------------------------------------------------- jobs


def test_an_update_is_followed_to_its_end(client: Client, workspace: Path) -> None:
    new = save(workspace / "photos/1000.png", 1000)
    job = client.start_update(workspace / "photos", retry_problems=True)
    assert job.state == "running"
    states = list(client.follow(job.id))
    assert {state.id for state in states} == {job.id}
    assert [state.state for state in states[:-1]] == ["running"] * (len(states) - 1)
    assert states[-1].state == "done"
    report = states[-1].report
    assert report is not None
    assert (report["added"], report["problems"]) == (1, BAD)
    assert names(client.search(picture_bytes(1000), k=1)) == ["1000.png"]
    new.unlink()
    *_, last = client.follow(client.start_update().id)
    assert last.report is not None
    assert last.report["removed"] == 1
    assert client.cancel(job.id).state == "done"
    for ask in (lambda: client.cancel("0" * 16), lambda: list(client.follow("0" * 16))):
        with pytest.raises(ServiceError, match="no job") as missing:
            ask()
        assert missing.value.status == 404
    with pytest.raises(ServiceError, match="not an indexed folder") as unknown:
        client.start_update(workspace / "encoder")
    assert unknown.value.status == 409


# ------------------------------------------------------------------------------------------------- access


def test_a_token_is_asked_for(workspace: Path) -> None:
    with Running(workspace, TOKEN) as running:
        for wrong in (None, "another token of letters"):
            with (
                Client(running.url, wrong) as client,
                pytest.raises(ServiceError, match="a token is needed") as refused,
            ):
                client.version()
            assert refused.value.status == 401
        with Client(running.url, TOKEN) as client:
            assert client.search(workspace / "photos/0007.png", k=1).hits
    with pytest.raises(ConfigError, match="token"):
        Client(token="naïve")
    sent: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers)
        return httpx.Response(200, json=VERSION)

    with stand_in(answer, token="") as client:
        client.version()
    assert "Authorization" not in sent[0]


def test_nobody_there_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.1:9")  # would time out, were it asked
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with Client(url) as client, pytest.raises(ServiceError, match="no answer") as nobody:
            client.version()
    assert nobody.value.status is None
    for url in ("nonsense", "http://a..b"):
        with Client(url) as client, pytest.raises(ServiceError):
            client.version()
    with pytest.raises(ConfigError, match="url"):
        Client("http://host:port")


# ---------------------------------------------------------------------------------- answers of a stand-in

Handler = Callable[[httpx.Request], httpx.Response]
VERSION = {
    "version": "1", "fingerprint": "f", "embedding_dim": 2, "precision": "fp32", "provider": "p", "index_generation": 1
}  # fmt: skip


def stand_in(handler: Handler, **more: Any) -> Client:
    return Client("http://stand-in", transport=httpx.MockTransport(handler), **more)


def busy(after: str | None) -> httpx.Response:
    headers = {} if after is None else {"Retry-After": after}
    problem = {"type": "urn:mimco:busy", "title": "", "status": 503, "detail": "the service is busy", "instance": ""}
    return httpx.Response(503, json=problem, headers=headers)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client waited; the clock goes on by as much, in no time."""
    waits: list[float] = []
    monkeypatch.setattr("mimco_deploy.serving.client.time.sleep", waits.append)
    monkeypatch.setattr("mimco_deploy.serving.client.time.monotonic", lambda: sum(waits))
    return waits


def test_a_busy_service_is_asked_again_when_it_said(slept: list[float]) -> None:
    answers = [busy("2"), busy(None), busy("soon"), httpx.Response(200, json=VERSION)]
    with stand_in(lambda _: answers.pop(0)) as client:
        assert client.version().embedding_dim == 2
    assert slept == [2, 1, 1]


def test_patience_ends(slept: list[float]) -> None:
    with stand_in(lambda _: busy("4")) as client, pytest.raises(ServiceError, match="busy") as refused:
        client.version()
    assert slept == [4, 4]  # a third would be beyond ten
    assert (refused.value.status, refused.value.kind) == (503, "busy")
    slept.clear()
    with stand_in(lambda _: busy("1"), patience_s=0) as client, pytest.raises(ServiceError):
        list(client.follow("0" * 16))
    assert slept == []


def test_pictures_are_sent_again_whole(slept: list[float]) -> None:
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        answer = {"hits": [], "searched": 0, "timings_ms": {}}
        return busy("1") if len(bodies) == 1 else httpx.Response(200, json=answer)

    with stand_in(handler) as client:
        client.search(b"a picture")
    assert len(slept) == 1
    assert bodies[0] == bodies[1]
    assert b"a picture" in bodies[1]


def test_why_names_both_pictures() -> None:
    seen = {"box": [0, 0, 1, 1], "heat": [[0.5]]}
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/why"
        bodies.append(request.read())
        return httpx.Response(200, json={"score": 0.5, "query": seen, "hit": seen})

    with stand_in(handler) as client:
        assert client.why("a" * 64, "b" * 64).score == 0.5
        assert client.why(b"a picture", "b" * 64, crop=(0, 0, 0.5, 1)).query.heat == [[0.5]]
    assert json.loads(bodies[0]) == {"query": {"id": "a" * 64}, "hit": "b" * 64}
    assert b'"crop": [0, 0, 0.5, 1]' in bodies[1]
    assert b"a picture" in bodies[1]


def test_why_needs_patches(client: Client, seven: str) -> None:
    with pytest.raises(ServiceError, match="patch") as refused:
        client.why(seven, seven)
    assert refused.value.status == 409


def test_portions_are_bounded_by_bytes_too() -> None:
    counts: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        counts.append(request.read().count(b'name="file"'))
        floats = np.zeros((counts[-1], 2), "<f4").tobytes()
        headers = {"Content-Type": "application/octet-stream", "X-Mimco-Fingerprint": str(len(counts) > 3)}
        return httpx.Response(200, content=floats, headers=headers)

    with stand_in(handler) as client:
        assert client.embed([b"x" * (10 * 2**20)] * 5).shape == (5, 2)
        assert counts == [2, 2, 1]
        counts[:] = [0, 0]
        with pytest.raises(EncoderMismatchError):
            client.embed([b"x"] * 40)


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (httpx.Response(200, json={}), "no Version"),
        (httpx.Response(200, content=b"<html>"), "no Version"),
        (httpx.Response(502, content=b"<html>"), "Bad Gateway"),
        (httpx.Response(500, json=[]), "Internal Server Error"),
        (httpx.Response(307, headers={"Location": "http://elsewhere/"}), "307"),
    ],
)
def test_answers_of_something_else_are_told(response: httpx.Response, words: str) -> None:
    with stand_in(lambda _: response) as client, pytest.raises(ServiceError, match=words):
        client.version()


@pytest.mark.parametrize("content", [b"", b"12345", b"1234" * 3])
def test_embeddings_that_are_none_are_told(content: bytes) -> None:
    response = httpx.Response(200, content=content, headers={"Content-Type": "application/octet-stream"})
    with stand_in(lambda _: response) as client, pytest.raises(ServiceError, match="no embeddings of 2 pictures"):
        client.embed([b"x", b"y"])
