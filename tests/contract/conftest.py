"""The table of stores: every test of this folder runs on each row."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest

from service.stores.connection.pools import connect
from service.stores.in_process import LOG_LENGTH, InProcessStore
from service.stores.protocol import MemoryStore
from service.stores.redis.store import LOG_LENGTH as REDIS_LOG_LENGTH
from service.stores.redis.store import RedisStore
from tests.support.servers import BINARIES, cluster, server


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A store, and how time passes for it: `later(seconds)`. `replica` is the same store as another process has it.

    `now` is the time by which quotas go: the test's in this process, else the server's own.
    """

    store: MemoryStore
    later: Callable[[float], None]
    replica: MemoryStore
    now: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One store of the table: how it is opened empty, and how many slot changes it keeps for those behind."""

    open: Callable[[float, int], AbstractAsyncContextManager[Opened]]
    log_length: int


@asynccontextmanager
async def _in_process(remember_s: float, remember_bytes: int) -> AsyncIterator[Opened]:
    now = 1000.0

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    store = InProcessStore(clock=lambda: now, remember_s=remember_s, remember_bytes=remember_bytes)
    yield Opened(store=store, later=later, replica=store, now=lambda: now)
    await store.aclose()


def _served(url: str) -> Callable[[float, int], AbstractAsyncContextManager[Opened]]:
    """Return how a store is opened, empty, on real servers."""

    @asynccontextmanager
    async def opened(remember_s: float, remember_bytes: int) -> AsyncIterator[Opened]:
        now = 1000.0

        def later(seconds: float) -> None:
            nonlocal now
            now += seconds

        def made() -> RedisStore:
            client = connect(url, timeout_s=TIMEOUT_S)
            return RedisStore(client, clock=lambda: now, remember_s=remember_s, remember_bytes=remember_bytes)

        store, replica = made(), made()
        try:
            await store._client.flushall()
            yield Opened(store=store, later=later, replica=replica, now=time.monotonic)
        finally:
            await store.aclose()
            await replica.aclose()

    return opened


TABLE = {"in-process": Row(open=_in_process, log_length=LOG_LENGTH)}

REMEMBER_S = 60.0
REMEMBER_BYTES = 100

TIMEOUT_S = 60.0
"""How long a real server may take to answer: longer than a machine stands still."""

SERVED = {"embedded": ("valkey", server), "redis": ("redis", server), "cluster": ("valkey", cluster)}
"""Rows on real servers: which binary, and how many of it; the cluster has three primaries."""

ROWS = ("in-process", "embedded", *(pytest.param(name, marks=pytest.mark.slow) for name in ("redis", "cluster")))


@pytest.fixture(params=ROWS, scope="session")
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """Yield one row of the table; of the session, so that hypothesis may use it too."""
    if request.param in TABLE:
        yield TABLE[request.param]
        return
    name, run = SERVED[request.param]
    binary = BINARIES[name]
    if binary is None:
        pytest.skip(f"no {name} server is installed")
    with run(str(binary)) as running:
        yield Row(open=_served(running.url), log_length=REDIS_LOG_LENGTH)


@pytest.fixture
async def opened(row: Row) -> AsyncIterator[Opened]:
    """Yield an empty store that keeps answers for a minute, and 100 bytes of them."""
    async with row.open(REMEMBER_S, REMEMBER_BYTES) as opened:
        yield opened


@pytest.fixture
def store(opened: Opened) -> MemoryStore:
    """Return an empty store."""
    return opened.store
