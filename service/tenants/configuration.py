"""What changes a tenant: its configuration, its shots, its memories. Each change is whole or did not happen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from core.adaptive.adaptation import Adaptation
from core.memory.codec import encode_feature
from service.background import reindex
from service.classify import Fault, check_count, count_faults, each
from service.domain.tenant import ClassSpec, TenantConfig, checked, class_id, class_name, shadow_of, tenant_name
from service.errors import (
    Contended,
    LimitExceeded,
    ServiceError,
    UnknownClass,
    UnknownJob,
    UnknownShot,
    UnknownSlot,
    UnknownTenant,
)
from service.images.decode import ImageFault
from service.memory.cache import check_fingerprint, held_bytes, origin_of
from service.services import Rooms
from service.settings import DEFAULT_TENANT
from service.stores.protocol import (
    Conflict,
    Job,
    JobState,
    ReloadNeeded,
    SnapshotInfo,
    Stamp,
    StoredMemory,
    StoredShot,
    TenantRecord,
    labelling_of,
    shown_of,
)
from service.telemetry import logs
from service.telemetry.metrics import Lap

from . import snapshots

_TRIES = 5
_UPLOAD_TRIES = 20
"""Replicas that add shots to one tenant at a time pass each other by until each has counted those of the others."""

_SOON_S = 1.0
"""How long a change waits for the upkeep that it causes."""

Revise = Callable[[TenantConfig | None], TenantConfig]
"""From a tenant's configuration (None: there is no such tenant) to the next."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """A tenant after a change: whether it is new, and the job that its memory still needs, if it is not done yet."""

    record: TenantRecord
    created: bool
    job: Job | None


async def put_tenant(rooms: Rooms, name: str, config: TenantConfig) -> Changed:
    """Create or replace a tenant. Classes that stay keep their memories; under another encoder, their images.

    Raises:
        InvalidRequest, DuplicateClass, LimitExceeded: as `tenants.checked` says.
    """
    tidy = checked(config, rooms.settings.of(name))
    return await _change(rooms, tenant_name(name), lambda _: tidy, anew=True)


async def add_classes(rooms: Rooms, tenant: str, added: Sequence[ClassSpec]) -> Changed:
    """Add classes; the others keep their memories, with labels and entropies as the new label set gives them."""
    limits = rooms.settings.of(tenant)
    return await _change(rooms, tenant, lambda old: checked(_must(old, tenant).with_classes(added), limits))


async def remove_class(rooms: Rooms, tenant: str, name: str) -> None:
    """Remove a class, its slots and its shots."""
    await _change(
        rooms, tenant, lambda old: _must(old, tenant).without(class_name(name, rooms.settings.max_text_chars))
    )


async def delete_tenant(rooms: Rooms, tenant: str) -> None:
    """Remove a tenant and all that it has. The default tenant comes back without classes.

    Raises:
        UnknownTenant: there is no such tenant.
    """
    async with rooms.archive.exclusive(tenant):
        found = await rooms.store.delete(tenant)
        await rooms.store.delete(shadow_of(tenant))
        if tenant == DEFAULT_TENANT:
            await ensure_default(rooms)
        rooms.archive.drop(tenant)
    if not found:
        raise UnknownTenant(f"There is no tenant {tenant!r}.")
    logs.event(logs.TENANT_CHANGED, tenant=tenant, change="deleted")


async def ensure_default(rooms: Rooms) -> None:
    """Create the default tenant, without classes, where it is missing."""
    if await rooms.store.get(DEFAULT_TENANT) is None:
        with suppress(Conflict):  # another replica was faster
            await configure(rooms, DEFAULT_TENANT, None, TenantConfig())


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
    stamp = await _labelled(rooms, tenant)
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
    await _labelled(rooms, tenant)


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
    await _labelled(rooms, tenant)


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
        await _soon(rooms, tenant)
        stamp = (await rooms.archive.record(tenant)).stamp
    logs.event(logs.MEMORY_RESET, tenant=tenant, dynamic=dynamic, static=static, classes=ids and len(ids))
    return await _labelled(rooms, tenant) if static else stamp, saved


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


async def load(rooms: Rooms, tenant: str) -> StoredMemory:
    """Return everything that the store holds of a tenant.

    Raises:
        UnknownTenant: there is no such tenant.
    """
    stored = await rooms.store.load(tenant)
    if stored is None:
        raise UnknownTenant(f"There is no tenant {tenant!r}.")
    return stored


async def adaptation(rooms: Rooms, record: TenantRecord) -> Adaptation | None:
    """Return what the method `auto` reads a tenant's memory with; None with `dmn`, or if it cannot be read now."""
    if record.config.method != "auto" or not record.config.classes:
        return None
    with suppress(ServiceError):
        async with rooms.archive.open(record.name) as hot:
            return hot.snapshot.adaptation
    return None


async def _change(rooms: Rooms, tenant: str, revise: Revise, *, anew: bool = False) -> Changed:
    """Replace a tenant's configuration by what `revise` makes of it; again if another writer was faster.

    The memory of another encoder is of no use to this one: it is refused, or, if asked, the tenant starts anew. What
    is about to be lost is kept in a snapshot. Slots that the new label set labels otherwise are scored anew in the
    background; of a small memory that is done by the time of the answer.
    """
    saved = False
    for _ in range(_TRIES):
        async with rooms.archive.exclusive(tenant):
            old = await rooms.store.get(tenant)
            config = revise(None if old is None else old.config)
            if old is None:
                await snapshots.check_room(rooms)
            elif not anew or rooms.reading(old.fingerprint) is not rooms:
                check_fingerprint(old, rooms.encoder)
            if old is not None and not saved:
                await _save(rooms, old, config)
                saved = True
            try:
                record = await configure(rooms, tenant, old, config)
            except Conflict:
                continue
            rooms.archive.drop(tenant)
        logs.event(logs.TENANT_CHANGED, tenant=tenant, change="configured", classes=len(config.classes))
        return Changed(record=record, created=old is None, job=await _upkeep(rooms, old, record))
    raise Contended


async def _save(rooms: Rooms, old: TenantRecord, config: TenantConfig) -> None:
    """Take a snapshot of what a new configuration is about to lose, if anything."""
    if old.fingerprint != rooms.encoder.fingerprint:
        await snapshots.before(rooms, old.name, "encoder-change")
    elif {spec.id for spec in old.config.classes} - {spec.id for spec in config.classes}:
        await snapshots.before(rooms, old.name, "class-removal")


async def configure(rooms: Rooms, tenant: str, old: TenantRecord | None, config: TenantConfig) -> TenantRecord:
    """Give a tenant a configuration in the place of what is known of it, None if nothing is; return its record.

    Raises:
        Conflict: it has changed meanwhile.
    """
    # Even where no slot needs it: the first image should not have to wait for the prompts.
    await rooms.texts.class_weights([config.prompts(spec) for spec in config.classes])
    fingerprint, origin = rooms.encoder.fingerprint, origin_of(rooms.encoder)
    has_slots = old is not None and old.fingerprint == fingerprint and bool(old.config.classes)
    training = old.training if old is not None and has_slots else None
    if training is not None and old is not None:
        training = training.without({spec.id for spec in old.config.classes} - {spec.id for spec in config.classes})
    due = labelling_of(config, training, await _shown(rooms, old, config))
    labelling = old.labelling if old is not None and has_slots else due
    fewer: StoredMemory | None = None
    if old is not None and has_slots and config.slots < old.config.slots and labelling == due:
        fewer = await load(rooms, tenant)
        if fewer.record.stamp.epoch != old.stamp.epoch:
            raise Conflict(tenant)
        old = fewer.record
    stamp = await rooms.store.replace(
        tenant,
        config,
        fingerprint,
        expected=None if old is None else old.stamp,
        exact=fewer is not None,
        labelling=labelling,
        origin=origin,
        slots=None if fewer is None else {own: bank.best(config.slots) for own, bank in fewer.slots.items()},
        barred=() if fewer is None else fewer.barred,
        statistics=None if fewer is None else fewer.statistics,
    )
    return TenantRecord(
        name=tenant,
        config=config,
        fingerprint=fingerprint,
        origin=origin,
        labelling=labelling,
        stamp=stamp,
        training=training,
    )


async def _shown(rooms: Rooms, old: TenantRecord | None, config: TenantConfig) -> str:
    """Return the hash of the shots that stay; under another encoder, of those whose images are kept."""
    if old is None or old.fingerprint == rooms.encoder.fingerprint:
        return "" if old is None else old.shown
    stored, stay = await load(rooms, old.name), {spec.id for spec in config.classes}
    return shown_of(shot.id for own in stored.shots.values() for shot in own if shot.kept and shot.class_id in stay)


async def _upkeep(rooms: Rooms, old: TenantRecord | None, record: TenantRecord) -> Job | None:
    """Start what a changed memory is due for, and give it a moment; return its job if it is not done by then."""
    read_anew = old is not None and old.fingerprint != record.fingerprint
    if record.labelling == record.due_labelling and not read_anew:
        return None
    return await _soon(rooms, record.name)


async def _soon(rooms: Rooms, tenant: str) -> Job | None:
    """Start the upkeep that a tenant's memory is due for, and return its job if it is not done in a moment."""
    with suppress(UnknownTenant, UnknownJob):  # removed since, by someone else: then nothing has to be done
        job = await reindex.resume(rooms, tenant)
        if job is not None:
            await rooms.jobs.wait(job.id, _SOON_S)
            now = await rooms.jobs.get(tenant, job.id)
            return None if now.state is JobState.DONE else now
    return None


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


async def _labelled(rooms: Rooms, tenant: str) -> Stamp:
    """Have slots scored anew if the shots that there are now label them otherwise; return where the memory is then.

    Of a small memory that is done by the time of the answer. What fails is tried again by whoever meets the memory.
    """
    record = await rooms.archive.record(tenant)
    if record.labelling == record.due_labelling:
        return record.stamp
    with suppress(ServiceError):
        await _soon(rooms, tenant)
    return (await rooms.archive.record(tenant)).stamp


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


def _must(config: TenantConfig | None, tenant: str) -> TenantConfig:
    if config is None:
        raise UnknownTenant(f"There is no tenant {tenant!r}.")
    return config
