"""Bodies of requests: JSON, or a form of JSON and files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from mimco_deploy.serving.http import schemas
from mimco_deploy.serving.http.batching import BusyError
from mimco_deploy.serving.http.requests import MAX_JSON_BYTES
from mimco_deploy.serving.http.service import Upload

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
_RETRY_AFTER_S = 5


@dataclass(frozen=True)
class Body(Generic[Model]):
    """What a request asks for."""

    document: Model | None
    """Of the JSON; None where a form has none."""
    uploads: Sequence[Upload]


@contextlib.asynccontextmanager
async def read_body(request: Request, model: type[Model], max_files: int) -> AsyncIterator[Body[Model]]:
    """Read a body of JSON, or a form with the field `request` of JSON and files named `file`.

    Args:
        request: whose body nobody has read.
        model: of the JSON.
        max_files: of a form.

    Yields:
        The body; the files are closed with the context.

    Raises:
        RequestValidationError: the JSON is not of the model, or the form holds something else.
        HTTPException: it is neither, or a form that cannot be read.
        BusyError: the system has no room for its files.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield Body(_parse(model, await request.body()), [])
    elif kind == "multipart/form-data" and _is_utf8(request.headers["content-type"]):
        whole = Request(request.scope, _UntilLastBoundary(request))
        try:
            form = await whole.form(max_files=max_files, max_fields=1, max_part_size=MAX_JSON_BYTES)
        except OSError as error:  # large files are laid down in a temporary folder
            if error.errno not in _NO_ROOM:
                raise
            logger.warning("an upload was refused: %s", error)
            raise BusyError(_RETRY_AFTER_S) from error
        try:
            yield _read_form(form, model)
        finally:
            await form.close()
    else:
        raise HTTPException(415, "the body is neither application/json nor multipart/form-data in UTF-8")


def parts_of(query: schemas.Query | None, uploads: Sequence[Upload]) -> schemas.Query:
    """A query with parts: where it names none, all uploads.

    Raises:
        RequestValidationError: it names nothing, too much, or an upload that is not there.
    """
    query = query or schemas.Query()  # type: ignore[call-arg]  # all of it has defaults
    if query.parts is None:
        if not 1 <= len(uploads) <= schemas.MAX_PARTS:
            raise invalid("file", f"{len(uploads)} pictures, expected 1 to {schemas.MAX_PARTS}, or parts")
        parts = [schemas.QueryPart(upload=number) for number in range(len(uploads))]  # type: ignore[call-arg]
        return query.model_copy(update={"parts": parts})
    for part in query.parts:
        check_part(part, uploads)
    return query


def check_part(part: schemas.QueryPart, uploads: Sequence[Upload]) -> None:
    """Let a part name one picture that is there.

    Raises:
        RequestValidationError: it does not.
    """
    if sum(name is not None for name in (part.upload, part.id, part.path)) != 1:
        raise invalid("parts", "each names one of upload, id and path")
    if part.upload is not None and part.upload >= len(uploads):
        raise invalid("upload", f"{part.upload}, but the form has {len(uploads)} files")
    if part.crop is not None and not (part.crop[2] > 0 and part.crop[3] > 0):
        raise invalid("crop", "width and height are above 0")


def json_content(model: str) -> dict[str, Any]:
    """What OpenAPI says of a body of JSON alone."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_content(model: str | None) -> dict[str, Any]:
    """What OpenAPI says of a body that is JSON, or a form of JSON and files; where `model` is None, a form of files."""
    properties: dict[str, Any] = {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}}
    form = {"type": "object", "properties": properties, "additionalProperties": False}
    if model is None:
        properties["file"]["minItems"] = 1
        content = {"multipart/form-data": {"schema": form | {"required": ["file"]}}}
        return {"requestBody": {"required": True, "content": content}}
    body = json_content(model)
    properties["request"] = {"$ref": f"#/components/schemas/{model}"}
    body["requestBody"]["content"]["multipart/form-data"] = {
        "schema": form,
        "encoding": {"request": {"contentType": "application/json"}},
    }
    return body


def _read_form(form: FormData, model: type[Model]) -> Body[Model]:
    document = None
    uploads: list[Upload] = []
    for name, value in form.multi_items():
        if name == "file" and isinstance(value, UploadFile):
            uploads.append(_reader(value))
        elif name == "file":
            raise invalid("file", "has no filename")
        elif name == "request":
            content = value if isinstance(value, str) else None
            if content is None:
                raise invalid("request", "a field of JSON, not a file")
            document = _parse(model, content.encode(errors="surrogatepass"))
        else:
            raise invalid(name[:50], "unknown, expected request and file")
    return Body(document, uploads)


class _UntilLastBoundary:
    """The body of a form as it comes in; the parser itself takes one that is cut off for whole."""

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
        self._last = b"--" + boundary + b"--"
        self._before = b""
        self._is_whole = False

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            return message
        seen = self._before + message.get("body", b"")
        self._is_whole = self._is_whole or self._last in seen
        self._before = seen[-len(self._last) :]
        if not (self._is_whole or message.get("more_body", False)):
            raise MultiPartException("the form is cut off: its last boundary is missing")
        return message


def _is_utf8(content_type: str) -> bool:
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8")
    return charset.lower() in (b"utf-8", b"utf8")


def _reader(file: UploadFile) -> Upload:
    lock = asyncio.Lock()

    async def read() -> bytes:
        async with lock:  # several parts may name it
            await file.seek(0)
            return await file.read()

    return read


def _parse(model: type[Model], content: bytes) -> Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None


def invalid(field: str, message: str) -> RequestValidationError:
    """What is wrong with one field of a body."""
    return RequestValidationError([{"loc": ("body", field), "msg": message, "type": "value_error"}])
