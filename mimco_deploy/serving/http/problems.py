"""Errors as RFC 9457 has them: one JSON document that says what was found, what was expected and what to do."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from mimco_deploy.errors import (
    BundleError,
    ConditionError,
    ConfigError,
    EncoderMismatchError,
    ImageError,
    IndexStoreError,
    MimcoError,
)
from mimco_deploy.serving.http.batching import BusyError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_SHOWN = 5
_MAX_DETAIL = 600
_WAIT_S = "5"


class NotThereError(MimcoError):
    """Nothing has this id."""


class GoneError(MimcoError):
    """The index knows it, the disk has it no more, or something else in its place."""


class ConflictError(MimcoError):
    """It cannot be done as things are."""


# The first that fits.
_KINDS: tuple[tuple[type[Exception], str, HTTPStatus], ...] = (
    (BusyError, "busy", HTTPStatus.SERVICE_UNAVAILABLE),
    (NotThereError, "not-found", HTTPStatus.NOT_FOUND),
    (GoneError, "gone", HTTPStatus.GONE),
    (ConflictError, "conflict", HTTPStatus.CONFLICT),
    (ImageError, "picture", HTTPStatus.UNPROCESSABLE_ENTITY),
    (ConditionError, "condition", HTTPStatus.UNPROCESSABLE_ENTITY),
    (ConfigError, "query", HTTPStatus.UNPROCESSABLE_ENTITY),
    (BundleError, "encoder", HTTPStatus.CONFLICT),
    (EncoderMismatchError, "encoder", HTTPStatus.SERVICE_UNAVAILABLE),
    (IndexStoreError, "index", HTTPStatus.SERVICE_UNAVAILABLE),
)


def problem(
    status: int, detail: str, request_id: str, kind: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    """An error as a response.

    Args:
        status: of HTTP.
        detail: one line.
        request_id: as in the log.
        kind: short name, for programs; empty where the status says all.
        headers: of the response.
    """
    detail = detail if len(detail) <= _MAX_DETAIL else f"{detail[:_MAX_DETAIL]} …"
    document = {
        "type": f"urn:mimco:{kind}" if kind else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": f"urn:uuid:{request_id}",
    }
    # In ASCII: names of files may hold what is no text.
    return Response(json.dumps(document), status, headers, MEDIA_TYPE)


def request_id_of(scope: Scope) -> str:
    """The id that `requests.py` gave a request."""
    return str(scope.get("mimco.request_id", ""))


class ProblemFileResponse(FileResponse):
    """A file or parts of it; ranges that it refuses in plain text are refused in a problem document."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        refusal: Message = {}

        async def send_unless_refused(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
                refusal.update(message)
            elif not refusal:
                await send(message)

        await super().__call__(scope, receive, send_unless_refused)
        if refusal:
            of_file = Headers(raw=refusal["headers"]).get("content-range")  # how long the file is
            headers = {} if of_file is None else {"Content-Range": of_file}
            detail = (
                "the Range is beyond the end of the file" if of_file else "the Range cannot be read, expected bytes=A-B"
            )
            await problem(refusal["status"], detail, request_id_of(scope), headers=headers)(scope, receive, send)


class OpenFileResponse(ProblemFileResponse):
    """A file that is open, which is closed once it was sent.

    Args:
        descriptor: of a regular file.
        others: as of `FileResponse`.
    """

    def __init__(self, descriptor: int, **others: Any) -> None:
        self._descriptor = descriptor
        super().__init__(f"/dev/fd/{descriptor}", stat_result=os.fstat(descriptor), **others)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self._descriptor)


def _methods_of(request: Request) -> list[str]:
    """All that an address answers to, by the description of the API; Starlette tells those of its first route only."""
    described = request.app.openapi()["paths"].items()
    path = request.url.path
    found = [methods for shape, methods in described if re.fullmatch(re.sub(r"{[^}]*}", "[^/]+", shape), path)]
    return sorted(method.upper() for methods in found for method in methods)


def add_handlers(app: FastAPI) -> None:
    """Let every error of an application be such a document."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, MimcoError)
        name, status = next(((name, status) for kind, name, status in _KINDS if isinstance(error, kind)), ("", None))
        if status is None:
            raise error
        headers = {}
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(error.retry_after_s) if isinstance(error, BusyError) else _WAIT_S
            logger.info("not answered: %s", error)
        if isinstance(error, ImageError) and error.problem == "too_large":
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return problem(status, str(error), request_id_of(request.scope), name, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = [
            f"{'.'.join(str(part) for part in one['loc'] if part != 'body') or 'body'}: {one['msg']}"
            for one in error.errors()[:_SHOWN]
        ]
        return problem(422, "; ".join(found), request_id_of(request.scope), "request")

    async def plain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {**(headers or {}), **({"Allow": ", ".join(known)} if (known := _methods_of(request)) else {})}
        return problem(error.status_code, str(error.detail), request_id_of(request.scope), headers=headers)

    app.add_exception_handler(MimcoError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
