"""Locks by key, none of which is left behind."""

from __future__ import annotations

import asyncio

import pytest

from service.concurrency.keyed_lock import KeyedLocks


async def _visit(locks: KeyedLocks, key: str, log: list[str], name: str, gate: asyncio.Event) -> None:
    async with locks.hold(key):
        log.append(f"{name} in")
        await gate.wait()
        log.append(f"{name} out")


async def test_a_key_is_held_by_one_at_a_time_first_come_first_served() -> None:
    locks, log, gate = KeyedLocks(), [], asyncio.Event()
    tasks = [asyncio.create_task(_visit(locks, "a", log, name, gate)) for name in "xyz"]
    await asyncio.sleep(0)
    assert log == ["x in"]
    gate.set()
    await asyncio.gather(*tasks)
    assert log == ["x in", "x out", "y in", "y out", "z in", "z out"]


async def test_keys_do_not_wait_for_each_other() -> None:
    locks, log, gate = KeyedLocks(), [], asyncio.Event()
    tasks = [asyncio.create_task(_visit(locks, key, log, key, gate)) for key in "ab"]
    await asyncio.sleep(0)
    assert log == ["a in", "b in"]
    gate.set()
    await asyncio.gather(*tasks)


async def test_a_key_is_known_while_it_is_held_or_awaited_and_forgotten_then() -> None:
    locks, log, gate = KeyedLocks(), [], asyncio.Event()
    tasks = [asyncio.create_task(_visit(locks, "a", log, name, gate)) for name in "xy"]
    await asyncio.sleep(0)
    assert "a" in locks
    assert "b" not in locks
    gate.set()
    await asyncio.gather(*tasks)
    assert "a" not in locks
    assert not locks._locks


async def test_an_error_inside_lets_the_next_one_in_and_leaves_nothing() -> None:
    locks = KeyedLocks()
    with pytest.raises(KeyError):
        async with locks.hold("a"):
            raise KeyError
    async with locks.hold("a"):
        assert "a" in locks
    assert not locks._locks


async def test_who_stops_waiting_lets_others_go_on_and_leaves_nothing() -> None:
    locks, log, gate = KeyedLocks(), [], asyncio.Event()
    tasks = [asyncio.create_task(_visit(locks, "a", log, name, gate)) for name in "xyz"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    assert "a" in locks
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert log == ["x in", "x out", "z in", "z out"]
    assert not locks._locks


async def test_who_is_cancelled_while_holding_lets_the_next_one_in() -> None:
    locks, log, gate = KeyedLocks(), [], asyncio.Event()
    tasks = [asyncio.create_task(_visit(locks, "a", log, name, gate)) for name in "xy"]
    await asyncio.sleep(0)
    tasks[0].cancel()
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert log == ["x in", "y in", "y out"]
    assert not locks._locks
