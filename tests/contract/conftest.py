"""The table of stores: every test of this folder runs on each row."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest

from service.stores.base import MemoryStore
from service.stores.memory import LOG_LENGTH, InProcessStore


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


TABLE = {"in-process": Row(open=_in_process, log_length=LOG_LENGTH)}

REMEMBER_S = 60.0
REMEMBER_BYTES = 100


@pytest.fixture(params=TABLE.values(), ids=TABLE.keys(), scope="session")
def row(request: pytest.FixtureRequest) -> Row:
    """Return one row of the table; of the session, so that hypothesis may use it too."""
    found = request.param
    assert isinstance(found, Row)
    return found


@pytest.fixture
async def opened(row: Row) -> AsyncIterator[Opened]:
    """Yield an empty store that keeps answers for a minute, and 100 bytes of them."""
    async with row.open(REMEMBER_S, REMEMBER_BYTES) as opened:
        yield opened


@pytest.fixture
def store(opened: Opened) -> MemoryStore:
    """Return an empty store."""
    return opened.store
