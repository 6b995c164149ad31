"""What is seen to while nobody asks: each thing as often as it needs it, and whatever becomes of the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from core.encoders.protocol import Encoder
from core.memory.codec import encode_feature
from core.numerics import unit
from service import wiring
from service.domain.memory import StoredSlot
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import StoreAway
from service.inference.results import Question
from service.memory.hot_memory import HotMemory
from service.services import Rooms
from service.settings import Settings
from service.stores.in_process import InProcessStore
from service.stores.protocol import PushCandidate
from service.telemetry import logs
from service.tenants import configuration, maintenance
from service.tenants.maintenance import Housekeeper, keep_house
from tests.support.clock import Clock
from tests.support.fakes import FakeEncoder
from tests.support.replicas import PATIENCE_S, Replicas, replicas

SYNC_S, PAUSE_S, VERIFY_S, DAY_S = 0.2, 1.0, 300.0, 86_400.0
RED = class_id("red")
OPS = ("get", "load", "stamps", "sync", "push", "digests", "claim", "snapshots", "keep_snapshot")


class Store(InProcessStore):
    """The in-process store, which notes what is asked of it, and fails or waits where a test asks for it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=clock, remember_s=1.0, remember_bytes=1)
        self.asked: list[str] = []
        self.faults: dict[str, Exception] = {}
        self.before: Callable[[str], Awaitable[None]] | None = None
        for op in OPS:
            setattr(self, op, partial(self._ask, op, getattr(self, op)))

    def leave(self, *ops: str) -> None:
        """Be away, for some calls or for all."""
        self.faults = dict.fromkeys(ops or OPS, StoreAway("away"))

    async def _ask(self, op: str, call: Callable[..., Awaitable[Any]], *args: object, **kwargs: object) -> object:
        self.asked.append(op)
        if op in self.faults:
            raise self.faults[op]
        if self.before is not None:
            await self.before(op)
        return await call(*args, **kwargs)


class House(Replicas):
    """Services whose housekeeper comes when a test calls, and a store that can be away."""

    store: Store

    async def open(self, encoder: Encoder | None = None, **settings: object) -> Rooms:
        rooms = await super().open(encoder, **settings)
        for tenant in ("zoo", "farm"):
            await configuration.put_tenant(rooms, tenant, TenantConfig(classes=(ClassSpec(name="red"),), slots=9))
        return rooms

    async def learn(self, rooms: Rooms, id_: str, tenant: str = "zoo") -> str:
        """Ask for one image, and return what became of it; the memory is hot afterwards."""
        feature = unit(torch.randn(FakeEncoder.dim, generator=torch.Generator().manual_seed(sum(map(ord, id_)))))
        question = Question(views=feature[None], digest=id_, learn=True, explain=False)
        return (await rooms.desk.ask(tenant, question)).learned.outcome

    async def ids(self, tenant: str = "zoo") -> set[str]:
        stored = await self.store.load(tenant)
        assert stored is not None
        return set(stored.slots[RED].ids) if RED in stored.slots else set()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    clock = Clock()
    async with replicas(House, clock, Store(clock)) as house:
        yield house


@pytest.fixture
async def rooms(house: House) -> Rooms:
    return await house.open()


async def hot(rooms: Rooms, tenant: str = "zoo") -> HotMemory:
    async with rooms.archive.open(tenant) as opened:
        return opened


def tamper(memory: HotMemory) -> None:
    """Change the hot copy alone."""
    (bank,) = memory.snapshot.dynamic.classes
    wrong = replace(bank, entropies=tuple(nats + 0.1 for nats in bank.entropies))
    with torch.inference_mode():  # as the worker does
        memory.shelves.advance(replace(memory.snapshot, dynamic=replace(memory.snapshot.dynamic, classes=(wrong,))))


def repairs(rooms: Rooms) -> float | None:
    return rooms.metrics.registry.get_sample_value("dmn_memory_repairs_total")


# Delivering -----------------------------------------------------------------------------------------------------------


async def test_what_waits_for_the_store_is_delivered_when_it_is_back(house: House, rooms: Rooms) -> None:
    housekeeper = Housekeeper(rooms)
    for tenant in ("zoo", "farm"):
        assert await house.learn(rooms, "0", tenant) == "filled"
    house.store.leave()
    for tenant in ("zoo", "farm"):
        assert await house.learn(rooms, "1", tenant) == "pending"
    house.clock.advance(PAUSE_S)
    await housekeeper.tick()
    assert rooms.desk.pending == 2
    house.store.faults.clear()
    house.clock.advance(PAUSE_S)
    await housekeeper.tick()
    assert rooms.desk.pending == 0
    assert await house.ids("zoo") == await house.ids("farm") == {"0", "1"}


async def test_while_it_is_away_it_is_asked_no_more_than_once_a_tick(house: House, rooms: Rooms) -> None:
    housekeeper = Housekeeper(rooms)
    for tenant in ("zoo", "farm"):
        await house.learn(rooms, "0", tenant)
    house.store.leave()
    for tenant in ("zoo", "farm"):
        await house.learn(rooms, "1", tenant)
    for _ in range(3):
        house.clock.advance(PAUSE_S)
        house.store.asked.clear()
        await housekeeper.tick()
        assert len(house.store.asked) == 1


# Comparing ------------------------------------------------------------------------------------------------------------


async def test_hot_memories_are_compared_as_often_as_the_setting_says(house: House, rooms: Rooms) -> None:
    housekeeper = Housekeeper(rooms)
    for tenant in ("zoo", "farm"):
        await house.learn(rooms, "0", tenant)
    for n in range(3):
        tamper(await hot(rooms, "farm"))
        house.clock.advance(VERIFY_S - 1.0)
        await housekeeper.tick()
        assert repairs(rooms) == n
        house.clock.advance(1.0)
        await housekeeper.tick()
        assert repairs(rooms) == n + 1
        assert rooms.archive.tenants == ["zoo"]


async def test_they_are_never_compared_where_that_is_the_setting(house: House) -> None:
    rooms = await house.open(verify_s=0)
    await house.learn(rooms, "0")
    tamper(await hot(rooms))
    for _ in range(3):
        house.clock.advance(VERIFY_S)
        await Housekeeper(rooms).tick()
    assert repairs(rooms) == 0


# Snapshots ------------------------------------------------------------------------------------------------------------


async def test_hot_memories_are_kept_on_schedule_and_cold_ones_are_left_alone(house: House, rooms: Rooms) -> None:
    housekeeper = Housekeeper(rooms)
    record = await house.store.get("farm")
    assert record is not None
    own = StoredSlot(id="0", entropy=0.5, feature=encode_feature(unit(torch.ones(FakeEncoder.dim))))
    await house.store.push("farm", record.stamp, [PushCandidate(class_id=RED, slot=own)])
    for day in range(4):
        await house.learn(rooms, f"{day}")
        await housekeeper.tick()
        await housekeeper.tick()
        assert await house.reasons() == ["schedule"] * day
        house.clock.advance(DAY_S)
    assert await house.reasons("farm") == []


async def test_a_schedule_shorter_than_ten_minutes_is_kept_too(house: House) -> None:
    rooms = await house.open(snapshot_every_s=60.0)
    housekeeper = Housekeeper(rooms)
    for minute in range(4):
        await house.learn(rooms, f"{minute}")
        await housekeeper.tick()
        assert await house.reasons() == ["schedule"] * minute
        house.clock.advance(60.0)


@pytest.mark.parametrize("op", ["snapshots", "keep_snapshot"])
async def test_one_that_could_not_be_taken_is_taken_long_before_the_next_is_due(
    house: House, rooms: Rooms, op: str
) -> None:
    housekeeper = Housekeeper(rooms)
    await house.learn(rooms, "0")
    await housekeeper.tick()
    house.clock.advance(DAY_S)
    house.store.leave(op)
    await housekeeper.tick()
    house.store.faults.clear()
    house.clock.advance(DAY_S / 24)
    await housekeeper.tick()
    assert await house.reasons() == ["schedule"]


async def test_the_store_is_not_asked_every_second_whether_it_is_time(house: House, rooms: Rooms) -> None:
    housekeeper = Housekeeper(rooms)
    await house.learn(rooms, "0")
    await housekeeper.tick()
    house.store.asked.clear()
    for _ in range(200):
        house.clock.advance(1.0)
        await housekeeper.tick()
    assert house.store.asked == []


# Whatever happens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["push", "digests", "snapshots"])
async def test_a_duty_that_fails_is_logged_and_the_others_are_done(
    house: House, rooms: Rooms, op: str, caplog: pytest.LogCaptureFixture
) -> None:
    housekeeper = Housekeeper(rooms)
    await house.learn(rooms, "0")
    await housekeeper.tick()
    house.store.leave("push")
    await house.learn(rooms, "1")
    house.clock.advance(DAY_S)
    house.store.faults = {op: KeyError("broken")}
    await housekeeper.tick()
    assert _errors(caplog) == [logs.UPKEEP_FAILED]
    done = {
        "push": await house.ids() == {"0", "1"},
        "digests": (await hot(rooms)).verified_at == house.clock.now,
        "snapshots": bool(await InProcessStore.snapshots(house.store, "zoo")),
    }
    assert done == {name: name != op for name in done}
    house.store.faults.clear()
    house.clock.advance(VERIFY_S)
    await housekeeper.tick()
    assert await house.ids() == {"0", "1"}
    assert (await hot(rooms)).verified_at == house.clock.now


async def test_a_store_that_is_away_and_a_tenant_that_is_gone_are_told_elsewhere(
    house: House, rooms: Rooms, caplog: pytest.LogCaptureFixture
) -> None:
    housekeeper = Housekeeper(rooms)
    for tenant in ("zoo", "farm"):
        await house.learn(rooms, "0", tenant)
    await house.store.delete("farm")
    house.store.leave()
    await house.learn(rooms, "1")
    for _ in range(2):
        house.clock.advance(DAY_S)
        await housekeeper.tick()
        house.store.faults.clear()
    assert _errors(caplog) == []
    assert await house.ids() == {"0", "1"}


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if one.levelno >= logging.ERROR]


async def test_it_comes_every_second_until_it_is_told_to_leave(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, third = 0, asyncio.Event()

    async def tick(_: Housekeeper) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            third.set()

    monkeypatch.setattr(maintenance, "TICK_S", 0.001)
    monkeypatch.setattr(Housekeeper, "tick", tick)
    task = asyncio.create_task(keep_house(rooms))
    async with asyncio.timeout(PATIENCE_S):
        await third.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_a_service_has_a_housekeeper_as_long_as_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def keeper(_: Rooms) -> None:
        came.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    monkeypatch.setattr(wiring, "keep_house", keeper)
    async with wiring.open_rooms(Settings(store="memory"), FakeEncoder()):
        async with asyncio.timeout(PATIENCE_S):
            await came.wait()
        assert not left.is_set()
    assert left.is_set()


async def test_what_waits_when_the_service_stops_is_delivered_even_if_the_housekeeper_was_at_it(
    monkeypatch: pytest.MonkeyPatch, house: House
) -> None:
    arrived = asyncio.Event()

    async def wait(op: str) -> None:
        if op == "push":
            house.store.before = None
            arrived.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(maintenance, "TICK_S", 0.001)
    monkeypatch.setattr(wiring, "keep_house", keep_house)
    async with wiring.open_rooms(Settings(store="memory"), FakeEncoder()) as rooms:
        await configuration.put_tenant(rooms, "zoo", TenantConfig(classes=(ClassSpec(name="red"),), slots=9))
        await house.learn(rooms, "0")
        house.store.leave()
        await house.learn(rooms, "1")
        house.store.before = wait
        house.store.faults.clear()
        house.clock.advance(PAUSE_S)
        async with asyncio.timeout(PATIENCE_S):
            await arrived.wait()
    assert await house.ids() == {"0", "1"}
