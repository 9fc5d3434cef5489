"""What every request goes through: an id, access, limits on its body, a line in the log, metrics, headers of safety.

Plain ASGI, so that bodies and answers stream through. Bodies are counted as they come: one that is too long, too slow
or one too many is refused before anybody decodes it. The log has a line of JSON for each request, without query texts
or pictures.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimco_deploy.serving.http.access import HEADERS, Access
from mimco_deploy.serving.http.metrics import Metrics
from mimco_deploy.serving.http.problems import problem

logger = logging.getLogger(__name__)
log = logging.getLogger("mimco_deploy.access")

MAX_JSON_BYTES = 512 * 2**10
MAX_BODIES = 64
"""Requests whose body is coming in at once."""
_GRACE_S = 5.0
_MIN_BYTES_PER_S = 16 * 2**10
"""A body has this grace, and keeps this pace: a few that trickle would otherwise take all places for long."""
_UNKNOWN = "unknown"


class _Refused(Exception):
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Requests:
    """Middleware; see the module.

    Args:
        app: the application.
        access: who is answered.
        metrics: told of each request.
        max_bytes: of a body that is no JSON.
        upload_s: for a body to arrive.
    """

    def __init__(self, app: ASGIApp, *, access: Access, metrics: Metrics, max_bytes: int, upload_s: float) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics
        self._max_bytes, self._upload_s = max_bytes, upload_s
        self._bodies = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets here
            await send({"type": "websocket.close", "code": 1000})
            return
        request = _Request(scope, send)
        self._metrics.in_flight.inc()
        try:
            await self._answer(request, receive)
        finally:
            self._metrics.in_flight.dec()
            self._tell(request)

    async def _answer(self, request: _Request, receive: Receive) -> None:
        scope, headers = request.scope, Headers(scope=request.scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        try:
            refusal = self._access.refusal(scope["path"], headers)
            if refusal is not None:
                raise _Refused(*refusal)
            body = _Body(receive, self._limit(headers), self._upload_s)
            body.check(headers)
            if has_body:
                if self._bodies >= MAX_BODIES:
                    raise _Refused(503, "too many requests are coming in")
                self._bodies += 1
                body.on_end = self._body_ended
            try:
                await self._app(scope, body.receive, request.send)
            finally:
                body.end()
        except _Refused as refused:
            if not request.started:
                extra = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(refused.status, {})
                # Whatever of the body is still to come is not waited for.
                extra = extra | ({"Connection": "close"} if has_body else {})
                response = problem(refused.status, refused.detail, request.id, headers=extra)
                await response(scope, receive, request.send)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception:
            logger.exception("request %s failed", request.id)
            if not request.started:
                response = problem(500, "the service failed; its log says how, under this id", request.id)
                await response(scope, receive, request.send)

    def _limit(self, headers: Headers) -> int:
        return self._max_bytes if headers.get("content-type", "").lower().startswith("multipart/") else MAX_JSON_BYTES

    def _body_ended(self) -> None:
        self._bodies -= 1

    def _tell(self, request: _Request) -> None:
        scope, seconds = request.scope, time.perf_counter() - request.since
        route = getattr(scope.get("route"), "path", _UNKNOWN)
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE", "OPTIONS") else _UNKNOWN
        self._metrics.requests.labels(method, route, str(request.status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        line = {
            "request": request.id,
            "method": method,
            "route": route,
            "status": request.status,
            "ms": round(seconds * 1e3, 2),
            "bytes": request.sent_bytes,
            "client": (scope.get("client") or ("",))[0],
        }
        log.info(json.dumps(line))


class _Request:
    """One request, and what is known of its answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self.id = str(uuid.uuid4())
        self.since = time.perf_counter()
        self.started = False
        self.status = 499
        """Of HTTP; as it is, the other side was gone before there was one."""
        self.sent_bytes = 0
        self._send = send
        scope["mimco.request_id"] = self.id

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self.id
            for name, value in HEADERS:
                headers.setdefault(name.decode(), value.decode())
            headers.setdefault("Cache-Control", "no-store")
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
        await self._send(message)


class _Body:
    """The body of a request as it comes in."""

    def __init__(self, receive: Receive, max_bytes: int, limit_s: float) -> None:
        self._receive = receive
        self._max_bytes, self._limit_s = max_bytes, limit_s
        self._since = time.perf_counter()
        self._bytes = 0
        self._whole = False
        self.on_end: Callable[[], None] = _nothing

    def check(self, headers: Headers) -> None:
        """Look at what it says of itself.

        Raises:
            _Refused: it says that it is too long.
        """
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_long()

    async def receive(self) -> Message:
        """Pass a part of it on.

        Raises:
            _Refused: it is too long or too slow.
        """
        if self._whole:
            return await self._receive()  # that the other side is gone, some time
        allowed_s = min(self._limit_s, _GRACE_S + self._bytes / _MIN_BYTES_PER_S)
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._since + allowed_s - time.perf_counter()))
        except TimeoutError:
            found = f"{self._bytes:,} bytes of the request came in {allowed_s:.3g} s, which is too slow"
            raise _Refused(HTTPStatus.REQUEST_TIMEOUT, found) from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._max_bytes:
            raise self._too_long()
        if not message.get("more_body", False):
            self._whole = True
            self.end()
        return message

    def end(self) -> None:
        """It needs no place any more."""
        self.on_end()
        self.on_end = _nothing

    def _too_long(self) -> _Refused:
        return _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request has more than {self._max_bytes:,} bytes")


def _nothing() -> None:
    pass
