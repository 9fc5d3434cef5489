"""The page and its files, sessions for browsers, and what a supervisor asks: health, readiness, metrics."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from mimco_deploy.errors import MimcoError
from mimco_deploy.serving.http import schemas
from mimco_deploy.serving.http.access import COOKIE
from mimco_deploy.serving.http.context import Shared, refusals
from mimco_deploy.serving.http.problems import problem, request_id_of

router = APIRouter(tags=["service"])

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def _read_files() -> dict[str, tuple[bytes, str]]:
    folder = resources.files("mimco_deploy.serving.http") / "web"
    return {
        "/" if one.name == "index.html" else f"/{one.name}": (one.read_bytes(), f"{_KINDS[suffix]}; charset=utf-8")
        for one in folder.iterdir()
        if (suffix := "." + one.name.rpartition(".")[2]) in _KINDS
    }


_FILES = _read_files()
PATHS = (*_FILES, "/healthz", "/readyz", "/v1/session")
"""Answered without a token: they hold nothing of the index."""


def _add(path: str, content: bytes, kind: str) -> None:
    async def get_file() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    router.add_api_route(path, get_file, methods=["GET", "HEAD"], include_in_schema=False)


for _path, (_content, _kind) in _FILES.items():
    _add(_path, _content, _kind)


@router.post("/v1/session", status_code=204, responses=refusals())
async def begin_session(request: Request, shared: Shared) -> Response:
    """Exchange the token for a cookie, with which a browser can show pictures."""
    if shared.access.cookie and not shared.access.has_token(request.headers):
        headers = {"WWW-Authenticate": "Bearer"}
        return problem(401, "this is not the token", request_id_of(request.scope), headers=headers)
    response = Response(status_code=204)
    if shared.access.cookie:
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, shared.access.cookie, httponly=True, samesite="strict", secure=secure)
    return response


@router.delete("/v1/session", status_code=204, responses=refusals())
async def end_session() -> Response:
    """Forget the cookie."""
    response = Response(status_code=204)
    response.delete_cookie(COOKIE)
    return response


@router.get("/healthz", response_model=schemas.Health, responses=refusals())
async def health() -> schemas.Health:
    """Whether the process lives."""
    return schemas.Health(status="ok")


@router.get("/readyz", response_model=schemas.Health, responses=refusals())
async def ready(request: Request, shared: Shared) -> schemas.Health | Response:
    """Whether searches are answered: the encoder is loaded and the index can be read."""
    wrong = "it is stopping"
    if shared.service.ready and not shared.stopping():
        try:
            await shared.service.read(lambda index: index.state())
        except MimcoError as error:
            wrong = str(error)
        else:
            return schemas.Health(status="ok")
    return problem(503, wrong, request_id_of(request.scope), headers={"Retry-After": "5"})


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **refusals(),
        200: {"description": "For Prometheus", "content": {"text/plain": {"schema": {"type": "string"}}}},
    },
)
async def metrics(shared: Shared) -> Response:
    """Counters and histograms."""
    service = shared.service
    generation, revision, _ = await service.read(lambda index: index.state())
    shared.metrics.generation.set(generation)
    shared.metrics.revision.set(revision)
    shared.metrics.pictures.set((await service.read(lambda index: index.counts())).files)
    shared.metrics.queued.set(service.now.batcher.admitted)
    return Response(shared.metrics.text(), media_type=CONTENT_TYPE_LATEST)
