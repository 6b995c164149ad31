"""`POST /classify`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.access.idempotency import Ledger
from service.api.dependencies import (
    CallHeaders,
    as_parameters,
    deadline_of,
    digest_if,
    is_final,
    json_answer,
    parsed,
    response_of,
    stamp_told,
    unless_gone,
)
from service.api.problems import REFUSED_IMAGES, AllFailed, may, problem_of
from service.api.request_params import headers_of
from service.api.schemas.base import LIMITS, ClassifyOut, PredictionOut, TenantName
from service.api.security import Guarded, tenant_of
from service.api.uploads import Images, read_images
from service.classify import ClassifyCall, Fault
from service.inference.predictor import Choice, Explanation, Reading
from service.services import Rooms
from service.stores.protocol import Remembered
from service.telemetry.metrics import STAGES
from service.tenants import migration

Answer = Callable[[ClassifyCall, str | None, str], Coroutine[object, object, Response]]
"""Answers a call that was read, given its idempotency key and digest: here (`answered`), or in another process."""

router = APIRouter(tags=["classify"], route_class=Guarded)

_NO_MORE: dict[str, object] = {"required": ["images"], "additionalProperties": False}
_AT_MOST = {"minItems": 1, LIMITS: {"maxItems": "max_images"}}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}, **_AT_MOST}
_IMAGE = {
    "type": "object",
    "properties": {"data": {"type": "string", "format": "byte"}},
    "required": ["data"],
    "additionalProperties": False,
}
_BASE64 = {"type": "array", "items": _IMAGE, **_AT_MOST}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "properties": {"images": _FILES}, **_NO_MORE}},
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": {"type": "object", "properties": {"images": _BASE64}, **_NO_MORE}},
    },
}


class _Query(BaseModel):
    """How to answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")  # `lern=false` would learn

    top_k: int = Field(5, ge=1, le=10_000, description="classes to name for each image")
    learn: bool = Field(default=True, description="let the dynamic memory take the images")
    views: int = Field(
        1,
        ge=1,
        description="views of each image, the plain one included",
        json_schema_extra={LIMITS: {"maximum": "max_views"}},
    )
    explain: bool = Field(default=False, description="name the slots and shots behind each answer")
    tenant: TenantName | None = Field(None, description="the same as `X-Tenant`")


_USUAL = _Query.model_validate({})


@router.post(
    "/classify",
    response_model=ClassifyOut,
    summary="Classify images, and learn from them",
    responses=may(*REFUSED_IMAGES, "no-classes", "limit-exceeded"),
    openapi_extra={
        "requestBody": _BODY,
        "parameters": [*as_parameters(_Query, "query"), *as_parameters(CallHeaders, "header")],
    },
)
async def post_classify(request: Request) -> Response:
    """Answer images in order; one that fails carries its own problem."""
    # Read by hand: the framework takes longer to put together what this route asks for than a readout takes.
    rooms: Rooms = request.app.state.rooms
    asked = parsed(_Query, "query", request.query_params) if request.scope["query_string"] else _USUAL
    asked_in = parsed(CallHeaders, "header", headers_of(request.scope))
    tenant, key = tenant_of(request, asked_in.tenant, asked.tenant), asked_in.key
    deadline = deadline_of(asked_in.deadline_ms, rooms)
    if key is None:  # the answer to a retry may be at hand
        rooms.batcher.knock(tenant=tenant, deadline=deadline)
    images = await read_images(request, rooms.settings)
    call = ClassifyCall(
        tenant=tenant,
        images=images,
        learn=asked.learn,
        views=asked.views,
        explain=asked.explain,
        deadline=deadline,
        top_k=asked.top_k,
    )
    digest = await digest_if(key, lambda: ("classify", str(asked), *_contents(images)))
    answer: Answer = request.app.state.answer
    return await unless_gone(request, answer(call, key, digest))


ROUTE: Guarded = next(route for route in router.routes if isinstance(route, Guarded))
"""The route of `post_classify`."""


async def answered(rooms: Rooms, ledger: Ledger, call: ClassifyCall, key: str | None, digest: str) -> Response:
    """Return the answer to a call: the one kept for its key, or what the rooms make of it.

    Raises:
        ServiceError, AllFailed: the call is refused, or no image of it could be answered.
    """
    headers: dict[str, str] = {}

    async def once() -> Remembered:
        own, results = await migration.classify(rooms, call)
        readings = [result for result in results if isinstance(result, Reading)]
        if not readings:
            raise AllFailed([result for result in results if not isinstance(result, Reading)])
        headers.update({"Server-Timing": _server_timing(readings), **rooms.quotas.headers(call.tenant)})
        latest = max(reading.stamp for reading in readings)
        told = {
            "tenant": call.tenant,
            "model": own.encoder.name,
            "predictions": [_told(result) for result in results],
            "memory": stamp_told(latest, stale=any(reading.stale for reading in readings)),
        }
        return json_answer(told, digest, final=is_final(results))

    return response_of(await ledger.once(call.tenant, key, digest, once, wait_s=call.deadline - rooms.clock()), headers)


# What `ClassifyOut` says, without its models: making and checking these takes longer than telling what they hold.


def _told(result: Reading | Fault) -> dict[str, Any]:
    if isinstance(result, Reading):
        return _prediction(result)
    return {**dict.fromkeys(PredictionOut.model_fields), "error": problem_of(result).model_dump()}


def _prediction(reading: Reading) -> dict[str, Any]:
    learned = reading.learned
    return {
        "label": reading.fused.label,
        "score": reading.fused.score,
        "top": [_score(one) for one in reading.top],
        "readouts": {
            "text": _score(reading.text),
            "dynamic": _score(reading.dynamic),
            "static": reading.static and _score(reading.static),
            "statistics": reading.statistics and _score(reading.statistics),
        },
        "learned": {
            "outcome": learned.outcome,
            "label": learned.label,
            "entropy": learned.entropy,
            "slot": learned.slot,
            "evicted": learned.evicted,
        },
        "explain": reading.explanation and _explained(reading.explanation),
        "error": None,
    }


def _score(choice: Choice) -> dict[str, Any]:
    return {"label": choice.label, "score": choice.score}


def _explained(explanation: Explanation) -> dict[str, Any]:
    return {
        "dynamic": [
            {"label": one.label, "slot": one.id, "affinity": one.affinity, "entropy": one.entropy or 0.0}
            for one in explanation.dynamic
        ],
        "static": [{"label": one.label, "shot": one.id, "affinity": one.affinity} for one in explanation.static],
    }


def _contents(images: Images) -> list[bytes | str]:
    return [image if isinstance(image, bytes) else str(image) for image in images]


def _server_timing(readings: list[Reading]) -> str:
    """Return each stage's longest time among the images, in milliseconds."""
    longest = dict.fromkeys(STAGES, 0.0)
    for reading in readings:
        own = dict.fromkeys(STAGES, 0.0)
        for stage, seconds, _ in reading.laps:
            own[stage] += seconds
            longest[stage] = max(longest[stage], own[stage])
    return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in longest.items())
