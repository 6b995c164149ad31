"""Class statistics in Redis: what each counter of a tenant's present life has counted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from service.domain.memory import Count, StoredStatistics
from service.stores.protocol import ReloadNeeded

from .keys import Keys

SHARED = ""
"""Where a counter's hash has what is of no class."""

_PART_BYTES = 1 << 20
_ROWS = 256
_UNFINISHED_S = 3600

Run = Callable[[str, Sequence[str], Sequence[str | bytes | float]], Awaitable[Any]]
"""Runs a script by name, with keys and arguments."""

Do = Callable[[Any], Awaitable[Any]]
"""Awaits a command, and says what a fault of it means."""


class Counters:
    """Reads and writes counters in slices of at most 1 MB; one counter is written by one worker alone.

    `clock` is wall time in seconds, the same for all workers.
    """

    def __init__(self, client: Any, run: Run, do: Do, clock: Callable[[], float]) -> None:
        self._client, self._run, self._do, self._clock = client, run, do, clock

    async def write(
        self, keys: Keys, epoch: int, life: int, name: str, seq: int, told: StoredStatistics, *, finish: bool = True
    ) -> int:
        """Write rows of a counter; with `finish` it is then there to be read. Return the number of the write.

        0 if the counter was folded since.

        Raises:
            ReloadNeeded: the epoch is over.
        """
        touched = (keys.config, keys.counters(life), keys.counter(life, name), keys.lives)
        parts, wrote = list(_parts([*told.rows.items(), (SHARED, told.shared)])), 0
        for at, part in enumerate(parts, 1):
            last = finish and at == len(parts)
            flat = [value for row in part for value in row]
            wrote = await self._run(
                "count.lua", touched, (epoch, life, name, seq, int(last), _UNFINISHED_S, int(self._clock()), *flat)
            )
            if wrote < 0:
                raise ReloadNeeded(name)
            if not wrote:
                return 0
        return int(wrote)

    async def plant(self, keys: Keys, life: int, name: str, statistics: StoredStatistics) -> None:
        """Write what a life begins with, before anybody reads it."""
        await self._do(self._client.sadd(keys.lives, life))
        for part in _parts([*statistics.rows.items(), (SHARED, statistics.shared)]):
            await self._do(self._client.hset(keys.counter(life, name), mapping=dict(part)))
        await self._do(self._client.hset(keys.counters(life), name, f"1 {int(self._clock())}"))

    async def read(self, keys: Keys, life: int, known: Mapping[str, int]) -> tuple[dict[str, Count], dict[str, float]]:
        """Return what counters have counted, but for those of whom the write is known; and how long each is idle."""
        heads, found = await self._heads(keys, life), dict[str, Count]()
        for name, (seq, idle_s) in heads.items():
            if known.get(name) != seq:
                told = await self._statistics(keys.counter(life, name))
                found[name] = Count(seq=seq, statistics=told, idle_s=idle_s)
        if found and not heads.keys() <= (await self._heads(keys, life)).keys():
            # Some were folded meanwhile: what they had may be in neither.
            return await self.read(keys, life, known)
        return found, {name: idle_s for name, (_, idle_s) in heads.items()}

    async def _heads(self, keys: Keys, life: int) -> dict[str, tuple[int, float]]:
        """Return the number of each counter's latest write, and how long ago it was (s)."""
        index, now = await self._do(self._client.hgetall(keys.counters(life))), self._clock()
        split = {name.decode(): head.split() for name, head in index.items()}
        return {name: (int(seq), max(0.0, now - int(at))) for name, (seq, at) in split.items()}

    async def fold(self, keys: Keys, epoch: int, life: int, counts: Mapping[str, Count], into: str) -> bool:
        """Put the sum of some counters in their place; False if one of them has counted on.

        Raises:
            ReloadNeeded: the epoch is over.
        """
        whole = StoredStatistics.total(count.statistics for count in counts.values())
        await self.write(keys, epoch, life, into, 0, whole, finish=False)
        touched = (keys.config, keys.counters(life), *(keys.counter(life, name) for name in (into, *counts)))
        moves = [value for name, count in counts.items() for value in (name, count.seq)]
        told = await self._run("fold.lua", touched, (epoch, into, int(self._clock()), *moves))
        if told <= 0:
            await self._do(self._client.unlink(keys.counter(life, into)))
        if told < 0:
            raise ReloadNeeded(into)
        return bool(told)

    async def sweep(self, keys: Keys, before: int, read: int | None) -> None:
        """Remove lives that began before an epoch, but for the one that is read."""
        for life in map(int, await self._do(self._client.smembers(keys.lives))):
            if life >= before or life == read:
                continue
            await self.remove(keys, life)

    async def remove(self, keys: Keys, life: int) -> None:
        """Remove what was counted in a life that nothing reads any more."""
        for name in await self.names(keys, life):
            await self._do(self._client.unlink(keys.counter(life, name)))
        await self._do(self._client.unlink(keys.counters(life)))
        await self._do(self._client.srem(keys.lives, life))

    async def forget(self, keys: Keys, life: int, class_ids: Sequence[str]) -> None:
        """Remove the rows of classes that are gone; nobody writes them any more."""
        for name in await self.names(keys, life):
            await self._do(self._client.hdel(keys.counter(life, name), *class_ids))

    async def names(self, keys: Keys, life: int) -> list[str]:
        """Return the names of a life's counters."""
        return [name.decode() for name in await self._do(self._client.hkeys(keys.counters(life)))]

    async def _statistics(self, key: str) -> StoredStatistics:
        ids = [class_id.decode() for class_id in await self._do(self._client.hkeys(key))]
        shared = await self._do(self._client.hget(key, SHARED)) or b""
        rows: dict[str, bytes] = {}
        ids = [class_id for class_id in ids if class_id != SHARED]
        for start in range(0, len(ids), _ROWS):
            part = ids[start : start + _ROWS]
            found = await self._do(self._client.hmget(key, part))
            rows |= {own: row for own, row in zip(part, found, strict=True) if row is not None}
        return StoredStatistics(rows=rows, shared=shared)


def _parts(rows: Sequence[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Yield rows in parts of at most 1 MB; a larger row makes a part of its own."""
    part: list[tuple[str, bytes]] = []
    held = 0
    for row in rows:
        if part and held + len(row[1]) > _PART_BYTES:
            yield part
            part, held = [], 0
        part.append(row)
        held += len(row[1])
    yield part
