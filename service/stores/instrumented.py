"""A store whose every call is timed and whose failures are counted, and which is left alone while it is away."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, cast

from service.errors import StoreAway, StoreDown
from service.telemetry import logs
from service.telemetry.metrics import Metrics

from .protocol import MemoryStore

PAUSE_S = 1.0
"""A store that did not answer is not asked again for so long: callers would all wait out its timeout."""

_LATER_S = 10.0

ADDING = frozenset(("push", "count", "replace", "add_shots", "keep_snapshot"))
"""Operations that make a memory larger."""


def watched(
    store: MemoryStore,
    metrics: Metrics,
    clock: Callable[[], float],
    has_room: Callable[[], bool] = lambda: True,
) -> MemoryStore:
    """Return the same store with `dmn_store_duration_seconds` and `dmn_store_errors_total` kept for each operation.

    Their series start at once, each at 0. `clock` is monotonic, in seconds. For `PAUSE_S` after it did not answer,
    every call raises `StoreAway` at once. Where there is no room, what adds to a memory raises `StoreDown`: a server
    whose disk is full acknowledges the write that found it so, and has it in its own memory alone.
    """
    for op in (name for name in vars(MemoryStore) if not name.startswith("_") and name != "aclose"):
        metrics.store_seconds.labels(op)
        metrics.store_errors.labels(op)
    return cast("MemoryStore", _Watched(store, metrics, clock, has_room))


class _Watched:
    def __init__(
        self, store: MemoryStore, metrics: Metrics, clock: Callable[[], float], has_room: Callable[[], bool]
    ) -> None:
        self._has_room = has_room
        self._store, self._metrics, self._clock = store, metrics, clock
        self._away: StoreAway | None = None
        self._ask_at = 0.0
        self._finding_out = False

    def __getattr__(self, op: str) -> Callable[..., Awaitable[Any]]:
        call = getattr(self._store, op)

        @wraps(call)
        async def timed(*args: object, **kwargs: object) -> object:
            if self._away is not None and (self._finding_out or self._clock() < self._ask_at):
                raise StoreAway(self._away.detail, retry_after_s=PAUSE_S)
            if op in ADDING and not self._has_room():
                self._metrics.store_errors.labels(op).inc()
                raise StoreDown("The store's disk has too little room, and nothing is added.", retry_after_s=_LATER_S)
            # Of many who come after the pause one finds out; the others would wait out the timeout too.
            self._finding_out = self._away is not None
            try:
                with self._metrics.store_seconds.labels(op).time():
                    answer = await call(*args, **kwargs)
            except StoreDown as error:
                self._metrics.store_errors.labels(op).inc()
                if isinstance(error, StoreAway):
                    self._leave_alone(error)
                raise
            finally:
                self._finding_out = False
            self._welcome_back()
            return answer

        setattr(self, op, timed)
        return timed

    async def aclose(self) -> None:
        await self._store.aclose()

    def _leave_alone(self, error: StoreAway) -> None:
        if self._away is None:
            logs.event(logs.STORE_AWAY, level=logging.WARNING, detail=error.detail)
        self._away, self._ask_at = error, self._clock() + PAUSE_S

    def _welcome_back(self) -> None:
        if self._away is not None:
            logs.event(logs.STORE_BACK)
        self._away = None
