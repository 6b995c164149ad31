"""`/admin`: what empties memories, brings them back, and moves them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from service.access.idempotency import digest_of
from service.api.dependencies import KeyDep, LedgerDep, OwnRoomsDep, RoomsDep, TenantDep
from service.api.pagination import CursorDep, LimitDep, page
from service.api.problems import may
from service.api.responses import json_answer, response_of, stamp_out
from service.api.schemas.admin import (
    HoldingOut,
    MigrateIn,
    MigrationOut,
    ResetIn,
    ResetOut,
    SnapshotListOut,
    SnapshotOut,
)
from service.api.schemas.jobs import JobOut
from service.api.security import Guarded
from service.domain.memory import Stamp
from service.domain.records import Remembered, SnapshotInfo
from service.errors import UnsupportedBody
from service.services import Rooms
from service.tenants import migration as encoder_migration
from service.tenants import reset as tenant_reset
from service.tenants import shadow_memory, snapshots

router = APIRouter(prefix="/admin/memory", tags=["admin"], route_class=Guarded)

IMPORT = "/admin/memory/import"
"""Path of the one call whose body goes to disk, and may be larger than any other."""

_FILE = "application/octet-stream"
_BYTES = {"type": "string", "format": "binary"}
_UPLOAD = {"required": True, "content": {_FILE: {"schema": _BYTES}}}
_NO_SNAPSHOT = may("unknown-snapshot")


@router.post("/reset", response_model=ResetOut, summary="Empty the memories", responses=may("unknown-class"))
async def reset(
    rooms: OwnRoomsDep, ledger: LedgerDep, tenant: TenantDep, body: ResetIn, key: KeyDep = None
) -> Response:
    """Empty the dynamic memory, the static one or both, of some classes or of all; a snapshot keeps what was there."""
    digest = digest_of(("reset", body.as_bytes()))

    async def once() -> Remembered:
        stamp, saved = await tenant_reset.reset(
            rooms,
            tenant,
            dynamic=body.scope in ("dynamic", "all"),
            static=body.scope in ("static", "all"),
            classes=body.classes,
        )
        return json_answer(_told(tenant, stamp, saved), digest)

    return response_of(await ledger.once(tenant, key, digest, once, wait_s=rooms.settings.deadline_ms / 1000))


@router.post("/snapshots", status_code=201, response_model=SnapshotOut, summary="Take a snapshot")
async def take(rooms: OwnRoomsDep, ledger: LedgerDep, tenant: TenantDep, key: KeyDep = None) -> Response:
    """Keep the memory as it is now, to come back to."""
    digest = digest_of(("snapshot",))

    async def once() -> Remembered:
        return json_answer(SnapshotOut.of(await snapshots.take(rooms, tenant)), digest, 201)

    return response_of(await ledger.once(tenant, key, digest, once, wait_s=rooms.settings.deadline_ms / 1000))


@router.get("/snapshots", summary="List the snapshots")
async def list_snapshots(
    rooms: OwnRoomsDep, tenant: TenantDep, limit: LimitDep = 100, cursor: CursorDep = None
) -> SnapshotListOut:
    """Return a page of snapshots, the newest first."""
    await rooms.archive.record(tenant)
    infos = (await rooms.store.snapshots(tenant))[::-1]
    part, more = page(infos, limit, cursor, lambda info: info.id)
    return SnapshotListOut(items=[SnapshotOut.of(info) for info in part], next=more)


@router.get("/snapshots/{snapshot}", summary="Look at a snapshot", responses=_NO_SNAPSHOT)
async def get_snapshot(rooms: OwnRoomsDep, tenant: TenantDep, snapshot: str) -> SnapshotOut:
    """Return what is known of one snapshot."""
    return SnapshotOut.of(await snapshots.find(rooms, tenant, snapshot))


@router.post("/snapshots/{snapshot}/restore", summary="Go back to a snapshot", responses=_NO_SNAPSHOT)
async def restore(rooms: OwnRoomsDep, tenant: TenantDep, snapshot: str) -> ResetOut:
    """Bring configuration and memories back to what they were, at once for all who read; and keep what they are."""
    record, saved = await snapshots.restore(rooms, tenant, snapshot)
    return _told(tenant, record.stamp, saved)


@router.delete("/snapshots/{snapshot}", status_code=204, summary="Remove a snapshot", responses=_NO_SNAPSHOT)
async def drop(rooms: OwnRoomsDep, tenant: TenantDep, snapshot: str) -> None:
    """Remove a snapshot; the memory stays as it is."""
    await snapshots.drop(rooms, tenant, snapshot)


@router.get(
    "/export",
    response_class=StreamingResponse,
    summary="Export the memory",
    responses={200: {"content": {_FILE: {"schema": _BYTES}}}},
)
async def export(rooms: OwnRoomsDep, tenant: TenantDep) -> StreamingResponse:
    """Return configuration and memories as one safetensors file."""
    size, parts = await snapshots.send_out(rooms, tenant)
    headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{tenant}.safetensors"'}
    return StreamingResponse(parts, media_type=_FILE, headers=headers)


@router.post("/import", summary="Import a memory", openapi_extra={"requestBody": _UPLOAD})
async def import_(request: Request, rooms: OwnRoomsDep, tenant: TenantDep) -> ResetOut:
    """Replace configuration and memories, or create the tenant, by an exported file; all of it or nothing."""
    kind = request.headers.get("content-type", _FILE)
    if kind.startswith(("multipart/", "application/json")):
        raise UnsupportedBody(
            f"The body is {kind.partition(';')[0]}; send the file's bytes themselves (curl --data-binary @FILE)."
        )
    async with _received(request, rooms, tenant) as path:
        record, saved = await snapshots.bring_in(rooms, tenant, path)
    return _told(tenant, record.stamp, saved)


@router.get("/migration", summary="Look at the way to the next encoder")
async def migration(rooms: RoomsDep, tenant: TenantDep) -> MigrationOut:
    """Return which encoder the memory is of, and what has been learned under the next one."""
    found = await encoder_migration.standing(rooms, tenant)
    return MigrationOut(
        tenant=tenant,
        encoder=found.encoder,
        next=found.next,
        memory=HoldingOut(slots=found.memory.slots, shots=found.memory.shots),
        shadow=None if found.shadow is None else HoldingOut(slots=found.shadow.slots, shots=found.shadow.shots),
        stranded=found.stranded,
        trained=found.trained,
    )


@router.post("/migration", status_code=202, summary="Switch to the next encoder")
async def switch(rooms: RoomsDep, tenant: TenantDep, body: MigrateIn | None = None) -> JobOut:
    """Put what the next encoder has learned in the memory's place, at once for all who read; and keep what was."""
    return JobOut.of(await encoder_migration.switch(rooms, tenant, force=body is not None and body.force))


@router.delete("/migration", status_code=204, summary="Drop what the next encoder has learned")
async def abandon(rooms: RoomsDep, tenant: TenantDep) -> None:
    """Remove the memory under the next encoder; while that is loaded, traffic begins another."""
    await rooms.archive.record(tenant)
    await shadow_memory.cancel_migration(rooms, tenant)


@asynccontextmanager
async def _received(request: Request, rooms: Rooms, tenant: str) -> AsyncIterator[Path]:
    """Hold the request's body as a file."""
    with rooms.dock.berth(tenant) as take, TemporaryDirectory(prefix="dmn-import-") as folder:
        path = Path(folder) / "memory.safetensors"
        with path.open("wb") as file:
            async for part in request.stream():
                take(len(part))
                file.write(part)
        yield path


def _told(tenant: str, stamp: Stamp, saved: SnapshotInfo | None) -> ResetOut:
    return ResetOut(tenant=tenant, memory=stamp_out(stamp), snapshot=None if saved is None else SnapshotOut.of(saved))
