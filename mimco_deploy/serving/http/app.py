"""The FastAPI application: puts the parts together, and says in OpenAPI what they do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse

from mimco_deploy import __version__
from mimco_deploy.serving.http import page, problems, routes_index, routes_search, schemas
from mimco_deploy.serving.http.access import LOOPBACK, Access
from mimco_deploy.serving.http.context import Context
from mimco_deploy.serving.http.jobs import Jobs
from mimco_deploy.serving.http.metrics import Metrics
from mimco_deploy.serving.http.requests import Requests
from mimco_deploy.serving.http.service import ServeSettings, Service
from mimco_deploy.serving.http.thumbnails import Thumbnails
from mimco_deploy.serving.http.views import Views

_IN_BODIES = (schemas.Query, schemas.Batch, schemas.WhyRequest, schemas.JobRequest, schemas.ProblemDetails)
"""Read by `bodies.py`, not by FastAPI, so OpenAPI has to be told of them."""


def create_app(
    index: Path,
    workspace_encoder: Path,
    settings: ServeSettings | None = None,
    *,
    token: str | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Make the application. The encoder is loaded and the index opened when it starts.

    Args:
        index: the index folder.
        workspace_encoder: the bundle where neither the settings nor the index name one.
        settings: how to serve.
        token: that requests have to carry; None where the machine is trusted.
        hosts: names that are answered to where there is no token.
        stopping: says that the server is about to end, so that streams do.
    """
    settings = settings or ServeSettings()
    metrics = Metrics()
    service = Service(index, workspace_encoder, settings, metrics)
    access = Access(token, hosts, page.PATHS)
    context = Context(service, Jobs(service), Views(service), Thumbnails(service), metrics, access, stopping)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        async with service.running():
            try:
                yield
            finally:
                await context.jobs.stop()

    app = FastAPI(
        title="mimco",
        version=__version__,
        description="Search an index of pictures by pictures. Errors are documents of RFC 9457.",
        lifespan=lifespan,
        openapi_url=None,  # FastAPI's own route is none that the log and the metrics can name
        docs_url=None,  # they fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.context = context
    app.add_middleware(
        Requests,
        access=access,
        metrics=metrics,
        max_bytes=settings.max_upload_mib * 2**20,
        upload_s=settings.upload_s,
    )
    problems.add_handlers(app)
    app.include_router(routes_search.router)
    app.include_router(routes_index.router)
    app.include_router(page.router)
    app.add_api_route(
        "/openapi.json", lambda: JSONResponse(app.openapi()), methods=["GET", "HEAD"], include_in_schema=False
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's way to extend it
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas_there = document.setdefault("components", {}).setdefault("schemas", {})
        _, more = models_json_schema(
            [(model, "validation") for model in _IN_BODIES], ref_template="#/components/schemas/{model}"
        )
        schemas_there |= more["$defs"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas_there.pop(unused, None)
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"token": []}]
        app.openapi_schema = document
    return app.openapi_schema
