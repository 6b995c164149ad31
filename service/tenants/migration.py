"""Moving tenants to another encoder while they are served.

With `DMN_NEXT_ENCODER` there are two sets of rooms, on one store and one worker, and a tenant is answered in those
whose encoder its memory was made with. Until it is switched, its traffic also fills its *shadow*: a memory under the
next encoder, by a name that no caller can say, with the same classes, and the shots whose images are kept.

answer ──cast──> queue ──Filler, while no caller waits──> shadow ──switch, in one step──> the tenant's own memory

What the switch replaces is in a snapshot; restoring that, in the rooms of its encoder, is the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from service.background.jobs import Report
from service.domain.memory import StoredMemory, TenantRecord
from service.domain.records import Job
from service.domain.tenant import shadow_of
from service.errors import Contended, FingerprintMismatch, InvalidRequest, StoreDown
from service.memory.fingerprint import check_fingerprint, origin_of
from service.services import Rooms
from service.stores.protocol import Conflict, ReloadNeeded
from service.telemetry import logs

from . import configuration, reindex, snapshots
from .shadow_memory import cancel_migration, follow, follow_shots, rescore_shadow, shots_of

KIND = "migrate"
"""Kind of the job that switches a tenant."""

_TRIES = 20
_RESCORE_S = 60.0


# The switch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """How much a memory holds."""

    slots: int
    shots: int

    @staticmethod
    def of(stored: StoredMemory) -> Holding:
        """Count it; shots that wait for their features are not there yet."""
        read = sum(bool(shot.feature) for shot in shots_of(stored))
        return Holding(slots=sum(map(len, stored.slots.values())), shots=read)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where a tenant is: its encoder and the one that it may be switched to, and what its memory and its shadow hold.

    `stranded` shots have no kept image, and cannot come along; `trained` says that there are offsets, which cannot
    either.
    """

    encoder: str
    next: str | None
    memory: Holding
    shadow: Holding | None
    stranded: int
    trained: bool


async def standing(rooms: Rooms, tenant: str) -> Standing:
    """Return where a tenant is on its way to the next encoder.

    Raises:
        UnknownTenant: there is no such tenant.
    """
    main = await configuration.load(rooms, tenant)
    then = _others(rooms, main.record)
    shadow = await rooms.store.load(shadow_of(tenant))
    return Standing(
        encoder=main.record.origin.get("encoder", ""),
        next=None if then is None else then.encoder.name,
        memory=Holding.of(main),
        shadow=None if shadow is None else Holding.of(shadow),
        stranded=0 if then is None else sum(not shot.kept for shot in shots_of(main)),
        trained=main.record.training is not None,
    )


async def switch(rooms: Rooms, tenant: str, *, force: bool = False) -> Job:
    """Start to put a tenant's shadow in the place of its memory, at once for all who read, and return the job.

    With `force` also if shots are lost by it.

    Raises:
        UnknownTenant: there is no such tenant.
        FingerprintMismatch: its memory was made with neither encoder, or there is no other one to switch it to.
        InvalidRequest: shots would be lost.
    """
    main = await configuration.load(rooms, tenant)
    then = _others(rooms, main.record)
    if then is None:
        raise FingerprintMismatch(
            f"The memory of {tenant!r} is of the encoder {main.record.origin.get('encoder', '(unknown)')}, and there "
            "is no other one here to switch it to: DMN_NEXT_ENCODER names it."
        )
    check_fingerprint(main.record, rooms.encoder)
    _check_stranded(main, force=force)
    under_way = [job for job in await rooms.jobs.every(tenant) if job.kind == KIND and not job.over]
    return (
        under_way[0]
        if under_way
        else await rooms.jobs.start(tenant, KIND, partial(_switch, rooms, then, tenant, force))
    )


async def _switch(now: Rooms, then: Rooms, tenant: str, force: bool, report: Report) -> Mapping[str, Any]:  # noqa: FBT001
    saved = None
    for _ in range(_TRIES):
        with suppress(Conflict, ReloadNeeded):
            await _prepared(now, then, tenant, report)
            if saved is None and now.settings.snapshots:
                saved = await snapshots.take(now, tenant, "encoder-change")
            holding = await _put(now, then, tenant, force=force)
            logs.event(
                logs.MIGRATED, tenant=tenant, encoder=then.encoder.name, slots=holding.slots, shots=holding.shots
            )
            return {"encoder": then.encoder.name, "snapshot": None if saved is None else saved.id, **asdict(holding)}
    raise Contended


async def _prepared(now: Rooms, then: Rooms, tenant: str, report: Report) -> None:
    """Bring a tenant's shadow in step, its slots scored as they should be."""
    record = await now.archive.record(tenant)
    check_fingerprint(record, now.encoder)
    shadow = await follow(now, then, record)
    await follow_shots(now, then, tenant, report)
    await rescore_shadow(then, shadow.name)
    for job in await then.jobs.every(shadow.name):
        await then.jobs.wait(job.id, _RESCORE_S)


async def _put(now: Rooms, then: Rooms, tenant: str, *, force: bool) -> Holding:
    """Replace a tenant's memory by its shadow.

    Raises:
        Conflict: one of them has changed since it was brought in step.
    """
    name = shadow_of(tenant)
    async with now.archive.exclusive(tenant), then.archive.exclusive(tenant), then.carrier:
        with suppress(StoreDown):
            await then.archive.hand_in(name)
        shadow, main = await configuration.load(then, name), await snapshots.load_whole(now, tenant)
        check_fingerprint(main.record, now.encoder)
        if main.record.config != shadow.record.config:
            raise Conflict(tenant)
        _check_stranded(main, force=force)
        read = {shot.id: shot.feature for shot in shots_of(shadow)}
        # One that came a moment ago waits for its feature, as after any change of encoder.
        shots = [replace(shot, feature=read.get(shot.id, b"")) for shot in shots_of(main) if shot.image]
        await then.store.replace(
            tenant,
            main.record.config,
            then.encoder.fingerprint,
            expected=main.record.stamp,
            labelling=shadow.record.labelling,
            origin=origin_of(then.encoder),
            slots=shadow.slots,
            barred=shadow.barred | main.barred,
            shots=shots,
            statistics=shadow.statistics,
        )
        now.archive.drop(tenant)
        then.archive.drop(tenant)
    await cancel_migration(now, tenant)
    if not all(shot.feature for shot in shots):
        await reindex.resume(then, tenant)
    return Holding(slots=sum(map(len, shadow.slots.values())), shots=len(shots))


def _others(rooms: Rooms, record: TenantRecord) -> Rooms | None:
    """Return the rooms that a tenant may be switched to: the next ones, if it is not there yet."""
    return next(
        (own for own in rooms.beside if own is not rooms and own.encoder.fingerprint != record.fingerprint), None
    )


def _check_stranded(main: StoredMemory, *, force: bool) -> None:
    stranded = sum(not (shot.kept or shot.image) for shot in shots_of(main))
    if stranded and not force:
        raise InvalidRequest(
            f"{stranded} shots of {main.record.name!r} have no kept image that another encoder could read, and would "
            "be lost. Upload them again under `retention: images`, or say `force`."
        )
