"""Routes that read the index: pictures, status, problems, duplicates, the map; and jobs, which bring it up to date."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response, StreamingResponse

from mimco_deploy import __version__
from mimco_deploy.serving.http import schemas
from mimco_deploy.serving.http.bodies import json_content, read_body
from mimco_deploy.serving.http.context import Shared, refusals
from mimco_deploy.serving.http.problems import OpenFileResponse, ProblemFileResponse
from mimco_deploy.serving.http.views import picture_of

router = APIRouter(prefix="/v1")

PictureId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]
Where = Annotated[str, Query(max_length=4096, pattern=r"^[^\x00]*$")]
Root = Annotated[str | None, Query(max_length=4096, pattern=r"^[^\x00]*$")]
Limit = Annotated[int, Query(ge=1, le=500)]
# Contents never change under their id; a browser that must show a token still asks each session anew.
_FOR_EVER = "private, max-age=31536000, immutable"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_SHOWN_BY_BROWSERS = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".jpe": "image/jpeg",
    ".jfif": "image/jpeg",
    ".png": "image/png",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".bmp": "image/bmp",
}


@router.get("/pictures", response_model=schemas.PicturePage, responses=refusals(), tags=["pictures"])
async def list_pictures(
    shared: Shared,
    where: Where = "",
    root: Root = None,
    limit: Limit = 48,
    after: Annotated[str | None, Query(max_length=12_000)] = None,
) -> schemas.PicturePage:
    """List the indexed files for which a condition holds, by folder and name."""
    return await shared.views.pictures(where, root, limit, after)


@router.get("/pictures/{id}", response_model=schemas.Picture, responses=refusals(404), tags=["pictures"])
async def get_picture(shared: Shared, id: PictureId) -> schemas.Picture:
    """What is known of a picture."""
    return picture_of(await shared.service.files_with(id))


@router.head("/pictures/{id}/file", response_class=ProblemFileResponse, include_in_schema=False)
@router.get(
    "/pictures/{id}/file",
    response_class=ProblemFileResponse,
    responses={
        **refusals(400, 404, 410, 416),
        200: {
            "description": "The file; a download where browsers do not show its kind",
            "content": dict.fromkeys(("image/*", "application/octet-stream"), _BINARY),
        },
        206: {"description": "A part of it"},
        304: {"description": "As it was"},
    },
    tags=["pictures"],
)
async def get_file(shared: Shared, request: Request, id: PictureId) -> Response:
    """The original, whole or in parts. Only files that are as they were indexed are given out."""
    headers = {"ETag": f'"{id}"', "Cache-Control": _FOR_EVER}
    path, descriptor = await shared.service.open_content(id)
    if _is_known(request, id):
        os.close(descriptor)
        return Response(status_code=304, headers=headers)
    kind = _SHOWN_BY_BROWSERS.get(path.suffix.lower())
    return OpenFileResponse(
        descriptor,
        headers={**headers, "Content-Security-Policy": "default-src 'none'; sandbox"},
        media_type=kind or "application/octet-stream",
        filename=path.name.encode(errors="replace").decode(errors="replace"),
        content_disposition_type="attachment" if kind is None else "inline",
    )


@router.get(
    "/pictures/{id}/thumbnail",
    response_class=Response,
    responses={
        **refusals(404, 410, 413),
        200: {"description": "Upright", "content": {"image/jpeg": _BINARY}},
        304: {"description": "As it was"},
    },
    tags=["pictures"],
)
async def get_thumbnail(
    shared: Shared, request: Request, id: PictureId, px: Literal["64", "128", "256", "512", "1024"] = "256"
) -> Response:
    """A small copy; `px` is its longest side."""
    tag = f"{id}-{px}"
    headers = {"ETag": f'"{tag}"', "Cache-Control": _FOR_EVER}
    if _is_known(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(await shared.thumbnails.get(id, int(px)), headers=headers, media_type="image/jpeg")


@router.get("/index", response_model=schemas.IndexStatus, responses=refusals(), tags=["index"])
async def get_index(shared: Shared) -> schemas.IndexStatus:
    """What the index holds, and how it is searched."""
    return await shared.views.status()


@router.get("/problems", response_model=schemas.ProblemPage, responses=refusals(), tags=["index"])
async def list_problems(
    shared: Shared, limit: Limit = 100, after: Annotated[int, Query(ge=0, le=2**53)] = 0
) -> schemas.ProblemPage:
    """Files that could not be indexed, and why."""
    return await shared.views.problems(limit, after)


@router.get("/duplicates", response_model=schemas.Duplicates, responses=refusals(), tags=["index"])
async def list_duplicates(
    shared: Shared,
    min_score: Annotated[float, Query(ge=0.5, le=1)] = 0.95,
    root: Root = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
) -> schemas.Duplicates:
    """Groups of copies and near duplicates, as `mimco dupes` finds them. Nothing is moved from here."""
    return await shared.views.duplicates(min_score, root, limit)


@router.get("/map", response_model=schemas.MapPoints, responses=refusals(), tags=["index"])
async def get_map(shared: Shared) -> Response:
    """The collection on a plane, as `mimco map` lays it out."""
    return Response(await shared.views.map(), media_type="application/json")


@router.post(
    "/jobs",
    response_model=schemas.Job,
    status_code=202,
    responses=refusals(400, 408, 409, 413, 415),
    openapi_extra=json_content("JobRequest"),
    tags=["jobs"],
)
async def start_job(request: Request, shared: Shared) -> schemas.Job:
    """Bring the index up to date."""
    async with read_body(request, schemas.JobRequest, 0) as body:
        return await shared.jobs.start(body.document or schemas.JobRequest())  # type: ignore[call-arg]


@router.get("/jobs", response_model=list[schemas.Job], responses=refusals(), tags=["jobs"])
async def list_jobs(shared: Shared) -> list[schemas.Job]:
    """The last runs, newest first."""
    return shared.jobs.all()


@router.get("/jobs/{id}", response_model=schemas.Job, responses=refusals(404), tags=["jobs"])
async def get_job(shared: Shared, id: JobId) -> schemas.Job:
    """How far a run is."""
    return shared.jobs.get(id)


@router.delete("/jobs/{id}", response_model=schemas.Job, responses=refusals(404), tags=["jobs"])
async def cancel_job(shared: Shared, id: JobId) -> schemas.Job:
    """Ask a run to stop after its batch, and be `cancelling` until then. What it has committed stays."""
    return shared.jobs.cancel(id)


@router.get(
    "/jobs/{id}/events",
    response_class=StreamingResponse,
    responses={
        **refusals(404),
        200: {
            "description": "Server-sent events named `progress`, each a `Job`; the last one has ended",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
    },
    tags=["jobs"],
)
async def watch_job(shared: Shared, id: JobId) -> StreamingResponse:
    """Follow a run."""
    shared.jobs.get(id)

    async def lines() -> AsyncIterator[str]:
        async for job in shared.jobs.events(id, shared.stopping):
            yield ": still there\n\n" if job is None else f"event: progress\ndata: {job.model_dump_json()}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


@router.get("/version", response_model=schemas.Version, responses=refusals(), tags=["service"])
async def get_version(shared: Shared) -> schemas.Version:
    """What is running."""
    generation, *_ = await shared.service.read(lambda index: index.state())
    now = shared.service.now
    return schemas.Version(
        version=__version__,
        fingerprint=now.encoder.spec.fingerprint,
        embedding_dim=now.encoder.spec.embedding_dim,
        precision=now.encoder.precision,
        provider=now.encoder.provider,
        index_generation=generation,
    )


def _is_known(request: Request, tag: str) -> bool:
    given = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    return f'"{tag}"' in given or "*" in given
