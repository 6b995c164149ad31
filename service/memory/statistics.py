"""Class statistics of hot memories: what was counted here, what others counted, and how the two come together.

Every hot memory counts under a name of its own and writes what it has counted, whole rows of it, every few seconds. A
memory's statistics are the sum of all counters of its life, so workers need no lock, and writing again changes
nothing. A process that dies takes what it counted in the last seconds with it; slots are never lost so.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from core.adaptive.statistics import Counted, Running, Statistics
from core.errors import IncompatibleMemory
from service.concurrency.worker_thread import Worker
from service.errors import StoreDown
from service.stores.protocol import Count, MemoryStore, ReloadNeeded, Stamp, StoredStatistics

EXCHANGE_S = 5.0
"""How often what was counted is written, and what others counted is read."""

RECENT = 4096
"""Images that a hot memory knows again, so that one that is sent twice is counted once."""

_MANY = 8
_IDLE_S = 60.0
_SHARED = ("images", "total", "second", "agreed", "sure")
"""What is of no class, in the order in which it is stored."""


@dataclass(slots=True)
class Tally:
    """What one hot memory has counted, and what other counters had at their writes `seen`.

    `written` is what the store has of this counter by its write `seq`, `flying` is on its way there, and `waiting` was
    counted since. One task at a time has its `turn` with the store; the worker counts meanwhile.
    """

    tenant: str
    class_ids: tuple[str, ...]
    written: Statistics
    flying: Statistics
    waiting: Running
    others: dict[str, Statistics]
    seen: dict[str, int]
    exchanged_at: float
    counter: str = field(default_factory=lambda: uuid4().hex[:12])
    seq: int = 0
    recent: OrderedDict[str, None] = field(default_factory=OrderedDict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> Statistics:
        """What all counters have counted."""
        with self.guard:
            every = {**self.others, self.counter: self.written}
            new = self.flying, self.waiting.whole
        # In the order in which a store adds them up, so that what it has gives the same sums to the last bit.
        first, *rest = (part for _, part in sorted(every.items()))
        for part in (*rest, *new):
            first = first + part
        return first

    @property
    def none(self) -> Statistics:
        """Those of no image."""
        return Statistics.zeros(*self.written.sums.shape, device=self.written.sums.device)

    @property
    def nbytes(self) -> int:
        """Bytes held, with as many loose rows as there may be."""
        return 2 * self.written.nbytes + self.waiting.nbytes + sum(part.nbytes for part in self.others.values())

    def add(self, counted: Counted) -> None:
        """Count some images."""
        with self.guard:
            self.waiting = self.waiting.put(counted)

    def settle(self) -> None:
        """Add up what waits, which takes a worker; `send` then has next to nothing left to add."""
        with self.guard:
            self.waiting = self.waiting.settled()

    def send(self) -> None:
        """Put what waits on its way to the store."""
        with self.guard:
            self.flying, self.waiting = self.waiting.whole, Running.of(self.none)

    def land(self, seq: int) -> None:
        """Take what was on its way for written, by a write of that number."""
        with self.guard:
            self.written, self.flying, self.seq = self.written + self.flying, self.none, seq

    def turn_back(self) -> None:
        """Let what was on its way wait again."""
        with self.guard:
            self.waiting, self.flying = Running.of(self.flying + self.waiting.whole), self.none

    def rename(self) -> None:
        """Count on under another name; what was written is another's until it is read where it is now."""
        with self.guard:
            self.others = {**self.others, self.counter: self.written}
            self.counter, self.seq, self.written = uuid4().hex[:12], 0, self.none

    def take_in(self, fresh: Mapping[str, Statistics], seen: Mapping[str, int], names: Container[str]) -> None:
        """Take in what other counters have by their writes `seen`; those that are not among `names` are gone."""
        with self.guard:
            self.others = {name: part for name, part in {**self.others, **fresh}.items() if name in names}
            self.seen = {name: seq for name, seq in {**self.seen, **seen}.items() if name in names}

    def is_new(self, digests: Sequence[str]) -> list[bool]:
        """Return of each image whether it was not counted lately, nor earlier among these."""
        told, met = [], set()
        for digest in digests:
            told.append(digest not in self.recent and digest not in met)
            met.add(digest)
        return told

    def remember(self, digests: Sequence[str]) -> None:
        """Know images again that were counted."""
        self.recent.update(dict.fromkeys(digests))
        while len(self.recent) > RECENT:
            self.recent.popitem(last=False)


def begin(
    tenant: str,
    class_ids: Sequence[str],
    counts: Mapping[str, Count],
    like: Tensor,
    now: float,
    own: tuple[str, int] | None = None,
) -> Tally:
    """Return a tally that has counted nothing yet, for class weights `like` (c, d).

    It goes on with the counter `own`, a name and the number of its last write, where the store still has that as it was
    left: a memory that comes and goes would else leave a counter behind each time, for everyone to read and to hold.

    Raises:
        IncompatibleMemory: what is stored is of another size.
    """
    none = Statistics.zeros(*like.shape, device=like.device)
    others = {name: decode(count.statistics, class_ids, like) for name, count in counts.items()}
    seen = {name: count.seq for name, count in counts.items()}
    tally = Tally(
        tenant=tenant,
        class_ids=tuple(class_ids),
        written=none,
        flying=none,
        waiting=Running.of(none),
        others=others,
        seen=seen,
        exchanged_at=now,
    )
    if own is not None and seen.get(own[0]) == own[1]:
        tally.counter, tally.seq = own
        tally.written = others.pop(tally.counter)
        del seen[tally.counter]
    return tally


def encode(statistics: Statistics, class_ids: Sequence[str], which: Tensor | None = None) -> StoredStatistics:
    """Return statistics as a store keeps them: rows of all classes, or of those told by `which`."""
    rows = torch.cat((statistics.counts[:, None], statistics.sums), dim=1).cpu().numpy().astype("<f4")
    told = range(len(class_ids)) if which is None else which.nonzero()[:, 0].tolist()
    shared = torch.cat([getattr(statistics, name).reshape(-1) for name in _SHARED])
    return StoredStatistics(
        rows={class_ids[at]: rows[at].tobytes() for at in told}, shared=shared.cpu().numpy().astype("<f4").tobytes()
    )


def shared_entries(dim: int) -> int:
    """Return how many numbers of no class statistics have."""
    blank = Statistics.zeros(1, dim, device="meta")
    return sum(getattr(blank, name).numel() for name in _SHARED)


def dim_of_shared(entries: int) -> int:
    """Return the feature size D of which statistics have so many numbers of no class."""
    # D + D^2 of them depend on it.
    return (math.isqrt(4 * (entries - shared_entries(0)) + 1) - 1) // 2


def decode(stored: StoredStatistics, class_ids: Sequence[str], like: Tensor) -> Statistics:
    """Return stored statistics for class weights `like` (c, d); zero for a class without a row.

    Raises:
        IncompatibleMemory: they are of another size.
    """
    blank = Statistics.zeros(*like.shape, device=like.device)
    if not stored.shared:
        return blank
    sizes = {name: getattr(blank, name).numel() for name in _SHARED}
    flat = np.frombuffer(stored.shared, "<f4")
    table = np.zeros((len(class_ids), 1 + like.shape[1]), np.float32)
    rows = {at: np.frombuffer(stored.rows[own], "<f4") for at, own in enumerate(class_ids) if own in stored.rows}
    if len(flat) != sum(sizes.values()) or any(len(row) != table.shape[1] for row in rows.values()):
        raise IncompatibleMemory(f"Stored class statistics are not those of features of {like.shape[1]} entries.")
    for at, row in rows.items():
        table[at] = row
    parts = torch.from_numpy(flat.astype(np.float32)).to(like).split(list(sizes.values()))
    shared = {name: part.reshape(getattr(blank, name).shape) for name, part in zip(_SHARED, parts, strict=True)}
    by_class = torch.from_numpy(table).to(like)
    return Statistics(counts=by_class[:, 0].clone(), sums=by_class[:, 1:].clone(), **shared)


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
