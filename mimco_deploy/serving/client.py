"""A client of `mimco serve`: pictures in, answers out. Needs httpx, of the extra `serve`; neither encoder nor index.

    with Client("http://127.0.0.1:8000") as client:
        for hit in client.search(Path("query.jpg"), k=5).hits:
            print(f"{hit.score:.3f}  {hit.path}")

A picture is a `Path`, whose file is sent, `bytes`, which are the content of one, or a `str`: the id of one that is
indexed, of which nothing is sent. Answers are those of `http/schemas.py`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from mimco_deploy.errors import ConfigError, EncoderMismatchError, ImageError, MimcoError
from mimco_deploy.preprocess import Crop
from mimco_deploy.serving.http import schemas

Picture = Path | bytes | str
"""A file, the content of one, or the id of an indexed picture."""
Vectors = npt.NDArray[np.float32]
Model = TypeVar("Model", bound=BaseModel)

_FLOATS = "application/octet-stream"
_PORTION_BYTES = 24 * 2**20
"""Of pictures in one request; the service takes 32 MiB unless told otherwise."""
_PAGE = 500
_BEAT_S = 30.0
"""A stream of events that says nothing for longer is dead: the service makes a sound every ten seconds."""


class ServiceError(MimcoError):
    """The service did not do what it was asked, or cannot be reached.

    Args:
        status: of HTTP; None where there was no answer, or none of `mimco serve`.
        detail: what it said.
        kind: short name of the error, for programs (`busy`, `not-found`, `picture`); empty where the status says all.
    """

    def __init__(self, status: int | None, detail: str, kind: str = "") -> None:
        super().__init__(detail if status is None else f"{detail} (HTTP {status})")
        self.status, self.detail, self.kind = status, detail, kind


class Client:
    """One service. Use it as a context manager, or `close` it. It may be used from several threads.

    No proxy and no other setting is taken from the environment, and no redirection is followed: only `url` is asked.

    Args:
        url: of the service.
        token: that it asks for; none where it is empty.
        timeout_s: for connecting, and between two parts of what is sent or answered.
        patience_s: how long in all one call waits and tries again where the service is busy.
        transport: instead of the network.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout_s: float = 60.0,
        *,
        patience_s: float = 10.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.patience_s = patience_s
        self._url, self._timeout_s = url, timeout_s
        if token and not (token.isascii() and token.isprintable()):
            raise ConfigError("the token holds what no token can", expected="printable letters of ASCII")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._http = httpx.Client(
                base_url=url, headers=headers, timeout=timeout_s, trust_env=False, transport=transport
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"url = {url!r} ({error})", expected="such as http://127.0.0.1:8000") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # -------------------------------------------------------------------------------------- with pictures

    def search(
        self,
        *pictures: Picture,
        weights: Sequence[float] | None = None,
        crop: Crop | None = None,
        k: int = 24,
        where: str = "",
        root: Path | str | None = None,
        min_score: float = -1.0,
        min_confidence: float = 0.0,
        rerank: bool = False,
    ) -> schemas.Answer:
        """Find the indexed files that look most like a picture, or like several together.

        Args:
            pictures: 1 to 8.
            weights: of each, in [-100, 100], below 0: unlike this; 1 for all where None.
            crop: part of the first picture: left, top, width, height as shares of it when upright.
            k: most hits, 1 to 1000; with `rerank` at most 48.
            where: condition of SQL on the hits.
            root: only pictures in this folder or below.
            min_score: least cosine of a hit, in [-1, 1].
            min_confidence: least confidence of a hit, in [0, 1].
            rerank: order the best hits by how alike their parts are to those of the first picture.

        Returns:
            Up to k hits, best first.

        Raises:
            ServiceError: a picture is none, an id is unknown, the condition cannot be used, or the service is too busy.
            ImageError: a file cannot be read.
            ConfigError: there are not as many weights as pictures.
        """
        weights = [1.0] * len(pictures) if weights is None else weights
        if len(weights) != len(pictures):
            raise ConfigError(f"{len(weights)} weights", expected=f"one for each of {len(pictures)} pictures")
        files, parts = _parts_of(pictures)
        for part, weight in zip(parts, weights, strict=True):
            part["weight"] = weight
        if parts and crop is not None:
            parts[0]["crop"] = crop
        query = {
            "parts": parts,
            "k": k,
            "where": where,
            "root": None if root is None else str(root),
            "min_score": min_score,
            "min_confidence": min_confidence,
            "rerank": rerank,
        }
        return _read(schemas.Answer, self._post("/v1/search", query, files))

    def search_batch(self, pictures: Sequence[Picture], k: int = 24) -> list[schemas.Answer]:
        """Search for each of several pictures by itself.

        Args:
            pictures: any number; more than 32 go in several requests.
            k: most hits of each, 1 to 1000.

        Returns:
            An answer for each picture, in their order.

        Raises:
            ServiceError: one of them is no picture, an id is unknown, or the service is too busy.
            ImageError: a file cannot be read.
        """
        answers: list[schemas.Answer] = []
        for portion in _portions(pictures):
            files, parts = _parts_of(portion)
            batch = {"queries": [{"parts": [part], "k": k} for part in parts]}
            answers += _read(schemas.Answers, self._post("/v1/search/batch", batch, files)).answers
        return answers

    def embed(self, pictures: Sequence[Path | bytes]) -> Vectors:
        """Embed pictures.

        Args:
            pictures: any number; more than 32 go in several requests.

        Returns:
            float32 [B, D], each row of length 1, in the order of the pictures.

        Raises:
            ServiceError: one of them is no picture, or the service is too busy.
            EncoderMismatchError: the service changed to another encoder on the way.
            ImageError: a file cannot be read.
            ConfigError: a picture is named by its id.
        """
        if any(isinstance(picture, str) for picture in pictures):
            raise ConfigError("an id among the pictures to embed", expected="files or their contents")
        if not pictures:
            return np.zeros((0, self.version().embedding_dim), np.float32)
        embedded = []
        fingerprints = set()
        for portion in _portions(pictures):
            files, _ = _parts_of(portion)
            response = self._post("/v1/embed", None, files, {"Accept": _FLOATS})
            embedded.append(_rows(response, len(files)))
            fingerprints.add(response.headers.get("X-Mimco-Fingerprint"))
        if len(fingerprints) > 1:
            raise EncoderMismatchError("the service changed to another encoder on the way", expected="another try")
        return np.concatenate(embedded)

    def why(self, picture: Picture, hit_id: str, crop: Crop | None = None) -> schemas.Why:
        """Say where a picture and a hit are alike. Needs an encoder with patch tokens.

        Args:
            picture: that was searched with.
            hit_id: of the hit.
            crop: the part of the picture that was searched with.

        Returns:
            How alike they are, and for both a map of it [rows of the patch grid, columns].

        Raises:
            ServiceError: the encoder gives no patch tokens (409), an id is unknown, a picture is none or gone.
            ImageError: a file cannot be read.
        """
        files, (part,) = _parts_of([picture])
        if crop is not None:
            part["crop"] = crop
        return _read(schemas.Why, self._post("/v1/why", {"query": part, "hit": hit_id}, files))

    # -------------------------------------------------------------------------------- pictures of the index

    def picture(self, picture_id: str) -> schemas.Picture:
        """What is known of an indexed picture.

        Raises:
            ServiceError: nothing has this id (404; 422 where it is none).
        """
        return _read(schemas.Picture, self._get(f"/v1/pictures/{_quoted(picture_id)}"))

    def original(self, picture_id: str) -> bytes:
        """The file of an indexed picture, byte by byte.

        Raises:
            ServiceError: nothing has this id (404), or the file is gone or changed since it was indexed (410).
        """
        return self._get(f"/v1/pictures/{_quoted(picture_id)}/file").content

    def thumbnail(self, picture_id: str, px: int = 256) -> bytes:
        """A small JPEG of an indexed picture.

        Args:
            picture_id: of the picture.
            px: its longest side: 64, 128, 256, 512 or 1024.

        Raises:
            ServiceError: as for `original`, or `px` is another number (422).
        """
        return self._get(f"/v1/pictures/{_quoted(picture_id)}/thumbnail", {"px": px}).content

    def pictures(
        self, where: str = "", root: Path | str | None = None, *, page: int = _PAGE
    ) -> Iterator[schemas.PicturePage]:
        """List the indexed files for which a condition holds, by folder and name.

        Args:
            where: condition of SQL.
            root: only pictures in this folder or below.
            page: files in a page, 1 to 500.

        Yields:
            Pages; each is asked for when it is its turn.

        Raises:
            ServiceError: the condition cannot be used.
        """
        asked: dict[str, Any] = {"where": where, "limit": page}
        if root is not None:
            asked["root"] = str(root)
        while True:
            found = _read(schemas.PicturePage, self._get("/v1/pictures", asked))
            yield found
            if found.next is None:
                return
            asked["after"] = found.next

    # ---------------------------------------------------------------------------------------------- the index

    def status(self) -> schemas.IndexStatus:
        """What the index holds, and how it is searched."""
        return _read(schemas.IndexStatus, self._get("/v1/index"))

    def problems(self) -> Iterator[schemas.Problem]:
        """The files that could not be indexed, by path.

        Yields:
            Each; they are asked for in pages.
        """
        after: str | None = "0"
        while after is not None:
            found = _read(schemas.ProblemPage, self._get("/v1/problems", {"limit": _PAGE, "after": after}))
            yield from found.problems
            after = found.next

    def duplicates(
        self, min_score: float = 0.95, root: Path | str | None = None, limit: int = 100
    ) -> schemas.Duplicates:
        """Groups of copies and near duplicates. Nothing is moved.

        Args:
            min_score: cosine from which two pictures count as the same, in [0.5, 1].
            root: only pictures in this folder or below.
            limit: most groups, 1 to 10,000.

        Raises:
            ServiceError: an argument is out of range.
        """
        asked: dict[str, Any] = {"min_score": min_score, "limit": limit}
        if root is not None:
            asked["root"] = str(root)
        return _read(schemas.Duplicates, self._get("/v1/duplicates", asked))

    def version(self) -> schemas.Version:
        """What is running."""
        return _read(schemas.Version, self._get("/v1/version"))

    # ------------------------------------------------------------------------------------------------- jobs

    def start_update(self, root: Path | str | None = None, retry_problems: bool = False) -> schemas.Job:
        """Begin to bring the index up to date.

        Args:
            root: one of the indexed folders; all where None.
            retry_problems: read files again that were no pictures, although they did not change.

        Returns:
            The job, which goes on by itself.

        Raises:
            ServiceError: another one is running, or the folder is not indexed (409).
        """
        asked = {"root": None if root is None else str(root), "retry_problems": retry_problems}
        return _read(schemas.Job, self._post("/v1/jobs", asked, []))

    def follow(self, job_id: str) -> Iterator[schemas.Job]:
        """Watch a job.

        Args:
            job_id: of the job.

        Yields:
            Its states as they change, the present one first. The last one is neither `running` nor
            `cancelling`, unless the service ends.

        Raises:
            ServiceError: there is no such job (404), or the connection is lost.
        """
        timeout = httpx.Timeout(self._timeout_s, read=max(self._timeout_s, _BEAT_S))
        request = self._http.build_request(
            "GET", f"/v1/jobs/{_quoted(job_id)}/events", headers={"Accept": "text/event-stream"}, timeout=timeout
        )
        response = self._answer_to(request, stream=True)
        with contextlib.closing(response), _as_service_error(self._url):
            data: list[str] = []
            for line in response.iter_lines():
                if line.startswith("data:"):
                    data.append(line.removeprefix("data:").removeprefix(" "))
                elif not line and data:
                    yield _parse(schemas.Job, "\n".join(data))
                    data = []

    def cancel(self, job_id: str) -> schemas.Job:
        """Ask a job to stop after its batch. What it has committed stays.

        Raises:
            ServiceError: there is no such job (404).
        """
        return _read(schemas.Job, self._answer_to(self._http.build_request("DELETE", f"/v1/jobs/{_quoted(job_id)}")))

    # ----------------------------------------------------------------------------------------------- inside

    def _get(self, path: str, asked: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            request = self._http.build_request("GET", path, params=asked)
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{error.object!r} cannot be sent", expected="a text without bytes that are none"
            ) from None
        return self._answer_to(request)

    def _post(
        self, path: str, document: object, files: Sequence[bytes], headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """Send JSON, or where there are files a form of both."""
        if not files:
            json_headers = {"Content-Type": "application/json", **(headers or {})}
            content = _as_json(document)
            return self._answer_to(self._http.build_request("POST", path, content=content, headers=json_headers))
        fields = {} if document is None else {"request": _as_json(document)}
        form = [("file", (f"{number}", content, _FLOATS)) for number, content in enumerate(files)]
        return self._answer_to(self._http.build_request("POST", path, data=fields, files=form, headers=headers))

    def _answer_to(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """Send a request, again while the service is busy and there is patience.

        Raises:
            ServiceError: it is refused, or there is no answer.
        """
        until = time.monotonic() + self.patience_s
        while True:
            with _as_service_error(self._url):
                response = self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                response.read()
                response.close()
            wait_s = _retry_after_s(response)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() + wait_s > until:
                raise _error_of(response)
            time.sleep(wait_s)


@contextlib.contextmanager
def _as_service_error(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.TransportError, httpx.DecodingError, UnicodeError) as error:  # the last: of a name of no host
        raise ServiceError(None, f"no answer of {url} ({str(error) or type(error).__name__})") from error


def _parts_of(pictures: Sequence[Picture]) -> tuple[list[bytes], list[dict[str, Any]]]:
    """What is sent of some pictures, and how a query names them."""
    files: list[bytes] = []
    parts: list[dict[str, Any]] = []
    for picture in pictures:
        if isinstance(picture, str):
            parts.append({"id": picture})
        else:
            parts.append({"upload": len(files)})
            files.append(picture if isinstance(picture, bytes) else _content(picture))
    return files, parts


def _portions(pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
    """As many as one request may have; a file is read when it is its turn."""
    portion: list[Picture] = []
    size = 0
    for picture in pictures:
        read = _content(picture) if isinstance(picture, Path) else picture
        more = len(read) if isinstance(read, bytes) else 0
        if portion and (len(portion) == schemas.MAX_QUERIES or size + more > _PORTION_BYTES):
            yield portion
            portion, size = [], 0
        portion.append(read)
        size += more
    if portion:
        yield portion


def _quoted(name: str) -> str:
    return quote(name, safe="", errors="surrogateescape")


def _as_json(document: object) -> str:
    return json.dumps(document, default=np.generic.item)  # NumPy's numbers are numbers


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError("missing", f"{path} does not exist") from None
    except OSError as error:
        raise ImageError("unreadable", f"{path} cannot be read ({error.strerror})") from error


def _rows(response: httpx.Response, count: int) -> Vectors:
    """[B, D] of its bytes.

    Raises:
        ServiceError: they are not as many as they should be.
    """
    values = np.frombuffer(response.content[: len(response.content) // 4 * 4], "<f4")
    kind = response.headers.get("content-type")
    if kind != _FLOATS or not values.size or len(response.content) % (4 * count):
        raise ServiceError(None, f"no embeddings of {count} pictures: {kind}, {len(response.content)} bytes")
    return values.reshape(count, -1).astype(np.float32)


def _read(model: type[Model], response: httpx.Response) -> Model:
    return _parse(model, response.content)


def _parse(model: type[Model], content: bytes | str) -> Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ServiceError(
            None, f"the answer is no {model.__name__} of this version ({place or 'all of it'}: {first['msg']})"
        ) from None


def _retry_after_s(response: httpx.Response) -> float:
    given = response.headers.get("Retry-After", "")
    return float(given) if given.isdecimal() and given.isascii() else 1.0


def _error_of(response: httpx.Response) -> ServiceError:
    """An answer of a proxy on the way need not be a document of RFC 9457."""
    try:
        document = response.json()
        detail, kind = str(document["detail"]), str(document.get("type", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        detail, kind = response.reason_phrase or "refused", ""
    kind = kind.removeprefix("urn:mimco:") if kind.startswith("urn:mimco:") else ""
    return ServiceError(response.status_code, detail, kind)
