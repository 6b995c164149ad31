"""Services in one process that share a store and a clock; what falls due by itself is done when a test does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import TypeVar

import pytest

from core.encoders.protocol import Encoder
from service import wiring
from service.domain.memory import StoredMemory, StoredShot, StoredSlot
from service.services import Rooms
from service.settings import Settings
from service.stores import factory
from service.stores.in_process import InProcessStore
from service.tenants import reindex
from tests.support.clock import Clock
from tests.support.fakes import FakeEncoder

PATIENCE_S = 60.0
"""How long anything may take that is no fault: no test asserts it."""


class Replicas:
    """Services that share one store and one clock, without a housekeeper."""

    def __init__(self, stack: AsyncExitStack, clock: Clock, store: InProcessStore) -> None:
        self.clock, self.store, self._stack = clock, store, stack

    async def open(self, encoder: Encoder | None = None, **settings: object) -> Rooms:
        """Open one more service; it is closed with all others."""
        whole = Settings(**{"store": "memory", "drain_delay_s": 0, **settings})  # type: ignore[arg-type]
        return await self._stack.enter_async_context(wiring.open_rooms(whole, encoder or FakeEncoder()))

    async def memory(self, tenant: str = "zoo") -> StoredMemory:
        """Return what the store holds of a tenant."""
        stored = await self.store.load(tenant, images=True)
        assert stored is not None
        return stored

    async def slots(self, tenant: str = "zoo") -> dict[str, dict[str, StoredSlot]]:
        """Return the slots by class id and id, of classes that have any."""
        banks = (await self.memory(tenant)).slots
        return {class_id: {slot.id: slot for slot in bank} for class_id, bank in banks.items() if len(bank)}

    async def shots(self, tenant: str = "zoo") -> dict[str, StoredShot]:
        """Return the shots by id."""
        return {shot.id: shot for shots in (await self.memory(tenant)).shots.values() for shot in shots}

    async def reasons(self, tenant: str = "zoo") -> list[str]:
        """Return the reason of every snapshot, the oldest first."""
        return [info.reason for info in await self.store.snapshots(tenant)]


def in_process_store(clock: Clock) -> InProcessStore:
    """Return an empty store that reads this clock."""
    return InProcessStore(clock=clock, remember_s=1.0, remember_bytes=1)


R = TypeVar("R", bound=Replicas)


@asynccontextmanager
async def replicas(kind: type[R], clock: Clock | None = None, store: InProcessStore | None = None) -> AsyncIterator[R]:
    """Yield what opens services on this store and clock, and close them."""
    clock = clock or Clock()
    store = store or in_process_store(clock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiring, "time", SimpleNamespace(monotonic=clock, time=clock))
        patch.setattr(factory, "InProcessStore", lambda **_: store)
        patch.setattr(reindex, "_SOON_S", PATIENCE_S)
        with without_housekeeper():
            async with AsyncExitStack() as stack:
                yield kind(stack, clock, store)


@contextmanager
def without_housekeeper() -> Iterator[None]:
    """Open services that do nothing by themselves: no exchange, no canary, no schedule."""

    async def nothing(_: Rooms) -> None:
        await asyncio.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiring, "keep_house", nothing)
        yield
