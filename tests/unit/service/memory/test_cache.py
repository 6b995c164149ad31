"""Hot memories: loaded once, kept in step, and dropped for room when nobody holds them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from core.adaptive.statistics import TEMPERATURES, Counted
from core.classify import Sample, classify
from core.memory.codec import decode_features, encode_feature
from core.memory.dynamic import DynamicMemory
from core.numerics import unit
from service.concurrency.worker_thread import Worker
from service.domain.memory import Stamp, StoredMemory, StoredShot, StoredSlot
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import FingerprintMismatch, NoClasses, StoreAway, StoreDown, UnknownTenant
from service.memory.cache import Archive
from service.memory.convert import decode
from service.memory.hot_memory import HotMemory
from service.memory.text_features import TextFeatures
from service.stores.in_process import InProcessStore
from service.stores.protocol import Change, PushCandidate, Synced
from service.telemetry.metrics import Metrics
from tests.support.fakes import FakeEncoder

PATIENCE_S = 60.0
SYNC_S = 0.2
DIM = FakeEncoder.dim


class Store(InProcessStore):
    """The in-process store, which counts what is asked of it and waits where a gate is shut."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0, remember_s=1.0, remember_bytes=1)
        self.asked: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.down: set[str] = set()
        self.meanwhile: Callable[[], Awaitable[None]] | None = None

    async def load(self, tenant: str, *, images: bool = False) -> StoredMemory | None:
        self._note("load", tenant)
        if tenant in self.gates:
            await self.gates[tenant].wait()
        return await super().load(tenant, images=images)

    async def stamps(self, tenants: Sequence[str]) -> Sequence[Stamp | None]:
        self._note("stamps", *tenants)
        return await super().stamps(tenants)

    async def sync(self, tenant: str, since: Stamp) -> Synced:
        self._note("sync", tenant)
        return await super().sync(tenant, since)

    async def digests(self, tenant: str, at: Stamp, class_ids: Sequence[str]) -> Mapping[str, str]:
        self._note("digests", tenant)
        if self.meanwhile is not None:
            await self.meanwhile()
        return await super().digests(tenant, at, class_ids)

    def _note(self, op: str, *tenants: str) -> None:
        self.asked.append(" ".join((op, *tenants)))
        if op in self.down:
            raise StoreAway("down")


class Cellar:
    """An archive over a store, with a clock that stands still until it is told."""

    def __init__(self, *, max_bytes: int = 1 << 30, serve_stale: bool = True) -> None:
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
            serve_stale=serve_stale,
        )

    async def create(self, tenant: str, *names: str, slots: int = 2, fingerprint: str = "fake-1") -> Stamp:
        config = TenantConfig(classes=tuple(ClassSpec(name=name) for name in names), slots=slots)
        return await put(self.store, tenant, config, None, fingerprint=fingerprint)

    async def push(self, tenant: str, *slots: tuple[str, str, float]) -> None:
        """Write (class, id, entropy) as another worker would."""
        record = await self.store.get(tenant)
        assert record is not None
        await self.store.push(tenant, record.stamp, [_candidate(*slot) for slot in slots])

    def sample(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)


async def put(
    store: InProcessStore, tenant: str, config: TenantConfig, expected: Stamp | None, *, fingerprint: str = "fake-1"
) -> Stamp:
    """Create or replace a tenant, without slots."""
    return await store.replace(
        tenant,
        config,
        fingerprint,
        expected=expected,
        labelling=config.labelling,
        origin={"encoder": "fake", "architecture": "fake", "weights": fingerprint},
        slots={},
    )


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
            assert torch.equal(key, decode_features(encode_feature(feature(str(id_))), DIM)[0])
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
    assert (hot.static_bytes, hot.filled, hot.barred) == (2 * DIM + 4, 3, frozenset())
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
    await put(cellar.store, "zoo", config, stamp)
    await opened(cellar, "zoo")


async def test_a_memory_of_another_encoder_is_refused(cellar: Cellar) -> None:
    await cellar.create("zoo", "red", fingerprint="other")
    with pytest.raises(FingerprintMismatch):
        await opened(cellar, "zoo")
    assert cellar.encoder.texts == 0


async def test_a_fingerprint_that_changes_under_a_hot_memory_is_refused(cellar: Cellar) -> None:
    stamp = await cellar.create("zoo", "red")
    hot = await opened(cellar, "zoo")
    await put(cellar.store, "zoo", hot.config, stamp, fingerprint="other")
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
    assert cellar.store.asked == ["load zoo", "stamps zoo", "sync zoo"]
    await opened(cellar, "zoo")
    assert cellar.store.asked == ["load zoo", "stamps zoo", "sync zoo"]


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
    await put(store, "zoo", TenantConfig(classes=(ClassSpec(name="red"),)), None)


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


async def test_a_record_is_always_what_the_store_has(cellar: Cellar) -> None:
    """Who changes a tenant must not start from what was true a moment ago."""
    stamp = await cellar.create("zoo", "red")
    await opened(cellar, "zoo")
    more = TenantConfig(classes=(ClassSpec(name="red"), ClassSpec(name="green")))
    await put(cellar.store, "zoo", more, stamp)
    assert (await cellar.archive.record("zoo")).config == more


async def test_a_record_of_a_tenant_that_another_worker_deleted_is_gone_too(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    await opened(cellar, "zoo")
    await cellar.store.delete("zoo")
    with pytest.raises(UnknownTenant):
        await cellar.archive.record("zoo")


async def test_a_configuration_is_read_from_the_hot_memory_and_asked_for_where_none_is_hot(
    cellar: Cellar, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cellar.create("zoo", "red")
    hot = await opened(cellar, "zoo")
    await cellar.create("farm", "green")
    assert (await cellar.archive.config("farm")).classes == (ClassSpec(name="green"),)

    async def away(_: str) -> None:
        raise StoreAway("down")

    monkeypatch.setattr(cellar.store, "get", away)
    assert await cellar.archive.config("zoo") is hot.config
    with pytest.raises(StoreAway):
        await cellar.archive.config("farm")


# While the store is away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("down", ["stamps", "sync"])
async def test_while_the_store_is_away_the_memory_goes_on_and_says_so(cellar: Cellar, down: str) -> None:
    await cellar.create("zoo", "red")
    first = await opened(cellar, "zoo")
    await cellar.push("zoo", ("red", "1", 0.5))
    cellar.store.down = {down}
    cellar.now += SYNC_S
    hot = await opened(cellar, "zoo")
    assert hot is first
    assert (hot.away, hot.stale, hot.due) == (True, True, False)
    assert slots_of(hot.snapshot.dynamic) == [{}]
    cellar.store.down = set()
    assert await opened(cellar, "zoo") is first
    assert (hot.away, hot.stale) == (False, False)
    assert slots_of(hot.snapshot.dynamic) == [{"1": 0.5}]


async def test_a_memory_that_must_not_be_read_unasked_is_refused_and_goes_on_when_the_store_is_back() -> None:
    cellar = Cellar(serve_stale=False)
    await cellar.create("zoo", "red")
    first = await opened(cellar, "zoo")
    cellar.store.down = {"stamps"}
    cellar.now += SYNC_S
    with pytest.raises(StoreDown):
        await opened(cellar, "zoo")
    cellar.store.down = set()
    assert await opened(cellar, "zoo") is first
    cellar.worker.close()


async def test_a_memory_that_was_away_asks_again_however_young_it_is(cellar: Cellar) -> None:
    """The store may not have answered a push, right after a look: what waits for it must not wait for the next one."""
    await cellar.create("zoo", "red")
    hot = await opened(cellar, "zoo")
    hot.away = True
    await opened(cellar, "zoo")
    assert not hot.away
    assert cellar.store.asked == ["load zoo", "stamps zoo"]


async def test_a_memory_that_is_not_hot_is_not_there_while_the_store_is_away(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    cellar.store.down = {"load"}
    with pytest.raises(StoreAway):
        await opened(cellar, "zoo")


# Asking together ------------------------------------------------------------------------------------------------------


async def _ten(cellar: Cellar) -> list[str]:
    """Make ten hot memories, and forget what was asked for them."""
    tenants = [f"t{n}" for n in range(10)]
    for tenant in tenants:
        await cellar.create(tenant, "red")
        await opened(cellar, tenant)
    cellar.store.asked.clear()
    return tenants


async def test_the_versions_of_many_tenants_are_asked_for_in_one_call(cellar: Cellar) -> None:
    tenants = await _ten(cellar)
    cellar.now += SYNC_S
    await asyncio.gather(*(opened(cellar, tenant) for tenant in tenants))
    assert cellar.store.asked == ["stamps " + " ".join(tenants)]


async def test_of_those_only_the_changed_ones_take_changes_over(cellar: Cellar) -> None:
    tenants = await _ten(cellar)
    await cellar.push("t3", ("red", "1", 0.5))
    await cellar.store.delete("t7")
    cellar.now += SYNC_S
    told = await asyncio.gather(*(opened(cellar, tenant) for tenant in tenants), return_exceptions=True)
    assert isinstance(told[7], UnknownTenant)
    assert [hot.filled for hot in told if isinstance(hot, HotMemory)] == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    asked = sorted(cellar.store.asked)
    assert asked == ["load t7", "stamps " + " ".join(tenants), "sync t3", "sync t7"]


async def test_young_memories_ask_for_no_versions(cellar: Cellar) -> None:
    tenants = await _ten(cellar)
    cellar.now += 0.9 * SYNC_S
    await asyncio.gather(*(opened(cellar, tenant) for tenant in tenants))
    assert cellar.store.asked == []


async def test_a_version_that_is_the_same_makes_the_memory_young_again(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    await opened(cellar, "zoo")
    cellar.now += SYNC_S
    await opened(cellar, "zoo")
    cellar.now += 0.9 * SYNC_S
    await opened(cellar, "zoo")
    assert cellar.store.asked == ["load zoo", "stamps zoo"]


async def test_a_store_that_is_away_is_heard_of_by_all_who_asked_together(cellar: Cellar) -> None:
    tenants = await _ten(cellar)
    cellar.store.down = {"stamps"}
    cellar.now += SYNC_S
    told = await asyncio.gather(*(opened(cellar, tenant) for tenant in tenants))
    assert all(hot.away for hot in told)
    assert len(cellar.store.asked) == 1


async def test_who_leaves_while_versions_are_asked_for_spoils_it_for_nobody(cellar: Cellar) -> None:
    tenants = await _ten(cellar)
    cellar.now += SYNC_S
    tasks = [asyncio.create_task(opened(cellar, tenant)) for tenant in tenants]
    await asyncio.sleep(0)
    tasks[0].cancel()
    async with asyncio.timeout(PATIENCE_S):
        told = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(told[0], asyncio.CancelledError)
    assert all(isinstance(hot, HotMemory) for hot in told[1:])


async def test_taking_back_counts_as_a_look(cellar: Cellar) -> None:
    stamp = await cellar.create("zoo", "red")
    async with cellar.archive.open("zoo") as hot:
        cellar.now += SYNC_S
        change = Change(class_id=class_id("red"), slot=_candidate("red", "1", 0.5).slot)
        await cellar.archive.take_back(hot, Stamp(epoch=stamp.epoch, version=stamp.version + 1), [change])
    assert slots_of((await opened(cellar, "zoo")).snapshot.dynamic) == [{"1": 0.5}]
    assert cellar.store.asked == ["load zoo"]


async def test_a_memory_that_followed_changes_is_in_the_order_of_one_that_was_loaded_and_answers_bit_for_bit(
    cellar: Cellar,
) -> None:
    await cellar.create("zoo", "red", "green", slots=5)
    await opened(cellar, "zoo")
    random = Random(0)
    for n in range(40):
        # Rounded, so that ties are common; and ids whose order is not that of their coming.
        await cellar.push("zoo", (random.choice(("red", "green")), f"{n * 37 % 101}", round(random.random(), 1)))
        cellar.now += SYNC_S
        followed = await opened(cellar, "zoo")
        for bank in followed.snapshot.dynamic.classes:
            order = list(zip(bank.entropies, bank.ids, strict=True))
            assert order == sorted(order, key=lambda one: (one[0], str(one[1])))
    cellar.archive.drop("zoo")
    loaded = await opened(cellar, "zoo")
    assert [bank.ids for bank in followed.snapshot.dynamic.classes] == [
        bank.ids for bank in loaded.snapshot.dynamic.classes
    ]
    x = torch.stack([feature(f"query {n}") for n in range(20)])
    samples = [Sample(views=one[None], id=f"q{n}", learn=False) for n, one in enumerate(x)]
    assert torch.equal(followed.shelves.scores(x)[0], loaded.shelves.scores(x)[0])
    assert torch.equal(classify(followed.shelves, samples).fused, classify(loaded.shelves, samples).fused)


# Comparing with the store ---------------------------------------------------------------------------------------------


def _tamper(hot: HotMemory, class_: int, **values: object) -> None:
    """Change a class's bank in the hot copy alone."""
    classes = list(hot.snapshot.dynamic.classes)
    classes[class_] = replace(classes[class_], **values)  # type: ignore[arg-type]
    dynamic = replace(hot.snapshot.dynamic, classes=tuple(classes))
    with torch.inference_mode():  # as the worker does
        hot.shelves.advance(replace(hot.snapshot, dynamic=dynamic))


async def _two(cellar: Cellar) -> HotMemory:
    """Return the hot memory of a tenant with two slots."""
    await cellar.create("zoo", "red", "green")
    await cellar.push("zoo", ("red", "1", 0.5), ("red", "2", 0.25))
    return await opened(cellar, "zoo")


@pytest.mark.parametrize("wrong", [{"entropies": (0.25, 0.4)}, {"ids": ("2", "9")}, {"ids": ("1", "2")}])
async def test_a_hot_memory_that_differs_from_the_stores_is_loaded_anew_and_counted(
    cellar: Cellar, wrong: dict[str, object]
) -> None:
    _tamper(await _two(cellar), 0, **wrong)
    await cellar.archive.verify("zoo")
    assert cellar.sample("dmn_memory_repairs_total") == 1
    assert slots_of((await opened(cellar, "zoo")).snapshot.dynamic) == [{"2": 0.25, "1": 0.5}, {}]


async def test_a_hot_memory_that_equals_the_stores_stays(cellar: Cellar) -> None:
    hot = await _two(cellar)
    await cellar.archive.verify("zoo")
    assert cellar.sample("dmn_memory_repairs_total") == 0
    assert await opened(cellar, "zoo") is hot


async def test_a_hot_memory_that_is_merely_behind_is_brought_in_step_before_it_is_compared(cellar: Cellar) -> None:
    hot = await _two(cellar)
    await cellar.push("zoo", ("green", "3", 0.5), ("red", "4", 0.1))
    await cellar.archive.verify("zoo")
    assert cellar.sample("dmn_memory_repairs_total") == 0
    assert await opened(cellar, "zoo") is hot
    assert slots_of(hot.snapshot.dynamic) == [{"4": 0.1, "2": 0.25}, {"3": 0.5}]


async def test_a_store_that_moves_on_while_it_is_compared_is_compared_the_next_time(cellar: Cellar) -> None:
    hot = await _two(cellar)
    _tamper(hot, 0, entropies=(0.25, 0.4))

    async def meanwhile() -> None:
        await cellar.push("zoo", ("green", "3", 0.5))

    cellar.store.meanwhile = meanwhile
    await cellar.archive.verify("zoo", 300.0)
    cellar.now += 300.0
    await cellar.archive.verify("zoo", 300.0)
    assert cellar.sample("dmn_memory_repairs_total") == 0
    assert await opened(cellar, "zoo") is hot
    cellar.store.meanwhile = None
    await cellar.archive.verify("zoo", 300.0)
    assert cellar.sample("dmn_memory_repairs_total") == 1


async def test_a_memory_that_began_a_new_life_is_no_repair(cellar: Cellar) -> None:
    await _two(cellar)
    await _reset(cellar.store)
    await cellar.archive.verify("zoo")
    assert cellar.sample("dmn_memory_repairs_total") == 0


async def test_a_memory_is_compared_no_more_often_than_asked(cellar: Cellar) -> None:
    await _two(cellar)
    for age, compared in ((299.0, 0), (1.0, 1), (299.0, 1), (1.0, 2)):
        cellar.now += age
        await cellar.archive.verify("zoo", 300.0)
        assert cellar.store.asked.count("digests zoo") == compared


async def test_a_memory_that_is_not_hot_is_not_compared(cellar: Cellar) -> None:
    await cellar.create("zoo", "red")
    await cellar.archive.verify("zoo")
    assert cellar.store.asked == []


async def test_requests_go_on_while_a_memory_of_many_classes_is_compared(cellar: Cellar) -> None:
    await cellar.create("zoo", *(f"c{n}" for n in range(150)))
    await cellar.push("zoo", ("c149", "1", 0.5))
    hot = await opened(cellar, "zoo")
    _tamper(hot, 149, entropies=(0.4,))
    reader: list[asyncio.Task[HotMemory]] = []

    async def meanwhile() -> None:
        if not reader:
            reader.append(asyncio.create_task(opened(cellar, "zoo")))
            await settle()
        elif cellar.store.asked.count("digests zoo") == 3:
            assert reader[0].done()

    cellar.store.meanwhile = meanwhile
    await cellar.archive.verify("zoo")
    assert cellar.store.asked.count("digests zoo") == 3
    assert cellar.sample("dmn_memory_repairs_total") == 1


async def test_a_store_that_is_away_while_it_is_compared_changes_nothing(cellar: Cellar) -> None:
    hot = await _two(cellar)
    cellar.store.down = {"digests"}
    with pytest.raises(StoreAway):
        await cellar.archive.verify("zoo")
    cellar.store.down = set()
    assert await opened(cellar, "zoo") is hot


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


async def test_memories_that_come_and_go_leave_one_counter_each_and_few_that_wait_to_be_written() -> None:
    cellar, no = Cellar(max_bytes=1), torch.zeros(1, TEMPERATURES)
    names = [f"tenant-{n}" for n in range(20)]
    for tenant in names:
        await cellar.create(tenant, "red")
    for tenant in names * 3:
        async with cellar.archive.open(tenant) as hot:
            assert hot.tally is not None
            hot.tally.add(Counted(x=torch.zeros(1, DIM), responsibilities=torch.ones(1, 1), agreed=no, sure=no[:, 0]))
        assert len(cellar.archive._left) <= 10
    await cellar.archive.settle(everything=True)
    for tenant in names:
        stored = await cellar.store.load(tenant)
        assert stored is not None
        assert len(stored.counts) == 1
        assert decode(stored.statistics, [class_id("red")], torch.zeros(1, DIM)).images == 3
    cellar.worker.close()


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
