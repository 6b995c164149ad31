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

from core.dynamic import Outcome

from ..tenants import TenantConfig


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Stamp:
    """Where a memory is in its life."""

    epoch: int
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSlot:
    """One dynamic slot: id, entropy in nats, and the feature's bytes (`core.codec`)."""

    id: str
    entropy: float
    feature: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredShot:
    """One shot of a class: id, the feature's bytes, and the image's own where the tenant keeps images."""

    id: str
    class_id: str
    feature: bytes
    image: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that count against the tenant's limit."""
        return len(self.feature) + len(self.image or b"")


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
    """A tenant's configuration, the fingerprint that its features were made with, and its stamp."""

    name: str
    config: TenantConfig
    fingerprint: str
    stamp: Stamp


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMemory:
    """Everything of one tenant, read at one moment; slots and shots by class id.

    `barred` are the class and slot ids that were purged in this epoch and may not come back.
    """

    record: TenantRecord
    slots: Mapping[str, tuple[StoredSlot, ...]]
    shots: Mapping[str, tuple[StoredShot, ...]]
    barred: frozenset[tuple[str, str]] = frozenset()


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


class ReloadNeeded(Exception):
    """The worker's copy is of another life, or too far behind: load the memory anew."""


class Conflict(Exception):
    """The tenant changed between the reading and the writing; read it again."""


class MemoryStore(Protocol):
    """Where memories live. Every call is one atomic step; all are safe to repeat."""

    async def get(self, tenant: str) -> TenantRecord | None:
        """Return a tenant's record, or None."""

    async def names(self, *, after: str, limit: int) -> Sequence[str]:
        """Return up to `limit` tenant names after a name, in order."""

    async def load(self, tenant: str) -> StoredMemory | None:
        """Return everything of a tenant, or None."""

    async def replace(
        self,
        tenant: str,
        config: TenantConfig,
        fingerprint: str,
        *,
        expected: Stamp | None,
        slots: Mapping[str, Iterable[StoredSlot]],
    ) -> Stamp:
        """Create a tenant (`expected` None) or replace its configuration and dynamic slots at once.

        Shots of classes that the configuration lacks are removed.

        Raises:
            Conflict: the tenant is not at `expected`.
        """

    async def delete(self, tenant: str) -> bool:
        """Remove a tenant and everything of it; return whether it was there."""

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

    async def add_shots(self, tenant: str, since: Stamp, shots: Sequence[StoredShot]) -> Stamp:
        """Add shots; one whose id is there already changes nothing.

        Raises:
            ReloadNeeded: the stamp is of another epoch; nothing was written.
        """

    async def remove_shots(self, tenant: str, ids: Sequence[str]) -> int:
        """Remove shots by id and return how many there were; starts a new epoch if any."""

    async def reset(self, tenant: str, *, dynamic: bool, static: bool, class_ids: Sequence[str] | None) -> Stamp | None:
        """Empty one or both memories, of some classes or of all, in a new epoch; None if there is no such tenant."""

    async def purge(self, tenant: str, class_id: str, slot: str) -> bool:
        """Remove one dynamic slot for as long as this epoch lasts; return whether it was there."""

    async def recall(self, tenant: str, key: str) -> Remembered | None:
        """Return the answer kept for an idempotency key, or None."""

    async def remember(self, tenant: str, key: str, answer: Remembered) -> None:
        """Keep an answer for an idempotency key, for as long as the store is set to."""

    async def ping(self) -> None:
        """Return if the store answers.

        Raises:
            StoreDown: it does not.
        """

    async def aclose(self) -> None:
        """Let go of connections."""
