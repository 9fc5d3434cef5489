"""What the routes of one application share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from mimco_deploy.serving.http import problems
from mimco_deploy.serving.http.access import Access
from mimco_deploy.serving.http.jobs import Jobs
from mimco_deploy.serving.http.metrics import Metrics
from mimco_deploy.serving.http.service import Service
from mimco_deploy.serving.http.thumbnails import Thumbnails
from mimco_deploy.serving.http.views import Views

_WORDS = {
    400: "A form or a range that cannot be read",
    401: "A token is needed",
    403: "From a page of another site",
    404: "Not there",
    408: "The request took too long to arrive",
    409: "Cannot be done as things are",
    410: "Gone from the disk, or changed",
    413: "The request, or a picture in it, is too large",
    415: "Neither JSON nor a form",
    416: "A range beyond the end",
    421: "A name of another machine, without a token",
    422: "The request, or a picture in it, cannot be used",
    503: "Busy, or the index is not there; Retry-After says when to come again",
}


@dataclass(frozen=True)
class Context:
    """The parts of an application."""

    service: Service
    jobs: Jobs
    views: Views
    thumbnails: Thumbnails
    metrics: Metrics
    access: Access
    stopping: Callable[[], bool]


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Shared = Annotated[Context, Depends(_context)]


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route's errors.

    Args:
        statuses: besides those that every route may answer with.
    """
    content = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    return {
        status: {"description": _WORDS[status], "content": content}
        for status in sorted({401, 403, 421, 422, 503, *statuses})
    }
