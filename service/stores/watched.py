"""A store whose every call is timed and whose failures are counted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, cast

from ..errors import StoreDown
from ..metrics import Metrics
from .base import MemoryStore


def watched(store: MemoryStore, metrics: Metrics) -> MemoryStore:
    """Return the same store with `dmn_store_duration_seconds` and `dmn_store_errors_total` kept for each operation."""
    return cast("MemoryStore", _Watched(store, metrics))


class _Watched:
    def __init__(self, store: MemoryStore, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics

    def __getattr__(self, op: str) -> Callable[..., Awaitable[Any]]:
        call = getattr(self._store, op)

        @wraps(call)
        async def timed(*args: object, **kwargs: object) -> object:
            try:
                with self._metrics.store_seconds.labels(op).time():
                    return await call(*args, **kwargs)
            except StoreDown:
                self._metrics.store_errors.labels(op).inc()
                raise

        setattr(self, op, timed)
        return timed
