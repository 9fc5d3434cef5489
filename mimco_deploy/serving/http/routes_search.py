"""Routes that take pictures: search, embed, and why two are alike."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from mimco_deploy.serving.http import schemas
from mimco_deploy.serving.http.bodies import check_part, form_content, invalid, parts_of, read_body
from mimco_deploy.serving.http.context import Shared, refusals

router = APIRouter(prefix="/v1", tags=["search"])

_FLOATS = "application/octet-stream"
_BODY = (400, 408, 413, 415)


@router.post(
    "/search",
    response_model=schemas.Answer,
    responses=refusals(404, 409, 410, *_BODY),
    openapi_extra=form_content("Query"),
)
async def search(request: Request, shared: Shared) -> schemas.Answer:
    """Find the pictures most like one picture, a part of one, or several with weights."""
    _refuse_early(request, shared)
    async with read_body(request, schemas.Query, schemas.MAX_PARTS) as body:
        query = parts_of(body.document, body.uploads)
        if query.rerank and query.k > schemas.MAX_RERANKED_K:
            raise invalid("k", f"{query.k} with rerank, expected at most {schemas.MAX_RERANKED_K}")
        return await shared.service.search(query, body.uploads)


@router.post(
    "/search/batch",
    response_model=schemas.Answers,
    responses=refusals(404, 410, *_BODY),
    openapi_extra=form_content("Batch"),
)
async def search_batch(request: Request, shared: Shared) -> schemas.Answers:
    """Answer several queries. A form without `request` asks for each of its files."""
    async with read_body(request, schemas.Batch, schemas.MAX_QUERIES) as body:
        if body.document is None:
            asked = [
                schemas.Query(parts=[schemas.QueryPart(upload=number)])  # type: ignore[call-arg]  # the rest by default
                for number in range(len(body.uploads))
            ]
            if not asked:
                raise invalid("file", "none")
        else:
            asked = body.document.queries
        for query in asked:
            if query.parts is None or query.rerank:
                raise invalid("queries", "each of a batch has parts, and none is reranked")
        queries = [parts_of(query, body.uploads) for query in asked]
        return schemas.Answers(answers=await shared.service.search_all(queries, body.uploads))


@router.post(
    "/embed",
    response_model=schemas.Embeddings,
    responses={
        **refusals(*_BODY),
        200: {
            "description": "As JSON, or where `Accept` asks for it as float32, little-endian, a row for each picture",
            "content": {_FLOATS: {"schema": {"type": "string", "format": "binary"}}},
        },
    },
    openapi_extra=form_content(None),
)
async def embed(
    request: Request, shared: Shared, accept: Annotated[str, Header()] = "application/json"
) -> schemas.Embeddings | Response:
    """Embed the pictures of a form."""
    async with read_body(request, schemas.Query, schemas.MAX_QUERIES) as body:
        if body.document is not None or not body.uploads:
            raise invalid("file", "only pictures, at least one")
        spec, embeddings = await shared.service.embed(body.uploads)
    if _FLOATS in (one.partition(";")[0].strip().lower() for one in accept.split(",")):
        headers = {"X-Mimco-Shape": "x".join(map(str, embeddings.shape)), "X-Mimco-Fingerprint": spec.fingerprint}
        return Response(embeddings.astype("<f4").tobytes(), headers=headers, media_type=_FLOATS)
    return schemas.Embeddings(
        fingerprint=spec.fingerprint,
        embedding_dim=spec.embedding_dim,
        embeddings=np.asarray(embeddings, np.float64).tolist(),
    )


@router.post(
    "/why",
    response_model=schemas.Why,
    responses=refusals(404, 409, 410, *_BODY),
    openapi_extra=form_content("WhyRequest"),
)
async def why(request: Request, shared: Shared) -> schemas.Why:
    """Where a picture and a hit are alike, part by part. Needs an encoder with patch tokens."""
    _refuse_early(request, shared)
    async with read_body(request, schemas.WhyRequest, 1) as body:
        if body.document is None:
            raise invalid("request", "missing")
        check_part(body.document.query, body.uploads)
        return await shared.service.why(body.document, body.uploads)


def _refuse_early(request: Request, shared: Shared) -> None:
    """Before a form is read, which costs more than to say no."""
    batcher = shared.service.now.batcher
    if batcher.full and request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise batcher.busy()
