"""`/memory`: both memories of a tenant, its shots, its slots."""

from __future__ import annotations

from fastapi import APIRouter

from core.adaptive.adaptation import Adaptation
from service.api.dependencies import OwnRoomsDep, TenantDep
from service.api.pagination import CursorDep, LimitDep, page
from service.api.problems import may
from service.api.schemas.base import Text
from service.api.schemas.memory import (
    AdaptationOut,
    DynamicClassOut,
    DynamicOut,
    MemoryOut,
    ProjectionsOut,
    SlotItemOut,
    SlotListOut,
    StaticClassOut,
    StaticOut,
)
from service.api.security import Guarded
from service.domain.memory import StoredMemory
from service.domain.tenant import class_name
from service.memory.convert import held_bytes
from service.services import Rooms
from service.tenants import configuration, reset

router = APIRouter(prefix="/memory", tags=["memory"], route_class=Guarded)


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
    await reset.purge(rooms, tenant, name, slot)


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
