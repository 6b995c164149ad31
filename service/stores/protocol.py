"""What the service asks of a store of memories, and the values that go back and forth.

A store holds, for every tenant, its configuration, its dynamic slots and its shots, under a stamp: an *epoch*, which
a change starts that removes or re-scores something, and a *version*, which counts every change. A worker keeps a
copy of the memory with the stamp that it has seen. It pushes candidates with that stamp and takes back, in the same
call, every slot change since; or it is told to load anew. The rule of which candidate enters is core's, applied by
the store to what it holds at that moment, so any number of workers converge without a lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.memory.dynamic import Outcome
from service.domain.memory import (
    Count,
    Stamp,
    StoredBank,
    StoredMemory,
    StoredOffsets,
    StoredShot,
    StoredSlot,
    StoredStatistics,
    TenantRecord,
)
from service.domain.quotas import Allowance, Lease, Quota
from service.domain.records import Job, Remembered, SnapshotInfo, StoredKey
from service.domain.tenant import TenantConfig
from service.errors import StoreDown


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
