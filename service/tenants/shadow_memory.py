"""The shadow memory: a tenant's memory under the next encoder, filled from its traffic and its shots."""

from __future__ import annotations

import logging
from dataclasses import replace

from service.background.jobs import Report
from service.background.shadow_queue import Glimpse
from service.domain.memory import StoredMemory, StoredShot, TenantRecord
from service.domain.tenant import class_id, shadow_of
from service.errors import FingerprintMismatch, ServiceError
from service.images.errors import ImageFault
from service.inference.encoding import encode_each
from service.inference.predictor import Desk
from service.inference.results import Question
from service.services import Rooms
from service.stores.protocol import Conflict, ReloadNeeded
from service.telemetry import logs

from . import configuration, reindex

_SHOTS = 16
_LOOK_S = 2.0
"""How often a shadow that is filled is compared with its tenant, at most."""

_CLAIM_S = 10.0


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
        await cancel_migration(now, record.name)
        raise Conflict(record.name)
    return made


async def follow_shots(now: Rooms, then: Rooms, tenant: str, report: Report | None = None) -> None:
    """Give a tenant's shadow the shots whose images are kept, but for those that the next encoder cannot read.

    Raises:
        ReloadNeeded: one of them began a new epoch; what was read before is stored.
        UnknownTenant: one of them is gone.
    """
    main, shadow = await configuration.load(now, tenant), await configuration.load(then, shadow_of(tenant))
    wanted = {shot.id: shot for shot in shots_of(main) if shot.kept}
    there = {shot.id for shot in shots_of(shadow)}
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
        await rescore_shadow(then, name)


async def rescore_shadow(then: Rooms, shadow: str) -> None:
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


def shots_of(stored: StoredMemory) -> list[StoredShot]:
    """Return all shots of a memory."""
    return [shot for own in stored.shots.values() for shot in own]


async def cancel_migration(rooms: Rooms, tenant: str) -> bool:
    """Remove a tenant's shadow, and return whether there was one; traffic makes another, if there is a next encoder."""
    name = shadow_of(tenant)
    found = await rooms.store.delete(name)
    for own in rooms.beside:
        async with own.archive.exclusive(name):
            own.archive.drop(name)
    return found
