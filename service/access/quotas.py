"""Quotas: how much of each tenant's work is let in, counted in the store for all processes together.

images ──admit──> let in     429 over the rate, or too many at work; 422 more than are ever let in at once

While the store is away each process counts by itself. What is at work is held under a lease, which ends by itself
where its holder was killed.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count

from service.domain.quotas import Allowance, Lease, Quota
from service.errors import LimitExceeded, RateLimited, StoreDown
from service.settings import Settings
from service.stores.protocol import MemoryStore
from service.stores.token_bucket import OwnLimits

LEASE_S = 10.0
"""How long a lease lasts that nobody renews."""

_RENEW_S = LEASE_S / 4
_GATHER_S = 0.02
"""How long a lease that is over waits for the tenant's next call, which takes it along."""

_CROWDED_S = 1.0
"""When to come again where images of one's own are in the way."""

_MOST_TOLD = 10_000
_NONE = Quota()


class Quotas:
    """Lets images in, and tells callers how many more would be. `clock` is monotonic, in seconds."""

    def __init__(self, store: MemoryStore, settings: Settings, clock: Callable[[], float]) -> None:
        self._store, self._settings, self._clock = store, settings, clock
        self._usual = quota_of(settings, "")
        self._special = {tenant: quota_of(settings, tenant) for tenant in settings.tenant_limits}
        self._own = OwnLimits(clock)
        self._holder, self._numbers = secrets.token_hex(8), count()
        self._at_work: dict[str, dict[Lease, float]] = {}
        self._over: dict[str, list[Lease]] = {}
        self._giving_back: asyncio.Task[None] | None = None
        self._told: OrderedDict[str, Allowance] = OrderedDict()

    def most(self, tenant: str) -> int | None:
        """Return how many images times views are ever let in at once, or None: as many as want."""
        quota = self._of(tenant)
        limits = ([quota.burst] if quota.rate else []) + ([quota.concurrent] if quota.concurrent else [])
        return min(limits, default=None)

    @asynccontextmanager
    async def admit(self, tenant: str, images: int, *, until: float | None = None) -> AsyncIterator[None]:
        """Let images times views in, and hold their place until they are answered.

        With `until`, a moment of the clock, who would be let in by then waits for it.

        Raises:
            RateLimited: they are not let in now; says when they may be.
            LimitExceeded: they never are.
        """
        quota = self._of(tenant)
        if quota == _NONE:
            yield
            return
        most = self.most(tenant)
        if most is not None and images > most:
            raise LimitExceeded(
                f"The call holds {images} images times views; at most {most} of the tenant are let in at once."
            )
        lease = Lease(id=f"{self._holder}-{next(self._numbers)}", images=images)
        held = True  # for all that is known until the store has said so
        try:
            told = await self._enter(tenant, quota, lease, until)
            held = told.let_in
            if not told.let_in:
                raise self._refusal(tenant, told, quota)
            if quota.concurrent:
                self._at_work.setdefault(tenant, {})[lease] = self._clock() + _RENEW_S
            yield
        finally:
            if quota.concurrent and held:
                self._leave(tenant, lease)

    def headers(self, tenant: str) -> dict[str, str]:
        """Return what an answer's headers say of the tenant's quota, if the settings want them.

        As draft-ietf-httpapi-ratelimit-headers has them; `images` counts images times views.
        """
        told, quota = self._told.get(tenant), self._of(tenant)
        if told is None or not quota.rate:
            return {}
        missing = max(0.0, quota.burst - told.tokens)
        return {
            "RateLimit-Policy": f'"images";q={quota.burst};w={math.ceil(quota.burst / quota.rate)}',
            "RateLimit": f'"images";r={math.floor(told.tokens)};t={math.ceil(missing / quota.rate)}',
        }

    async def renew(self) -> None:
        """Let the leases of what is still at work last on; to be called every second."""
        for tenant, leases in list(self._at_work.items()):
            due = [lease for lease, at in leases.items() if at <= self._clock()]
            if due:
                leases.update(dict.fromkeys(due, self._clock() + _RENEW_S))
                self._own.renew(tenant, due, lasts_s=LEASE_S)
                with suppress(StoreDown):  # then they may end before their work does
                    await self._store.renew(tenant, due, lasts_s=LEASE_S)

    async def aclose(self) -> None:
        """Give back what is held."""
        if self._giving_back is not None:
            self._giving_back.cancel()
            await asyncio.gather(self._giving_back, return_exceptions=True)
        await self._give_back()

    def _of(self, tenant: str) -> Quota:
        return self._special.get(tenant.partition("/")[0], self._usual)

    async def _enter(self, tenant: str, quota: Quota, lease: Lease, until: float | None) -> Allowance:
        """Return what is said to a lease that wants in, in the end."""
        while True:
            told = await self._ask(tenant, quota, lease)
            self._note(tenant, told)
            wait_s = told.wait_s or _CROWDED_S
            if told.let_in or until is None or self._clock() + wait_s > until:
                return told
            await asyncio.sleep(wait_s)

    async def _ask(self, tenant: str, quota: Quota, lease: Lease) -> Allowance:
        over = self._over.pop(tenant, [])
        try:
            return await self._store.admit(tenant, quota, lease.images, lease, lasts_s=LEASE_S, over=over)
        except StoreDown:
            return self._own.admit(tenant, quota, lease.images, lease, lasts_s=LEASE_S, over=over)

    def _note(self, tenant: str, told: Allowance) -> None:
        if self._settings.ratelimit_headers:
            self._told[tenant] = told
            self._told.move_to_end(tenant)
            if len(self._told) > _MOST_TOLD:
                self._told.popitem(last=False)

    def _leave(self, tenant: str, lease: Lease) -> None:
        leases = self._at_work.get(tenant, {})
        leases.pop(lease, None)
        if not leases:
            self._at_work.pop(tenant, None)
        self._own.release(tenant, [lease])
        self._over.setdefault(tenant, []).append(lease)
        if self._giving_back is None or self._giving_back.done():
            self._giving_back = asyncio.create_task(self._give_back(_GATHER_S), name="dmn-quotas")

    async def _give_back(self, after_s: float = 0.0) -> None:
        """Release leases that are over and that no call has taken along."""
        await asyncio.sleep(after_s)
        while self._over:
            tenant, leases = self._over.popitem()
            with suppress(StoreDown):  # then they end by themselves
                await self._store.release(tenant, leases)

    def _refusal(self, tenant: str, told: Allowance, quota: Quota) -> RateLimited:
        wait_s, why = told.wait_s, f"The tenant has sent more than its {quota.rate:g} images times views a second."
        if not wait_s:
            wait_s = _CROWDED_S
            why = f"{told.held} of the tenant's images times views are at work; {quota.concurrent} at most may be."
        return RateLimited(why, retry_after_s=wait_s, headers=self.headers(tenant))


def quota_of(settings: Settings, tenant: str) -> Quota:
    """Return a tenant's quota: the settings' own, or those that they have for this tenant."""
    own = settings.of(tenant)
    burst = own.tenant_burst or max(own.max_images, math.ceil(own.tenant_rate))
    return Quota(rate=own.tenant_rate, burst=burst if own.tenant_rate else 0, concurrent=own.tenant_concurrent)
