"""Quotas in Redis: token bucket and leases in one atomic script."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from service.domain.quotas import MICROSECONDS, Allowance, Lease, Quota

from .keys import Keys

Run = Callable[[str, Sequence[str], Sequence[str | bytes | float]], Awaitable[Any]]
"""Runs a script by name, with keys and arguments."""


class Limits:
    """Quotas in Redis, by the clock of the server that has the tenant: clocks of callers may differ."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def admit(
        self, keys: Keys, quota: Quota, images: int, lease: Lease, *, lasts_s: float, over: Sequence[Lease]
    ) -> Allowance:
        """Return as `MemoryStore.admit` does."""
        asked = (images, repr(quota.rate), quota.burst, quota.concurrent, _name(lease), _ms(lasts_s))
        wait, crowded, tokens, held = await self._run("admit.lua", keys.quota, [*asked, *map(_name, over)])
        return Allowance(wait_s=wait / MICROSECONDS, crowded=bool(crowded), tokens=float(tokens), held=held)

    async def renew(self, keys: Keys, leases: Sequence[Lease], *, lasts_s: float) -> None:
        """Do as `MemoryStore.renew` does."""
        await self._run("lease.lua", keys.quota[1:], (_ms(lasts_s), *map(_name, leases)))

    async def release(self, keys: Keys, leases: Sequence[Lease]) -> None:
        """Do as `MemoryStore.release` does."""
        await self._run("lease.lua", keys.quota[1:], (0, *map(_name, leases)))


def _name(lease: Lease) -> str:
    """Return how a lease is written: what it holds, and whose it is."""
    return f"{lease.images}:{lease.id}"


def _ms(seconds: float) -> int:
    return max(1, round(1000 * seconds))
