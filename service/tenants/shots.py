"""Shots: labelled images are encoded and stored, and removed again by id or by label."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from core.memory.codec import encode_feature
from service.classify import Fault, count_faults, each
from service.domain.memory import Stamp, StoredMemory, StoredShot, TenantRecord
from service.domain.quotas import check_count
from service.domain.tenant import class_id, class_name
from service.errors import (
    Contended,
    LimitExceeded,
    UnknownClass,
    UnknownShot,
)
from service.images.errors import ImageFault
from service.memory.convert import held_bytes
from service.memory.fingerprint import check_fingerprint
from service.services import Rooms
from service.stores.protocol import ReloadNeeded
from service.telemetry.metrics import Lap

from .configuration import load
from .reindex import rescore_if_due

_UPLOAD_TRIES = 20
"""Replicas that add shots to one tenant at a time pass each other by until each has counted those of the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """An uploaded shot as it came (or why it did not arrive), and the class that it is said to show."""

    label: str
    image: bytes | ImageFault


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """A stored shot, as its uploader hears of it."""

    id: str
    label: str


async def add_shots(
    rooms: Rooms, tenant: str, labelled: Sequence[LabelledImage], *, deadline: float, bounded: bool = True
) -> tuple[list[Shot | Fault], Stamp]:
    """Store labelled images, and return each one's id or fault, and where the memory is then.

    `bounded` holds the call to the limit of images a call. All good images are stored at once, or none is.

    Raises:
        UnknownTenant, UnknownClass, LimitExceeded, TooManyImages, QueueFull: nothing was stored.
    """
    if bounded:
        check_count(len(labelled), rooms.settings)
    record = await rooms.archive.record(tenant)
    for label in {one.label for one in labelled}:
        record.config.spec(label)
    walks: list[StoredShot | Fault] = []
    settings, most = rooms.settings, rooms.quotas.most(tenant)
    step = min(rooms.batcher.batch_images, settings.tenant_queue_images, len(labelled) if most is None else most)
    for start in range(0, len(labelled), max(1, step)):
        part = labelled[start : start + step]
        # Who was let in with its first images goes on at the tenant's rate: nothing would be left of a call cut short.
        async with rooms.quotas.admit(tenant, len(part), until=deadline if walks else None):
            walks += await _walk_together(rooms, record, part, deadline)
    count_faults(rooms, walks)
    await _store_shots(rooms, tenant, [shot for shot in walks if isinstance(shot, StoredShot)])
    stamp = await rescore_if_due(rooms, tenant)
    told = [
        Shot(id=walked.id, label=one.label) if isinstance(walked, StoredShot) else walked
        for walked, one in zip(walks, labelled, strict=True)
    ]
    return told, stamp


async def remove_shot(rooms: Rooms, tenant: str, shot: str) -> None:
    """Remove one shot.

    Raises:
        UnknownTenant, UnknownShot: it is not there.
    """
    await rooms.archive.record(tenant)
    async with rooms.archive.exclusive(tenant):
        if not await rooms.store.remove_shots(tenant, [shot]):
            raise UnknownShot(f"There is no shot {shot!r}.")
        rooms.archive.drop(tenant)
    await rescore_if_due(rooms, tenant)


async def remove_label(rooms: Rooms, tenant: str, label: str) -> None:
    """Remove every shot of a class.

    Raises:
        UnknownTenant, UnknownClass: there is no such class.
    """
    spec = (await rooms.archive.record(tenant)).config.spec(class_name(label, rooms.settings.max_text_chars))
    async with rooms.archive.exclusive(tenant):
        stored = await load(rooms, tenant)
        if await rooms.store.remove_shots(tenant, [shot.id for shot in stored.shots.get(spec.id, ())]):
            rooms.archive.drop(tenant)
    await rescore_if_due(rooms, tenant)


async def _walk_together(
    rooms: Rooms, record: TenantRecord, part: Sequence[LabelledImage], deadline: float
) -> list[StoredShot | Fault]:
    keep = record.config.retention == "images"
    laps: list[list[Lap]] = [[] for _ in part]
    with rooms.batcher.admit(len(part), tenant=record.name, deadline=deadline):
        ways = [
            partial(_walk, rooms, record.name, one, deadline, own, keep=keep)
            for one, own in zip(part, laps, strict=True)
        ]
        walks = await each(ways, rooms, deadline)
    if rooms.traces is not None:
        rooms.traces.stages(laps)
    return walks


async def _walk(
    rooms: Rooms, tenant: str, one: LabelledImage, deadline: float, laps: list[Lap], *, keep: bool
) -> StoredShot:
    if isinstance(one.image, ImageFault):
        raise one.image
    with rooms.metrics.stage("decode", laps):
        developed = await rooms.darkroom.develop(one.image, tenant=tenant)
    feature = (await rooms.batcher.encode(developed.pixels, tenant=tenant, deadline=deadline, laps=laps))[0]
    own = class_id(one.label)
    return StoredShot(
        id=hashlib.sha256(f"{own}/{developed.digest}".encode()).hexdigest()[:20],
        class_id=own,
        feature=await rooms.worker.run(encode_feature, feature),
        image=one.image if keep else None,
    )


async def _store_shots(rooms: Rooms, tenant: str, shots: Sequence[StoredShot]) -> None:
    for _ in range(_UPLOAD_TRIES):
        async with rooms.archive.exclusive(tenant):
            stored = await load(rooms, tenant)
            check_fingerprint(stored.record, rooms.encoder)
            _check_limits(rooms, stored, shots)
            try:
                stamp = await rooms.store.add_shots(tenant, stored.record.stamp, shots, beside=stored.record.shown)
            except ReloadNeeded:
                continue
            if stamp != stored.record.stamp:
                rooms.archive.drop(tenant)
            return
    raise Contended


def _check_limits(rooms: Rooms, stored: StoredMemory, shots: Sequence[StoredShot]) -> None:
    """Return if the new ones among the shots fit.

    Raises:
        UnknownClass: a class was removed meanwhile.
        LimitExceeded: a class would have too many shots, or the tenant too many bytes.
    """
    names = {spec.id: spec.name for spec in stored.record.config.classes}
    limits = rooms.settings.of(stored.record.name)
    held = {own: {shot.id for shot in bank} for own, bank in stored.shots.items()}
    new = {shot.id: shot for shot in shots if shot.id not in held.get(shot.class_id, ())}
    for own in {shot.class_id for shot in new.values()}:
        if own not in names:
            raise UnknownClass("A class of these shots was removed while they were read.")
        count = len(held.get(own, ())) + sum(shot.class_id == own for shot in new.values())
        if count > limits.max_shots:
            raise LimitExceeded(
                f"The class {names[own]!r} would have {count} shots; at most {limits.max_shots} are allowed."
            )
    total = held_bytes(stored, rooms.encoder.dim) + sum(shot.nbytes for shot in new.values())
    if new and total > limits.tenant_max_bytes:
        raise LimitExceeded(f"The tenant would hold {total} bytes; at most {limits.tenant_max_bytes} are allowed.")
