"""The archive: tenants' memories kept hot, as device tensors, in step with the store.

One memory at a time is touched by one task, under its lock; an opened memory is never dropped for room. A cold one is
loaded by whoever opens it first while the others of that tenant wait for the lock and other tenants go on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.bank import Slots
from core.codec import decode_feature
from core.dynamic import DynamicMemory
from core.encoder import Encoder
from core.shelves import Shelves
from core.snapshot import Snapshot
from core.static import Shots, StaticMemory

from . import logs
from .errors import FingerprintMismatch, NoClasses, UnknownTenant
from .locks import KeyedLocks
from .metrics import Metrics
from .stores.base import Change, MemoryStore, ReloadNeeded, Stamp, StoredMemory, StoredShot, StoredSlot, TenantRecord
from .tenants import TenantConfig
from .texts import TextFeatures
from .worker import Worker


@dataclass(slots=True)
class HotMemory:
    """One tenant's memory, ready to be read. `shelves` is touched in the worker alone.

    `position` leads from class id to class position; `barred` are purged slots; `filled` are dynamic slots; `nbytes`
    counts features and what is kept ready from them.
    """

    record: TenantRecord
    stamp: Stamp
    shelves: Shelves
    synced_at: float
    shot_bytes: int
    position: dict[str, int]
    barred: frozenset[tuple[str, str]] = frozenset()
    filled: int = 0
    nbytes: int = 0

    @property
    def config(self) -> TenantConfig:
        """The tenant's configuration."""
        return self.record.config

    @property
    def snapshot(self) -> Snapshot:
        """The memory as it is now."""
        return self.shelves.snapshot

    def measure(self) -> None:
        """Count what is held; after each change, in the worker, so that nobody counts on the way of a request."""
        dynamic, static = self.snapshot.dynamic.classes, self.snapshot.static.classes
        features = sum(bank.keys.nbytes for bank in dynamic) + sum(bank.keys.nbytes for bank in static)
        self.filled = sum(len(bank) for bank in dynamic)
        self.nbytes = self.shelves.nbytes + self.snapshot.text.nbytes + features


class Archive:
    """Opens hot memories, keeps them in step, and drops the least used ones for room."""

    def __init__(
        self,
        store: MemoryStore,
        encoder: Encoder,
        texts: TextFeatures,
        worker: Worker,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        max_bytes: int,
        sync_s: float,
    ) -> None:
        self._store, self._encoder, self._texts, self._worker = store, encoder, texts, worker
        self._metrics, self._clock, self._max_bytes, self._sync_s = metrics, clock, max_bytes, sync_s
        self._hot: OrderedDict[str, HotMemory] = OrderedDict()
        self._locks = KeyedLocks()

    @asynccontextmanager
    async def exclusive(self, tenant: str) -> AsyncIterator[None]:
        """Hold a tenant's memory against every other task of this process."""
        async with self._locks.hold(tenant):
            yield

    @asynccontextmanager
    async def open(self, tenant: str, timings: dict[str, float] | None = None) -> AsyncIterator[HotMemory]:
        """Hold a tenant's hot memory, loaded and no older than the setting says.

        Raises:
            UnknownTenant: there is no such tenant.
            NoClasses: it has no classes.
            FingerprintMismatch: its features were made with another encoder.
        """
        async with self.exclusive(tenant):
            with self._metrics.stage("store", timings):
                hot = await self._fresh(tenant)
            try:
                yield hot
            finally:
                self._account()

    async def record(self, tenant: str) -> TenantRecord:
        """Return a tenant's record: the store's, or the hot memory's while that is no older than the setting says.

        Raises:
            UnknownTenant: there is no such tenant.
        """
        hot = self._hot.get(tenant)
        young = hot is not None and self._clock() - hot.synced_at < self._sync_s
        record = hot.record if hot is not None and young else await self._store.get(tenant)
        if record is None:
            raise UnknownTenant(f"There is no tenant {tenant!r}.")
        return record

    async def take_back(self, hot: HotMemory, stamp: Stamp, changes: Sequence[Change]) -> None:
        """Bring an opened memory to a stamp by the store's slot changes."""
        if changes:
            await self._worker.run(_apply, hot, changes)
        hot.stamp, hot.synced_at = stamp, self._clock()

    def drop(self, tenant: str) -> None:
        """Forget a hot memory, so that the next one who opens it loads it."""
        self._hot.pop(tenant, None)
        self._account()

    async def _fresh(self, tenant: str) -> HotMemory:
        hot = self._hot.get(tenant)
        if hot is None:
            hot = self._hot[tenant] = await self._load(tenant)
        self._hot.move_to_end(tenant)
        age = self._clock() - hot.synced_at
        self._metrics.sync_lag_seconds.observe(max(0.0, age))
        if age < self._sync_s:
            return hot
        try:
            synced = await self._store.sync(tenant, hot.stamp)
        except ReloadNeeded:
            self._hot.pop(tenant, None)
            hot = self._hot[tenant] = await self._load(tenant)
            return hot
        await self.take_back(hot, synced.stamp, synced.changes)
        return hot

    async def _load(self, tenant: str) -> HotMemory:
        stored = await self._store.load(tenant)
        if stored is None:
            raise UnknownTenant(f"There is no tenant {tenant!r}.")
        check_fingerprint(stored.record, self._encoder.fingerprint)
        config = stored.record.config
        if not config.classes:
            raise NoClasses(f"The tenant {tenant!r} has no classes yet.")
        loaded_at = self._clock()
        text = await self._texts.class_weights([config.prompts(spec) for spec in config.classes])
        shelves = await self._worker.run(lambda: Shelves(_snapshot(stored, text, self._encoder.logit_scale)))
        logs.event(logs.MEMORY_LOADED, tenant=tenant, classes=len(config.classes))
        hot = HotMemory(
            record=stored.record,
            stamp=stored.record.stamp,
            shelves=shelves,
            synced_at=loaded_at,
            shot_bytes=sum(shot.nbytes for own in stored.shots.values() for shot in own),
            position={spec.id: i for i, spec in enumerate(config.classes)},
            barred=stored.barred,
        )
        await self._worker.run(hot.measure)
        return hot

    def _account(self) -> None:
        """Drop the least used memories that nobody holds until the rest fits, and say how it stands."""
        total = sum(hot.nbytes for hot in self._hot.values())
        for tenant in [tenant for tenant in self._hot if tenant not in self._locks]:
            if total <= self._max_bytes:
                break
            total -= self._hot.pop(tenant).nbytes
            self._metrics.hot_evictions.inc()
            logs.event(logs.MEMORY_EVICTED, tenant=tenant)
        self._metrics.hot_tenants.set(len(self._hot))
        self._metrics.hot_bytes.set(total)
        room = sum(len(hot.config.classes) * hot.config.slots for hot in self._hot.values())
        filled = sum(hot.filled for hot in self._hot.values())
        self._metrics.fill_ratio.set(filled / room if room else 0.0)


def check_fingerprint(record: TenantRecord, fingerprint: str) -> None:
    """Return if a tenant's features were made with the encoder of that fingerprint.

    Raises:
        FingerprintMismatch: they were not.
    """
    if record.fingerprint != fingerprint:
        raise FingerprintMismatch(
            f"The memory of {record.name!r} was made with the encoder {record.fingerprint[:12]}; this service runs "
            f"{fingerprint[:12]}. Serve with that encoder, or replace the tenant to start its memory anew."
        )


def stack_features(stored: Iterable[StoredSlot | StoredShot], dim: int) -> Tensor:
    """Return stored features (n, d) in half precision."""
    rows = [decode_feature(one.feature, dim) for one in stored]
    return torch.stack(rows) if rows else torch.empty(0, dim, dtype=torch.float16)


def _snapshot(stored: StoredMemory, text: Tensor, tau: float) -> Snapshot:
    config, dim = stored.record.config, text.shape[-1]
    banks = [stored.slots.get(spec.id, ()) for spec in config.classes]
    shots = [stored.shots.get(spec.id, ()) for spec in config.classes]
    return Snapshot(
        text=text,
        dynamic=DynamicMemory(classes=tuple(_slots(bank, dim, text.device) for bank in banks), slots=config.slots),
        static=StaticMemory(
            classes=tuple(
                Shots(keys=stack_features(own, dim).to(text.device), ids=tuple(shot.id for shot in own))
                for own in shots
            )
        ),
        tau=tau,
        beta=config.beta,
        weights=config.weights,
    )


def _slots(bank: Sequence[StoredSlot], dim: int, device: torch.device) -> Slots:
    return Slots(
        keys=stack_features(bank, dim).to(device),
        entropies=tuple(slot.entropy for slot in bank),
        ids=tuple(slot.id for slot in bank),
    )


def _apply(hot: HotMemory, changes: Sequence[Change]) -> None:
    """Write the store's slot changes into a hot memory; only the classes that they touch are made anew."""
    snapshot = hot.snapshot
    classes, dim = list(snapshot.dynamic.classes), snapshot.text.shape[-1]
    touched: dict[int, dict[str, StoredSlot | None]] = {}
    for change in changes:
        own = touched.setdefault(hot.position[change.class_id], {})
        own[change.slot.id] = change.slot
        if change.evicted is not None:
            own[change.evicted] = None
    for index, own in touched.items():
        classes[index] = _rewrite(classes[index], own, dim)
    memory = DynamicMemory(classes=tuple(classes), slots=snapshot.dynamic.slots)
    hot.shelves.advance(replace(snapshot, dynamic=memory))
    hot.measure()


def _rewrite(bank: Slots, own: dict[str, StoredSlot | None], dim: int) -> Slots:
    kept = [slot for slot, id_ in enumerate(bank.ids) if id_ not in own]
    new = [slot for slot in own.values() if slot is not None]
    return Slots(
        keys=torch.cat((bank.keys[kept], stack_features(new, dim).to(bank.keys.device))),
        entropies=(*(bank.entropies[slot] for slot in kept), *(slot.entropy for slot in new)),
        ids=(*(bank.ids[slot] for slot in kept), *(slot.id for slot in new)),
    )
