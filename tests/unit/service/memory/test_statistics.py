"""What hot memories count: written whole, counted once, and the same whoever counted which image."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields

import pytest
import torch

from core.adaptive.statistics import LOOSE, TEMPERATURES, Counted, Statistics
from core.errors import IncompatibleMemory
from service.concurrency.worker_thread import Worker
from service.domain.memory import Count, Stamp, StoredStatistics
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import StoreAway
from service.memory.convert import decode, dim_of_shared, encode, shared_entries
from service.memory.statistics import RECENT, Tally, begin
from service.memory.statistics_sync import Ledger
from service.stores.in_process import InProcessStore
from service.stores.protocol import ReloadNeeded

NAMES = ("cats", "dogs", "birds")
IDS = tuple(map(class_id, NAMES))
DIM = 4
LIKE = torch.zeros(len(IDS), DIM)


def rows(seed: int, images: int = 3) -> Counted:
    """Return images of whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randint(1, 9, (images, *size), generator=generator).float()

    return Counted(x=drawn(DIM), responsibilities=drawn(len(IDS)), agreed=drawn(TEMPERATURES), sure=drawn())


def some(seed: int, images: int = 3) -> Statistics:
    """Return the statistics of these images."""
    return rows(seed, images).added_to(Statistics.zeros(len(IDS), DIM))


def same(one: Statistics, other: Statistics) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Statistics))


def added(*parts: Statistics) -> Statistics:
    total = Statistics.zeros(len(IDS), DIM)
    for part in parts:
        total = total + part
    return total


class Store(InProcessStore):
    """The in-process store, which may be away, lose its answer to a write, or hold a write at a gate."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(clock=lambda: self.now, remember_s=1.0, remember_bytes=1)
        self.away = self.silent = False
        self.gate, self.reached = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def count(self, tenant: str, at: Stamp, counter: str, seq: int, statistics: StoredStatistics) -> int:
        if self.away:
            raise StoreAway("away")
        self.reached.set()
        await self.gate.wait()
        told = await super().count(tenant, at, counter, seq, statistics)
        if self.silent:
            raise StoreAway("no answer")
        return told

    async def total(self) -> Statistics:
        stored = await self.load("zoo")
        assert stored is not None
        return decode(stored.statistics, IDS, LIKE)


class Desk:
    """A store with one tenant, and tallies over it."""

    def __init__(self, worker: Worker) -> None:
        self.store = Store()
        self.ledger = Ledger(self.store, worker, lambda: self.store.now)
        self.stamp = Stamp(epoch=0, version=0)

    async def open(self, classes: Sequence[str] = NAMES) -> None:
        old = await self.store.get("zoo")
        config = TenantConfig(classes=tuple(ClassSpec(name=name) for name in classes))
        expected = None if old is None else old.stamp
        self.stamp = await self.store.replace(
            "zoo", config, "f", expected=expected, labelling=config.labelling, origin={}, slots={}
        )

    async def tally(self, own: tuple[str, int] | None = None) -> Tally:
        stored = await self.store.load("zoo")
        assert stored is not None
        return begin("zoo", IDS, stored.counts, LIKE, self.store.now, own)

    async def exchange(self, *tallies: Tally) -> list[bool]:
        return [await self.ledger.exchange(tally, self.stamp) for tally in tallies]


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    worker = Worker()
    made = Desk(worker)
    await made.open()
    yield made
    worker.close()


# As stored ------------------------------------------------------------------------------------------------------------


def test_statistics_come_back_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(5)
    parts = {
        name: torch.randn(getattr(some(1), name).shape, generator=generator)
        for name in (field.name for field in fields(Statistics))
    }
    drawn = Statistics(**parts)
    assert same(decode(encode(drawn, IDS), IDS, LIKE), drawn)


def test_rows_that_are_told_are_those_of_the_classes_that_changed() -> None:
    drawn = some(1)
    told = encode(drawn, IDS, torch.tensor([True, False, True]))
    assert set(told.rows) == {IDS[0], IDS[2]}
    assert told.shared == encode(drawn, IDS).shared


def test_a_class_without_a_row_has_counted_nothing_and_classes_may_stand_in_another_order() -> None:
    drawn = some(1)
    told = encode(drawn, IDS, torch.tensor([True, False, True]))
    back = decode(told, (IDS[2], IDS[1], IDS[0]), LIKE)
    assert torch.equal(back.sums, torch.stack([drawn.sums[2], torch.zeros(DIM), drawn.sums[0]]))
    assert back.counts.tolist() == [float(drawn.counts[2]), 0.0, float(drawn.counts[0])]


@pytest.mark.parametrize("cut", ["rows", "shared"])
def test_statistics_of_another_size_are_refused(cut: str) -> None:
    told = encode(some(1), IDS)
    rows = {own: row[:-4] for own, row in told.rows.items()} if cut == "rows" else told.rows
    shared = told.shared[:-4] if cut == "shared" else told.shared
    with pytest.raises(IncompatibleMemory):
        decode(StoredStatistics(rows=rows, shared=shared), IDS, LIKE)


@pytest.mark.parametrize("dim", [1, 2, 3, 192, 512, 1024])
def test_the_feature_size_is_read_from_how_many_numbers_are_of_no_class(dim: int) -> None:
    assert dim_of_shared(shared_entries(dim)) == dim


# What is counted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [(0, 0, 0, 0), (0, 1, 0, 1), (0, 1, 2, 3)])
async def test_what_was_counted_does_not_depend_on_who_counted_it(desk: Desk, split: Sequence[int]) -> None:
    tallies = [await desk.tally() for _ in range(4)]
    for seed, who in enumerate(split):
        tallies[who].add(rows(seed))
    await desk.exchange(*tallies)
    await desk.exchange(*tallies)
    wanted = added(*(some(seed) for seed in range(4)))
    assert all(same(tally.total, wanted) for tally in [*tallies, await desk.tally()])


async def test_an_exchange_says_whether_anything_came_of_it(desk: Desk) -> None:
    one, other = await desk.tally(), await desk.tally()
    assert await desk.exchange(one, other) == [False, False]
    one.add(rows(1))
    assert await desk.exchange(one, other, one, other) == [False, True, False, False]


async def test_images_counted_while_a_write_is_under_way_are_in_the_next_one(desk: Desk) -> None:
    tally = await desk.tally()
    tally.add(rows(1))
    desk.store.gate.clear()
    under_way = asyncio.create_task(desk.exchange(tally))
    await desk.store.reached.wait()
    tally.add(rows(2))
    assert same(tally.total, added(some(1), some(2)))
    desk.store.gate.set()
    await under_way
    assert same(await desk.store.total(), some(1))
    assert same(tally.total, added(some(1), some(2)))
    await desk.exchange(tally)
    assert same(await desk.store.total(), added(some(1), some(2)))


async def test_two_who_write_a_tally_at_once_lose_nothing_and_write_nothing_twice(desk: Desk) -> None:
    tally = await desk.tally()
    tally.add(rows(1))
    desk.store.gate.clear()
    first = asyncio.create_task(desk.exchange(tally))
    await desk.store.reached.wait()
    tally.add(rows(2))
    second = asyncio.create_task(desk.exchange(tally))
    desk.store.gate.set()
    await asyncio.gather(first, second)
    wanted = added(some(1), some(2))
    assert same(await desk.store.total(), wanted)
    assert same(tally.total, wanted)


async def test_a_write_that_fails_leaves_everything_to_be_written(desk: Desk) -> None:
    tally = await desk.tally()
    tally.add(rows(1))
    desk.store.away = True
    with pytest.raises(StoreAway):
        await desk.exchange(tally)
    tally.add(rows(2))
    assert same(tally.total, added(some(1), some(2)))
    desk.store.away = False
    await desk.exchange(tally)
    assert same(await desk.store.total(), added(some(1), some(2)))


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("failures", [1, 2])
async def test_a_write_whose_answer_is_lost_is_not_counted_twice(desk: Desk, before: int, failures: int) -> None:
    tally, parts = await desk.tally(), [some(seed) for seed in range(4)]
    if before:
        tally.add(rows(0))
        await desk.exchange(tally)
    desk.store.silent = True
    for seed in range(failures):
        tally.add(rows(1 + seed))
        with pytest.raises(StoreAway):
            await desk.exchange(tally)
    desk.store.silent = False
    tally.add(rows(3))
    await desk.exchange(tally)
    wanted = added(*parts[1 - before : 1 + failures], parts[3])
    assert same(await desk.store.total(), wanted)
    assert same(tally.total, wanted)
    assert same((await desk.tally()).total, wanted)


async def test_a_write_that_is_cancelled_leaves_everything_to_be_written(desk: Desk) -> None:
    tally = await desk.tally()
    tally.add(rows(1))
    desk.store.gate.clear()
    under_way = asyncio.create_task(desk.exchange(tally))
    await desk.store.reached.wait()
    under_way.cancel()
    await asyncio.gather(under_way, return_exceptions=True)
    desk.store.gate.set()
    await desk.exchange(tally)
    assert same(await desk.store.total(), some(1))


async def test_what_belongs_to_another_epoch_is_not_written(desk: Desk) -> None:
    tally, old = await desk.tally(), desk.stamp
    tally.add(rows(1))
    await desk.open()
    with pytest.raises(ReloadNeeded):
        await desk.ledger.exchange(tally, old)
    await desk.ledger.leave(tally, old)
    assert same(await desk.store.total(), added())


async def test_who_leaves_while_the_store_is_away_may_come_again(desk: Desk) -> None:
    tally = await desk.tally()
    tally.add(rows(1))
    desk.store.away = True
    with pytest.raises(StoreAway):
        await desk.ledger.leave(tally, desk.stamp)
    desk.store.away = False
    await desk.ledger.leave(tally, desk.stamp)
    await desk.ledger.leave(tally, desk.stamp)
    assert same(await desk.store.total(), some(1))


# Rows that are not added up yet ---------------------------------------------------------------------------------------


ON_ITS_WAY = {
    "sent and landed": ("send", "land"),
    "sent and turned back": ("send", "turn_back"),
    "sent": ("send",),
    "renamed": ("rename",),
    "sent under another name": ("send", "rename", "land"),
}


@pytest.mark.parametrize("steps", ON_ITS_WAY.values(), ids=list(ON_ITS_WAY))
@pytest.mark.parametrize("images", [1, LOOSE - 1, LOOSE, 3 * LOOSE])
async def test_nothing_is_lost_or_counted_twice_whatever_happens_while_rows_are_loose(
    desk: Desk, images: int, steps: Sequence[str]
) -> None:
    tally, wanted = await desk.tally(), added()
    for turn in range(3):
        for step in ("", *steps):
            seed = 10 * turn + len(step)
            tally.add(rows(seed, images))
            wanted = wanted + some(seed, images)
            if step == "land":
                tally.land(tally.seq + 1)
            elif step:
                getattr(tally, step)()
            assert same(tally.total, wanted)
        if "land" not in steps:
            tally.turn_back()
    tally.send()
    assert tally.waiting.images == 0
    assert same(tally.total, wanted)


async def test_loose_rows_do_not_change_how_much_a_tally_holds(desk: Desk) -> None:
    tally = await desk.tally()
    before = tally.nbytes
    for seed in range(LOOSE - 1):
        tally.add(rows(seed, 1))
        assert tally.nbytes == before
    held = sum(getattr(row, field.name).nbytes for row in tally.waiting.loose for field in fields(Counted))
    assert held == before - 3 * tally.none.nbytes


# Folding --------------------------------------------------------------------------------------------------------------


async def counts(desk: Desk) -> Mapping[str, Count]:
    return (await desk.store.counts("zoo", desk.stamp, {}))[0]


async def test_counters_that_processes_left_behind_are_put_together(desk: Desk) -> None:
    gone = [await desk.tally() for _ in range(12)]
    for seed, tally in enumerate(gone):
        tally.add(rows(seed))
    await desk.exchange(*gone)
    wanted, alive = added(*map(some, range(12))), await desk.tally()
    desk.store.now += 61
    await desk.exchange(alive)
    assert len(await counts(desk)) == 1
    assert same(await desk.store.total(), wanted)
    await desk.exchange(alive)
    assert same(alive.total, wanted)


async def test_few_counters_or_busy_ones_are_left_as_they_are(desk: Desk) -> None:
    tallies = [await desk.tally() for _ in range(9)]
    for seed, tally in enumerate(tallies):
        tally.add(rows(seed))
    await desk.exchange(*tallies)
    await desk.exchange(*tallies)
    assert len(await counts(desk)) == 9


async def test_a_counter_that_was_folded_goes_on_under_another_name_and_counts_nothing_twice(desk: Desk) -> None:
    tally, other = await desk.tally(), await desk.tally()
    tally.add(rows(1))
    other.add(rows(2))
    await desk.exchange(tally, other, tally)
    assert await desk.store.fold("zoo", desk.stamp, await counts(desk), "sum")
    name = tally.counter
    tally.add(rows(3))
    await desk.exchange(tally, other)
    wanted = added(some(1), some(2), some(3))
    assert tally.counter != name
    assert set(await counts(desk)) == {"sum", tally.counter}
    assert same(await desk.store.total(), wanted)
    assert same(tally.total, wanted)
    assert same(other.total, wanted)


async def test_a_folded_counter_keeps_its_counts_while_it_cannot_read_where_they_are(desk: Desk) -> None:
    tally = await desk.tally()
    tally.add(rows(1))
    await desk.exchange(tally)
    assert await desk.store.fold("zoo", desk.stamp, await counts(desk), "sum")
    tally.add(rows(2))
    await desk.ledger.leave(tally, desk.stamp)
    assert same(tally.total, added(some(1), some(2)))


# Memories that come and go --------------------------------------------------------------------------------------------


async def test_a_memory_that_comes_again_goes_on_with_its_counter(desk: Desk) -> None:
    own, wanted = None, added()
    for seed in range(5):
        tally = await desk.tally(own)
        assert same(tally.total, wanted)
        tally.add(rows(seed))
        wanted = wanted + some(seed)
        await desk.ledger.leave(tally, desk.stamp)
        own = tally.counter, tally.seq
    assert set(await counts(desk)) == {tally.counter}
    assert same(await desk.store.total(), wanted)


async def test_a_counter_that_was_folded_or_written_meanwhile_is_not_gone_on_with(desk: Desk) -> None:
    first = await desk.tally()
    first.add(rows(1))
    await desk.ledger.leave(first, desk.stamp)
    own = first.counter, first.seq
    first.add(rows(2))
    await desk.ledger.leave(first, desk.stamp)
    assert (await desk.tally(own)).counter != first.counter
    assert await desk.store.fold("zoo", desk.stamp, await counts(desk), "sum")
    late = await desk.tally((first.counter, first.seq))
    assert late.counter != first.counter
    assert same(late.total, added(some(1), some(2)))


# Images that come again -----------------------------------------------------------------------------------------------


async def test_an_image_that_was_counted_lately_is_not_new_nor_one_that_comes_twice_in_a_group(desk: Desk) -> None:
    tally = await desk.tally()
    assert tally.is_new(["a", "b", "a"]) == [True, True, False]
    tally.remember(["a"])
    assert tally.is_new(["a", "b", "c", "b"]) == [False, True, True, False]


async def test_images_that_are_long_past_are_forgotten(desk: Desk) -> None:
    tally = await desk.tally()
    tally.remember([str(i) for i in range(RECENT + 1)])
    assert len(tally.recent) == RECENT
    assert tally.is_new(["0", "1", str(RECENT)]) == [True, False, False]
