"""Which encoder answers a tenant, and what the next encoder is shown of a call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from service import classify as hall
from service.background.shadow_queue import Glimpse
from service.classify import ClassifyCall, Fault
from service.errors import FingerprintMismatch
from service.inference.results import Reading
from service.services import Rooms

T = TypeVar("T")


# In whose rooms -------------------------------------------------------------------------------------------------------


async def rooms_of(rooms: Rooms, tenant: str) -> Rooms:
    """Return the rooms whose encoder a tenant's memory was made with; those given, where there are no others.

    Raises:
        StoreDown: the memory is not hot, and the store does not answer.
    """
    for own in rooms.beside:
        if own.archive.is_hot(tenant):
            return own
    record = await rooms.store.get(tenant) if rooms.beside else None
    return rooms if record is None else rooms.reading(record.fingerprint)


async def in_its_rooms(rooms: Rooms, tenant: str, work: Callable[[Rooms], Awaitable[T]]) -> T:
    """Return what work gives in a tenant's rooms; a tenant that is switched meanwhile is followed."""
    chosen = await rooms_of(rooms, tenant)
    try:
        return await work(chosen)
    except FingerprintMismatch:
        now = await _followed(rooms, chosen, tenant)
        if now is chosen:
            raise
        return await work(now)


async def classify(rooms: Rooms, call: ClassifyCall) -> tuple[Rooms, list[Reading | Fault]]:
    """Answer a call in its tenant's rooms, as `classify.classify` does, and return these too.

    Raises:
        ServiceError: the whole call is refused, and nothing was decoded.
    """
    if not rooms.beside:
        return rooms, await hall.classify(rooms, call)
    chosen = await rooms_of(rooms, call.tenant)
    chosen.batcher.draining = rooms.batcher.draining
    results = await hall.classify(chosen, call)
    missed = [at for at, one in enumerate(results) if isinstance(one, FingerprintMismatch)]
    now = await _followed(rooms, chosen, call.tenant) if missed else chosen
    if now is not chosen:
        again = await hall.classify(now, replace(call, images=[call.images[at] for at in missed]))
        for at, one in zip(missed, again, strict=True):
            results[at] = one
    if now is rooms:
        _cast(rooms, call, results)
    return now, results


async def _followed(rooms: Rooms, chosen: Rooms, tenant: str) -> Rooms:
    """Return the rooms of a tenant that was not found in those that were chosen for it."""
    if not rooms.beside:
        return chosen
    async with chosen.archive.exclusive(tenant):
        chosen.archive.drop(tenant)
    return await rooms_of(rooms, tenant)


def _cast(rooms: Rooms, call: ClassifyCall, results: Sequence[Reading | Fault]) -> None:
    """Let the next encoder see what was learned from."""
    for image, result in zip(call.images, results, strict=True):
        if call.learn and rooms.shadows is not None and isinstance(image, bytes) and isinstance(result, Reading):
            one = Glimpse(
                tenant=call.tenant,
                image=image,
                digest=result.digest,
                views=call.views,
                epoch=result.stamp.epoch,
            )
            if not rooms.shadows.put(one):
                rooms.metrics.shadows.labels("dropped").inc()
