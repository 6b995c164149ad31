"""A cache of API keys over the store; one look-up finds all keys that are asked for at once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from service.domain.records import StoredKey
from service.errors import StoreDown

FRESH_S = 0.5
"""How old what is known of a key may be. A revoked one has to be refused within a second, by every process."""

_MOST_KNOWN = 10_000
_TOGETHER = 256
"""Keys that are looked up in one round trip."""

Find = Callable[[Sequence[str]], Awaitable[Sequence[StoredKey | StoreDown | None]]]
"""Looks up keys by id, where they are kept; as `MemoryStore.find_keys`."""


class Keyring:
    """What is kept of keys, as it was not long ago, also that there is no such key.

    Keys that are asked for at the same time are looked up together, one round trip after the other: however many
    wrong ones come in, the store is asked one thing at a time.
    """

    def __init__(self, find: Find, clock: Callable[[], float]) -> None:
        self._find, self._clock = find, clock
        self._known: OrderedDict[str, tuple[float, StoredKey | None]] = OrderedDict()
        self._asked: dict[str, asyncio.Future[StoredKey | None]] = {}
        self._asking: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._known)

    async def find(self, id_: str) -> StoredKey | None:
        """Return what is kept of a key, or None; as it was `FRESH_S` ago or later.

        Raises:
            StoreDown: it cannot be looked up.
        """
        read_at, known = self._known.get(id_, (None, None))
        if read_at is not None and self._clock() - read_at <= FRESH_S:
            return known
        # Not one that is being looked up already: what is read of it may be older than this call.
        future = self._asked.setdefault(id_, asyncio.get_running_loop().create_future())
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="dmn-keys")
        return await asyncio.shield(future)

    async def aclose(self) -> None:
        """Look up nothing any more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _ask(self) -> None:
        try:
            while self._asked:
                ids = list(islice(self._asked, _TOGETHER))
                await self._answer({id_: self._asked.pop(id_) for id_ in ids})
        finally:
            self._asking = None
            for future in self._asked.values():
                future.cancel()

    async def _answer(self, asked: dict[str, asyncio.Future[StoredKey | None]]) -> None:
        read_at = self._clock()
        try:
            found = await self._find(list(asked))
        except asyncio.CancelledError:
            for future in asked.values():
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            found = [error] * len(asked)  # type: ignore[list-item]
        for (id_, future), one in zip(asked.items(), found, strict=True):
            if isinstance(one, Exception):
                future.set_exception(one)
                future.exception()  # heard of, even where nobody waits any more
            else:
                future.set_result(one)
                self._note(id_, read_at, one)

    def _note(self, id_: str, read_at: float, found: StoredKey | None) -> None:
        self._known.pop(id_, None)
        self._known[id_] = read_at, found
        while len(self._known) > _MOST_KNOWN or read_at - next(iter(self._known.values()))[0] > FRESH_S:
            self._known.popitem(last=False)
