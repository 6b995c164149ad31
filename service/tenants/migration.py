"""Moving tenants to another encoder while they are served.

With `DMN_NEXT_ENCODER` there are two sets of rooms, on one store and one worker, and a tenant is answered in those
whose encoder its memory was made with. Until it is switched, its traffic also fills its *shadow*: a memory under the
next encoder, by a name that no caller can say, with the same classes, and the shots whose images are kept.

answer ──cast──> queue ──Filler, while no caller waits──> shadow ──switch, in one step──> the tenant's own memory

What the switch replaces is in a snapshot; restoring that, in the rooms of its encoder, is the way back.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from service import classify as hall
from service.background import reindex
from service.background.jobs import Report
from service.background.shadow_queue import Glimpse
from service.classify import ClassifyCall, Fault
from service.domain.tenant import class_id, shadow_of
from service.errors import Contended, FingerprintMismatch, InvalidRequest, ServiceError, StoreDown
from service.images.decode import ImageFault
from service.inference.batching import encode_each
from service.inference.predictor import Desk, Question, Reading
from service.memory.cache import check_fingerprint, origin_of
from service.services import Rooms
from service.stores.protocol import Conflict, Job, ReloadNeeded, StoredMemory, StoredShot, TenantRecord
from service.telemetry import logs

from . import configuration, snapshots

T = TypeVar("T")

KIND = "migrate"
"""Kind of the job that switches a tenant."""

_TRIES = 20
_SHOTS = 16
_LOOK_S = 2.0
"""How often a shadow that is filled is compared with its tenant, at most."""

_CLAIM_S = 10.0
_RESCORE_S = 60.0


# In whose rooms -------------------------------------------------------------------------------------------------------


async def rooms_of(rooms: Rooms, tenant: str) -> Rooms:
    """Return the rooms whose encoder a tenant's memory was made with; those given, where there are no others.

    Raises:
        StoreDown: the memory is not hot, and the store does not answer.
    """
    for own in rooms.beside:
        if own.archive.is_hot(tenant):
            return own
    record = await rooms.store.get(tenant) if rooms.beside else None
    return rooms if record is None else rooms.reading(record.fingerprint)


async def in_its_rooms(rooms: Rooms, tenant: str, work: Callable[[Rooms], Awaitable[T]]) -> T:
    """Return what work gives in a tenant's rooms; a tenant that is switched meanwhile is followed."""
    chosen = await rooms_of(rooms, tenant)
    try:
        return await work(chosen)
    except FingerprintMismatch:
        now = await _followed(rooms, chosen, tenant)
        if now is chosen:
            raise
        return await work(now)


async def classify(rooms: Rooms, call: ClassifyCall) -> tuple[Rooms, list[Reading | Fault]]:
    """Answer a call in its tenant's rooms, as `classify.classify` does, and return these too.

    Raises:
        ServiceError: the whole call is refused, and nothing was decoded.
    """
    if not rooms.beside:
        return rooms, await hall.classify(rooms, call)
    chosen = await rooms_of(rooms, call.tenant)
    chosen.batcher.draining = rooms.batcher.draining
    results = await hall.classify(chosen, call)
    missed = [at for at, one in enumerate(results) if isinstance(one, FingerprintMismatch)]
    now = await _followed(rooms, chosen, call.tenant) if missed else chosen
    if now is not chosen:
        again = await hall.classify(now, replace(call, images=[call.images[at] for at in missed]))
        for at, one in zip(missed, again, strict=True):
            results[at] = one
    if now is rooms:
        _cast(rooms, call, results)
    return now, results


async def _followed(rooms: Rooms, chosen: Rooms, tenant: str) -> Rooms:
    """Return the rooms of a tenant that was not found in those that were chosen for it."""
    if not rooms.beside:
        return chosen
    async with chosen.archive.exclusive(tenant):
        chosen.archive.drop(tenant)
    return await rooms_of(rooms, tenant)


def _cast(rooms: Rooms, call: ClassifyCall, results: Sequence[Reading | Fault]) -> None:
    """Let the next encoder see what was learned from."""
    for image, result in zip(call.images, results, strict=True):
        if call.learn and rooms.shadows is not None and isinstance(image, bytes) and isinstance(result, Reading):
            one = Glimpse(
                tenant=call.tenant,
                image=image,
                digest=result.digest,
                views=call.views,
                epoch=result.stamp.epoch,
            )
            if not rooms.shadows.put(one):
                rooms.metrics.shadows.labels("dropped").inc()


# The shadow -----------------------------------------------------------------------------------------------------------


class Filler:
    """Shows the rooms `then` what was answered in the rooms `now`; `desk` is one that no caller's image comes to."""

    def __init__(self, now: Rooms, then: Rooms, desk: Desk) -> None:
        self._now, self._then, self._desk = now, then, desk
        self._looked_at: dict[str, float] = {}
        self._in_step: dict[str, tuple[str, str]] = {}

    async def run(self) -> None:
        """Take images from the queue until cancelled."""
        queue = self._now.shadows
        while queue is not None:
            await self.show(await queue.take())

    async def show(self, one: Glimpse) -> None:
        """Let a tenant's shadow learn from an image, and count what became of it."""
        try:
            outcome = await self._show(one)
        except (ReloadNeeded, Conflict, FingerprintMismatch):
            outcome = "late"  # the tenant, or its shadow, is not any more what it was
        except (ServiceError, ImageFault):
            outcome = "failed"
        except Exception as error:  # noqa: BLE001 - the next image is not to blame
            logs.event(logs.UPKEEP_FAILED, level=logging.ERROR, error=error, tenant=one.tenant)
            outcome = "failed"
        self._now.metrics.shadows.labels(outcome).inc()

    async def aclose(self) -> None:
        """Let what is being learned be written."""
        await self._desk.drain()

    async def _show(self, one: Glimpse) -> str:
        now, then, shadow = self._now, self._then, shadow_of(one.tenant)
        record = await self._lasting(one)
        if record is None:
            return "late"
        await self._keep_in_step(record)
        await _quiet(now, then)
        developed = await then.darkroom.develop(one.image, tenant=shadow, views=one.views)
        await _quiet(now, then)
        (features,) = await then.worker.run(encode_each, then.encoder.encode_images, [developed.pixels])
        if isinstance(features, ServiceError):
            return "failed"
        question = Question(views=features, digest=one.digest, learn=True, explain=False, top_k=1)
        reading = await self._desk.ask(shadow, question)
        if reading.due:
            await reindex.resume(then, shadow)
        if await self._lasting(one) is not None:
            return "learned"
        await now.store.purge(shadow, class_id(reading.learned.label), one.digest)
        return "late"

    async def _lasting(self, one: Glimpse) -> TenantRecord | None:
        """Return the record of an image's tenant; None if the image was taken out since, or is not to be learned."""
        async with self._now.archive.open(one.tenant) as hot:
            record, barred, away = hot.record, any(id_ == one.digest for _, id_ in hot.barred), hot.away
        # A hot memory may be a moment behind.
        latest = await self._now.archive.record(one.tenant)
        lasts = latest.stamp.epoch == one.epoch and not barred and not away
        return record if lasts and record.config.learn else None

    async def _keep_in_step(self, record: TenantRecord) -> None:
        """Give a tenant's shadow its classes, and every now and then its shots."""
        tenant, clock = record.name, self._now.clock
        shadow = await follow(self._now, self._then, record)
        known = self._in_step.get(tenant) == (record.shown, shadow.shown)
        if known or clock() - self._looked_at.get(tenant, -_LOOK_S) < _LOOK_S:
            return
        self._looked_at[tenant] = clock()
        if await self._now.store.claim(shadow.name, "shots", _CLAIM_S):
            await follow_shots(self._now, self._then, tenant)
            after = await self._now.store.get(shadow.name)
            self._in_step[tenant] = (record.shown, "" if after is None else after.shown)


async def follow(now: Rooms, then: Rooms, record: TenantRecord) -> TenantRecord:
    """Return the shadow of a tenant, made if it is not there, with the tenant's configuration.

    Raises:
        Conflict: somebody else changes it now, or the tenant was switched, or is gone.
    """
    name = shadow_of(record.name)
    known = await then.store.get(name)
    if known is not None and known.fingerprint == then.encoder.fingerprint and known.config == record.config:
        return known
    made = await configuration.configure(then, name, known, record.config)
    async with then.archive.exclusive(name):
        then.archive.drop(name)
    # One that was made a moment too late would be nobody's.
    present = await now.store.get(record.name)
    if present is None or present.fingerprint != record.fingerprint:
        await abandon(now, record.name)
        raise Conflict(record.name)
    return made


async def follow_shots(now: Rooms, then: Rooms, tenant: str, report: Report | None = None) -> None:
    """Give a tenant's shadow the shots whose images are kept, but for those that the next encoder cannot read.

    Raises:
        ReloadNeeded: one of them began a new epoch; what was read before is stored.
        UnknownTenant: one of them is gone.
    """
    main, shadow = await configuration.load(now, tenant), await configuration.load(then, shadow_of(tenant))
    wanted = {shot.id: shot for shot in _shots(main) if shot.kept}
    there = {shot.id for shot in _shots(shadow)}
    name, stamp = shadow.record.name, shadow.record.stamp
    if gone := sorted(there - wanted.keys()):
        await then.store.remove_shots(name, gone)
        stamp = (await then.archive.record(name)).stamp
    new = [shot for id_, shot in sorted(wanted.items()) if id_ not in there]
    for start in range(0, len(new), _SHOTS):
        part = new[start : start + _SHOTS]
        images = await now.store.images(tenant, main.record.stamp, part)
        read = [await _read(now, then, name, *one) for one in zip(part, images, strict=True)]
        await then.store.add_shots(name, stamp, [shot for shot in read if shot is not None])
        if report is not None:
            report((start + len(part)) / len(new))
    if new or gone:
        async with then.archive.exclusive(name):
            then.archive.drop(name)
        await _score_anew(then, name)


async def _score_anew(then: Rooms, shadow: str) -> None:
    """Start to score a shadow's slots anew if its shots label them otherwise now."""
    record = await then.store.get(shadow)
    if record is not None and record.labelling != record.due_labelling:
        await reindex.resume(then, shadow)


async def _read(now: Rooms, then: Rooms, shadow: str, shot: StoredShot, image: bytes | None) -> StoredShot | None:
    """Return a shot as the next encoder sees it, without its image, which the tenant keeps."""
    await _quiet(now, then)
    read = await reindex.read_anew(then, shadow, shot, image)
    return None if read is None else replace(read, image=None, kept=0)


async def _quiet(*houses: Rooms) -> None:
    """Return when no caller's image waits for the device."""
    while any(not rooms.batcher.is_quiet for rooms in houses):
        for rooms in houses:
            await rooms.batcher.quiet()


def _shots(stored: StoredMemory) -> list[StoredShot]:
    return [shot for own in stored.shots.values() for shot in own]


# The switch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """How much a memory holds."""

    slots: int
    shots: int

    @staticmethod
    def of(stored: StoredMemory) -> Holding:
        """Count it; shots that wait for their features are not there yet."""
        read = sum(bool(shot.feature) for shot in _shots(stored))
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
        stranded=0 if then is None else sum(not shot.kept for shot in _shots(main)),
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


async def abandon(rooms: Rooms, tenant: str) -> bool:
    """Remove a tenant's shadow, and return whether there was one; traffic makes another, if there is a next encoder."""
    name = shadow_of(tenant)
    found = await rooms.store.delete(name)
    for own in rooms.beside:
        async with own.archive.exclusive(name):
            own.archive.drop(name)
    return found


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
    await _score_anew(then, shadow.name)
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
        read = {shot.id: shot.feature for shot in _shots(shadow)}
        # One that came a moment ago waits for its feature, as after any change of encoder.
        shots = [replace(shot, feature=read.get(shot.id, b"")) for shot in _shots(main) if shot.image]
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
    await abandon(now, tenant)
    if not all(shot.feature for shot in shots):
        await reindex.resume(then, tenant)
    return Holding(slots=sum(map(len, shadow.slots.values())), shots=len(shots))


def _others(rooms: Rooms, record: TenantRecord) -> Rooms | None:
    """Return the rooms that a tenant may be switched to: the next ones, if it is not there yet."""
    return next(
        (own for own in rooms.beside if own is not rooms and own.encoder.fingerprint != record.fingerprint), None
    )


def _check_stranded(main: StoredMemory, *, force: bool) -> None:
    stranded = sum(not (shot.kept or shot.image) for shot in _shots(main))
    if stranded and not force:
        raise InvalidRequest(
            f"{stranded} shots of {main.record.name!r} have no kept image that another encoder could read, and would "
            "be lost. Upload them again under `retention: images`, or say `force`."
        )
