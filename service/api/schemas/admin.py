"""Models of the admin routes: reset, snapshots, migration."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from service.domain.records import SnapshotInfo

from .base import Moment, RequestModel, ResponseModel, StampOut, Text


class ResetIn(RequestModel):
    """Which memories to empty, and of which classes (all, if left out)."""

    scope: Literal["dynamic", "static", "all"]
    classes: list[Text] | None = None


class SnapshotOut(ResponseModel):
    """A snapshot: when and why it was taken, what it holds, and where the memory was then."""

    id: str
    created: Moment
    reason: str
    fingerprint: str
    epoch: int
    version: int
    classes: int
    slots: int
    shots: int
    bytes: int

    @staticmethod
    def of(info: SnapshotInfo) -> SnapshotOut:
        """Return what a caller sees of a snapshot."""
        return SnapshotOut(
            id=info.id,
            created=datetime.fromtimestamp(info.created, UTC).isoformat(timespec="seconds"),
            reason=info.reason,
            fingerprint=info.fingerprint,
            epoch=info.stamp.epoch,
            version=info.stamp.version,
            classes=info.classes,
            slots=info.slots,
            shots=info.shots,
            bytes=info.bytes,
        )


class SnapshotListOut(ResponseModel):
    """A page of snapshots, the newest first."""

    items: list[SnapshotOut]
    next: str | None


class ResetOut(ResponseModel):
    """Where the memory is after a reset, a restore or an import; `snapshot` keeps what it was before."""

    tenant: str
    memory: StampOut
    snapshot: SnapshotOut | None


class HoldingOut(ResponseModel):
    """How much a memory holds."""

    slots: int
    shots: int


class MigrateIn(RequestModel):
    """How to switch: with `force` also if shots are lost by it, whose images are not kept."""

    force: bool = False


class MigrationOut(ResponseModel):
    """Where a tenant is on its way to the next encoder.

    `encoder` is its own, `next` the one that it may be switched to, if there is one; `shadow` is the memory that its
    traffic has filled under that. `stranded` shots have no kept image, and trained offsets cannot come along either.
    """

    tenant: str
    encoder: str
    next: str | None
    memory: HoldingOut
    shadow: HoldingOut | None
    stranded: int
    trained: bool
