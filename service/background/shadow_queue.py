"""Images that were answered and wait to be shown to the next encoder too, when no caller wants the device.

They are bounded in bytes; whoever is there, a share stays free for the next tenant that comes. What finds no room is
dropped: a memory needs the surest images of its traffic, and not every one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from service.concurrency.fair_queue import Turns

_OVERHEAD_BYTES = 1024
"""What an image counts besides its own bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Glimpse:
    """An image as it came, the digest that the tenant's memory knows it by, and the epoch that it was answered in."""

    tenant: str
    image: bytes
    digest: str
    views: int
    epoch: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes while it waits."""
        return len(self.image) + _OVERHEAD_BYTES


class Shadows:
    """The queue of such images, one of each tenant in turn."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: Turns[Glimpse] = Turns()
        self._held: Counter[str] = Counter()
        self._arrived = asyncio.Event()

    @property
    def nbytes(self) -> int:
        """Bytes of all that wait."""
        return self._held.total()

    def put(self, one: Glimpse) -> bool:
        """Let an image wait; False if there is no room for it."""
        held, size = self._held, one.nbytes
        others = len(held) - (one.tenant in held)
        share = self._max_bytes // (others + 2) if others else self._max_bytes
        if held[one.tenant] + size > share or held.total() + size > self._max_bytes:
            return False
        self._note(one.tenant, size)
        self._waiting.put(one.tenant, one)
        self._arrived.set()
        return True

    async def take(self) -> Glimpse:
        """Return the next image, once there is one."""
        await self._arrived.wait()
        one = self._waiting.take()
        self._note(one.tenant, -one.nbytes)
        if not self._waiting:
            self._arrived.clear()
        return one

    def _note(self, tenant: str, size: int) -> None:
        self._held[tenant] += size
        if not self._held[tenant]:
            del self._held[tenant]
