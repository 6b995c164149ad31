"""The archive: tenants' memories kept hot, as device tensors, in step with the store.

One memory at a time is touched by one task, under its lock; an opened memory is never dropped for room. A cold one is
loaded by whoever opens it first while the others of that tenant wait for the lock and other tenants go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context

from core.encoders.protocol import Encoder
from core.prepared_banks import Shelves
from service.concurrency.keyed_lock import KeyedLocks
from service.concurrency.worker_thread import Worker
from service.domain.memory import (
    Stamp,
    TenantRecord,
    digest_of,
)
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import NoClasses, StoreDown, UnknownTenant
from service.stores.protocol import Change, MemoryStore, ReloadNeeded
from service.telemetry import logs
from service.telemetry.metrics import Lap, Metrics

from .convert import snapshot_of, static_bytes
from .fingerprint import check_fingerprint
from .hot_memory import HotMemory, apply_changes, update_adaptation
from .statistics import Tally, begin
from .statistics_sync import Ledger
from .text_features import TextFeatures

_MOST_LEFT = 8
"""Dropped memories whose last counts may wait to be written: they are in no budget."""

_VERIFIED = 64
"""Classes that are compared with the store at a time."""


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
        serve_stale: bool = True,
    ) -> None:
        self._store, self._encoder, self._texts, self._worker = store, encoder, texts, worker
        self._metrics, self._clock, self._max_bytes, self._sync_s = metrics, clock, max_bytes, sync_s
        self._serve_stale = serve_stale
        self._ledger = Ledger(store, worker, clock)
        self._left: list[tuple[Tally, Stamp]] = []
        self._counters: dict[str, tuple[str, int]] = {}
        self._hot: OrderedDict[str, HotMemory] = OrderedDict()
        self._held = _Held()
        self._locks = KeyedLocks()
        self._asked: dict[str, asyncio.Future[Stamp | None]] = {}
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def tenants(self) -> list[str]:
        """Whose memories are hot, the least used first."""
        return list(self._hot)

    def is_hot(self, tenant: str) -> bool:
        """Return whether a tenant's memory is ready to be read."""
        return tenant in self._hot

    @asynccontextmanager
    async def exclusive(self, tenant: str) -> AsyncIterator[None]:
        """Hold a tenant's memory against every other task of this process."""
        async with self._locks.hold(tenant):
            yield

    @asynccontextmanager
    async def open(self, tenant: str, laps: list[Lap] | None = None) -> AsyncIterator[HotMemory]:
        """Hold a tenant's hot memory, loaded and no older than the setting says, or marked as `away` from the store.

        Raises:
            UnknownTenant: there is no such tenant.
            NoClasses: it has no classes.
            FingerprintMismatch: its features were made with another encoder.
            StoreDown: the memory is not hot, or must not be read unasked, and the store does not answer.
        """
        async with self.exclusive(tenant):
            with self._metrics.stage("store", laps):
                hot = await self._fresh(tenant)
            try:
                yield hot
            finally:
                self._account(tenant)

    async def record(self, tenant: str) -> TenantRecord:
        """Return a tenant's record, as the store has it.

        Raises:
            UnknownTenant: there is no such tenant.
        """
        record = await self._store.get(tenant)
        if record is None:
            raise UnknownTenant(f"There is no tenant {tenant!r}.")
        return record

    async def config(self, tenant: str) -> TenantConfig:
        """Return a tenant's configuration as it was last seen; the store is asked only where no memory is hot.

        Raises:
            UnknownTenant: there is no such tenant.
        """
        hot = self._hot.get(tenant)
        return (await self.record(tenant)).config if hot is None else hot.config

    async def take_back(self, hot: HotMemory, stamp: Stamp, changes: Sequence[Change]) -> None:
        """Bring an opened memory to a stamp by the store's slot changes."""
        if changes:
            await self._worker.run(apply_changes, hot, changes)
        hot.stamp, hot.synced_at, hot.away = stamp, self._clock(), False

    def drop(self, tenant: str) -> None:
        """Forget a hot memory, so that the next one who opens it loads it."""
        self._forget(tenant)
        self._account(tenant)

    async def exchange(self, tenant: str, every_s: float = 0.0) -> None:
        """Write what a hot memory has counted and take in what others have, unless that was done lately.

        Raises:
            StoreDown: the store does not answer.
        """
        hot = self._hot.get(tenant)
        if hot is None or hot.tally is None or self._clock() - hot.tally.exchanged_at < every_s:
            return
        try:
            new = await self._ledger.exchange(hot.tally, hot.stamp)
        except ReloadNeeded:
            return  # it moves on; whoever opens it next brings it in step
        adaptation = hot.snapshot.adaptation
        # Also where nothing came: who opens the memory now would read all that was counted.
        if new or (adaptation is not None and adaptation.behind):
            async with self.exclusive(tenant):
                await self._worker.run(update_adaptation, hot)

    async def hand_in(self, tenant: str) -> None:
        """Do as `exchange` does, and read the memory from now on as who opens it anew reads it.

        Raises:
            StoreDown: the store does not answer.
        """
        hot = self._hot.get(tenant)
        if hot is not None and hot.tally is not None:
            with suppress(ReloadNeeded):
                await self._ledger.exchange(hot.tally, hot.stamp)
                await self._worker.run(update_adaptation, hot)

    async def settle(self, *, tenant: str | None = None, everything: bool = False) -> None:
        """Write what dropped memories had counted, of all tenants or of one; with `everything` what hot ones have too.

        What the store does not take because it is away is kept for the next time.
        """
        if everything:
            self._left += [(hot.tally, hot.stamp) for hot in self._hot.values() if hot.tally is not None]
        await self._settle([left for left in self._left if tenant in (None, left[0].tenant)])

    async def _settle(self, lefts: Sequence[tuple[Tally, Stamp]]) -> None:
        for tally, at in lefts:
            with suppress(StoreDown):
                lost = await self._ledger.leave(tally, at)
                self._metrics.counted.labels("lost").inc(lost)
                self._left = [one for one in self._left if one[0] is not tally]
                if tally.seq and not lost:
                    self._counters[tally.tenant] = tally.counter, tally.seq

    async def verify(self, tenant: str, every_s: float = 0.0) -> None:
        """Compare a hot memory with the store's, unless that was done lately; one that differs is loaded anew.

        Raises:
            StoreDown: the store does not answer.
        """
        hot = self._hot.get(tenant)
        if hot is None or self._clock() - hot.verified_at < every_s:
            return
        for start in range(0, len(hot.config.classes), _VERIFIED):
            # Held for one slice: requests go on in between.
            async with self.exclusive(tenant):
                if self._hot.get(tenant) is not hot:
                    return
                try:
                    differ = await self._differing(hot, hot.config.classes[start : start + _VERIFIED])
                except ReloadNeeded:
                    return  # it moves on; whoever opens it next brings it in step
                if differ:
                    self._metrics.repairs.inc()
                    logs.event(logs.MEMORY_REPAIRED, level=logging.WARNING, tenant=tenant, classes=differ)
                    self.drop(tenant)
                    return
        hot.verified_at = self._clock()

    async def _differing(self, hot: HotMemory, classes: Sequence[ClassSpec]) -> int:
        """Return in how many classes a hot memory differs from the store's, once it is in step with it."""
        synced = await self._store.sync(hot.record.name, hot.stamp)
        await self.take_back(hot, synced.stamp, synced.changes)
        told = await self._store.digests(hot.record.name, hot.stamp, [spec.id for spec in classes])
        banks = hot.snapshot.dynamic.classes
        own = {spec.id: banks[hot.position[spec.id]] for spec in classes}
        return sum(
            told[id_] != digest_of([str(slot) for slot in bank.ids], bank.entropies) for id_, bank in own.items()
        )

    async def _fresh(self, tenant: str) -> HotMemory:
        hot = self._hot.get(tenant)
        if hot is None:
            hot = self._hot[tenant] = await self._load(tenant)
        self._hot.move_to_end(tenant)
        age = self._clock() - hot.synced_at
        self._metrics.sync_lag_seconds.observe(max(0.0, age))
        if age < self._sync_s and not hot.away:
            return hot
        try:
            await self._bring_in_step(hot)
        except ReloadNeeded:
            self._forget(tenant)
            hot = self._hot[tenant] = await self._load(tenant)
        except StoreDown:
            if not self._serve_stale:
                raise
            hot.away = True
        return hot

    async def _bring_in_step(self, hot: HotMemory) -> None:
        asked_at = self._clock()
        stamp = await self._where(hot.record.name)
        if stamp != hot.stamp:
            synced = await self._store.sync(hot.record.name, hot.stamp)
            await self.take_back(hot, synced.stamp, synced.changes)
        hot.synced_at, hot.away = asked_at, False

    async def _where(self, tenant: str) -> Stamp | None:
        """Return the stamp that a tenant is at; all who ask in one turn of the event loop share one read."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._ask)
        future = self._asked.setdefault(tenant, loop.create_future())
        return await asyncio.shield(future)

    def _ask(self) -> None:
        asked, self._asked = self._asked, {}
        task = asyncio.create_task(self._answer(asked), name="dmn-versions")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _answer(self, asked: Mapping[str, asyncio.Future[Stamp | None]]) -> None:
        try:
            stamps = await self._store.stamps(list(asked))
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            for future in asked.values():
                future.set_exception(error)
                future.exception()  # heard of, even where nobody waits any more
            return
        for future, stamp in zip(asked.values(), stamps, strict=True):
            if isinstance(stamp, StoreDown):
                future.set_exception(stamp)
                future.exception()  # as above
            else:
                future.set_result(stamp)

    async def _load(self, tenant: str) -> HotMemory:
        await self.settle(tenant=tenant)  # what was counted a moment ago is to be read too
        await self._settle(self._left[:-_MOST_LEFT])  # who comes makes room for itself
        stored = await self._store.load(tenant)
        if stored is None:
            raise UnknownTenant(f"There is no tenant {tenant!r}.")
        check_fingerprint(stored.record, self._encoder)
        config = stored.record.config
        if not config.classes:
            raise NoClasses(f"The tenant {tenant!r} has no classes yet.")
        loaded_at = self._clock()
        text = await self._texts.class_weights([config.prompts(spec) for spec in config.classes])
        shelves = await self._worker.run(lambda: Shelves(snapshot_of(stored, text, self._encoder.logit_scale)))
        logs.event(logs.MEMORY_LOADED, tenant=tenant, classes=len(config.classes))
        unread = sum(not shot.feature for own in stored.shots.values() for shot in own)
        hot = HotMemory(
            record=stored.record,
            stamp=stored.record.stamp,
            shelves=shelves,
            synced_at=loaded_at,
            verified_at=loaded_at,
            unread=unread,
            due=unread > 0 or stored.record.labelling != stored.record.due_labelling,
            static_bytes=static_bytes(stored, self._encoder.dim),
            names=tuple(spec.name for spec in config.classes),
            position={spec.id: i for i, spec in enumerate(config.classes)},
            shots=sum(len(own) for own in stored.shots.values()) - unread,
            barred=stored.barred,
        )
        if config.method == "auto":
            ids = [spec.id for spec in config.classes]
            own = self._counters.pop(tenant, None)
            hot.tally = await self._worker.run(begin, tenant, ids, stored.counts, text, loaded_at, own)
        await self._worker.run(hot.measure, sum(len(bank) for bank in shelves.snapshot.dynamic.classes))
        return hot

    def _forget(self, tenant: str) -> None:
        """Drop a hot memory; what it has counted is written by and by."""
        hot = self._hot.pop(tenant, None)
        if hot is not None and hot.tally is not None:
            self._left.append((hot.tally, hot.stamp))

    def _account(self, tenant: str) -> None:
        """Note what one tenant's memory takes now; drop the least used ones that nobody holds until the rest fits."""
        self._held.note(tenant, self._hot.get(tenant))
        if self._held.nbytes > self._max_bytes:
            for idle in [name for name in self._hot if name not in self._locks]:
                self._forget(idle)
                self._held.note(idle, None)
                self._metrics.hot_evictions.inc()
                Context().run(_tell_evicted, idle)  # not in the name of the request that needed the room
                if self._held.nbytes <= self._max_bytes:
                    break
        self._metrics.hot_tenants.set(len(self._hot))
        self._metrics.hot_bytes.set(self._held.nbytes)
        self._metrics.fill_ratio.set(self._held.filled / self._held.room if self._held.room else 0.0)


def _tell_evicted(tenant: str) -> None:
    logs.event(logs.MEMORY_EVICTED, tenant=tenant)


class _Held:
    """Sums over the hot memories, kept as these change: a call must not cost more where there are more of them."""

    def __init__(self) -> None:
        self.nbytes = self.filled = self.room = 0
        self._of: dict[str, tuple[int, int, int]] = {}

    def note(self, tenant: str, hot: HotMemory | None) -> None:
        """Take in what a tenant's memory takes now, nothing where it is not hot."""
        before = self._of.pop(tenant, (0, 0, 0))
        now = (0, 0, 0)
        if hot is not None:
            now = self._of[tenant] = (hot.nbytes, hot.filled, len(hot.config.classes) * hot.config.slots)
        self.nbytes, self.filled, self.room = (
            total + new - old
            for total, new, old in zip((self.nbytes, self.filled, self.room), now, before, strict=True)
        )
