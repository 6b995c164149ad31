"""The archive: tenants' memories kept hot, as device tensors, in step with the store.

One memory at a time is touched by one task, under its lock; an opened memory is never dropped for room. A cold one is
loaded by whoever opens it first while the others of that tenant wait for the lock and other tenants go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from core.adaptive.adaptation import Adaptation
from core.encoders.protocol import Encoder
from core.errors import IncompatibleMemory
from core.memory.bank import Slots
from core.memory.codec import FEATURE_BYTES, decode_features
from core.memory.dynamic import DynamicMemory
from core.memory.static import Shots, StaticMemory
from core.prepared_banks import Shelves
from core.readout.projection import Projection
from core.snapshot import Snapshot
from service.concurrency.keyed_lock import KeyedLocks
from service.concurrency.worker_thread import Worker
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import FingerprintMismatch, NoClasses, StoreDown, UnknownTenant
from service.stores.protocol import (
    OFFSETS,
    Change,
    MemoryStore,
    ReloadNeeded,
    Stamp,
    StoredBank,
    StoredMemory,
    StoredShot,
    StoredSlot,
    TenantRecord,
    digest_of,
)
from service.telemetry import logs
from service.telemetry.metrics import Lap, Metrics

from .statistics import Ledger, Tally, begin, decode
from .text_features import TextFeatures

_MOST_LEFT = 8
"""Dropped memories whose last counts may wait to be written: they are in no budget."""

_VERIFIED = 64
"""Classes that are compared with the store at a time."""


@dataclass(slots=True)
class HotMemory:
    """One tenant's memory, ready to be read. `shelves` is touched in the reader alone.

    `names` are those of the classes, and `position` leads from class id to their position; `barred` are purged slots;
    `filled` are dynamic slots and `shots` those that have a feature; `nbytes` counts features and what is kept ready
    from them, `static_bytes` shots and offsets. `tally` is there with the method `auto`. `unread` shots wait for this
    encoder to read their images. `due` says that these, or slots that were scored under other labels, come before the
    memory is what it should be. `away` says that the store could not be asked how it stands.
    """

    record: TenantRecord
    stamp: Stamp
    shelves: Shelves
    synced_at: float
    verified_at: float
    static_bytes: int
    names: tuple[str, ...]
    position: dict[str, int]
    shots: int = 0
    barred: frozenset[tuple[str, str]] = frozenset()
    unread: int = 0
    due: bool = False
    filled: int = 0
    nbytes: int = 0
    away: bool = False
    tally: Tally | None = None

    @property
    def stale(self) -> bool:
        """Whether answers may differ from those of the memory as it should be."""
        return self.away or self.due

    @property
    def config(self) -> TenantConfig:
        """The tenant's configuration."""
        return self.record.config

    @property
    def snapshot(self) -> Snapshot:
        """The memory as it is now."""
        return self.shelves.snapshot

    def measure(self, filled: int) -> None:
        """Count what is held, with so many dynamic slots filled; after each change, in the worker."""
        features = (filled + self.shots) * FEATURE_BYTES * self.snapshot.text.shape[-1]
        self.filled = filled
        self.nbytes = self.shelves.nbytes + self.snapshot.text.nbytes + features
        if self.tally is not None and self.snapshot.adaptation is not None:
            self.nbytes += self.tally.nbytes + self.snapshot.adaptation.nbytes


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
            await self._worker.run(_apply, hot, changes)
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
                await self._worker.run(_recount, hot)

    async def hand_in(self, tenant: str) -> None:
        """Do as `exchange` does, and read the memory from now on as who opens it anew reads it.

        Raises:
            StoreDown: the store does not answer.
        """
        hot = self._hot.get(tenant)
        if hot is not None and hot.tally is not None:
            with suppress(ReloadNeeded):
                await self._ledger.exchange(hot.tally, hot.stamp)
                await self._worker.run(_recount, hot)

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


def check_fingerprint(record: TenantRecord, encoder: Encoder) -> None:
    """Return if a tenant's features were made with this encoder.

    Raises:
        FingerprintMismatch: they were not; says what differs and what to do.
    """
    differs = differences(record, encoder)
    if differs:
        raise FingerprintMismatch(
            f"The memory of {record.name!r} was {differs}. Serve with DMN_ENCODER="
            f"{record.origin.get('encoder', '...')}, or PUT /tenants/{record.name} again: shots whose images are kept "
            "are then read by this encoder, and the dynamic memory starts afresh."
        )


def differences(record: TenantRecord, encoder: Encoder) -> str:
    """Return in what the encoder that made a memory differs from this one, as the end of a sentence; or nothing."""
    if record.fingerprint == encoder.fingerprint:
        return ""
    made, own = record.origin, encoder.origin
    names = [name for name in own if made.get(name) != own[name]]
    return (
        f"made with the encoder {made.get('encoder', '(unknown)')} ({record.fingerprint[:12]}), and this service runs "
        f"{encoder.name} ({encoder.fingerprint[:12]}): {', '.join(names) or 'fingerprints'} differ"
    )


def origin_of(encoder: Encoder) -> dict[str, str]:
    """Return what a tenant's record says of where its features come from."""
    return {"encoder": encoder.name, **encoder.origin}


def stack_features(stored: Iterable[StoredSlot | StoredShot], dim: int) -> Tensor:
    """Return stored features (n, d) in half precision."""
    return decode_features(b"".join(one.feature for one in stored), dim)


def static_bytes(stored: StoredMemory, dim: int) -> int:
    """Return the bytes of shots, their kept images and trained offsets: those that no image of a stream adds to.

    A shot that waits for its feature counts with it.
    """
    shots = [shot for own in stored.shots.values() for shot in own]
    return stored.offsets.nbytes + sum(shot.nbytes + (0 if shot.feature else dim * FEATURE_BYTES) for shot in shots)


def held_bytes(stored: StoredMemory, dim: int) -> int:
    """Return the bytes of features, kept images and trained offsets that count against a tenant's limit."""
    return sum(len(bank) for bank in stored.slots.values()) * dim * FEATURE_BYTES + static_bytes(stored, dim)


def encode_offsets(projection: Projection, class_ids: Sequence[str]) -> dict[str, bytes]:
    """Return trained offsets as a store keeps them: by class id, five vectors of little-endian float32 in one row."""
    parts = [getattr(projection, field.name) for field in fields(Projection)]
    rows = torch.cat(parts, dim=1).cpu().numpy().astype("<f4")
    return {class_id: row.tobytes() for class_id, row in zip(class_ids, rows, strict=True)}


def projection_of(stored: StoredMemory, like: Tensor) -> Projection | None:
    """Return a memory's trained offsets for class weights `like` (c, d), zero for classes without; None if untrained.

    Raises:
        IncompatibleMemory: they are of another size.
    """
    if stored.offsets.training is None:
        return None
    classes, dim = like.shape
    table = np.zeros((classes, OFFSETS * dim), np.float32)
    for at, spec in enumerate(stored.record.config.classes):
        row = stored.offsets.rows.get(spec.id)
        if row is not None:
            if len(row) != table.itemsize * table.shape[1]:
                raise IncompatibleMemory(
                    f"Trained offsets have {len(row)} bytes a class; expected {OFFSETS * dim} entries."
                )
            table[at] = np.frombuffer(row, "<f4")
    parts = torch.from_numpy(table).to(like).split(dim, dim=1)
    return Projection(**{field.name: part.clone() for field, part in zip(fields(Projection), parts, strict=True)})


def snapshot_of(stored: StoredMemory, text: Tensor, tau: float) -> Snapshot:
    """Return a stored memory as core reads it, for class weights and the encoder's logit scale."""
    config, dim = stored.record.config, text.shape[-1]
    banks = [stored.slots.get(spec.id, StoredBank()) for spec in config.classes]
    shots = [[shot for shot in stored.shots.get(spec.id, ()) if shot.feature] for spec in config.classes]
    static = StaticMemory(
        classes=tuple(
            Shots(keys=stack_features(own, dim).to(text.device), ids=tuple(shot.id for shot in own)) for own in shots
        )
    )
    return Snapshot(
        text=text,
        dynamic=DynamicMemory(classes=tuple(_slots(bank, dim, text.device) for bank in banks), slots=config.slots),
        static=static,
        projection=projection_of(stored, text),
        tau=tau,
        beta=config.beta,
        weights=config.weights,
        adaptation=_adaptation(stored, text, static, tau) if config.method == "auto" else None,
    )


def _adaptation(stored: StoredMemory, text: Tensor, static: StaticMemory, tau: float) -> Adaptation:
    ids = [spec.id for spec in stored.record.config.classes]
    return Adaptation.begin(text, static, tau, decode(stored.statistics, ids, text))


def _slots(bank: StoredBank, dim: int, device: torch.device) -> Slots:
    return Slots(keys=decode_features(bank.features, dim).to(device), entropies=bank.entropies, ids=bank.ids)


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
    filled = hot.filled
    for index, own in touched.items():
        filled -= len(classes[index])
        classes[index] = _rewrite(classes[index], own, dim)
        filled += len(classes[index])
    memory = DynamicMemory(classes=tuple(classes), slots=snapshot.dynamic.slots)
    hot.shelves.advance(replace(snapshot, dynamic=memory))
    hot.measure(filled)


def _recount(hot: HotMemory) -> None:
    """Bring a hot memory's adaptation to what all counters have counted, as whoever opens it now reads it."""
    snapshot = hot.snapshot
    if hot.tally is not None and snapshot.adaptation is not None:
        hot.shelves.advance(replace(snapshot, adaptation=snapshot.adaptation.known(hot.tally.total, anew=True)))
        hot.measure(hot.filled)


def _rewrite(bank: Slots, own: dict[str, StoredSlot | None], dim: int) -> Slots:
    """Return a bank with slots put in or, where there is None, taken out; in the order that a store reads them in.

    So the same slots give the same answers to the last bit, however they came together.
    """
    new = [slot for slot in own.values() if slot is not None]
    entropies = (*bank.entropies, *(slot.entropy for slot in new))
    ids = (*bank.ids, *(slot.id for slot in new))
    held = [slot for slot, id_ in enumerate(ids) if slot >= len(bank) or id_ not in own]
    order = sorted(held, key=lambda slot: (entropies[slot], ids[slot]))
    keys = torch.cat((bank.keys, stack_features(new, dim).to(bank.keys.device)))
    return Slots(
        keys=keys.index_select(0, torch.tensor(order, dtype=torch.long, device=keys.device)),
        entropies=tuple(entropies[slot] for slot in order),
        ids=tuple(ids[slot] for slot in order),
    )
