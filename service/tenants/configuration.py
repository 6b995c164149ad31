"""What changes a tenant: its configuration, its shots, its memories. Each change is whole or did not happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from core.adaptive.adaptation import Adaptation
from service.domain.memory import StoredMemory, TenantRecord, labelling_of, shown_of
from service.domain.records import Job
from service.domain.tenant import ClassSpec, TenantConfig, checked, class_name, shadow_of, tenant_name
from service.errors import (
    Contended,
    ServiceError,
    UnknownTenant,
)
from service.memory.fingerprint import check_fingerprint, origin_of
from service.services import Rooms
from service.settings import DEFAULT_TENANT
from service.stores.protocol import Conflict
from service.telemetry import logs

from . import snapshots
from .reindex import reindex_if_due

_TRIES = 5

Revise = Callable[[TenantConfig | None], TenantConfig]
"""From a tenant's configuration (None: there is no such tenant) to the next."""


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
        return Changed(record=record, created=old is None, job=await reindex_if_due(rooms, old, record))
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


def _must(config: TenantConfig | None, tenant: str) -> TenantConfig:
    if config is None:
        raise UnknownTenant(f"There is no tenant {tenant!r}.")
    return config
