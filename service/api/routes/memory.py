"""`/memory`: both memories of a tenant, its shots, its slots."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from core.adaptive.adaptation import Adaptation
from service.access.idempotency import digest_of
from service.api.dependencies import (
    CursorDep,
    DeadlineDep,
    KeyDep,
    LedgerDep,
    LimitDep,
    OwnRoomsDep,
    RoomsDep,
    TenantDep,
    digest_if,
    is_final,
    json_answer,
    page,
    response_of,
    stamp_out,
    unless_gone,
)
from service.api.problems import REFUSED_IMAGES, AllFailed, may, problem_of
from service.api.schemas.base import (
    LIMITS,
    REQUIRED,
    TEXT,
    AdaptationOut,
    DynamicClassOut,
    DynamicOut,
    JobOut,
    MemoryOut,
    ProjectionsOut,
    ShotItemOut,
    ShotListOut,
    ShotOut,
    ShotsOut,
    SlotItemOut,
    SlotListOut,
    StaticClassOut,
    StaticOut,
    Text,
    TrainIn,
)
from service.api.security import Guarded
from service.api.uploads import Upload, read_shots
from service.classify import Fault
from service.domain.tenant import class_name
from service.errors import InvalidRequest
from service.memory.cache import held_bytes
from service.services import Rooms
from service.stores.protocol import Remembered, StoredMemory
from service.tenants import configuration, migration, training

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


@router.get("", summary="Look at both memories")
async def get_memory(rooms: OwnRoomsDep, tenant: TenantDep) -> MemoryOut:
    """Return counts and entropies of every class, and where the memory is in its life."""
    stored = await configuration.load(rooms, tenant)
    return _memory_out(rooms, stored, await configuration.adaptation(rooms, stored.record))


@router.get("/dynamic/{name:path}", summary="Look at the slots of a class", responses=may("unknown-class"))
async def list_slots(
    rooms: OwnRoomsDep, tenant: TenantDep, name: Text, limit: LimitDep = 100, cursor: CursorDep = None
) -> SlotListOut:
    """Return a page of a class's dynamic slots, the surest first."""
    stored = await configuration.load(rooms, tenant)
    spec = stored.record.config.spec(class_name(name, rooms.settings.max_text_chars))
    slots = sorted(stored.slots.get(spec.id, ()), key=lambda slot: (slot.entropy, slot.id))
    part, more = page(slots, limit, cursor, lambda slot: slot.id)
    return SlotListOut(items=[SlotItemOut(slot=slot.id, entropy=slot.entropy) for slot in part], next=more)


@router.delete(
    "/dynamic/{name:path}/{slot}",
    status_code=204,
    summary="Purge a slot",
    responses=may("unknown-class", "unknown-slot"),
)
async def purge_slot(rooms: OwnRoomsDep, tenant: TenantDep, name: Text, slot: str) -> None:
    """Remove one dynamic slot; its image cannot come back before the next reset."""
    await configuration.purge(rooms, tenant, name, slot)


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
    await configuration.remove_label(rooms, tenant, label)


@router.delete("/static/{shot}", status_code=204, summary="Remove a shot", responses=may("unknown-shot"))
async def remove_shot(rooms: OwnRoomsDep, tenant: TenantDep, shot: str) -> None:
    """Remove one shot."""
    await configuration.remove_shot(rooms, tenant, shot)


async def _store(
    rooms: Rooms, ledger: LedgerDep, tenant: str, upload: Upload, deadline: float, key: str | None
) -> Response:
    labelled = [
        configuration.LabelledImage(label=class_name(one.label, rooms.settings.max_text_chars), image=one.image)
        for one in upload.labelled
    ]
    contents = (part for one in labelled for part in (one.label, one.image if isinstance(one.image, bytes) else b""))
    digest = await digest_if(key, lambda: ("shots", *contents))

    async def once() -> Remembered:
        add = partial(
            configuration.add_shots, tenant=tenant, labelled=labelled, deadline=deadline, bounded=not upload.zipped
        )
        results, stamp = await migration.in_its_rooms(rooms, tenant, add)
        faults = [result for result in results if not isinstance(result, configuration.Shot)]
        if len(faults) == len(results):
            raise AllFailed(faults)
        shots = [_shot_out(one.label, result) for one, result in zip(labelled, results, strict=True)]
        return json_answer(ShotsOut(shots=shots, memory=stamp_out(stamp)), digest, 201, final=is_final(results))

    answer = await ledger.once(tenant, key, digest, once, wait_s=deadline - rooms.clock())
    return response_of(answer, rooms.quotas.headers(tenant))


def _shot_out(label: str, result: configuration.Shot | Fault) -> ShotOut:
    if isinstance(result, configuration.Shot):
        return ShotOut(id=result.id, label=label, error=None)
    return ShotOut(id=None, label=label, error=problem_of(result))


def _memory_out(rooms: Rooms, stored: StoredMemory, adaptation: Adaptation | None) -> MemoryOut:
    record, classes = stored.record, stored.record.config.classes
    banks = [(spec.name, stored.slots.get(spec.id, ())) for spec in classes]
    return MemoryOut(
        tenant=record.name,
        fingerprint=record.fingerprint,
        epoch=record.stamp.epoch,
        version=record.stamp.version,
        bytes=held_bytes(stored, rooms.encoder.dim),
        dynamic=DynamicOut(
            slots=record.config.slots,
            classes=[
                DynamicClassOut(label=name, count=len(bank), entropies=sorted(slot.entropy for slot in bank))
                for name, bank in banks
            ],
        ),
        static=StaticOut(
            classes=[StaticClassOut(label=spec.name, count=len(stored.shots.get(spec.id, ()))) for spec in classes]
        ),
        projections=ProjectionsOut.of(stored.offsets),
        adaptation=None if adaptation is None else AdaptationOut.of(adaptation),
    )
