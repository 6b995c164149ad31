"""Records beside memories: cached responses, snapshots, jobs, API keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .memory import Stamp


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


def tenant_of_key(id_: str) -> str:
    """Return the tenant that an API key of this id belongs to, or ''."""
    return id_.rpartition("_")[0]
