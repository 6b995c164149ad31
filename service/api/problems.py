"""Errors as RFC 9457 problems, and the page that each problem type's URI leads to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from service.api.schemas.base import Problem
from service.classify import Fault
from service.errors import InvalidRequest, RateLimited, ServiceError
from service.images.errors import ImageFault
from service.problem_types import PROBLEMS
from service.services import Rooms
from service.telemetry import logs
from service.telemetry.metrics import Metrics

MEDIA_TYPE = "application/problem+json"

MAY = "x-problems"
"""Where a route's part of the OpenAPI document names problems, until `document.describe` says the rest of them."""


REFUSED_IMAGES = (
    "unsupported-media-type",
    "image-unreadable",
    "image-too-large",
    "too-many-images",
    "rate-limited",
    "queue-full",
    "draining",
)
"""Problems of whatever call brings images."""

_BY_STATUS = {
    404: "not-found",
    405: "method-not-allowed",
    413: "body-too-large",
    415: "unsupported-media-type",
    503: "queue-full",
    504: "deadline-exceeded",
}


def may(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """Return what a route says of problems that it may answer with, beside those that any route of its kind may."""
    told: dict[int | str, dict[str, Any]] = {}
    for slug in slugs:
        told.setdefault(PROBLEMS[slug].status, {"description": "", MAY: []})[MAY].append(slug)
    return told


def problem_of(fault: Fault) -> Problem:
    """Return what a caller is told of a fault."""
    retry_after = fault.retry_after_s if isinstance(fault, ServiceError) else None
    return problem(fault.slug, str(fault), retry_after=retry_after)


def problem(slug: str, detail: str, *, retry_after: float | None = None, **more: object) -> Problem:
    """Return a problem of a type; `retry_after` in seconds."""
    kind = PROBLEMS[slug]
    return Problem(
        type=f"/problems/{slug}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        request_id=logs.request_id.get(),
        retry_after=retry_after,
        **more,
    )


def problem_response(told: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """Return a problem as an answer, with `Retry-After` where waiting helps."""
    extra = {} if told.retry_after is None else {"Retry-After": str(math.ceil(told.retry_after))}
    if told.status == HTTPStatus.UNAUTHORIZED:
        extra["WWW-Authenticate"] = "Bearer"
    body = told.model_dump_json(exclude_none=True)
    return Response(body, status_code=told.status, media_type=MEDIA_TYPE, headers={**(headers or {}), **extra})


class AllFailed(Exception):
    """No image of a call was answered: the call fails with the first one's problem, and names each one's own."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(f"{len(faults)} images failed")
        self.faults = faults


def refusal(error: Fault | AllFailed, metrics: Metrics) -> Response:
    """Return what a caller is told of a call that failed; one that was refused without work is counted."""
    if isinstance(error, AllFailed):
        return _all_failed(error.faults)
    if isinstance(error, ServiceError):
        metrics.rejected.labels(error.slug).inc()
    return problem_response(problem_of(error), error.headers if isinstance(error, RateLimited) else None)


def _all_failed(faults: Sequence[Fault]) -> Response:
    told = [problem_of(fault) for fault in faults]
    errors = [{"index": i, "problem": one.model_dump(exclude_none=True)} for i, one in enumerate(told)]
    return problem_response(told[0].model_copy(update={"errors": errors}))


def register(app: FastAPI, routes: Sequence[BaseRoute] = ()) -> None:
    """Make every error of the app a problem; a method that is not allowed names those of these routes that are."""

    @app.exception_handler(ServiceError)
    @app.exception_handler(ImageFault)
    @app.exception_handler(AllFailed)
    async def _refused(request: Request, error: Fault | AllFailed) -> Response:
        return refusal(error, request.app.state.rooms.metrics)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return await _refused(request, InvalidRequest(_sentences(error)))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        slug = _BY_STATUS.get(error.status_code, "invalid-request")
        detail = f"{str(error.detail).rstrip('.')}."
        if slug == "not-found":
            detail = f"There is no route {request.url.path[:200]!r}."
        if slug == "method-not-allowed":
            detail = f"{request.method[:20]} is not allowed here."
        headers = dict(error.headers or {})
        if slug == "method-not-allowed" and (allowed := _allowed(request, routes)):
            headers["Allow"] = allowed
        rooms: Rooms = request.app.state.rooms
        rooms.metrics.rejected.labels(slug).inc()
        retry_after = rooms.batcher.retry_after_s() if slug == "queue-full" else None
        return problem_response(problem(slug, detail, retry_after=retry_after), headers=headers)


def _allowed(request: Request, routes: Sequence[BaseRoute]) -> str:
    """Return the methods that a path takes, of all routes that have it; the framework names those of the first."""
    fitting = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in fitting for method in getattr(route, "methods", ())}))


def _sentences(error: RequestValidationError) -> str:
    """Return what is wrong with a request, field by field."""
    told = []
    for one in error.errors()[:10]:
        place = ".".join(str(part) for part in one["loc"])
        told.append(f"{place}: {one['msg']}.")
    return " ".join(told) or "The request is not valid."
