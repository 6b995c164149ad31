"""What a memory needs after its label set or its encoder changed, done in the background as a job.

Nothing has to be remembered for it: a record says under which labelling its slots were scored, and a shot that waits
for its feature has none. Whoever meets a memory that is due starts the job, and one of several replicas does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from core.adaptive.adaptation import adapt
from core.classify import label_scores
from core.memory.codec import encode_feature
from core.numerics import entropy
from core.snapshot import Snapshot
from service.background.jobs import Report
from service.domain.memory import (
    Stamp,
    StoredBank,
    StoredMemory,
    StoredShot,
    StoredSlot,
    StoredStatistics,
    TenantRecord,
)
from service.domain.records import Job, JobState
from service.errors import (
    Contended,
    Internal,
    QueueFull,
    ServiceError,
    UnknownJob,
    UnknownTenant,
)
from service.images.errors import ImageFault
from service.memory.convert import encode, snapshot_of, stack_features
from service.memory.fingerprint import origin_of
from service.services import Rooms
from service.stores.protocol import Conflict, ReloadNeeded
from service.telemetry import logs

_TRIES = 20
_CLAIM_S = 60.0
_ROWS = 1024
_SHOTS = 16
_PATIENCE_S = 300.0


async def resume(rooms: Rooms, tenant: str) -> Job | None:
    """Start what a tenant's memory is due for, and return its job; None if nothing is, or another replica is at it."""
    record = await rooms.store.get(tenant)
    if record is None or record.fingerprint != rooms.encoder.fingerprint:
        return None
    kind = "rescore" if record.labelling != record.due_labelling else "reencode"
    if any(job.kind == kind and not job.over for job in await rooms.jobs.every(tenant)):
        return None
    # Of several who find nobody at it, one begins.
    if not await rooms.store.claim(tenant, f"{kind}:{record.stamp.epoch}", _CLAIM_S):
        return None
    work = {"rescore": _rescore, "reencode": _reencode}[kind]
    return await rooms.jobs.start(tenant, kind, partial(work, rooms, tenant))


async def _rescore(rooms: Rooms, tenant: str, report: Report) -> Mapping[str, Any]:
    """Score every slot anew from its feature, under the label that the present label set gives it."""
    for _ in range(_TRIES):
        stored = await rooms.store.load(tenant)
        if stored is None or not _is_due(stored.record, rooms):
            return {"slots": 0}
        config = stored.record.config
        try:
            banks, statistics = await _scored_anew(rooms, stored, report)
            await rooms.store.replace(
                tenant,
                config,
                stored.record.fingerprint,
                expected=stored.record.stamp,
                exact=True,
                labelling=stored.record.due_labelling,
                origin=origin_of(rooms.encoder),
                slots={own: bank.best(config.slots) for own, bank in banks.items()},
                barred=stored.barred,
                statistics=statistics,
            )
        except Conflict:
            continue
        await _drop(rooms, tenant)
        slots = sum(map(len, banks.values()))
        logs.event(logs.MEMORY_RESCORED, tenant=tenant, slots=slots)
        return {"slots": slots}
    raise Contended


def _is_due(record: TenantRecord, rooms: Rooms) -> bool:
    return record.fingerprint == rooms.encoder.fingerprint and record.labelling != record.due_labelling


async def _scored_anew(
    rooms: Rooms, stored: StoredMemory, report: Report
) -> tuple[dict[str, StoredBank], StoredStatistics | None]:
    """Return every slot under its new label, and the class statistics that these slots make: others are gone."""
    config = stored.record.config
    # In an order of its own, so that the same slots give the same sums to the last bit.
    known = [slot for _, bank in sorted(stored.slots.items()) for slot in bank]
    if not known:
        return {}, None
    text = await rooms.texts.class_weights([config.prompts(spec) for spec in config.classes])
    bare = replace(stored, slots={}, counts={})
    snapshot = await rooms.worker.run(snapshot_of, bare, text, rooms.encoder.logit_scale)
    out: dict[str, dict[str, StoredSlot]] = {}
    counted = {id_ for _, id_ in stored.barred}
    for start in range(0, len(known), _ROWS):
        # Some at a time, so that images get their turn in between.
        part = known[start : start + _ROWS]
        labelled, snapshot = await rooms.worker.run(_scored, part, snapshot, counted)
        for label, slot in labelled:
            own = config.classes[label].id
            scored = out.setdefault(own, {})
            rival = scored.get(slot.id, slot)
            if (own, slot.id) not in stored.barred and _order(slot) <= _order(rival):
                scored[slot.id] = slot
        report((start + len(part)) / len(known))
    banks = {own: StoredBank.of(bank.values()) for own, bank in out.items()}
    if snapshot.adaptation is None:
        return banks, None
    ids = [spec.id for spec in config.classes]
    adaptation = snapshot.adaptation
    return banks, await rooms.worker.run(lambda: encode(adaptation.statistics, ids))


def _scored(
    slots: Sequence[StoredSlot], snapshot: Snapshot, counted: set[str]
) -> tuple[list[tuple[int, StoredSlot]], Snapshot]:
    """Return each slot with the label and entropy that its feature has, Eq. (4), and the snapshot that counted them.

    Images in `counted` are not counted; the others are added to it. One image may have slots in several classes.
    """
    x = stack_features(slots, snapshot.text.shape[-1]).to(snapshot.text)
    text, scores = label_scores(snapshot, x)
    p = scores.softmax(-1)
    labels, entropies = p.argmax(-1).tolist(), entropy(p).tolist()
    told = [(label, replace(slot, entropy=nats)) for slot, label, nats in zip(slots, labels, entropies, strict=True)]
    if snapshot.adaptation is None:
        return told, snapshot
    first = {slot.id: at for at, slot in reversed(list(enumerate(slots)))}
    fresh = [first[slot.id] == at and slot.id not in counted for at, slot in enumerate(slots)]
    counted.update(first)
    adapted = adapt(snapshot.adaptation, x, text.to(x), scores.to(x), fresh)
    return told, replace(snapshot, adaptation=adapted.adaptation)


def _order(slot: StoredSlot) -> tuple[float, bytes]:
    return slot.entropy, slot.feature


async def _reencode(rooms: Rooms, tenant: str, report: Report) -> Mapping[str, Any]:
    """Read the images of shots that wait for their features; a shot whose image cannot be read any more goes."""
    done: set[str] = set()
    failed: set[str] = set()
    for _ in range(_TRIES):
        stored = await rooms.store.load(tenant)
        if stored is None or stored.record.fingerprint != rooms.encoder.fingerprint:
            return {"shots": len(done), "failed": []}
        try:
            await _read_all(rooms, stored, done, failed, report)
        except ReloadNeeded:
            continue  # the tenant began a new epoch: see what still waits
        if failed:
            await rooms.store.remove_shots(tenant, sorted(failed))
            await _drop(rooms, tenant)
            await _rescore(rooms, tenant, report)  # with `auto` shots label too
        logs.event(logs.SHOTS_REENCODED, tenant=tenant, shots=len(done), failed=len(failed))
        return {"shots": len(done), "failed": sorted(failed)}
    raise Contended


async def _read_all(rooms: Rooms, stored: StoredMemory, done: set[str], failed: set[str], report: Report) -> None:
    """Read what waits, some at a time, and note what was read and what cannot be.

    Raises:
        ReloadNeeded: the tenant began a new epoch; what was read before is stored.
    """
    tenant, stamp = stored.record.name, stored.record.stamp
    blank = [shot for own in stored.shots.values() for shot in own if not shot.feature and shot.id not in failed]
    total = len(blank) + len(done) + len(failed)
    for start in range(0, len(blank), _SHOTS):
        part = blank[start : start + _SHOTS]
        images = await rooms.store.images(tenant, stamp, part)
        read = [await read_anew(rooms, tenant, shot, image) for shot, image in zip(part, images, strict=True)]
        await rooms.store.add_shots(tenant, stamp, [shot for shot in read if shot is not None])
        await _drop(rooms, tenant)
        done |= {shot.id for shot in read if shot is not None}
        failed |= {shot.id for shot, own in zip(part, read, strict=True) if own is None}
        report((len(done) + len(failed)) / total)


async def read_anew(rooms: Rooms, tenant: str, shot: StoredShot, image: bytes | None) -> StoredShot | None:
    """Return a shot with the feature that this encoder gives its image; None if the image cannot be read."""
    if image is None:
        return None
    deadline = rooms.clock() + _PATIENCE_S
    while True:
        try:
            with rooms.batcher.admit(1, tenant=tenant):
                developed = await rooms.darkroom.develop(image, tenant=tenant)
                feature = await rooms.batcher.encode(developed.pixels, tenant=tenant, deadline=deadline, laps=[])
                return replace(shot, feature=await rooms.worker.run(encode_feature, feature[0]))
        except (ImageFault, Internal):  # or every try would end at this very image
            return None
        except QueueFull as full:
            if rooms.clock() > deadline:
                raise
            await asyncio.sleep(full.retry_after_s or 1.0)  # callers come first


async def _drop(rooms: Rooms, tenant: str) -> None:
    """Forget the hot memory, also one that is being loaded: it may have been read before."""
    async with rooms.archive.exclusive(tenant):
        rooms.archive.drop(tenant)


_SOON_S = 1.0
"""How long a change waits for the upkeep that it causes."""


async def reindex_if_due(rooms: Rooms, old: TenantRecord | None, record: TenantRecord) -> Job | None:
    """Start what a changed memory is due for, and give it a moment; return its job if it is not done by then."""
    read_anew = old is not None and old.fingerprint != record.fingerprint
    if record.labelling == record.due_labelling and not read_anew:
        return None
    return await reindex_soon(rooms, record.name)


async def reindex_soon(rooms: Rooms, tenant: str) -> Job | None:
    """Start the upkeep that a tenant's memory is due for, and return its job if it is not done in a moment."""
    with suppress(UnknownTenant, UnknownJob):  # removed since, by someone else: then nothing has to be done
        job = await resume(rooms, tenant)
        if job is not None:
            await rooms.jobs.wait(job.id, _SOON_S)
            now = await rooms.jobs.get(tenant, job.id)
            return None if now.state is JobState.DONE else now
    return None


async def rescore_if_due(rooms: Rooms, tenant: str) -> Stamp:
    """Have slots scored anew if the shots that there are now label them otherwise; return where the memory is then.

    Of a small memory that is done by the time of the answer. What fails is tried again by whoever meets the memory.
    """
    record = await rooms.archive.record(tenant)
    if record.labelling == record.due_labelling:
        return record.stamp
    with suppress(ServiceError):
        await reindex_soon(rooms, tenant)
    return (await rooms.archive.record(tenant)).stamp
