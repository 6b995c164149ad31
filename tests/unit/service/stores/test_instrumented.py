"""A store that is timed, whose failures are counted, and which is left alone while it is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.domain.memory import Stamp
from service.errors import Contended, StoreAway, StoreDown
from service.stores.instrumented import PAUSE_S, watched
from service.stores.protocol import Conflict, MemoryStore, ReloadNeeded
from service.telemetry import logs
from service.telemetry.metrics import Metrics

PATIENCE_S = 60.0
STAMP = Stamp(epoch=1, version=2)


class Store:
    """A store that notes who reaches it, and does with each what it is told to."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.closed = 0
        self.fault: Exception | None = None
        self.before: Callable[[], Awaitable[None]] | None = None

    async def names(self, *, after: str, limit: int) -> list[str]:
        await self._meet("names")
        return [after] * limit

    async def sync(self, tenant: str, since: Stamp) -> tuple[str, Stamp]:
        await self._meet("sync")
        return tenant, since

    async def push(self, *_: object) -> None:
        await self._meet("push")

    async def ping(self) -> None:
        await self._meet("ping")

    async def aclose(self) -> None:
        self.closed += 1

    async def _meet(self, op: str) -> None:
        self.reached.append(op)
        if self.before is not None:
            await self.before()
        if self.fault is not None:
            raise self.fault


class Watch:
    """A watched store, with a clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.inner, self.metrics = Store(), Metrics(CollectorRegistry())
        self.store: MemoryStore = watched(self.inner, self.metrics, lambda: self.now)  # type: ignore[arg-type]

    async def fail(self, fault: Exception) -> None:
        """Make one call that reaches the store and fails."""
        self.inner.fault = fault
        with pytest.raises(type(fault)):
            await self.store.ping()
        self.inner.fault = None
        self.inner.reached.clear()

    def sample(self, name: str, op: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"op": op})


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Return what names the store's events so far."""
    with caplog.at_level(logging.INFO, logs.logger.name):
        yield lambda: [one.message for one in caplog.records if one.message in (logs.STORE_AWAY, logs.STORE_BACK)]


async def test_a_call_is_passed_on_and_its_answer_back(watch: Watch) -> None:
    assert await watch.store.names(after="a", limit=2) == ["a", "a"]
    answer: Any = await watch.store.sync("zoo", STAMP)
    assert answer == ("zoo", STAMP)
    assert watch.inner.reached == ["names", "sync"]


async def test_every_call_that_reaches_the_store_is_timed_whatever_becomes_of_it(watch: Watch) -> None:
    await watch.store.ping()
    for fault in (ReloadNeeded(), StoreDown("full"), KeyError("x"), StoreAway("away")):
        await watch.fail(fault)
    with pytest.raises(StoreAway):
        await watch.store.ping()
    assert watch.sample("dmn_store_duration_seconds_count", "ping") == 5
    assert watch.sample("dmn_store_duration_seconds_count", "sync") == 0


@pytest.mark.parametrize("fault", [StoreDown("full"), StoreAway("away"), Contended()])
async def test_failures_of_the_store_are_counted_by_operation(watch: Watch, fault: StoreDown) -> None:
    await watch.fail(fault)
    assert watch.sample("dmn_store_errors_total", "ping") == 1
    assert watch.sample("dmn_store_errors_total", "sync") == 0


@pytest.mark.parametrize("answer", [ReloadNeeded(), Conflict()])
async def test_a_refusal_that_the_protocol_knows_is_no_failure(watch: Watch, answer: Exception) -> None:
    await watch.fail(answer)
    assert watch.sample("dmn_store_errors_total", "ping") == 0
    await watch.store.ping()
    assert watch.inner.reached == ["ping"]


async def test_a_store_that_is_away_is_left_alone_for_a_while_by_every_call(watch: Watch) -> None:
    await watch.fail(StoreAway("it is down the road"))
    for passed in (0.0, 0.5 * PAUSE_S, 0.49 * PAUSE_S):
        watch.now += passed
        for call in (watch.store.ping, lambda: watch.store.sync("zoo", STAMP)):
            with pytest.raises(StoreAway, match="it is down the road") as caught:
                await call()
            assert caught.value.retry_after_s
    assert watch.inner.reached == []


async def test_calls_that_never_reached_the_store_are_no_failures_of_it(watch: Watch) -> None:
    await watch.fail(StoreAway("away"))
    for _ in range(3):
        with pytest.raises(StoreAway):
            await watch.store.ping()
    assert watch.sample("dmn_store_errors_total", "ping") == 1


async def test_after_the_pause_one_call_reaches_it_and_if_it_answers_so_do_all(watch: Watch) -> None:
    await watch.fail(StoreAway("away"))
    watch.now += PAUSE_S
    for _ in range(3):
        await watch.store.ping()
    assert watch.inner.reached == ["ping"] * 3


async def test_a_store_that_is_still_away_is_left_alone_again(watch: Watch) -> None:
    await watch.fail(StoreAway("away"))
    for _ in range(3):
        watch.now += PAUSE_S
        await watch.fail(StoreAway("still"))
        with pytest.raises(StoreAway, match="still"):
            await watch.store.ping()
    assert watch.inner.reached == []


async def test_while_one_call_finds_out_whether_it_is_back_no_other_waits_for_it(watch: Watch) -> None:
    """It may take as long as the timeout to say no, and callers would all wait it out."""
    await watch.fail(StoreAway("away"))
    watch.now += PAUSE_S
    arrived, gate = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await gate.wait()

    watch.inner.before = wait
    async with asyncio.timeout(PATIENCE_S):
        first = asyncio.create_task(watch.store.ping())
        await arrived.wait()
        others = [asyncio.create_task(watch.store.sync("zoo", STAMP)) for _ in range(5)]
        for _ in range(5):
            await asyncio.sleep(0)
        reached = watch.inner.reached[:]
        gate.set()
        told = await asyncio.gather(*others, return_exceptions=True)
        await first
    assert reached == ["ping"]
    assert {type(one) for one in told} == {StoreAway}
    await watch.store.ping()


async def test_one_who_leaves_while_it_finds_out_leaves_it_to_another(watch: Watch) -> None:
    await watch.fail(StoreAway("away"))
    watch.now += PAUSE_S
    arrived = asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await asyncio.Event().wait()

    watch.inner.before = wait
    async with asyncio.timeout(PATIENCE_S):
        first = asyncio.create_task(watch.store.ping())
        await arrived.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    watch.inner.before = None
    watch.now += PAUSE_S
    await watch.store.ping()


@pytest.mark.parametrize("fault", [StoreDown("full"), Contended(), ReloadNeeded(), Conflict()])
async def test_a_store_that_answers_is_not_left_alone_whatever_it_answers(watch: Watch, fault: Exception) -> None:
    for away in (False, True):
        if away:
            await watch.fail(StoreAway("away"))
            watch.now += PAUSE_S
        await watch.fail(fault)
        await watch.store.ping()
        assert watch.inner.reached == ["ping"]


async def test_that_it_left_and_that_it_is_back_is_told_once(watch: Watch, told: Callable[[], list[str]]) -> None:
    await watch.store.ping()
    assert told() == []
    for _ in range(3):
        await watch.fail(StoreAway("away"))
        watch.now += PAUSE_S
    assert told() == [logs.STORE_AWAY]
    for _ in range(3):
        await watch.store.ping()
    assert told() == [logs.STORE_AWAY, logs.STORE_BACK]


async def test_a_store_that_is_away_can_be_let_go_of(watch: Watch) -> None:
    await watch.fail(StoreAway("away"))
    await watch.store.aclose()
    assert watch.inner.closed == 1


async def test_where_there_is_no_room_nothing_is_added_and_everything_else_is_done() -> None:
    watch, room = Watch(), False
    watch.store = watched(watch.inner, watch.metrics, lambda: watch.now, lambda: room)  # type: ignore[arg-type]
    with pytest.raises(StoreDown, match="room") as refused:
        await watch.store.push("a", STAMP, [])
    assert not isinstance(refused.value, StoreAway)
    await watch.store.sync("a", STAMP)
    assert watch.inner.reached == ["sync"]
    room = True
    await watch.store.push("a", STAMP, [])
    assert watch.inner.reached == ["sync", "push"]
