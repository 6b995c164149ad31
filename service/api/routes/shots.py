"""Routes of the static memory: shots, labels, training and its offsets."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.access.idempotency import digest_of
from service.api.dependencies import DeadlineDep, KeyDep, LedgerDep, OwnRoomsDep, RoomsDep, TenantDep
from service.api.pagination import CursorDep, LimitDep, page
from service.api.problems import REFUSED_IMAGES, AllFailed, may, problem_of
from service.api.responses import digest_if, is_final, json_answer, response_of, stamp_out, unless_gone
from service.api.schemas.base import LIMITS, REQUIRED, TEXT, Text
from service.api.schemas.jobs import JobOut
from service.api.schemas.memory import (
    ShotItemOut,
    ShotListOut,
    ShotOut,
    ShotsOut,
    TrainIn,
)
from service.api.security import Guarded
from service.api.uploads import read_shots
from service.api.zip_uploads import Upload
from service.classify import Fault
from service.domain.records import Remembered
from service.domain.tenant import class_name
from service.errors import InvalidRequest
from service.services import Rooms
from service.tenants import configuration, encoder_routing, training
from service.tenants import shots as tenant_shots

router = APIRouter(prefix="/memory", tags=["memory"], route_class=Guarded)

_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "label": TEXT,
                    "images": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "minItems": 1,
                        LIMITS: {"maxItems": "max_images"},
                    },
                },
                "required": ["label", "images"],
                "additionalProperties": False,
            }
        },
        "application/zip": {"schema": {"type": "string", "format": "binary"}},
    },
}


@router.get("/static", summary="List the shots")
async def list_shots(
    rooms: OwnRoomsDep, tenant: TenantDep, limit: LimitDep = 100, cursor: CursorDep = None
) -> ShotListOut:
    """Return a page of shots, class after class."""
    stored = await configuration.load(rooms, tenant)
    shots = [
        ShotItemOut(id=shot.id, label=spec.name)
        for spec in stored.record.config.classes
        for shot in stored.shots.get(spec.id, ())
    ]
    part, more = page(shots, limit, cursor, lambda shot: shot.id)
    return ShotListOut(items=part, next=more)


@router.post(
    "/static",
    status_code=201,
    response_model=ShotsOut,
    summary="Upload labelled shots",
    responses=may(*REFUSED_IMAGES, "unknown-class"),
    openapi_extra={"requestBody": _UPLOAD},
)
async def post_shots(
    request: Request,
    rooms: RoomsDep,
    ledger: LedgerDep,
    tenant: TenantDep,
    deadline: DeadlineDep,
    key: KeyDep = None,
) -> Response:
    """Store labelled images; one that fails carries its own problem, and the others are stored at once."""
    if key is None:  # the answer to a retry may be at hand
        rooms.batcher.knock(tenant=tenant, deadline=deadline)
    upload = await read_shots(request, rooms.settings)
    return await unless_gone(request, _store(rooms, ledger, tenant, upload, deadline, key))


@router.post(
    "/static/train",
    status_code=202,
    response_model=JobOut,
    summary="Train on the shots",
    responses=may("no-classes"),
)
async def train(
    rooms: OwnRoomsDep, ledger: LedgerDep, tenant: TenantDep, body: TrainIn | None = None, key: KeyDep = None
) -> Response:
    """Start few-shot training; its job tells how far it is, and the result is in use when it is done."""
    wanted = body or TrainIn()
    digest = digest_of(("train", wanted.as_bytes()))

    async def once() -> Remembered:
        return json_answer(JobOut.of(await training.start(rooms, tenant, wanted.options())), digest, 202)

    return response_of(await ledger.once(tenant, key, digest, once, wait_s=rooms.settings.deadline_ms / 1000))


@router.delete("/static/train", status_code=204, summary="Remove what was trained", responses=may("not-found"))
async def remove_offsets(rooms: OwnRoomsDep, tenant: TenantDep) -> None:
    """Remove the trained offsets; shots and slots stay."""
    await training.remove(rooms, tenant)


@router.delete("/static", status_code=204, summary="Remove every shot of a class", responses=may("unknown-class"))
async def remove_label(
    rooms: OwnRoomsDep,
    tenant: TenantDep,
    label: Annotated[Text | None, Query(description="the class", json_schema_extra=REQUIRED)] = None,
) -> None:
    """Remove the shots of one class."""
    if label is None:
        raise InvalidRequest("Say which shots: DELETE /memory/static/{id}, or DELETE /memory/static?label=CLASS.")
    await tenant_shots.remove_label(rooms, tenant, label)


@router.delete("/static/{shot}", status_code=204, summary="Remove a shot", responses=may("unknown-shot"))
async def remove_shot(rooms: OwnRoomsDep, tenant: TenantDep, shot: str) -> None:
    """Remove one shot."""
    await tenant_shots.remove_shot(rooms, tenant, shot)


async def _store(
    rooms: Rooms, ledger: LedgerDep, tenant: str, upload: Upload, deadline: float, key: str | None
) -> Response:
    labelled = [
        tenant_shots.LabelledImage(label=class_name(one.label, rooms.settings.max_text_chars), image=one.image)
        for one in upload.labelled
    ]
    contents = (part for one in labelled for part in (one.label, one.image if isinstance(one.image, bytes) else b""))
    digest = await digest_if(key, lambda: ("shots", *contents))

    async def once() -> Remembered:
        add = partial(
            tenant_shots.add_shots, tenant=tenant, labelled=labelled, deadline=deadline, bounded=not upload.zipped
        )
        results, stamp = await encoder_routing.in_its_rooms(rooms, tenant, add)
        faults = [result for result in results if not isinstance(result, tenant_shots.Shot)]
        if len(faults) == len(results):
            raise AllFailed(faults)
        shots = [_shot_out(one.label, result) for one, result in zip(labelled, results, strict=True)]
        return json_answer(ShotsOut(shots=shots, memory=stamp_out(stamp)), digest, 201, final=is_final(results))

    answer = await ledger.once(tenant, key, digest, once, wait_s=deadline - rooms.clock())
    return response_of(answer, rooms.quotas.headers(tenant))


def _shot_out(label: str, result: tenant_shots.Shot | Fault) -> ShotOut:
    if isinstance(result, tenant_shots.Shot):
        return ShotOut(id=result.id, label=label, error=None)
    return ShotOut(id=None, label=label, error=problem_of(result))
