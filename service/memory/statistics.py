"""Class statistics of hot memories: what was counted here, what others counted, and how the two come together.

Every hot memory counts under a name of its own and writes what it has counted, whole rows of it, every few seconds. A
memory's statistics are the sum of all counters of its life, so workers need no lock, and writing again changes
nothing. A process that dies takes what it counted in the last seconds with it; slots are never lost so.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from torch import Tensor

from core.adaptive.statistics import Counted, Running, Statistics
from service.domain.memory import Count

from .convert import decode

RECENT = 4096
"""Images that a hot memory knows again, so that one that is sent twice is counted once."""


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
