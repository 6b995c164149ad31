"""How every store keeps class statistics: in counters of one life, which add up and are gone when labels change."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from service.domain.memory import SEED, Count, Stamp, StoredBank, StoredStatistics, TenantRecord, shown_of
from service.domain.tenant import class_id
from service.stores.protocol import MemoryStore, ReloadNeeded
from service.stores.redis.store import RedisStore
from tests.contract.conftest import Opened
from tests.contract.test_store import (
    CATS,
    DOGS,
    FINGERPRINT,
    candidate,
    config,
    create,
    push,
    put,
    shot,
    slot,
    stamp_of,
)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


FIRST = StoredStatistics(rows={CATS: floats(1.0, 0.1, -0.0), DOGS: floats(2.0, 1e-40, 3.0)}, shared=floats(3.0, 0.3))
SECOND = StoredStatistics(rows={DOGS: floats(5.0, 7.0, 11.0)}, shared=floats(8.0, 0.7))


async def counts(store: MemoryStore, at: Stamp | None = None) -> Mapping[str, Count]:
    """Return what all counters have, which a load tells too."""
    stored = await store.load("zoo")
    assert stored is not None
    found, idle = await store.counts("zoo", at or await stamp_of(store), {})
    assert found == stored.counts
    assert set(found) == set(idle)
    return found


async def count(store: MemoryStore, name: str, told: StoredStatistics = FIRST, seq: int = 0) -> int:
    return await store.count("zoo", await stamp_of(store), name, seq, told)


async def counted(store: MemoryStore, *names: str) -> Stamp:
    """Make a tenant of whom these counters have counted the first statistics."""
    await create(store)
    for name in names:
        assert await count(store, name) == 1
    return await stamp_of(store)


async def record_of(store: MemoryStore) -> TenantRecord:
    record = await store.get("zoo")
    assert record is not None
    return record


async def settled(store: MemoryStore, **given: Any) -> Stamp:
    made = given.pop("made", config("cats", "dogs"))
    fingerprint = given.pop("fingerprint", FINGERPRINT)
    return await store.replace(
        "zoo", made, fingerprint, expected=await stamp_of(store), labelling=made.labelling, origin={}, **given
    )


async def keys_of(store: MemoryStore, part: str) -> list[str]:
    """Return the keys that a store on a server has of the tenant; none of a store without keys."""
    if not isinstance(store, RedisStore):
        return []
    return [key.decode() async for key in store._client.scan_iter(match=f"dmn:{{zoo}}:{part}", count=1000)]


# Counting -------------------------------------------------------------------------------------------------------------


async def test_a_new_tenant_has_counted_nothing(store: MemoryStore) -> None:
    await create(store)
    assert await counts(store) == {}


async def test_what_was_counted_comes_back_bit_for_bit(store: MemoryStore) -> None:
    await counted(store, "a", "b")
    assert await counts(store) == {name: Count(seq=1, statistics=FIRST) for name in ("a", "b")}


async def test_rows_that_did_not_change_stay(store: MemoryStore) -> None:
    await counted(store, "a")
    assert await count(store, "a", SECOND, 1) == 2
    whole = StoredStatistics(rows={**FIRST.rows, **SECOND.rows}, shared=SECOND.shared)
    assert await counts(store) == {"a": Count(seq=2, statistics=whole)}


async def test_a_counter_that_is_larger_than_one_write_comes_back_whole(store: MemoryStore) -> None:
    names = [f"class {i}" for i in range(300)]
    await create(store, names=names)
    rows = {class_id(name): floats(i) * 2049 for i, name in enumerate(names)}
    large = StoredStatistics(rows=rows, shared=floats(2.5) * 600_000)
    assert await count(store, "a", large) == 1
    assert await count(store, "a", large, 1) == 2
    assert (await counts(store))["a"] == Count(seq=2, statistics=large)


async def test_a_counter_that_is_known_is_not_read_again_until_it_counts_on(store: MemoryStore) -> None:
    at = await counted(store, "a", "b")
    found, idle = await store.counts("zoo", at, {"a": 1})
    assert set(found) == {"b"}
    assert set(idle) == {"a", "b"}
    await count(store, "a", SECOND, 1)
    assert set((await store.counts("zoo", at, {"a": 1, "b": 1}))[0]) == {"a"}


async def test_how_long_a_counter_is_idle_is_told(opened: Opened) -> None:
    at = await counted(opened.store, "a", "b")
    opened.later(70.0)
    await count(opened.store, "b", SECOND, 1)
    found, idle = await opened.store.counts("zoo", at, {})
    assert idle == {"a": 70.0, "b": 0.0}
    assert {name: one.idle_s for name, one in found.items()} == idle


async def test_a_write_after_one_that_is_not_there_any_more_says_so_and_writes_nothing(store: MemoryStore) -> None:
    await counted(store, "a")
    before = await counts(store)
    assert await count(store, "a", SECOND, 2) == 0
    assert await count(store, "gone", SECOND, 1) == 0
    assert await counts(store) == before


async def test_a_write_whose_answer_was_lost_is_written_over(store: MemoryStore) -> None:
    at = await counted(store, "a")
    assert await count(store, "a", SECOND, 1) == 2
    assert await count(store, "a", SECOND, 1) == 3
    found, _ = await store.counts("zoo", at, {"a": 2})
    assert found["a"] == Count(
        seq=3, statistics=StoredStatistics(rows={**FIRST.rows, **SECOND.rows}, shared=SECOND.shared)
    )


async def test_who_is_in_an_old_epoch_has_to_load_and_writes_nothing(store: MemoryStore) -> None:
    old = await counted(store, "a", "b")
    await settled(store)
    before = await counts(store)
    with pytest.raises(ReloadNeeded):
        await store.count("zoo", old, "a", 1, SECOND)
    with pytest.raises(ReloadNeeded):
        await store.counts("zoo", old, {})
    with pytest.raises(ReloadNeeded):
        await store.fold("zoo", old, before, "sum")
    assert await counts(store) == before
    assert before == {name: Count(seq=1, statistics=FIRST) for name in ("a", "b")}


async def test_counting_is_no_change_that_others_have_to_follow(store: MemoryStore) -> None:
    await create(store)
    before = await stamp_of(store)
    await count(store, "a")
    await store.fold("zoo", before, await counts(store), "sum")
    assert await stamp_of(store) == before


async def test_many_who_count_at_once_are_all_there(store: MemoryStore) -> None:
    at = await counted(store)
    await asyncio.gather(*(store.count("zoo", at, str(i), 0, FIRST) for i in range(20)))
    assert await counts(store) == {str(i): Count(seq=1, statistics=FIRST) for i in range(20)}


# Folding --------------------------------------------------------------------------------------------------------------


async def test_folding_puts_the_sum_in_the_place_of_those_that_are_named(store: MemoryStore) -> None:
    at = await counted(store, "a", "b", "c")
    await count(store, "b", SECOND, 1)
    found = await counts(store)
    idle = {name: found[name] for name in ("a", "b")}
    assert await store.fold("zoo", at, idle, "sum") is True
    whole = StoredStatistics.total(one.statistics for one in idle.values())
    assert await counts(store) == {"c": found["c"], "sum": Count(seq=1, statistics=whole)}
    assert struct.unpack("<3f", whole.rows[DOGS]) == (7.0, 7.0, 14.0)
    assert await count(store, "a", SECOND, 1) == 0


async def test_folding_is_refused_if_one_has_counted_on_or_is_gone(store: MemoryStore) -> None:
    at = await counted(store, "a", "b")
    found = await counts(store)
    await count(store, "b", SECOND, 1)
    before = await counts(store)
    assert await store.fold("zoo", at, found, "sum") is False
    assert await store.fold("zoo", at, {"a": found["a"], "gone": found["a"]}, "sum") is False
    assert await counts(store) == before
    assert not await keys_of(store, "t*:sum")


async def test_of_two_who_fold_the_same_counters_one_does(store: MemoryStore) -> None:
    at = await counted(store, "a", "b")
    found = await counts(store)
    told = await asyncio.gather(*(store.fold("zoo", at, found, name) for name in ("one", "other")))
    assert sorted(told) == [False, True]
    assert len(await counts(store)) == 1
    assert len(await keys_of(store, "t*:*")) in (0, 1)


async def test_counters_that_are_folded_while_they_are_read_are_read_where_they_are(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(store, RedisStore):
        return  # it reads all counters in one step
    at = await counted(store, "a", "b")
    found, counters = await counts(store), store._counters
    real = counters._statistics

    async def late(key: str) -> StoredStatistics:
        monkeypatch.undo()
        assert await store.fold("zoo", at, found, "sum")
        return await real(key)

    monkeypatch.setattr(counters, "_statistics", late)
    stored = await store.load("zoo")
    assert stored is not None
    assert stored.statistics == StoredStatistics.total([FIRST, FIRST])


# Lives ----------------------------------------------------------------------------------------------------------------


async def test_a_reset_of_the_dynamic_memory_begins_a_new_life(store: MemoryStore) -> None:
    await counted(store, "a")
    before = (await record_of(store)).life
    await store.reset("zoo", dynamic=True, static=False, class_ids=None)
    assert await counts(store) == {}
    assert (await record_of(store)).life != before
    assert await count(store, "a", SECOND) == 1
    assert await counts(store) == {"a": Count(seq=1, statistics=SECOND)}


async def test_a_reset_of_a_class_drops_its_row_of_every_counter_and_nothing_else(store: MemoryStore) -> None:
    await counted(store, "a", "b")
    await store.reset("zoo", dynamic=True, static=False, class_ids=[CATS])
    left = StoredStatistics(rows={DOGS: FIRST.rows[DOGS]}, shared=FIRST.shared)
    assert await counts(store) == {name: Count(seq=1, statistics=left) for name in ("a", "b")}


async def test_what_happens_to_shots_leaves_the_statistics(store: MemoryStore) -> None:
    await counted(store, "a")
    await store.add_shots("zoo", await stamp_of(store), [shot("1"), shot("2", DOGS)])
    await store.remove_shots("zoo", ["1"])
    await store.reset("zoo", dynamic=False, static=True, class_ids=[DOGS])
    await store.reset("zoo", dynamic=False, static=True, class_ids=None)
    await push(store, candidate("1", 0.5))
    await store.purge("zoo", CATS, "1")
    assert await counts(store) == {"a": Count(seq=1, statistics=FIRST)}
    assert await count(store, "a", SECOND, 1) == 2


async def test_slots_that_are_given_begin_a_new_life_with_the_statistics_given(store: MemoryStore) -> None:
    await counted(store, "a")
    await settled(store, slots={CATS: StoredBank.of([slot("1", 0.5)])}, statistics=SECOND)
    assert await counts(store) == {SEED: Count(seq=1, statistics=SECOND)}
    await settled(store, slots={})
    assert await counts(store) == {}


async def test_without_slots_the_statistics_stay(store: MemoryStore) -> None:
    await counted(store, "a")
    life = (await record_of(store)).life
    await settled(store, made=config("dogs", "birds", "cats", slots=7), statistics=SECOND)
    assert await counts(store) == {"a": Count(seq=1, statistics=FIRST)}
    assert (await record_of(store)).life == life


async def test_a_class_that_leaves_takes_its_row_along(store: MemoryStore) -> None:
    await counted(store, "a", "b")
    await settled(store, made=config("dogs"))
    await settled(store, made=config("dogs", "cats"))
    left = StoredStatistics(rows={DOGS: FIRST.rows[DOGS]}, shared=FIRST.shared)
    assert await counts(store) == {name: Count(seq=1, statistics=left) for name in ("a", "b")}


@pytest.mark.parametrize("given", [None, SECOND])
async def test_another_fingerprint_begins_a_new_life(store: MemoryStore, given: StoredStatistics | None) -> None:
    await counted(store, "a")
    await settled(store, fingerprint="another", statistics=given)
    assert await counts(store) == ({} if given is None else {SEED: Count(seq=1, statistics=given)})


@pytest.mark.parametrize("slots", [None, {}])
async def test_a_tenant_may_be_made_with_statistics(store: MemoryStore, slots: dict[str, StoredBank] | None) -> None:
    made = config("cats", "dogs")
    await store.replace(
        "zoo", made, "f", expected=None, labelling=made.labelling, origin={}, slots=slots, statistics=FIRST
    )
    assert await counts(store) == {SEED: Count(seq=1, statistics=FIRST)}
    assert await count(store, "a", SECOND) == 1


async def test_statistics_go_with_their_tenant_and_do_not_come_back(store: MemoryStore) -> None:
    old = await counted(store, "a")
    await store.delete("zoo")
    with pytest.raises(ReloadNeeded):
        await store.count("zoo", old, "a", 1, SECOND)
    assert set(await keys_of(store, "*")) <= {"dmn:{zoo}:epochs"}
    await create(store)
    with pytest.raises(ReloadNeeded):
        await store.count("zoo", old, "a", 1, SECOND)
    assert await counts(store) == {}


async def test_lives_that_are_over_leave_nothing_behind(store: MemoryStore) -> None:
    await counted(store, "a", "b")
    await settled(store, slots={}, statistics=SECOND)
    await store.reset("zoo", dynamic=True, static=False, class_ids=None)
    await count(store, "a")
    await settled(store, slots={})
    assert await keys_of(store, "t[0-9]*") == []
    assert await keys_of(store, "lives") == []


async def test_a_replacement_that_comes_too_late_leaves_the_statistics_alone(store: MemoryStore) -> None:
    old = await counted(store, "a")
    await store.add_shots("zoo", old, [shot("1")])
    with pytest.raises(Exception, match="zoo"):
        await put(store, "zoo", config("cats"), FINGERPRINT, expected=old, slots={})
    assert await counts(store) == {"a": Count(seq=1, statistics=FIRST)}


# Shots that label -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_which_shots_there_are_is_told_whatever_order_they_came_in(store: MemoryStore, seed: int) -> None:
    random = Random(seed)
    ids = [f"{i:040x}" for i in range(12)]
    await create(store)
    held: set[str] = set()
    for _ in range(12):
        come, go = random.sample(ids, 3), random.sample(ids, 2)
        await store.add_shots("zoo", await stamp_of(store), [shot(id_) for id_ in come])
        await store.remove_shots("zoo", go)
        held = held.union(come) - set(go)
        assert (await record_of(store)).shown == shown_of(held)
    await store.remove_shots("zoo", ids)
    assert (await record_of(store)).shown == "" == shown_of([])


async def test_which_shots_there_are_is_told_after_resets_and_replacements(store: MemoryStore) -> None:
    await create(store)
    await store.add_shots("zoo", await stamp_of(store), [shot("a"), shot("b", DOGS), shot("c", image=b"image")])
    await store.add_shots("zoo", await stamp_of(store), [shot("a")])
    assert (await record_of(store)).shown == shown_of("abc")
    await store.reset("zoo", dynamic=False, static=True, class_ids=[DOGS])
    assert (await record_of(store)).shown == shown_of("ac")
    await settled(store, fingerprint="another")
    assert (await record_of(store)).shown == shown_of("c")
    await settled(store, shots=[shot("d"), shot("e", DOGS), shot("f", class_id("nobody"))])
    assert (await record_of(store)).shown == shown_of("de")
    await settled(store, made=config("dogs"))
    assert (await record_of(store)).shown == shown_of("e")
    await store.reset("zoo", dynamic=False, static=True, class_ids=None)
    assert (await record_of(store)).shown == ""


def test_other_shots_label_otherwise_under_auto_alone() -> None:
    auto, dmn = (replace(config("cats"), method=method) for method in ("auto", "dmn"))
    bare = [
        TenantRecord(name="zoo", config=made, fingerprint="f", stamp=Stamp(epoch=1, version=0), labelling="")
        for made in (auto, dmn)
    ]
    shown = [[replace(one, shown=shown_of(ids)).due_labelling for ids in ("", "a", "ab")] for one in bare]
    assert [len(set(own)) for own in shown] == [3, 1]
