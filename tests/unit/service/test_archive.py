"""Hot memories: loaded once, kept in step, and dropped for room when nobody holds them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from core.codec import decode_feature, encode_feature
from core.dynamic import DynamicMemory
from core.numerics import unit
from service.archive import Archive, HotMemory
from service.errors import FingerprintMismatch, NoClasses, StoreDown, UnknownTenant
from service.metrics import Metrics
from service.stores.base import Change, PushCandidate, Stamp, StoredMemory, StoredShot, StoredSlot, Synced
from service.stores.memory import InProcessStore
from service.tenants import ClassSpec, TenantConfig, class_id
from service.texts import TextFeatures
from service.worker import Worker
from tests.fakes import FakeEncoder

PATIENCE_S = 20.0
SYNC_S = 0.2
DIM = FakeEncoder.dim


class Store(InProcessStore):
    """The in-process store, which counts what is asked of it and waits where a gate is shut."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0, remember_s=1.0, remember_bytes=1)
        self.asked: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.down: set[str] = set()

    async def load(self, tenant: str) -> StoredMemory | None:
        self.asked.append(f"load {tenant}")
        if "load" in self.down:
            raise StoreDown("down")
        if tenant in self.gates:
            await self.gates[tenant].wait()
        return await super().load(tenant)

    async def sync(self, tenant: str, since: Stamp) -> Synced:
        self.asked.append(f"sync {tenant}")
        if "sync" in self.down:
            raise StoreDown("down")
        return await super().sync(tenant, since)


class Cellar:
    """An archive over a store, with a clock that stands still until it is told."""

    def __init__(self, *, max_bytes: int = 1 << 30) -> None:
        self.now = 100.0
        self.store, self.encoder, self.worker = Store(), FakeEncoder(), Worker()
        self.metrics = Metrics(CollectorRegistry())
        texts = TextFeatures(self.worker, self.encoder.encode_texts, max_bytes=1 << 20)
        self.archive = Archive(
            self.store,
            self.encoder,
            texts,
            self.worker,
            self.metrics,
            lambda: self.now,
            max_bytes=max_bytes,
            sync_s=SYNC_S,
        )

    async def create(self, tenant: str, *names: str, slots: int = 2, fingerprint: str = "fake-1") -> Stamp:
        config = TenantConfig(classes=tuple(ClassSpec(name=name) for name in names), slots=slots)
        return await self.store.replace(tenant, config, fingerprint, expected=None, slots={})

    async def push(self, tenant: str, *slots: tuple[str, str, float]) -> None:
        """Write (class, id, entropy) as another worker would."""
        record = await self.store.get(tenant)
        assert record is not None
        await self.store.push(tenant, record.stamp, [_candidate(*slot) for slot in slots])

    def sample(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)


def feature(seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(seed.encode()))
    return unit(torch.randn(DIM, generator=generator))


def _candidate(name: str, id_: str, entropy: float) -> PushCandidate:
    slot = StoredSlot(id=id_, entropy=entropy, feature=encode_feature(feature(id_)))
    return PushCandidate(class_id=class_id(name), slot=slot)


def slots_of(memory: DynamicMemory) -> list[dict[str, float]]:
    """Return ids and entropies by class; the features must be those that were stored."""
    for bank in memory.classes:
        for id_, key in zip(bank.ids, bank.keys, strict=True):
            assert torch.equal(key, decode_feature(encode_feature(feature(str(id_))), DIM))
    return [dict(zip(map(str, bank.ids), bank.entropies, strict=True)) for bank in memory.classes]


@pytest.fixture
async def cellar() -> AsyncIterator[Cellar]:
    cellar = Cellar()
    yield cellar
    cellar.worker.close()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def opened(cellar: Cellar, tenant: str) -> HotMemory:
    async with cellar.archive.open(tenant) as hot:
        return hot


# Loading --------------------------------------------------------------------------------------------------------------


async def test_a_memory_is_as_the_store_has_it(cellar: Cellar) -> None:
    stamp = await cellar.create("zoo", "red", "green", slots=3)
    await cellar.push("zoo", ("red", "1", 0.5), ("green", "2", 0.25), ("red", "3", 0.125))
    own = StoredShot(id="s", class_id=class_id("green"), feature=encode_feature(feature("s")), image=b"1234")
    await cellar.store.add_shots("zoo", stamp, [own])
    hot = await opened(cellar, "zoo")
    assert slots_of(hot.snapshot.dynamic) == [{"1": 0.5, "3": 0.125}, {"2": 0.25}]
    assert hot.snapshot.dynamic.slots == 3
    assert [bank.ids for bank in hot.snapshot.static.classes] == [(), ("s",)]
    assert (hot.shot_bytes, hot.filled, hot.barred) == (2 * DIM + 4, 3, frozenset())
    assert hot.snapshot.tau == cellar.encoder.logit_scale
    record = await cellar.store.get("zoo")
    assert (hot.record, hot.stamp) == (record, record.stamp if record else None)


async def test_a_memory_knows_what_was_purged(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    await cellar.push("zoo", ("red", "1", 0.5))
    await cellar.store.purge("zoo", class_id("red"), "1")
    assert (await opened(cellar, "zoo")).barred == {(class_id("red"), "1")}


async def test_class_weights_come_from_the_tenants_prompts_in_its_order(cellar: Cellar) -> None:
    await cellar.create("zoo", "red", "green")
    hot = await opened(cellar, "zoo")
    reds, greens = (cellar.encoder.encode_texts(hot.config.prompts(spec)) for spec in hot.config.classes)
    torch.testing.assert_close(hot.snapshot.text, torch.stack([unit(reds.mean(0)), unit(greens.mean(0))]))


async def test_an_unknown_tenant_is_refused_and_leaves_nothing(cellar: Cellar) -> None:
    with pytest.raises(UnknownTenant):
        await opened(cellar, "zoo")
    with pytest.raises(UnknownTenant):
        await cellar.archive.record("zoo")
    assert cellar.sample("dmn_hot_tenants") in {0.0, None}
    await cellar.create("zoo", "red")
    await opened(cellar, "zoo")


async def test_a_tenant_without_classes_is_refused_until_it_has_some(cellar: Cellar) -> None:
    stamp = await cellar.create("zoo")
    with pytest.raises(NoClasses):
        await opened(cellar, "zoo")
    config = TenantConfig(classes=(ClassSpec(name="red"),))
    await cellar.store.replace("zoo", config, "fake-1", expected=stamp, slots={})
    await opened(cellar, "zoo")


async def test_a_memory_of_another_encoder_is_refused(cellar: Cellar) -> None:
    await cellar.create("zoo", "red", fingerprint="other")
    with pytest.raises(FingerprintMismatch):
        await opened(cellar, "zoo")
    assert cellar.encoder.texts == 0


async def test_a_fingerprint_that_changes_under_a_hot_memory_is_refused(cellar: Cellar) -> None:
    stamp = await cellar.create("zoo", "red")
    hot = await opened(cellar, "zoo")
    await cellar.store.replace("zoo", hot.config, "other", expected=stamp, slots={})
    cellar.now += SYNC_S
    with pytest.raises(FingerprintMismatch):
        await opened(cellar, "zoo")


async def test_a_load_that_fails_is_tried_again_by_the_next_one(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    cellar.store.down = {"load"}
    with pytest.raises(StoreDown):
        await opened(cellar, "zoo")
    cellar.store.down = set()
    await opened(cellar, "zoo")
    assert "zoo" not in cellar.archive._locks


async def test_many_who_open_a_cold_memory_load_it_once(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    cellar.store.gates["zoo"] = asyncio.Event()
    tasks = [asyncio.create_task(opened(cellar, "zoo")) for _ in range(5)]
    await settle()
    cellar.store.gates["zoo"].set()
    first, *others = await asyncio.gather(*tasks)
    assert all(hot is first for hot in others)
    assert cellar.store.asked == ["load zoo"]


async def test_a_loading_tenant_holds_nobody_else_up(cellar: Cellar) -> None:
    await cellar.create("slow", "red")
    await cellar.create("quick", "red")
    cellar.store.gates["slow"] = asyncio.Event()
    loading = asyncio.create_task(opened(cellar, "slow"))
    await settle()
    async with asyncio.timeout(PATIENCE_S):
        await opened(cellar, "quick")
    assert not loading.done()
    cellar.store.gates["slow"].set()
    await loading


async def test_who_leaves_while_it_loads_does_not_spoil_it_for_the_next_one(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    cellar.store.gates["zoo"] = asyncio.Event()
    first, second = (asyncio.create_task(opened(cellar, "zoo")) for _ in range(2))
    await settle()
    first.cancel()
    cellar.store.gates["zoo"].set()
    await second
    assert first.cancelled() or first.done()
    assert "zoo" not in cellar.archive._locks


# Keeping in step ------------------------------------------------------------------------------------------------------


async def test_a_young_memory_asks_nobody(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    first = await opened(cellar, "zoo")
    cellar.now += 0.9 * SYNC_S
    assert await opened(cellar, "zoo") is first
    assert cellar.store.asked == ["load zoo"]


async def test_an_old_memory_takes_over_what_other_workers_wrote(cellar: Cellar) -> None:
    await cellar.create("zoo", "red", "green", slots=2)
    await cellar.push("zoo", ("red", "1", 0.9), ("red", "2", 0.8))
    first = await opened(cellar, "zoo")
    await cellar.push("zoo", ("red", "3", 0.5), ("green", "4", 0.5), ("red", "5", 0.4), ("red", "3", 0.3))
    assert slots_of((await opened(cellar, "zoo")).snapshot.dynamic) == [{"1": 0.9, "2": 0.8}, {}]
    cellar.now += SYNC_S
    hot = await opened(cellar, "zoo")
    assert hot is first
    assert slots_of(hot.snapshot.dynamic) == [{"3": 0.3, "5": 0.4}, {"4": 0.5}]
    assert hot.filled == 3
    record = await cellar.store.get("zoo")
    assert hot.stamp == (record.stamp if record else None)
    assert cellar.store.asked == ["load zoo", "sync zoo"]
    await opened(cellar, "zoo")
    assert cellar.store.asked == ["load zoo", "sync zoo"]


async def test_a_memory_that_followed_changes_reads_as_one_that_was_loaded(cellar: Cellar) -> None:
    await cellar.create("zoo", "red", "green", slots=2)
    await cellar.push("zoo", ("red", "1", 0.9))
    followed = await opened(cellar, "zoo")
    for n in range(2, 9):
        await cellar.push("zoo", ("red", f"{n}", 1.0 / n), ("green", f"{n}", 0.1 * n))
        cellar.now += SYNC_S
        assert await opened(cellar, "zoo") is followed
    cellar.archive.drop("zoo")
    loaded = await opened(cellar, "zoo")
    assert loaded is not followed
    x = torch.stack([feature("query"), feature("4")])
    torch.testing.assert_close(followed.shelves.scores(x)[0], loaded.shelves.scores(x)[0])
    assert slots_of(followed.snapshot.dynamic) == slots_of(loaded.snapshot.dynamic)


async def test_a_slot_that_left_and_came_back_between_two_looks_is_there_once(cellar: Cellar) -> None:
    await cellar.create("zoo", "red", slots=1)
    await cellar.push("zoo", ("red", "1", 0.9))
    await opened(cellar, "zoo")
    await cellar.push("zoo", ("red", "2", 0.5))
    await cellar.push("zoo", ("red", "1", 0.4))
    cellar.now += SYNC_S
    assert slots_of((await opened(cellar, "zoo")).snapshot.dynamic) == [{"1": 0.4}]


async def _purge(store: Store) -> None:
    await store.purge("zoo", class_id("red"), "1")


async def _reset(store: Store) -> None:
    await store.reset("zoo", dynamic=True, static=False, class_ids=None)


async def _recreate(store: Store) -> None:
    await store.delete("zoo")
    await store.replace("zoo", TenantConfig(classes=(ClassSpec(name="red"),)), "fake-1", expected=None, slots={})


@pytest.mark.parametrize("change", [_purge, _reset, _recreate])
async def test_a_memory_that_cannot_follow_is_loaded_anew(
    cellar: Cellar, change: Callable[[Store], Awaitable[None]]
) -> None:
    await cellar.create("zoo", "red")
    await cellar.push("zoo", ("red", "1", 0.5))
    first = await opened(cellar, "zoo")
    await change(cellar.store)
    cellar.now += SYNC_S
    hot = await opened(cellar, "zoo")
    assert hot is not first
    assert slots_of(hot.snapshot.dynamic) == [{}]


async def test_a_tenant_that_another_worker_deleted_is_gone_here_too(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    await opened(cellar, "zoo")
    await cellar.store.delete("zoo")
    cellar.now += SYNC_S
    with pytest.raises(UnknownTenant):
        await opened(cellar, "zoo")
    with pytest.raises(UnknownTenant):
        await cellar.archive.record("zoo")


async def test_a_record_is_no_older_than_a_memory_may_be(cellar: Cellar) -> None:
    """What another worker made of the tenant shows, even if nobody classifies here."""
    stamp = await cellar.create("zoo", "red")
    await opened(cellar, "zoo")
    more = TenantConfig(classes=(ClassSpec(name="red"), ClassSpec(name="green")))
    await cellar.store.replace("zoo", more, "fake-1", expected=stamp, slots={})
    cellar.now += SYNC_S
    assert (await cellar.archive.record("zoo")).config == more


async def test_a_record_of_a_tenant_that_another_worker_deleted_is_gone_too(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    await opened(cellar, "zoo")
    await cellar.store.delete("zoo")
    cellar.now += SYNC_S
    with pytest.raises(UnknownTenant):
        await cellar.archive.record("zoo")


async def test_a_store_that_is_down_is_heard_of_and_the_memory_goes_on_when_it_is_back(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    first = await opened(cellar, "zoo")
    cellar.store.down = {"sync"}
    cellar.now += SYNC_S
    with pytest.raises(StoreDown):
        await opened(cellar, "zoo")
    cellar.store.down = set()
    assert await opened(cellar, "zoo") is first


async def test_taking_back_counts_as_a_look(cellar: Cellar) -> None:
    stamp = await cellar.create("zoo", "red")
    async with cellar.archive.open("zoo") as hot:
        cellar.now += SYNC_S
        change = Change(class_id=class_id("red"), slot=_candidate("red", "1", 0.5).slot)
        await cellar.archive.take_back(hot, Stamp(epoch=stamp.epoch, version=stamp.version + 1), [change])
    assert slots_of((await opened(cellar, "zoo")).snapshot.dynamic) == [{"1": 0.5}]
    assert cellar.store.asked == ["load zoo"]


# Room -----------------------------------------------------------------------------------------------------------------


async def test_the_least_used_memories_are_dropped_for_room() -> None:
    cellar = Cellar(max_bytes=1)
    for tenant in ("a", "b", "c"):
        await cellar.create(tenant, "red")
    one = (await opened(cellar, "a")).nbytes
    cellar.archive._max_bytes = 2 * one
    for tenant in ("b", "a", "c"):
        await opened(cellar, tenant)
    cellar.store.asked.clear()
    for tenant in ("a", "c"):
        await opened(cellar, tenant)
    assert cellar.store.asked == []
    await opened(cellar, "b")
    assert cellar.store.asked == ["load b"]
    assert cellar.sample("dmn_hot_evictions_total") == 2
    assert cellar.sample("dmn_hot_tenants") == 2
    assert cellar.sample("dmn_hot_bytes") == 2 * one
    cellar.worker.close()


async def test_an_opened_memory_is_never_dropped() -> None:
    cellar = Cellar(max_bytes=1)
    await cellar.create("held", "red")
    await cellar.create("other", "red")
    async with cellar.archive.open("held") as hot:
        await opened(cellar, "other")
        await opened(cellar, "other")
        await cellar.push("held", ("red", "1", 0.5))
        assert "held" in cellar.archive._hot
    assert cellar.store.asked.count("load held") == 1
    assert await opened(cellar, "held") is hot
    cellar.worker.close()


async def test_a_memory_larger_than_the_room_is_answered_from_all_the_same() -> None:
    cellar = Cellar(max_bytes=1)
    await cellar.create("zoo", "red")
    assert await opened(cellar, "zoo") is await opened(cellar, "zoo")
    cellar.worker.close()


async def test_the_bytes_of_a_memory_grow_with_its_slots(cellar: Cellar) -> None:
    await cellar.create("zoo", "red", slots=50)
    before = (await opened(cellar, "zoo")).nbytes
    await cellar.push("zoo", *(("red", f"{n}", 0.5) for n in range(40)))
    cellar.now += SYNC_S
    hot = await opened(cellar, "zoo")
    assert hot.nbytes > before + 40 * 2 * DIM
    assert cellar.sample("dmn_hot_bytes") == hot.nbytes
    assert cellar.sample("dmn_memory_fill_ratio") == 40 / 50


async def test_the_fill_ratio_is_of_all_hot_memories(cellar: Cellar) -> None:
    await cellar.create("a", "red", "green", slots=5)
    await cellar.create("b", "red", slots=10)
    await cellar.push("a", ("red", "1", 0.5), ("green", "2", 0.5))
    await cellar.push("b", ("red", "3", 0.5))
    await opened(cellar, "a")
    await opened(cellar, "b")
    assert cellar.sample("dmn_memory_fill_ratio") == 3 / 20
    cellar.archive.drop("a")
    assert cellar.sample("dmn_memory_fill_ratio") == 1 / 10
    assert cellar.sample("dmn_hot_tenants") == 1


async def test_a_dropped_memory_is_loaded_anew(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    await opened(cellar, "zoo")
    cellar.archive.drop("zoo")
    cellar.archive.drop("zoo")
    await opened(cellar, "zoo")
    assert cellar.store.asked == ["load zoo", "load zoo"]


async def test_a_memory_is_held_by_one_at_a_time(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    async with cellar.archive.open("zoo"):
        other = asyncio.create_task(opened(cellar, "zoo"))
        alone = asyncio.create_task(_enter(cellar))
        await settle()
        assert not other.done()
        assert not alone.done()
    await asyncio.gather(other, alone)


async def _enter(cellar: Cellar) -> None:
    async with cellar.archive.exclusive("zoo"):
        pass
