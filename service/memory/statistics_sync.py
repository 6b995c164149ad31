"""Synchronises class statistics with the store, and so with other services."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from uuid import uuid4

from core.adaptive.statistics import Statistics
from service.concurrency.worker_thread import Worker
from service.domain.memory import Count, Stamp
from service.errors import StoreDown
from service.stores.protocol import MemoryStore, ReloadNeeded

from .convert import decode, encode
from .statistics import Tally

EXCHANGE_S = 5.0
"""How often what was counted is written, and what others counted is read."""

_MANY = 8
_IDLE_S = 60.0


class Ledger:
    """Writes tallies to the store and reads what others counted; nothing of it holds a tenant's memory."""

    def __init__(self, store: MemoryStore, worker: Worker, clock: Callable[[], float]) -> None:
        self._store, self._worker, self._clock = store, worker, clock

    async def exchange(self, tally: Tally, at: Stamp) -> bool:
        """Write what was counted, and take in what other counters have by now; return whether anything of it is new.

        Raises:
            ReloadNeeded: the tenant is in another epoch.
            StoreDown: the store does not answer; what was counted stays to be written.
        """
        async with tally.turn:
            tally.exchanged_at = self._clock()
            await self._write(tally, at)
            counts, idle = await self._store.counts(tally.tenant, at, {**tally.seen, tally.counter: tally.seq})
            if tally.seq and tally.counter not in idle:
                tally.rename()
            read = {name: count for name, count in counts.items() if name != tally.counter}
            new = bool(read) or not tally.others.keys() <= idle.keys()
            if new:
                fresh = await self._worker.run(_decoded, read, tally)
                tally.take_in(fresh, {name: count.seq for name, count in read.items()}, idle)
            await self._fold(tally, at, idle)
        return new

    async def leave(self, tally: Tally, at: Stamp) -> int:
        """Write what a memory that is dropped has counted; return how many images had to be given up.

        These are of another epoch.

        Raises:
            StoreDown: as for `exchange`.
        """
        with suppress(ReloadNeeded):
            async with tally.turn:
                await self._write(tally, at)
        return tally.waiting.images

    async def _write(self, tally: Tally, at: Stamp) -> None:
        """Write what the store does not have; under another name if what it had was put together with others'."""
        if not tally.waiting.images:
            return
        await self._worker.run(tally.settle)
        tally.send()
        try:
            seq = await self._send(tally, at)
            if not seq:
                tally.rename()
                seq = await self._send(tally, at)
            tally.land(seq)
        except BaseException:
            tally.turn_back()
            raise

    async def _send(self, tally: Tally, at: Stamp) -> int:
        whole, changed = tally.written + tally.flying, tally.flying.counts > 0
        told = await self._worker.run(encode, whole, tally.class_ids, changed)
        return await self._store.count(tally.tenant, at, tally.counter, tally.seq, told)

    async def _fold(self, tally: Tally, at: Stamp, idle: Mapping[str, float]) -> None:
        """Put idle counters together where there are many: processes that are gone leave theirs behind."""
        asleep = {name for name, seconds in idle.items() if seconds > _IDLE_S and name != tally.counter}
        if len(idle) > _MANY and len(asleep) > 1:
            known = {name: seq for name, seq in tally.seen.items() if name not in asleep}
            with suppress(StoreDown):
                counts, _ = await self._store.counts(tally.tenant, at, {**known, tally.counter: tally.seq})
                whole = {name: counts[name] for name in asleep & counts.keys()}
                await self._store.fold(tally.tenant, at, whole, uuid4().hex[:12])


def _decoded(counts: Mapping[str, Count], tally: Tally) -> dict[str, Statistics]:
    return {name: decode(count.statistics, tally.class_ids, tally.written.sums) for name, count in counts.items()}
