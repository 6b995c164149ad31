"""Snapshots, restore, export and import of whole memories, all in the format of `service.serialization`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from service.domain.memory import StoredMemory, TenantRecord
from service.domain.records import SnapshotInfo
from service.domain.tenant import shadow_of
from service.errors import Contended, FingerprintMismatch, InvalidRequest, LimitExceeded, UnknownSnapshot, UnknownTenant
from service.memory.convert import held_bytes
from service.memory.fingerprint import differences
from service.serialization import reader, writer
from service.services import Rooms
from service.settings import Settings
from service.stores.protocol import Conflict
from service.telemetry import logs

MANUAL = "manual"
"""Reason of a snapshot that people asked for."""

SCHEDULE = "schedule"
"""Reason of one that is taken every now and then."""

_TRIES = 5
_CLAIM_S = 300.0


async def take(rooms: Rooms, tenant: str, reason: str = MANUAL) -> SnapshotInfo:
    """Take a snapshot, and drop automatic ones that are more than are kept.

    Raises:
        UnknownTenant: there is no such tenant.
        LimitExceeded: there is no room for one more.
    """
    async with rooms.carrier:
        await rooms.archive.hand_in(tenant)
        return await _take(rooms, tenant, await load_whole(rooms, tenant), reason)


async def before(rooms: Rooms, tenant: str, reason: str) -> SnapshotInfo | None:
    """Take a snapshot before something is lost, unless none are to be taken or there is nothing to lose.

    Raises:
        LimitExceeded: there is no room for one more.
    """
    if not rooms.settings.snapshots:
        return None
    async with rooms.carrier:
        await rooms.archive.hand_in(tenant)
        stored = await rooms.store.load(tenant, images=True)
        if stored is None or not _holds(stored):
            return None
        with suppress(UnknownTenant):  # removed since, by someone else, with all that it had
            return await _take(rooms, tenant, stored, reason)
        return None


async def on_schedule(rooms: Rooms, tenant: str) -> None:
    """Take a snapshot if the last one on schedule is long enough ago, or the tenant's making, and something changed."""
    every_s = rooms.settings.snapshot_every_s
    record = await rooms.store.get(tenant) if every_s and rooms.settings.snapshots else None
    if record is None:
        return
    known = await rooms.store.snapshots(tenant)
    last = max((info.created for info in known if info.reason == SCHEDULE), default=record.created)
    due = rooms.wall() - last >= every_s and record.stamp not in {info.stamp for info in known[-1:]}
    # Of several replicas one does it; if it fails, another may soon try.
    if due and await rooms.store.claim(tenant, "snapshot", min(every_s, _CLAIM_S)):
        await before(rooms, tenant, SCHEDULE)


async def find(rooms: Rooms, tenant: str, id_: str) -> SnapshotInfo:
    """Return what is known of a snapshot.

    Raises:
        UnknownSnapshot: there is none of that id.
    """
    for info in await rooms.store.snapshots(tenant):
        if info.id == id_:
            return info
    raise UnknownSnapshot(f"There is no snapshot {id_!r}.")


async def drop(rooms: Rooms, tenant: str, id_: str) -> None:
    """Remove a snapshot.

    Raises:
        UnknownSnapshot: there is none of that id.
    """
    await find(rooms, tenant, id_)
    await rooms.store.drop_snapshot(tenant, id_)


async def restore(rooms: Rooms, tenant: str, id_: str) -> tuple[TenantRecord, SnapshotInfo | None]:
    """Bring a tenant back to a snapshot, configuration and all; return it, and the snapshot of what it was before.

    Raises:
        UnknownSnapshot: there is none of that id.
        FingerprintMismatch: it was taken with another encoder.
    """
    info = await find(rooms, tenant, id_)
    with TemporaryDirectory(prefix="dmn-snapshot-") as folder:
        path = Path(folder) / "snapshot.safetensors"
        await _fetch(rooms, tenant, info, path)
        return await bring_in(rooms, tenant, path, "restore")


async def bring_in(
    rooms: Rooms, tenant: str, path: Path, reason: str = "import"
) -> tuple[TenantRecord, SnapshotInfo | None]:
    """Replace a tenant, or create it, by what a file holds; return it, and the snapshot of what it was before.

    Raises:
        InvalidRequest, LimitExceeded: the file does not hold a memory that may be kept here; nothing was changed.
        FingerprintMismatch: it was made with another encoder.
    """
    settings = rooms.settings.of(tenant)
    if reason == "restore":
        # Several workers that learn at once may pass a tenant's limit by a little; what was there may come back.
        settings = settings.model_copy(update={"tenant_max_bytes": 2 * settings.tenant_max_bytes})
    brought = await asyncio.to_thread(reader.read, path, settings=settings)
    # Where two encoders are loaded, a file of either may come: a restore is also the way back from a switch.
    own = rooms.reading(brought.record.fingerprint)
    differs = differences(brought.record, own.encoder)
    if differs:
        raise FingerprintMismatch(
            f"The file holds a memory {differs}. Features of two encoders are never mixed, and nothing was changed: "
            f"bring it in where DMN_ENCODER is {brought.record.origin.get('encoder', 'the same')}."
        )
    total = held_bytes(brought, rooms.encoder.dim)
    if total > settings.tenant_max_bytes:
        raise LimitExceeded(
            f"With the features of all shots the tenant would hold {total} bytes; it may hold "
            f"{settings.tenant_max_bytes}."
        )
    training = brought.record.training
    if training is not None and training.dim != own.encoder.dim:
        raise InvalidRequest(f"The file's offsets have {training.dim} entries; this encoder has {own.encoder.dim}.")
    # Even where no slot needs it: the first image should not have to wait for the prompts.
    config = brought.record.config
    await own.texts.class_weights([config.prompts(spec) for spec in config.classes])
    saved = await before(rooms, tenant, reason)
    await rooms.store.delete(shadow_of(tenant))  # before, or a switch in between would bring it back
    async with own.archive.exclusive(tenant):
        record = await _put(own, tenant, brought)
        own.archive.drop(tenant)
    if own is not rooms:
        async with rooms.archive.exclusive(tenant):
            rooms.archive.drop(tenant)
    await rooms.store.delete(shadow_of(tenant))  # and what traffic has made of it since
    logs.event(logs.MEMORY_RESTORED, tenant=tenant, reason=reason, slots=_slots(brought), shots=_shots(brought))
    return record, saved


async def send_out(rooms: Rooms, tenant: str) -> tuple[int, Iterator[bytes]]:
    """Return the size of a tenant's memory as a file, and the file part by part.

    Raises:
        UnknownTenant: there is no such tenant.
    """
    async with rooms.carrier:
        await rooms.archive.hand_in(tenant)
        stored = await load_whole(rooms, tenant)
    created = _iso(rooms.wall())
    return writer.size_of(stored, created=created), writer.parts(stored, created=created)


async def load_whole(rooms: Rooms, tenant: str) -> StoredMemory:
    """Return everything that the store holds of a tenant, images too; for whoever holds the `carrier`.

    Raises:
        UnknownTenant: there is no such tenant.
    """
    stored = await rooms.store.load(tenant, images=True)
    if stored is None:
        raise UnknownTenant(f"There is no tenant {tenant!r}.")
    return stored


async def _take(rooms: Rooms, tenant: str, stored: StoredMemory, reason: str) -> SnapshotInfo:
    now = rooms.wall()
    info = SnapshotInfo(
        id=uuid4().hex[:20],
        created=now,
        reason=reason,
        fingerprint=stored.record.fingerprint,
        stamp=stored.record.stamp,
        classes=len(stored.record.config.classes),
        slots=_slots(stored),
        shots=_shots(stored),
        bytes=writer.size_of(stored, created=_iso(now)),
    )
    too_many = _too_many(await rooms.store.snapshots(tenant), info, rooms.settings)
    if not await rooms.store.keep_snapshot(tenant, info, writer.parts(stored, created=_iso(now))):
        raise UnknownTenant(f"There is no tenant {tenant!r}.")
    for old in too_many:
        await rooms.store.drop_snapshot(tenant, old.id)
    logs.event(logs.SNAPSHOT_TAKEN, tenant=tenant, reason=reason, bytes=info.bytes)
    return info


def _too_many(known: Sequence[SnapshotInfo], new: SnapshotInfo, settings: Settings) -> list[SnapshotInfo]:
    """Return which automatic snapshots have to go for a new one, the oldest first.

    Raises:
        LimitExceeded: there is no room even without them.
    """
    automatic = [info for info in known if info.automatic]
    kept = settings.snapshots - new.automatic
    going = automatic[: max(0, len(automatic) - kept)]
    staying = automatic[len(going) :]
    held = [info for info in known if not info.automatic]

    def fits() -> bool:
        every = [*held, *staying, new]
        return len(every) <= settings.max_snapshots and sum(info.bytes for info in every) <= settings.snapshot_max_bytes

    while not fits():
        if not staying:
            raise LimitExceeded(
                f"There is no room for a snapshot of {new.bytes} bytes: {len(held)} that were asked for hold "
                f"{sum(info.bytes for info in held)} of {settings.snapshot_max_bytes} bytes. Remove some of them"
                + (", or have the operator set DMN_SNAPSHOTS=0." if new.automatic else ".")
            )
        going.append(staying.pop(0))
    return going


async def _fetch(rooms: Rooms, tenant: str, info: SnapshotInfo, path: Path) -> None:
    part = size = 0
    with path.open("wb") as file:
        while (data := await rooms.store.read_snapshot(tenant, info.id, part)) is not None:
            size += file.write(data)
            part += 1
    if size != info.bytes:
        raise UnknownSnapshot(f"The snapshot {info.id!r} was removed while it was read.")


async def _put(rooms: Rooms, tenant: str, brought: StoredMemory) -> TenantRecord:
    for _ in range(_TRIES):
        old = await rooms.store.get(tenant)
        if old is None:
            await check_room(rooms)
        try:
            await rooms.store.replace(
                tenant,
                brought.record.config,
                brought.record.fingerprint,
                expected=None if old is None else old.stamp,
                labelling=brought.record.labelling,
                origin=brought.record.origin,
                slots=brought.slots,
                barred=brought.barred,
                shots=[shot for own in brought.shots.values() for shot in own],
                offsets=brought.offsets,
                statistics=brought.statistics,
            )
        except Conflict:
            continue
        return await rooms.archive.record(tenant)
    raise Contended


async def check_room(rooms: Rooms) -> None:
    """Return if there may be one more tenant.

    Raises:
        LimitExceeded: there may not.
    """
    limit = rooms.settings.max_tenants
    if len(await rooms.store.names(after="", limit=limit)) >= limit:
        raise LimitExceeded(f"There are {limit} tenants; no more are allowed.")


def _holds(stored: StoredMemory) -> bool:
    return bool(_slots(stored) or _shots(stored) or stored.offsets.training)


def _slots(stored: StoredMemory) -> int:
    return sum(map(len, stored.slots.values()))


def _shots(stored: StoredMemory) -> int:
    return sum(map(len, stored.shots.values()))


def _iso(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds")
