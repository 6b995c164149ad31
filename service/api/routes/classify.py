"""`POST /classify`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.dependencies import deadline_of
from service.api.problems import REFUSED_IMAGES, may
from service.api.request_params import CallHeaders, as_parameters, headers_of, parsed
from service.api.responses import digest_if, unless_gone
from service.api.schemas.base import LIMITS, TenantName
from service.api.schemas.classify import ClassifyOut
from service.api.security import Guarded, tenant_of
from service.api.uploads import Images, read_images
from service.classify import ClassifyCall
from service.services import Rooms

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


def _contents(images: Images) -> list[bytes | str]:
    return [image if isinstance(image, bytes) else str(image) for image in images]
