"""What the service asks of a store of memories, and the values that go back and forth.

A store holds, for every tenant, its configuration, its dynamic slots and its shots, under a stamp: an *epoch*, which
a change starts that removes or re-scores something, and a *version*, which counts every change. A worker keeps a
copy of the memory with the stamp that it has seen. It pushes candidates with that stamp and takes back, in the same
call, every slot change since; or it is told to load anew. The rule of which candidate enters is core's, applied by
the store to what it holds at that moment, so any number of workers converge without a lock.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha1
from typing import Any, Protocol

import numpy as np

from core.memory.dynamic import Outcome
from service.domain.tenant import TenantConfig
from service.errors import StoreDown


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Stamp:
    """Where a memory is in its life.

    `mark` tells apart two histories that count to the same version: a replica that takes over may not have heard of its
    primary's last changes. Only the store that gave it reads it.
    """

    epoch: int
    version: int
    mark: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSlot:
    """One dynamic slot: id, entropy in nats, and the feature's bytes (`core.memory.codec`)."""

    id: str
    entropy: float
    feature: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredBank:
    """A class's dynamic slots by columns, the surest first: a thousand banks are read without an object a slot.

    `features` holds the slots' features one after the other.
    """

    ids: tuple[str, ...] = ()
    entropies: tuple[float, ...] = ()
    features: bytes = b""

    @staticmethod
    def of(slots: Iterable[StoredSlot]) -> StoredBank:
        """Return the bank of some slots, in the order of (entropy, id)."""
        own = sorted(slots, key=lambda slot: (slot.entropy, slot.id))
        return StoredBank(
            ids=tuple(slot.id for slot in own),
            entropies=tuple(slot.entropy for slot in own),
            features=b"".join(slot.feature for slot in own),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[StoredSlot]:
        size = len(self.features) // max(1, len(self.ids))
        for at, (id_, entropy) in enumerate(zip(self.ids, self.entropies, strict=True)):
            yield StoredSlot(id=id_, entropy=entropy, feature=self.features[at * size : (at + 1) * size])

    def best(self, slots: int) -> StoredBank:
        """Return the surest ones, so many at most."""
        size = len(self.features) // max(1, len(self.ids))
        return StoredBank(
            ids=self.ids[:slots], entropies=self.entropies[:slots], features=self.features[: slots * size]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredShot:
    """One shot of a class: id, the feature's bytes, and the image's own where the tenant keeps images.

    The feature is empty while a shot waits to be read by another encoder than it came with. `kept` is the size of an
    image that the store holds and that was not read along.
    """

    id: str
    class_id: str
    feature: bytes
    image: bytes | None = None
    kept: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that count against the tenant's limit."""
        return len(self.feature) + (self.kept if self.image is None else len(self.image))


OFFSETS = 5
"""Trained vectors a class: those of query, key, value, output and text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What is known of a tenant's trained offsets without reading them.

    `created` is wall time in seconds, `dim` the feature size, `shots` how many were trained on. `before` and `after`
    are accuracies on held-out shots in percent, by branch; None where none could be held out.
    """

    id: str
    created: float
    seed: int
    epochs: int
    learning_rate: float
    shots: int
    dim: int
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None

    def without(self, class_ids: Iterable[str]) -> Training:
        """Return what is known once the rows of some classes are gone: other offsets have another id."""
        gone = sorted(class_ids)
        return (
            replace(self, id=sha1(" ".join((self.id, *gone)).encode(), usedforsecurity=False).hexdigest()[:20])
            if gone
            else self
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredOffsets:
    """Trained offsets: by class id b_q, b_k, b_v, b_o, b_t in one row of 5 D little-endian float32. Or none at all."""

    training: Training | None = None
    rows: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that count against the tenant's limit."""
        return sum(map(len, self.rows.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredStatistics:
    """Class statistics, little-endian float32: by class id s_c and S_c in one row; what is of no class in `shared`.

    That is n, G, M, and what calibration needs, in this order; nothing where no image was counted.
    """

    rows: Mapping[str, bytes] = field(default_factory=dict)
    shared: bytes = b""

    @staticmethod
    def total(parts: Iterable[StoredStatistics]) -> StoredStatistics:
        """Return the sum of what was counted apart."""
        rows: dict[str, bytes] = {}
        shared = b""
        for part in parts:
            shared = _added(shared, part.shared)
            for class_id, row in part.rows.items():
                rows[class_id] = _added(rows.get(class_id, b""), row)
        return StoredStatistics(rows=rows, shared=shared)


SEED = "seed"
"""The counter of the statistics that a life begins with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """What one counter has counted by its write number `seq`, `idle_s` seconds ago by the store's clock."""

    seq: int
    statistics: StoredStatistics
    idle_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class PushCandidate:
    """A sample that the worker's copy would take: for the store to decide on."""

    class_id: str
    slot: StoredSlot


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One slot that was written, and the id of the slot that left for it."""

    class_id: str
    slot: StoredSlot
    evicted: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the store did with one candidate."""

    outcome: Outcome
    evicted: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Synced:
    """The stamp that the store is at, and every slot change since the worker's, in order."""

    stamp: Stamp
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """The verdict on each candidate, in order, and what a sync would give."""

    verdicts: tuple[Verdict, ...]
    synced: Synced


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantRecord:
    """A tenant's configuration, where its features come from, and its stamp.

    `origin` says in words what `fingerprint` is a hash of; `labelling` is the labelling version that the dynamic slots
    were scored under; `created` is when the tenant was made, wall time in seconds. `training` is there where the tenant
    has trained offsets. `shown` is a hash of which shots there are, in whatever order they came; `life` is that of the
    class statistics, another one whenever they begin anew.
    """

    name: str
    config: TenantConfig
    fingerprint: str
    stamp: Stamp
    labelling: str
    origin: Mapping[str, str] = field(default_factory=dict)
    created: float = field(default=0.0, compare=False)
    training: Training | None = None
    shown: str = ""
    life: int = field(default=0, compare=False)

    @property
    def due_labelling(self) -> str:
        """The labelling version that the slots should be scored under."""
        return labelling_of(self.config, self.training, self.shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMemory:
    """Everything of one tenant, read at one moment; slots and shots by class id, shots in the order of their ids.

    `barred` are the class and slot ids that were purged and may not come back until their class is emptied; `offsets`
    are those that `record.training` tells of. `counts` are the class statistics of the record's life, by counter.
    """

    record: TenantRecord
    slots: Mapping[str, StoredBank]
    shots: Mapping[str, tuple[StoredShot, ...]]
    barred: frozenset[tuple[str, str]] = frozenset()
    offsets: StoredOffsets = field(default_factory=StoredOffsets)
    counts: Mapping[str, Count] = field(default_factory=dict)

    @property
    def statistics(self) -> StoredStatistics:
        """The class statistics of all counters together."""
        return StoredStatistics.total(count.statistics for _, count in sorted(self.counts.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """An answer kept for its idempotency key: digest of the request, status, media type, body.

    One that is not `final` is not kept: a retry may do better.
    """

    digest: str
    status: int
    media_type: str
    body: bytes
    final: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotInfo:
    """What is known of a snapshot without reading it: when and why it was taken, and what it holds.

    `created` is wall time in seconds. One that people asked for has the reason `manual` and stays until they drop it.
    """

    id: str
    created: float
    reason: str
    fingerprint: str
    stamp: Stamp
    classes: int
    slots: int
    shots: int
    bytes: int

    @property
    def automatic(self) -> bool:
        """Whether it was taken without being asked for, and may go when there are enough younger ones."""
        return self.reason != "manual"


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Long work for a tenant, as the process that does it last said; times are wall time in seconds.

    `progress` goes from 0 to 1; `result` is what it made, `error` the problem that ended it.
    """

    id: str
    kind: str
    state: JobState
    created: float
    updated: float
    progress: float = 0.0
    eta_s: float | None = None
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredKey:
    """What is kept of an API key: never the key itself, but its SHA-256 in hexadecimal digits, and what it allows.

    The id begins with the name of the tenant that the key belongs to, and so leads to where that tenant's keys are. A
    key that belongs to none has no such beginning. Times are wall time in seconds; one that `expires` at None never
    does.
    """

    id: str
    digest: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None = None

    @property
    def tenant(self) -> str:
        """The tenant that the key belongs to, or ''."""
        return tenant_of_key(self.id)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """How much of a tenant's work is let in, in images times views; 0 stands for no limit.

    `rate` a second in the long run, `burst` at once after a pause, `concurrent` at work at a time.
    """

    rate: float = 0.0
    burst: int = 0
    concurrent: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """Room for images that are at work; nobody else's has this id."""

    id: str
    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """What a store says to images that want in, and what is left once they are in, or are not.

    They are `let_in` unless they have to wait `wait_s` seconds for tokens, or there is no room beside the `held` images
    that are at work (`crowded`).
    """

    wait_s: float
    crowded: bool
    tokens: float
    held: int

    @property
    def let_in(self) -> bool:
        """Whether they are in."""
        return not self.wait_s and not self.crowded


class ReloadNeeded(Exception):
    """The worker's copy is of another life, or too far behind: load the memory anew."""


class Conflict(Exception):
    """The tenant changed between the reading and the writing; read it again."""


class MemoryStore(Protocol):
    """Where memories live. Every call is one atomic step; all are safe to repeat."""

    async def get(self, tenant: str) -> TenantRecord | None:
        """Return a tenant's record, or None."""

    async def names(self, *, after: str, limit: int) -> Sequence[str]:
        """Return up to `limit` tenant names after a name, in order; no shadows (`tenants.shadow_of`)."""

    async def load(self, tenant: str, *, images: bool = False) -> StoredMemory | None:
        """Return everything of a tenant, or None; the shots' images only if asked for."""

    async def stamps(self, tenants: Sequence[str]) -> Sequence[Stamp | StoreDown | None]:
        """Return where each of some tenants is, in one round trip; None for one that is not there.

        Of a store of several nodes one may be away: then the error stands in the place of its tenants.
        """

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
        """Create a tenant (`expected` None) or replace its configuration and what is given of its memories, at once.

        What is not given stays, except slots, shots and offsets of classes that the configuration lacks (then as
        `Training.without` says), and what was made with another fingerprint: slots and offsets go, and of the shots
        those stay, without a feature, whose image is kept. With slots come the ids that are barred from their classes;
        one that has a slot is not. And with slots class statistics begin a new life, with those given, if any: what was
        counted under another label set does not add up with what will be.
        Readers see everything before or everything after.

        Raises:
            Conflict: something has changed since `expected`, other than slots that were written; or, if it has to be
                `exact`, anything at all. Nothing was changed.
        """

    async def delete(self, tenant: str) -> bool:
        """Remove a tenant and everything of it, also its API keys; return whether it was there."""

    async def sync(self, tenant: str, since: Stamp) -> Synced:
        """Return the slot changes since a stamp.

        Raises:
            ReloadNeeded: the stamp is of another epoch, something else than slots changed, or the log is cut.
        """

    async def push(self, tenant: str, since: Stamp, candidates: Sequence[PushCandidate]) -> Pushed:
        """Let candidates into the dynamic memory by core's rule, and return every slot change since a stamp.

        Raises:
            ReloadNeeded: as for `sync`; nothing was written.
        """

    async def add_shots(
        self, tenant: str, since: Stamp, shots: Sequence[StoredShot], *, beside: str | None = None
    ) -> Stamp:
        """Add shots; one whose id is there already changes nothing, unless it waits for its feature.

        `beside` is the hash of the shots that the caller has counted (`TenantRecord.shown`), where that matters.

        Raises:
            ReloadNeeded: the stamp is of another epoch, or other shots are there; nothing was written.
        """

    async def images(self, tenant: str, at: Stamp, shots: Sequence[StoredShot]) -> Sequence[bytes | None]:
        """Return the images of some shots, None where none is kept.

        Raises:
            ReloadNeeded: the tenant is in another epoch than `at`.
        """

    async def remove_shots(self, tenant: str, ids: Sequence[str]) -> int:
        """Remove shots by id and return how many there were; starts a new epoch if any."""

    async def reset(self, tenant: str, *, dynamic: bool, static: bool, class_ids: Sequence[str] | None) -> Stamp | None:
        """Empty one or both memories, of some classes or of all, in a new epoch; None if there is no such tenant.

        Offsets go with the whole static memory.
        """

    async def purge(self, tenant: str, class_id: str, slot: str) -> bool:
        """Remove one dynamic slot, and bar its id until its class is emptied; return whether it was there."""

    async def count(self, tenant: str, at: Stamp, counter: str, seq: int, statistics: StoredStatistics) -> int:
        """Write what a counter has counted so far in this life: the rows that changed since its write `seq`, or all.

        Return the number of this write. One counter has one writer: a later write than `seq` is one of which it did not
        hear, and is written over. 0, and nothing is written, if its counts have been folded into others: go on with
        another counter. Who reads meanwhile may find some images counted in part.

        Raises:
            ReloadNeeded: the tenant is in another epoch; nothing was written.
        """

    async def counts(
        self, tenant: str, at: Stamp, known: Mapping[str, int]
    ) -> tuple[Mapping[str, Count], Mapping[str, float]]:
        """Return what counters have counted, but for those of whom the write is known; and how long each is idle (s).

        Raises:
            ReloadNeeded: the tenant is in another epoch.
        """

    async def fold(self, tenant: str, at: Stamp, counts: Mapping[str, Count], into: str) -> bool:
        """Put the sum of some counters in their place, under a name; False if one of them has moved on.

        Raises:
            ReloadNeeded: the tenant is in another epoch; nothing was changed.
        """

    async def digests(self, tenant: str, at: Stamp, class_ids: Sequence[str]) -> Mapping[str, str]:
        """Return `digest_of` the dynamic slots of some classes.

        Raises:
            ReloadNeeded: the tenant is not at this stamp.
        """

    async def keep_snapshot(self, tenant: str, info: SnapshotInfo, parts: Iterable[bytes]) -> bool:
        """Keep a snapshot's file, part by part; it is there once it is whole. False if there is no such tenant."""

    async def snapshots(self, tenant: str) -> Sequence[SnapshotInfo]:
        """Return what snapshots a tenant has, the oldest first."""

    async def read_snapshot(self, tenant: str, id_: str, part: int) -> bytes | None:
        """Return one part of a snapshot's file, counted from 0; None after the last, and of one that is not there."""

    async def drop_snapshot(self, tenant: str, id_: str) -> bool:
        """Remove a snapshot; return whether it was there."""

    async def note_job(self, tenant: str, job: Job) -> bool:
        """Write down how a job stands; False, and nothing is written, if it is over or its tenant is gone."""

    async def jobs(self, tenant: str) -> Sequence[Job]:
        """Return a tenant's latest jobs, the oldest first."""

    async def claim(self, tenant: str, what: str, seconds: float) -> bool:
        """Return whether the caller is the one to do something that is enough to be done once in so many seconds."""

    async def recall(self, tenant: str, key: str) -> Remembered | None:
        """Return the answer kept for an idempotency key, or None."""

    async def remember(self, tenant: str, key: str, answer: Remembered) -> None:
        """Keep an answer for an idempotency key, for as long as the store is set to."""

    async def keep_key(self, key: StoredKey) -> bool:
        """Keep an API key until it is dropped or its tenant is deleted; False if its id is another key's.

        The tenant need not be there yet.
        """

    async def find_keys(self, ids: Sequence[str]) -> Sequence[StoredKey | StoreDown | None]:
        """Return some API keys, in one round trip; None for one that is not there.

        Of a store of several nodes one may be away: then the error stands in the place of its tenants' keys.
        """

    async def keys(self, tenant: str | None = None) -> Sequence[StoredKey]:
        """Return the API keys of a tenant, of none (''), or all that there are, by id; expired ones too."""

    async def drop_key(self, id_: str) -> bool:
        """Remove an API key; return whether it was there."""

    async def admit(
        self, tenant: str, quota: Quota, images: int, lease: Lease, *, lasts_s: float, over: Sequence[Lease] = ()
    ) -> Allowance:
        """Let images in, or say why not: then nothing is spent, and nothing held.

        The bucket and the leases are the tenant's, whoever asks. What is let in is at work under the lease, where
        `concurrent` is limited, until the lease is released or was not renewed for `lasts_s`. Leases that are `over`
        are released first. The same lease is let in once, however often it is asked for; without a limit of
        `concurrent` a call that is repeated may be charged again.
        """

    async def renew(self, tenant: str, leases: Sequence[Lease], *, lasts_s: float) -> None:
        """Let leases last so long from now; those that have ended stay so."""

    async def release(self, tenant: str, leases: Sequence[Lease]) -> None:
        """Give leases back, if they have not ended yet."""

    async def ping(self) -> None:
        """Return if the store answers.

        Raises:
            StoreDown: it does not.
        """

    async def aclose(self) -> None:
        """Let go of connections."""


def tenant_of_key(id_: str) -> str:
    """Return the tenant that an API key of this id belongs to, or ''."""
    return id_.rpartition("_")[0]


def labelling_of(config: TenantConfig, training: Training | None, shown: str = "") -> str:
    """Return the hash of whatever decides which label an image gets.

    Classes and prompts; trained offsets, which move the text head too, Eq. (2); with `auto` the shots, Eq. (17).
    """
    said = [config.labelling]
    if training is not None:
        said.append(training.id)
    if config.method == "auto" and shown:
        said.append(f"shots {shown}")
    if len(said) == 1:
        return config.labelling
    return sha1(" ".join(said).encode(), usedforsecurity=False).hexdigest()[:16]


def shown_of(ids: Iterable[str]) -> str:
    """Return the hash of a set of shots that `TenantRecord.shown` is: a sum, so that one may come or go by itself."""
    total = sum(int(sha1(id_.encode(), usedforsecurity=False).hexdigest()[:12], 16) for id_ in ids) % (1 << 48)
    return f"{total:012x}" if total else ""


def _added(one: bytes, other: bytes) -> bytes:
    """Return the sum of little-endian float32 numbers, entry by entry; b"" counts as zeros."""
    if not one or not other:
        return one or other
    return bytes((np.frombuffer(one, "<f4") + np.frombuffer(other, "<f4")).astype("<f4").data)


def digest_of(ids: Sequence[str], entropies: Sequence[float]) -> str:
    """Return a hash of a bank's slots in the order of (entropy, id): two copies agree if their hashes do."""
    text = b"".join(struct.pack(">d", entropy) + id_.encode() for id_, entropy in zip(ids, entropies, strict=True))
    return sha1(text, usedforsecurity=False).hexdigest()
