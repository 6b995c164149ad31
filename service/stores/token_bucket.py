"""Quotas: a token bucket a tenant, and leases of its images that are at work; in Redis, and in this process.

A bucket holds `burst` tokens, an image times view takes one, and `rate` come back a second. So no more than
burst + rate t are let in within any t seconds. A lease that nobody renews ends by itself, as its holder may have been
killed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.domain.quotas import MICROSECONDS, Allowance, Lease, Quota

NEARLY = 1e-3
"""Tokens that may be owed: what rounding takes must not make a caller wait who came when it was told to."""


class OwnLimits:
    """Quotas in this process, by the rules of `lua/admit.lua`; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._meters: OrderedDict[str, _Meter] = OrderedDict()

    def admit(
        self, tenant: str, quota: Quota, images: int, lease: Lease, *, lasts_s: float, over: Sequence[Lease]
    ) -> Allowance:
        """Return as `MemoryStore.admit` does."""
        now = self._clock()
        self._forget_idle(now)
        meter = self._meters.setdefault(tenant, _Meter())
        self._meters.move_to_end(tenant)
        meter.release(over)
        return meter.admit(now, quota, images, lease, lasts_s)

    def renew(self, tenant: str, leases: Sequence[Lease], *, lasts_s: float) -> None:
        """Do as `MemoryStore.renew` does."""
        if tenant in self._meters:
            self._meters[tenant].renew(self._clock(), leases, lasts_s)

    def release(self, tenant: str, leases: Sequence[Lease]) -> None:
        """Do as `MemoryStore.release` does."""
        if tenant in self._meters:
            self._meters[tenant].release(leases)

    def _forget_idle(self, now: float) -> None:
        """Forget tenants, the least used ones first, whose bucket is full and who have nothing at work."""
        while self._meters and next(iter(self._meters.values())).idle(now):
            self._meters.popitem(last=False)


@dataclass(slots=True)
class _Meter:
    """One tenant: `tokens` in its bucket at a time, when the bucket is full, and when each lease ends."""

    tokens: float = math.inf
    at: float = -math.inf
    full_at: float = -math.inf
    ends: dict[Lease, float] = field(default_factory=dict)

    def admit(self, now: float, quota: Quota, images: int, lease: Lease, lasts_s: float) -> Allowance:
        self._end(now)
        tokens, held = self._tokens(now, quota), sum(own.images for own in self.ends) if quota.concurrent else 0
        if quota.concurrent and lease in self.ends:
            return Allowance(wait_s=0.0, crowded=False, tokens=tokens, held=held)
        short = images - tokens if quota.rate else 0.0
        wait_s = math.ceil(MICROSECONDS * short / quota.rate) / MICROSECONDS if short > NEARLY else 0.0
        crowded = 0 < quota.concurrent < held + lease.images
        if not wait_s and not crowded:
            tokens -= images if quota.rate else 0
            if quota.concurrent:
                self.ends[lease] = now + lasts_s
                held += lease.images
        if quota.rate and (now < self.at or (not wait_s and not crowded)):
            self.tokens, self.at, self.full_at = tokens, now, now + (quota.burst - tokens) / quota.rate
        return Allowance(wait_s=wait_s, crowded=crowded, tokens=tokens, held=held)

    def renew(self, now: float, leases: Sequence[Lease], lasts_s: float) -> None:
        self._end(now)
        self.ends.update(dict.fromkeys(self.ends.keys() & set(leases), now + lasts_s))

    def release(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self.ends.pop(lease, None)

    def idle(self, now: float) -> bool:
        self._end(now)
        return not self.ends and self.full_at <= now

    def _end(self, now: float) -> None:
        self.ends = {lease: end for lease, end in self.ends.items() if end > now}

    def _tokens(self, now: float, quota: Quota) -> float:
        """Return how many there are now; a clock that was set back brings none."""
        return min(quota.burst, self.tokens + max(0.0, now - self.at) * quota.rate) if quota.rate else quota.burst
