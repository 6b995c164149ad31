"""Cached responses of the in-process store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from service.domain.records import Remembered


class CachedResponses:
    """A tenant's answers by idempotency key, the oldest dropped first when time or room is up."""

    def __init__(self, clock: Callable[[], float], keep_s: float, keep_bytes: int) -> None:
        self._clock, self._keep_s, self._room = clock, keep_s, keep_bytes
        self._kept: OrderedDict[str, tuple[float, Remembered]] = OrderedDict()

    def get(self, key: str) -> Remembered | None:
        self._drop_old()
        found = self._kept.get(key)
        return None if found is None else found[1]

    def put(self, key: str, answer: Remembered) -> None:
        self._drop(key)
        self._kept[key] = (self._clock() + self._keep_s, answer)
        self._room -= len(answer.body)
        while self._room < 0:
            self._drop(next(iter(self._kept)))

    def _drop_old(self) -> None:
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self._room += len(found[1].body)
