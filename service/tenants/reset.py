"""Reset and purge: dynamic slots, statistics or everything of a tenant is removed, a snapshot kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from service.domain.memory import Stamp
from service.domain.records import SnapshotInfo
from service.domain.tenant import class_name, shadow_of
from service.errors import (
    UnknownSlot,
    UnknownTenant,
)
from service.services import Rooms
from service.telemetry import logs

from . import snapshots
from .reindex import reindex_soon, rescore_if_due


async def reset(
    rooms: Rooms, tenant: str, *, dynamic: bool, static: bool, classes: Sequence[str] | None
) -> tuple[Stamp, SnapshotInfo | None]:
    """Empty one or both memories, of the named classes or of all; trained offsets go with all shots.

    Return where the memory is then, and the snapshot that was taken before.

    Raises:
        UnknownTenant, UnknownClass: nothing was emptied.
    """
    record = await rooms.archive.record(tenant)
    ids = (
        None
        if classes is None
        else [record.config.spec(class_name(name, rooms.settings.max_text_chars)).id for name in classes]
    )
    saved = await snapshots.before(rooms, tenant, "reset")
    async with rooms.archive.exclusive(tenant):
        empty = partial(rooms.store.reset, dynamic=dynamic, static=static, class_ids=ids)
        # The shadow first, or a switch in between would bring back what it holds; and again what came in between.
        shadowed = await empty(shadow_of(tenant))
        stamp = await empty(tenant)
        if shadowed is not None:
            await empty(shadow_of(tenant))
        rooms.archive.drop(tenant)
    if stamp is None:
        raise UnknownTenant(f"There is no tenant {tenant!r}.")
    if record.training is not None and static and ids is None:
        # With the offsets goes what labelled the slots that stay.
        await reindex_soon(rooms, tenant)
        stamp = (await rooms.archive.record(tenant)).stamp
    logs.event(logs.MEMORY_RESET, tenant=tenant, dynamic=dynamic, static=static, classes=ids and len(ids))
    return await rescore_if_due(rooms, tenant) if static else stamp, saved


async def purge(rooms: Rooms, tenant: str, label: str, slot: str) -> None:
    """Remove one dynamic slot; the same image cannot come back to it within this epoch.

    Raises:
        UnknownTenant, UnknownClass, UnknownSlot: it is not there.
    """
    spec = (await rooms.archive.record(tenant)).config.spec(class_name(label, rooms.settings.max_text_chars))
    async with rooms.archive.exclusive(tenant):
        await _purge_shadow(rooms, tenant, slot)
        if await rooms.store.purge(tenant, spec.id, slot):
            rooms.archive.drop(tenant)
            return
    raise UnknownSlot(f"The class {label!r} holds no slot {slot!r}.")


async def _purge_shadow(rooms: Rooms, tenant: str, slot: str) -> None:
    """Take an image out of a tenant's shadow too, whatever class the next encoder gave it."""
    shadow = await rooms.store.load(shadow_of(tenant))
    for own, bank in ({} if shadow is None else shadow.slots).items():
        if slot in bank.ids:
            await rooms.store.purge(shadow_of(tenant), own, slot)
