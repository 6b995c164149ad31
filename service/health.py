"""Health: whether the process is alive, and whether images can be classified here now, each with its reason."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from service.stores.embedded.binary import free_bytes

from .errors import StoreDown
from .services import Rooms

_LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    ok: bool
    detail: str


def liveness(rooms: Rooms) -> Mapping[str, Check]:
    """Return what a process is started anew for: a worker that does not come back from the device."""
    return {"worker": _worker(rooms)}


async def readiness(rooms: Rooms) -> tuple[bool, Mapping[str, Check]]:
    """Return whether images can be classified now, and each reason.

    While the store is away, they can be where answers go on from hot memories and there are any; but not where keys
    are asked for, which cannot be looked up then.
    """
    checks = {
        "encoder": _encoder(rooms),
        "store": await _store(rooms),
        "draining": Check(ok=not rooms.batcher.leaving, detail="stopping" if rooms.batcher.leaving else "no"),
    }
    for other in rooms.beside:
        if other is not rooms:
            checks["next_encoder"] = _encoder(other)
    settings = rooms.settings
    if settings.store == "embedded":
        checks["disk"] = await asyncio.to_thread(_disk, rooms)
    goes_on = settings.store_down == "serve" and settings.auth == "open" and bool(rooms.archive.tenants)
    return all(one.ok or (name == "store" and goes_on) for name, one in checks.items()), checks


async def stuck(rooms: Rooms) -> Check:
    """Return why this process should be started anew, once it should."""
    while (found := _worker(rooms)).ok:  # noqa: ASYNC110 - who is stuck tells nobody
        await asyncio.sleep(_LOOK_S)
    return found


def _worker(rooms: Rooms) -> Check:
    busy_s = max(rooms.worker.busy_s, rooms.reader.busy_s)
    if busy_s <= rooms.settings.stuck_s:
        return Check(ok=True, detail="it comes back from the device")
    return Check(ok=False, detail=f"It has not come back from the device {rooms.encoder.device} for {busy_s:.0f} s.")


def _encoder(rooms: Rooms) -> Check:
    """Return whether an image was encoded lately: one that was sent, or, while nobody sends any, the canary."""
    ago_s = rooms.clock() - rooms.batcher.succeeded
    if not rooms.settings.canary_s or ago_s <= rooms.settings.canary_s:
        return Check(ok=True, detail=rooms.encoder.name)
    detail = f"{rooms.encoder.name} has encoded no image for {ago_s:.0f} s, not even the one it is tried with."
    return Check(ok=False, detail=detail)


async def _store(rooms: Rooms) -> Check:
    try:
        await rooms.store.ping()
    except StoreDown as error:
        waiting = " Writes wait for it." if rooms.desk.pending else ""
        return Check(ok=False, detail=error.detail + waiting)
    return Check(ok=True, detail=rooms.settings.store_kind)


def _disk(rooms: Rooms) -> Check:
    """Return whether there is room; not how much, since anybody may ask, and could watch what others store."""
    least = rooms.settings.min_free_bytes
    if free_bytes(rooms.settings.data_dir) >= least:
        return Check(ok=True, detail=f"at least {least >> 20} MiB free")
    return Check(
        ok=False,
        detail=f"The store's disk has less than {least >> 20} MiB left; "
        "nothing is added to memories until there is room.",
    )
