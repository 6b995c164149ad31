"""The in-process store: nothing outlives the process. It holds what any store holds, and obeys the same rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from core.memory.dynamic import Outcome
from service.domain.memory import (
    SEED,
    Count,
    Stamp,
    StoredBank,
    StoredMemory,
    StoredOffsets,
    StoredShot,
    StoredSlot,
    StoredStatistics,
    TenantRecord,
    digest_of,
    shown_of,
)
from service.domain.quotas import Allowance, Lease, Quota
from service.domain.records import Job, Remembered, SnapshotInfo, StoredKey
from service.domain.tenant import TenantConfig, is_shadow
from service.errors import StoreDown

from .in_process_documents import CachedResponses
from .protocol import Change, Conflict, PushCandidate, Pushed, ReloadNeeded, Synced, Verdict
from .token_bucket import OwnLimits

LOG_LENGTH = 2048
"""Slot changes kept for workers that are behind; one further behind loads anew."""


JOBS = 50
"""Jobs of a tenant that are remembered."""


@dataclass(slots=True)
class _Held:
    """One tenant. `log` holds (version, change); `settled` is the version up to which only a load will do."""

    record: TenantRecord
    slots: dict[str, dict[str, StoredSlot]] = field(default_factory=dict)
    shots: dict[str, StoredShot] = field(default_factory=dict)
    barred: set[tuple[str, str]] = field(default_factory=set)
    offsets: dict[str, bytes] = field(default_factory=dict)
    counts: dict[str, tuple[Count, float]] = field(default_factory=dict)
    log: deque[tuple[int, Change]] = field(default_factory=lambda: deque(maxlen=LOG_LENGTH))
    settled: int = 0
    snapshots: dict[str, tuple[SnapshotInfo, tuple[bytes, ...]]] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)


class InProcessStore:
    """A `MemoryStore` in this process's own memory. No call awaits, so each is one step of the event loop.

    `clock` is wall time in seconds.
    """

    def __init__(self, *, clock: Callable[[], float], remember_s: float, remember_bytes: int) -> None:
        self._tenants: dict[str, _Held] = {}
        self._answers: dict[str, CachedResponses] = {}
        self._remember_s, self._remember_bytes = remember_s, remember_bytes
        self._epochs: dict[str, int] = {}
        self._clock = clock
        self._claims: dict[tuple[str, str], float] = {}
        self._keys: dict[str, StoredKey] = {}
        self._limits = OwnLimits(clock)

    async def get(self, tenant: str) -> TenantRecord | None:
        held = self._tenants.get(tenant)
        return None if held is None else held.record

    async def names(self, *, after: str, limit: int) -> Sequence[str]:
        return sorted(name for name in self._tenants if name > after and not is_shadow(name))[:limit]

    async def load(self, tenant: str, *, images: bool = False) -> StoredMemory | None:
        held = self._tenants.get(tenant)
        if held is None:
            return None
        shots: dict[str, list[StoredShot]] = {}
        for _, shot in sorted(held.shots.items()):
            own = shot if images else replace(shot, image=None, kept=len(shot.image or b""))
            shots.setdefault(shot.class_id, []).append(own)
        return StoredMemory(
            record=held.record,
            slots={class_id: StoredBank.of(bank.values()) for class_id, bank in held.slots.items()},
            shots={class_id: tuple(own) for class_id, own in shots.items()},
            barred=frozenset(held.barred),
            offsets=StoredOffsets(training=held.record.training, rows=dict(held.offsets)),
            counts=self._counts(held, {}),
        )

    async def stamps(self, tenants: Sequence[str]) -> Sequence[Stamp | StoreDown | None]:
        found = (self._tenants.get(tenant) for tenant in tenants)
        return [None if held is None else held.record.stamp for held in found]

    async def replace(
        self,
        tenant: str,
        config: TenantConfig,
        fingerprint: str,
        *,
        expected: Stamp | None,
        exact: bool = False,
        labelling: str,
        origin: Mapping[str, str],
        slots: Mapping[str, StoredBank] | None = None,
        barred: Iterable[tuple[str, str]] = (),
        shots: Iterable[StoredShot] | None = None,
        offsets: StoredOffsets | None = None,
        statistics: StoredStatistics | None = None,
    ) -> Stamp:
        held = self._tenants.get(tenant)
        if _moved_on(held, expected, exact=exact):
            raise Conflict(tenant)
        stay = {spec.id for spec in config.classes}
        stamp = self._new_epoch(tenant, held)
        new = _Held(
            record=TenantRecord(
                name=tenant,
                config=config,
                fingerprint=fingerprint,
                origin=origin,
                labelling=labelling,
                stamp=stamp,
                created=self._clock() if held is None else held.record.created,
                life=stamp.epoch,
            ),
            settled=stamp.version,
        )
        same = held is not None and held.record.fingerprint == fingerprint
        slots = {} if slots is None and not same else slots
        if slots is not None:
            if statistics is not None and statistics.shared:
                new.counts = {SEED: (Count(seq=1, statistics=statistics), self._clock())}
            new.slots = {own: {slot.id: slot for slot in bank} for own, bank in slots.items() if own in stay}
            new.barred = {(own, id_) for own, id_ in barred if own in stay and id_ not in new.slots.get(own, ())}
        elif held is not None and same:
            new.slots = {own: bank for own, bank in held.slots.items() if own in stay}
            new.barred = {(own, id_) for own, id_ in held.barred if own in stay}
            new.counts = {name: (_of(count, stay), at) for name, (count, at) in held.counts.items()}
            new.record = replace(new.record, life=held.record.life)
        if shots is not None:
            new.shots = {shot.id: shot for shot in shots if shot.class_id in stay}
        elif held is not None:
            old = (shot if same else replace(shot, feature=b"") for shot in held.shots.values() if same or shot.image)
            new.shots = {shot.id: shot for shot in old if shot.class_id in stay}
        if offsets is None and held is not None and same:
            offsets = _remaining(held, stay)
        if offsets is not None:
            new.record = replace(new.record, training=offsets.training)
            new.offsets = {own: row for own, row in offsets.rows.items() if own in stay}
        if held is not None:
            new.snapshots, new.jobs = held.snapshots, held.jobs
        new.record = replace(new.record, shown=shown_of(new.shots))
        self._tenants[tenant] = new
        return stamp

    async def delete(self, tenant: str) -> bool:
        self._answers.pop(tenant, None)
        if self._tenants.pop(tenant, None) is None:
            return False
        for key in await self.keys(tenant):
            del self._keys[key.id]
        return True

    async def sync(self, tenant: str, since: Stamp) -> Synced:
        held = self._current(tenant, since)
        return Synced(stamp=held.record.stamp, changes=tuple(_missed(held, since)))

    async def push(self, tenant: str, since: Stamp, candidates: Sequence[PushCandidate]) -> Pushed:
        held = self._current(tenant, since)
        # Before any write: the pusher's own may cut from the log what it has to hear of.
        changes = _missed(held, since)
        verdicts = tuple(self._enter(held, candidate, changes) for candidate in candidates)
        return Pushed(verdicts=verdicts, synced=Synced(stamp=held.record.stamp, changes=tuple(changes)))

    async def add_shots(
        self, tenant: str, since: Stamp, shots: Sequence[StoredShot], *, beside: str | None = None
    ) -> Stamp:
        held = self._current(tenant, since)
        if beside is not None and held.record.shown != beside:
            raise ReloadNeeded(tenant)
        new = {shot.id: shot for shot in shots if shot.id not in held.shots}
        for shot in shots:
            known = held.shots.get(shot.id)
            if known is not None and shot.feature and not known.feature:
                new[shot.id] = replace(known, feature=shot.feature)
        if new:
            held.shots.update(new)
            held.record = replace(held.record, shown=shown_of(held.shots))
            self._settle(held, replace(held.record.stamp, version=held.record.stamp.version + 1))
        return held.record.stamp

    async def images(self, tenant: str, at: Stamp, shots: Sequence[StoredShot]) -> Sequence[bytes | None]:
        held = self._current(tenant, at)
        return [held.shots[shot.id].image if shot.id in held.shots else None for shot in shots]

    async def remove_shots(self, tenant: str, ids: Sequence[str]) -> int:
        held = self._tenants.get(tenant)
        if held is None:
            return 0
        gone = [id_ for id_ in ids if held.shots.pop(id_, None) is not None]
        if gone:
            held.record = replace(held.record, shown=shown_of(held.shots))
            self._settle(held, self._new_epoch(tenant, held))
        return len(gone)

    async def reset(self, tenant: str, *, dynamic: bool, static: bool, class_ids: Sequence[str] | None) -> Stamp | None:
        held = self._tenants.get(tenant)
        if held is None:
            return None
        named = {spec.id for spec in held.record.config.classes} if class_ids is None else set(class_ids)
        if dynamic:
            held.slots = {class_id: bank for class_id, bank in held.slots.items() if class_id not in named}
            held.barred = {(class_id, id_) for class_id, id_ in held.barred if class_id not in named}
            stay = {spec.id for spec in held.record.config.classes} - named
            held.counts = {name: (_of(count, stay), at) for name, (count, at) in held.counts.items()}
        if static:
            held.shots = {id_: shot for id_, shot in held.shots.items() if shot.class_id not in named}
            held.record = replace(held.record, shown=shown_of(held.shots))
        if static and class_ids is None:
            held.offsets, held.record = {}, replace(held.record, training=None)
        self._settle(held, self._new_epoch(tenant, held))
        if dynamic and class_ids is None:
            held.counts, held.record = {}, replace(held.record, life=held.record.stamp.epoch)
        return held.record.stamp

    async def purge(self, tenant: str, class_id: str, slot: str) -> bool:
        held = self._tenants.get(tenant)
        if held is None or held.slots.get(class_id, {}).pop(slot, None) is None:
            return False
        held.barred.add((class_id, slot))
        self._settle(held, replace(held.record.stamp, version=held.record.stamp.version + 1))
        return True

    async def count(self, tenant: str, at: Stamp, counter: str, seq: int, statistics: StoredStatistics) -> int:
        held = self._current(tenant, at)
        known, _ = held.counts.get(counter, (Count(seq=0, statistics=StoredStatistics()), 0.0))
        if known.seq < seq:
            return 0
        whole = StoredStatistics(rows={**known.statistics.rows, **statistics.rows}, shared=statistics.shared)
        held.counts[counter] = Count(seq=known.seq + 1, statistics=whole), self._clock()
        return known.seq + 1

    async def counts(
        self, tenant: str, at: Stamp, known: Mapping[str, int]
    ) -> tuple[Mapping[str, Count], Mapping[str, float]]:
        held, now = self._current(tenant, at), self._clock()
        return self._counts(held, known), {name: now - told for name, (_, told) in held.counts.items()}

    async def fold(self, tenant: str, at: Stamp, counts: Mapping[str, Count], into: str) -> bool:
        held = self._current(tenant, at)
        if any(name not in held.counts or held.counts[name][0].seq != count.seq for name, count in counts.items()):
            return False
        for name in counts:
            del held.counts[name]
        whole = StoredStatistics.total(count.statistics for count in counts.values())
        held.counts[into] = Count(seq=1, statistics=whole), self._clock()
        return True

    async def digests(self, tenant: str, at: Stamp, class_ids: Sequence[str]) -> Mapping[str, str]:
        held = self._current(tenant, at)
        if held.record.stamp != at:
            raise ReloadNeeded(tenant)
        banks = {own: StoredBank.of(held.slots.get(own, {}).values()) for own in class_ids}
        return {own: digest_of(bank.ids, bank.entropies) for own, bank in banks.items()}

    async def keep_snapshot(self, tenant: str, info: SnapshotInfo, parts: Iterable[bytes]) -> bool:
        held = self._tenants.get(tenant)
        if held is None:
            return False
        held.snapshots[info.id] = info, tuple(parts)
        return True

    async def snapshots(self, tenant: str) -> Sequence[SnapshotInfo]:
        held = self._tenants.get(tenant)
        infos = [] if held is None else [info for info, _ in held.snapshots.values()]
        return sorted(infos, key=lambda info: (info.created, info.id))

    async def read_snapshot(self, tenant: str, id_: str, part: int) -> bytes | None:
        held = self._tenants.get(tenant)
        if held is None or id_ not in held.snapshots:
            return None
        parts = held.snapshots[id_][1]
        return parts[part] if part < len(parts) else None

    async def drop_snapshot(self, tenant: str, id_: str) -> bool:
        held = self._tenants.get(tenant)
        return held is not None and held.snapshots.pop(id_, None) is not None

    async def note_job(self, tenant: str, job: Job) -> bool:
        held = self._tenants.get(tenant)
        if held is None or (job.id in held.jobs and held.jobs[job.id].over):
            return False
        held.jobs[job.id] = job
        for old in [known for known in by_age(held.jobs.values()) if known.over][: max(0, len(held.jobs) - JOBS)]:
            del held.jobs[old.id]
        return True

    async def jobs(self, tenant: str) -> Sequence[Job]:
        held = self._tenants.get(tenant)
        return [] if held is None else by_age(held.jobs.values())

    async def claim(self, tenant: str, what: str, seconds: float) -> bool:
        now, claimed = self._clock(), (tenant, what)
        if self._claims.get(claimed, now) > now:
            return False
        self._claims = {known: ends for known, ends in self._claims.items() if ends > now} | {claimed: now + seconds}
        return True

    async def recall(self, tenant: str, key: str) -> Remembered | None:
        kept = self._answers.get(tenant)
        return None if kept is None else kept.get(key)

    async def remember(self, tenant: str, key: str, answer: Remembered) -> None:
        if tenant not in self._answers:
            self._answers[tenant] = CachedResponses(self._clock, self._remember_s, self._remember_bytes)
        self._answers[tenant].put(key, answer)

    async def keep_key(self, key: StoredKey) -> bool:
        return self._keys.setdefault(key.id, key) == key

    async def find_keys(self, ids: Sequence[str]) -> Sequence[StoredKey | StoreDown | None]:
        return [self._keys.get(id_) for id_ in ids]

    async def keys(self, tenant: str | None = None) -> Sequence[StoredKey]:
        return [key for _, key in sorted(self._keys.items()) if tenant in (None, key.tenant)]

    async def drop_key(self, id_: str) -> bool:
        return self._keys.pop(id_, None) is not None

    async def admit(
        self, tenant: str, quota: Quota, images: int, lease: Lease, *, lasts_s: float, over: Sequence[Lease] = ()
    ) -> Allowance:
        return self._limits.admit(tenant, quota, images, lease, lasts_s=lasts_s, over=over)

    async def renew(self, tenant: str, leases: Sequence[Lease], *, lasts_s: float) -> None:
        self._limits.renew(tenant, leases, lasts_s=lasts_s)

    async def release(self, tenant: str, leases: Sequence[Lease]) -> None:
        self._limits.release(tenant, leases)

    async def ping(self) -> None:
        """Return: this process is here."""

    async def aclose(self) -> None:
        """Return: there is nothing to let go of."""

    def _current(self, tenant: str, since: Stamp) -> _Held:
        held = self._tenants.get(tenant)
        if held is None or held.record.stamp.epoch != since.epoch:
            raise ReloadNeeded(tenant)
        return held

    def _counts(self, held: _Held, known: Mapping[str, int]) -> dict[str, Count]:
        now = self._clock()
        return {
            name: replace(count, idle_s=now - at)
            for name, (count, at) in held.counts.items()
            if known.get(name) != count.seq
        }

    def _new_epoch(self, tenant: str, held: _Held | None) -> Stamp:
        # Counted beyond the tenant's life: one that is deleted and made again never comes back to an old epoch.
        self._epochs[tenant] = epoch = self._epochs.get(tenant, 0) + 1
        return Stamp(epoch=epoch, version=held.record.stamp.version + 1 if held else 0)

    def _settle(self, held: _Held, stamp: Stamp) -> None:
        """Move to a stamp by a change that is no slot write: whoever is behind it has to load."""
        held.record = replace(held.record, stamp=stamp)
        held.settled = stamp.version
        held.log.clear()

    def _enter(self, held: _Held, candidate: PushCandidate, changes: list[Change]) -> Verdict:
        """Apply Eq. (5) to what is held now, as `core.memory.dynamic.propose` and `apply` do; note what it changes."""
        slot, bank = candidate.slot, held.slots.setdefault(candidate.class_id, {})
        if (candidate.class_id, slot.id) in held.barred:
            return Verdict(outcome=Outcome.REJECTED)
        known = bank.get(slot.id)
        if known is not None:
            if (slot.entropy, slot.feature) < (known.entropy, known.feature):
                changes.append(_write(held, Change(class_id=candidate.class_id, slot=slot)))
            return Verdict(outcome=Outcome.DUPLICATE)
        if len(bank) < held.record.config.slots:
            changes.append(_write(held, Change(class_id=candidate.class_id, slot=slot)))
            return Verdict(outcome=Outcome.FILLED)
        worst = max(bank.values(), key=_order, default=None)
        if worst is None or _order(slot) > _order(worst):
            return Verdict(outcome=Outcome.REJECTED)
        changes.append(_write(held, Change(class_id=candidate.class_id, slot=slot, evicted=worst.id)))
        return Verdict(outcome=Outcome.REPLACED, evicted=worst.id)


def _of(count: Count, class_ids: Collection[str]) -> Count:
    """Return what was counted of some classes, and of no class."""
    rows = {own: row for own, row in count.statistics.rows.items() if own in class_ids}
    return replace(count, statistics=replace(count.statistics, rows=rows))


def _remaining(held: _Held, stay: set[str]) -> StoredOffsets:
    """Return a tenant's offsets without those of classes that leave."""
    leaves = {spec.id for spec in held.record.config.classes} - stay
    training = held.record.training
    return StoredOffsets(training=None if training is None else training.without(leaves), rows=held.offsets)


def _moved_on(held: _Held | None, expected: Stamp | None, *, exact: bool) -> bool:
    if held is None or expected is None:
        return (held is None) != (expected is None)
    stamp = held.record.stamp
    latest = stamp.version if exact else held.settled
    return stamp.epoch != expected.epoch or latest > expected.version


def _missed(held: _Held, since: Stamp) -> list[Change]:
    """Return the slot changes since a stamp of this epoch.

    Raises:
        ReloadNeeded: something else changed too, or the log does not reach back so far.
    """
    if since.version < held.settled or held.record.stamp.version - since.version > len(held.log):
        raise ReloadNeeded(held.record.name)
    return [change for version, change in held.log if version > since.version]


def _write(held: _Held, change: Change) -> Change:
    bank = held.slots[change.class_id]
    if change.evicted is not None:
        del bank[change.evicted]
    bank[change.slot.id] = change.slot
    stamp = replace(held.record.stamp, version=held.record.stamp.version + 1)
    held.record = replace(held.record, stamp=stamp)
    held.log.append((stamp.version, change))
    return change


def by_age(jobs: Iterable[Job]) -> list[Job]:
    """Return jobs, the oldest first."""
    return sorted(jobs, key=lambda job: (job.created, job.id))


def _order(slot: StoredSlot) -> tuple[float, str]:
    return slot.entropy, slot.id
