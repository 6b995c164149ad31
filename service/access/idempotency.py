"""One answer for one key: retries of a call get the first answer back, and do nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, suppress

from service.concurrency.keyed_lock import KeyedLocks
from service.domain.records import Remembered
from service.errors import DeadlineExceeded, IdempotencyConflict, InvalidRequest, StoreDown
from service.stores.protocol import MemoryStore

_LONGEST_KEY = 255
_FIRST_FAILURE = 300


class Ledger:
    """Remembers answers in the store; calls with one key at the same time wait for the first."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._under_way = KeyedLocks()

    async def once(
        self,
        tenant: str,
        key: str | None,
        digest: str,
        answer: Callable[[], Awaitable[Remembered]],
        *,
        wait_s: float,
    ) -> Remembered:
        """Return the answer kept for a key, or give one and keep it if it is a success.

        Raises:
            InvalidRequest: the key is malformed.
            DeadlineExceeded: another call with this key is not done after `wait_s` seconds.
            IdempotencyConflict: the key was used for a request of another digest.
        """
        if key is None:
            return await answer()
        if not key.isascii() or not key.isprintable() or not 0 < len(key) <= _LONGEST_KEY:
            raise InvalidRequest(f"Idempotency-Key must have 1 to {_LONGEST_KEY} printable ASCII characters.")
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(wait_s):
                    await stack.enter_async_context(self._under_way.hold((tenant, key)))
            except TimeoutError as error:
                raise DeadlineExceeded("Another call with this Idempotency-Key is still under way.") from error
            return await self._once(tenant, key, digest, answer)

    async def _once(
        self, tenant: str, key: str, digest: str, answer: Callable[[], Awaitable[Remembered]]
    ) -> Remembered:
        known = None
        with suppress(StoreDown):  # a call that can be answered without the store is; repeating it changes nothing
            known = await self._store.recall(tenant, key)
        if known is None:
            known = await answer()
            if known.final and known.status < _FIRST_FAILURE:
                with suppress(StoreDown):  # what was done is done
                    await self._store.remember(tenant, key, known)
        elif known.digest != digest:
            raise IdempotencyConflict(f"The Idempotency-Key {key!r} was used for another request.")
        return known


def digest_of(parts: Iterable[bytes | str]) -> str:
    """Return a hash of what makes a request, part by part."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "big"))
        whole.update(data)
    return whole.hexdigest()
