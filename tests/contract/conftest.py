"""The table of stores: every test of this folder runs on each row."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from redis.asyncio import Redis

from service.stores.base import MemoryStore
from service.stores.embedded import find_binary
from service.stores.memory import LOG_LENGTH, InProcessStore
from service.stores.redis import LOG_LENGTH as REDIS_LOG_LENGTH
from service.stores.redis import RedisStore


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A store, and how time passes for it: `later(seconds)`."""

    store: MemoryStore
    later: Callable[[float], None]


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
    yield Opened(store=store, later=later)
    await store.aclose()


def _served(listening: Path) -> Callable[[float, int], AbstractAsyncContextManager[Opened]]:
    """Return how a store is opened, empty, on a real server that listens on a socket."""

    @asynccontextmanager
    async def opened(remember_s: float, remember_bytes: int) -> AsyncIterator[Opened]:
        now = 1000.0

        def later(seconds: float) -> None:
            nonlocal now
            now += seconds

        client = Redis.from_url(f"unix://{listening}")
        await client.flushall()
        store = RedisStore(client, clock=lambda: now, remember_s=remember_s, remember_bytes=remember_bytes)
        try:
            yield Opened(store=store, later=later)
        finally:
            await store.aclose()

    return opened


@contextmanager
def _server(binary: str) -> Iterator[Path]:
    """Run a server that keeps nothing, for the session."""
    with TemporaryDirectory(prefix="dmn-") as folder:
        listening = Path(folder) / "s.sock"
        arguments = ("--port", "0", "--unixsocket", str(listening), "--save", "", "--dir", folder)
        log = (Path(folder) / "log").open("wb")
        process = subprocess.Popen((binary, *arguments), stdout=log, stderr=log)
        try:
            _wait(process, listening)
            yield listening
        finally:
            process.terminate()
            process.wait(30)
            log.close()


def _wait(process: subprocess.Popen[bytes], path: Path) -> None:
    ends = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError), closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.connect(str(path))
            return
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < ends, "the server does not listen"
        time.sleep(0.02)  # no event tells that another process listens; bounded above


BINARIES = {"valkey": find_binary(), "redis": shutil.which("redis-server")}
"""Real servers: the one that the embedded store runs, and Debian's Redis where it is."""

TABLE = {"in-process": Row(open=_in_process, log_length=LOG_LENGTH)}

REMEMBER_S = 60.0
REMEMBER_BYTES = 100


@pytest.fixture(params=["in-process", *BINARIES], scope="session")
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """Yield one row of the table; of the session, so that hypothesis may use it too."""
    if request.param in TABLE:
        yield TABLE[request.param]
        return
    binary = BINARIES[request.param]
    if binary is None:
        pytest.skip(f"no {request.param} server is installed")
    with _server(str(binary)) as listening:
        yield Row(open=_served(listening), log_length=REDIS_LOG_LENGTH)


@pytest.fixture
async def opened(row: Row) -> AsyncIterator[Opened]:
    """Yield an empty store that keeps answers for a minute, and 100 bytes of them."""
    async with row.open(REMEMBER_S, REMEMBER_BYTES) as opened:
        yield opened


@pytest.fixture
def store(opened: Opened) -> MemoryStore:
    """Return an empty store."""
    return opened.store
