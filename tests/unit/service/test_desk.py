"""Samples of one tenant against its memory: read together, answered as if each had come alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from core.classify import Answers, Sample
from core.classify import classify as classify_in_core
from core.codec import encode_feature
from core.numerics import affinity, unit
from core.shelves import Shelves
from service import desk as desk_module
from service.archive import Archive
from service.desk import Desk, Question, Reading
from service.errors import NoClasses, StoreDown, UnknownTenant
from service.metrics import OUTCOMES, Metrics
from service.stores.base import PushCandidate, Pushed, ReloadNeeded, Stamp, StoredShot, StoredSlot
from service.stores.memory import InProcessStore
from service.tenants import ClassSpec, TenantConfig, class_id
from service.texts import TextFeatures
from service.worker import Worker
from tests.fakes import FakeEncoder

PATIENCE_S = 20.0
NAMES = ("red", "green", "blue")
DIM = FakeEncoder.dim
GROUP = 32
"""Candidates in one push, at most."""

ONE = 2 * DIM
"""Bytes of one stored feature."""


class Store(InProcessStore):
    """The in-process store, which notes the pushes and does something before each where a test asks for it."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0, remember_s=1.0, remember_bytes=1)
        self.pushes: list[list[str]] = []
        self.before: Callable[[], Awaitable[None]] | None = None

    async def push(self, tenant: str, since: Stamp, candidates: Sequence[PushCandidate]) -> Pushed:
        self.pushes.append([one.slot.id for one in candidates])
        if self.before is not None:
            await self.before()
        return await super().push(tenant, since, candidates)


class Study:
    """A desk with its archive and store; time stands still, so no memory ever looks for changes by itself."""

    def __init__(self, *, tenant_max_bytes: int = 1 << 30) -> None:
        self.store, self.encoder, self.worker = Store(), FakeEncoder(), Worker()
        self.metrics = Metrics(CollectorRegistry())
        texts = TextFeatures(self.worker, self.encoder.encode_texts, max_bytes=1 << 20)
        self.archive = Archive(
            self.store,
            self.encoder,
            texts,
            self.worker,
            self.metrics,
            lambda: 0.0,
            max_bytes=1 << 30,
            sync_s=1.0,
        )
        self.desk = Desk(self.archive, self.store, self.worker, self.metrics, tenant_max_bytes=tenant_max_bytes)

    async def create(self, tenant: str = "zoo", *, slots: int = 2, learn: bool = True) -> Stamp:
        config = TenantConfig(classes=tuple(ClassSpec(name=name) for name in NAMES), slots=slots, learn=learn)
        return await self.store.replace(tenant, config, self.encoder.fingerprint, expected=None, slots={})

    async def ask(self, *questions: Question, tenant: str = "zoo") -> list[Reading]:
        """Ask one after the other."""
        async with asyncio.timeout(PATIENCE_S):
            return [await self.desk.ask(tenant, question) for question in questions]

    async def ask_together(self, *questions: Question, tenant: str = "zoo") -> list[Reading | BaseException]:
        """Ask while the memory is held, so that all of them gather."""
        async with asyncio.timeout(PATIENCE_S):
            async with self.archive.exclusive(tenant):
                tasks = [asyncio.create_task(self.desk.ask(tenant, question)) for question in questions]
                await settle()
            return await asyncio.gather(*tasks, return_exceptions=True)

    async def contents(self, tenant: str = "zoo") -> dict[str, set[str]]:
        """Return the ids in each class that holds any."""
        stored = await self.store.load(tenant)
        assert stored is not None
        return {
            name: {slot.id for slot in stored.slots[class_id(name)]}
            for name in NAMES
            if stored.slots.get(class_id(name))
        }

    def updates(self) -> dict[str, float]:
        values = {
            name: self.metrics.registry.get_sample_value("dmn_memory_updates_total", {"outcome": name})
            for name in OUTCOMES
        }
        return {name: value for name, value in values.items() if value}


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def study() -> AsyncIterator[Study]:
    study = Study()
    yield study
    await study.desk.drain()
    study.worker.close()


def look(name: str, doubt: float = 0.2) -> Tensor:
    """Return the feature of a picture of a colour; the more doubt, the larger its entropy."""
    own, *others = FakeEncoder().encode_texts([f"a photo of {n}." for n in (name, *(o for o in NAMES if o != name))])
    texture = torch.randn(DIM, generator=torch.Generator().manual_seed(int(1000 * doubt)))
    return unit(own + (0.3 + doubt) * unit(others[0] + others[1]) + 0.01 * texture)


def question(name: str, digest: str, doubt: float = 0.2, *, learn: bool = True, explain: bool = False) -> Question:
    return Question(views=look(name, doubt)[None], digest=digest, learn=learn, explain=explain)


def outcomes(readings: Sequence[Reading | BaseException]) -> list[str]:
    return [reading.learned.outcome if isinstance(reading, Reading) else type(reading).__name__ for reading in readings]


def same(one: Reading | BaseException, other: Reading | BaseException) -> bool:
    """Return whether two answers say the same, whoever was asked beside them."""
    assert isinstance(one, Reading)
    assert isinstance(other, Reading)
    close = all(
        torch.allclose(getattr(one, branch), getattr(other, branch), atol=1e-5)
        for branch in ("fused", "text", "dynamic")
    )
    return close and replace(one.learned, entropy=0.0) == replace(other.learned, entropy=0.0)


# What became of an image ----------------------------------------------------------------------------------------------


async def test_an_image_fills_a_free_slot_of_its_class(study: Study) -> None:
    await study.create()
    (reading,) = await study.ask(question("red", "1"))
    assert reading.names == NAMES
    assert reading.names[int(reading.fused.argmax())] == "red"
    assert (reading.learned.outcome, reading.learned.label, reading.learned.slot) == ("filled", "red", "1")
    assert reading.learned.evicted is None
    stored = await study.store.load("zoo")
    assert stored is not None
    assert stored.slots[class_id("red")] == (
        StoredSlot(id="1", entropy=reading.learned.entropy, feature=encode_feature(look("red"))),
    )
    assert reading.stamp == stored.record.stamp


async def test_a_surer_image_replaces_the_least_sure_one_and_says_which(study: Study) -> None:
    await study.create(slots=2)
    readings = await study.ask(*(question("red", id_, doubt) for id_, doubt in (("1", 0.3), ("2", 0.1), ("3", 0.2))))
    assert outcomes(readings) == ["filled", "filled", "replaced"]
    assert (readings[2].learned.slot, readings[2].learned.evicted) == ("3", "1")
    assert await study.contents() == {"red": {"2", "3"}}


async def test_a_less_sure_image_is_rejected_without_asking_the_store(study: Study) -> None:
    await study.create(slots=1)
    readings = await study.ask(question("red", "1", 0.1), question("red", "2", 0.3))
    assert outcomes(readings) == ["filled", "rejected"]
    assert (readings[1].learned.slot, readings[1].learned.evicted) == (None, None)
    assert study.store.pushes == [["1"]]


async def test_an_image_that_comes_again_is_a_duplicate_and_asks_no_store(study: Study) -> None:
    await study.create()
    readings = await study.ask(question("red", "1"), question("red", "1"))
    assert outcomes(readings) == ["filled", "duplicate"]
    assert readings[1].learned.slot == "1"
    assert study.store.pushes == [["1"]]
    torch.testing.assert_close(readings[0].fused, readings[1].fused)


async def test_an_image_that_comes_again_and_is_surer_is_kept_as_it_is_now(study: Study) -> None:
    await study.create()
    readings = await study.ask(question("red", "1", 0.3), question("red", "1", 0.1))
    assert outcomes(readings) == ["filled", "duplicate"]
    stored = await study.store.load("zoo")
    assert stored is not None
    assert [slot.entropy for slot in stored.slots[class_id("red")]] == [readings[1].learned.entropy]


async def test_an_image_that_must_not_learn_is_skipped_and_gets_the_answer_of_one_that_does(study: Study) -> None:
    await study.create()
    looked, learnt = await study.ask(question("red", "1", learn=False), question("red", "1"))
    assert outcomes([looked, learnt]) == ["skipped", "filled"]
    assert looked.learned.slot is None
    assert torch.equal(looked.fused, learnt.fused)
    assert study.store.pushes == [["1"]]


async def test_a_tenant_that_must_not_learn_learns_nothing(study: Study) -> None:
    await study.create(learn=False)
    readings = await study.ask(question("red", "1"), question("red", "1"))
    assert outcomes(readings) == ["skipped", "skipped"]
    assert study.store.pushes == []
    assert await study.contents() == {}


async def test_a_purged_image_is_rejected_without_asking_the_store_and_leaves_no_trace(study: Study) -> None:
    await study.create()
    await study.ask(question("red", "1"))
    await study.store.purge("zoo", class_id("red"), "1")
    study.archive.drop("zoo")
    purged, first = await study.ask_together(question("red", "1"), question("red", "2", 0.5))
    alone = Study()
    await alone.create()
    (second,) = await alone.ask(question("red", "2", 0.5))
    assert outcomes([purged, first]) == ["rejected", "filled"]
    assert study.store.pushes == [["1"], ["2"]]
    assert same(first, second)
    alone.worker.close()


async def test_what_another_worker_filled_meanwhile_is_taken_over_and_decides(study: Study) -> None:
    stamp = await study.create(slots=1)
    await study.ask(question("blue", "0"))
    theirs = StoredSlot(id="theirs", entropy=0.0, feature=encode_feature(look("red")))
    await study.store.push("zoo", replace(stamp, version=1), [PushCandidate(class_id=class_id("red"), slot=theirs)])
    first, second = await study.ask(question("red", "1"), question("red", "2"))
    assert outcomes([first, second]) == ["rejected", "rejected"]
    assert study.store.pushes == [["0"], ["theirs"], ["1"]]
    assert first.stamp.version == 2


async def test_outcomes_and_entropies_are_counted_once_an_image(study: Study) -> None:
    await study.create(slots=1)
    readings = await study.ask(
        question("red", "1"), question("red", "1"), question("red", "2", 0.5), question("blue", "3", learn=False)
    )
    assert study.updates() == {"filled": 1, "duplicate": 1, "rejected": 1, "skipped": 1}
    sums = study.metrics.registry.get_sample_value("dmn_memory_entropy_nats_sum")
    assert sums == pytest.approx(sum(reading.learned.entropy for reading in readings))


# Groups ---------------------------------------------------------------------------------------------------------------


async def test_images_that_gather_are_read_together_and_pushed_together(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    await study.create(slots=9)
    sizes: list[int] = []

    def counting(shelves: Shelves, samples: Sequence[Sample], *others: Any) -> Answers:
        sizes.append(len(samples))
        return classify_in_core(shelves, samples, *others)

    monkeypatch.setattr(desk_module, "classify", counting)
    readings = await study.ask_together(*(question("red", f"{n}") for n in range(5)))
    assert outcomes(readings) == ["filled"] * 5
    assert sizes == [5]
    assert study.store.pushes == [["0", "1", "2", "3", "4"]]


async def test_a_group_is_bounded_and_keeps_the_order(study: Study) -> None:
    await study.create(slots=100)
    count = GROUP + 8
    await study.ask_together(*(question("red", f"{n:02}") for n in range(count)))
    assert [len(push) for push in study.store.pushes] == [GROUP, 8]
    assert [id_ for push in study.store.pushes for id_ in push] == [f"{n:02}" for n in range(count)]


STREAM = [
    question("red", "1", 0.4),
    question("red", "2", 0.3),
    question("green", "3", 0.1),
    question("red", "2", 0.3),
    question("red", "4", 0.5, learn=False),
    question("red", "5", 0.1, learn=False),
    question("red", "6", 0.2),
    question("blue", "7", 0.6),
    question("red", "1", 0.4),
    question("red", "8", 0.15),
    question("green", "9", 0.45),
    question("red", "9", 0.05),
]


@pytest.mark.parametrize("slots", [0, 1, 2, 50])
async def test_answers_do_not_depend_on_who_else_was_in_the_group(slots: int) -> None:
    alone, together = Study(), Study()
    for study in (alone, together):
        await study.create(slots=slots)
    one_by_one, grouped = await alone.ask(*STREAM), await together.ask_together(*STREAM)
    assert len(together.store.pushes) <= 1
    for one, other in zip(one_by_one, grouped, strict=True):
        assert same(one, other)
    assert await alone.contents() == await together.contents()
    for study in (alone, together):
        study.worker.close()


@pytest.mark.parametrize("room", [0, 1, 2, 3])
async def test_answers_do_not_depend_on_the_group_when_the_tenant_runs_full_either(room: int) -> None:
    alone, together = (Study(tenant_max_bytes=room * ONE) for _ in range(2))
    for study in (alone, together):
        await study.create(slots=2)
    one_by_one, grouped = await alone.ask(*STREAM), await together.ask_together(*STREAM)
    assert outcomes(grouped) == outcomes(one_by_one)
    for one, other in zip(one_by_one, grouped, strict=True):
        assert same(one, other)
    assert await alone.contents() == await together.contents()
    for study in (alone, together):
        study.worker.close()


async def test_a_client_that_leaves_stops_nobody_and_teaches_nothing(study: Study) -> None:
    await study.create()
    async with asyncio.timeout(PATIENCE_S):
        async with study.archive.exclusive("zoo"):
            gone, stays = (asyncio.create_task(study.desk.ask("zoo", question("red", id_))) for id_ in "12")
            await settle()
            gone.cancel()
            await settle()
        reading = await stays
    assert outcomes([reading]) == ["filled"]
    assert gone.cancelled()
    assert await study.contents() == {"red": {"2"}}


async def test_a_client_that_leaves_in_the_middle_of_a_push_stops_nobody(study: Study) -> None:
    await study.create()
    arrived, gate = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await gate.wait()

    study.store.before = wait
    async with asyncio.timeout(PATIENCE_S):
        async with study.archive.exclusive("zoo"):
            gone, stays = (asyncio.create_task(study.desk.ask("zoo", question("red", id_))) for id_ in "12")
            await settle()
        await arrived.wait()
        gone.cancel()
        gate.set()
        assert (await stays).learned.outcome == "filled"
    assert await study.contents() == {"red": {"1", "2"}}
    assert outcomes(await study.ask(question("red", "1"))) == ["duplicate"]


async def test_a_queue_that_everybody_left_touches_nothing(study: Study) -> None:
    await study.create()
    async with study.archive.exclusive("zoo"):
        tasks = [asyncio.create_task(study.desk.ask("zoo", question("red", id_))) for id_ in "12"]
        await settle()
        for task in tasks:
            task.cancel()
        await settle()
    await study.desk.drain()
    assert study.store.pushes == []
    assert not study.desk._queues


async def test_tenants_do_not_wait_for_each_other(study: Study) -> None:
    for tenant in ("zoo", "farm"):
        await study.create(tenant)
    async with study.archive.exclusive("zoo"):
        held = asyncio.create_task(study.desk.ask("zoo", question("red", "1")))
        await settle()
        assert outcomes(await study.ask(question("red", "1"), tenant="farm")) == ["filled"]
        assert not held.done()
    await held


async def test_draining_waits_for_what_is_under_way(study: Study) -> None:
    await study.create()
    async with study.archive.exclusive("zoo"):
        asked = asyncio.create_task(study.desk.ask("zoo", question("red", "1")))
        await settle()
        draining = asyncio.create_task(study.desk.drain())
        await settle()
        assert not draining.done()
    async with asyncio.timeout(PATIENCE_S):
        await draining
        assert outcomes([await asked]) == ["filled"]
    assert not study.desk._queues


# What goes wrong ------------------------------------------------------------------------------------------------------


async def test_a_memory_that_began_a_new_life_is_read_again(study: Study) -> None:
    await study.create()
    await study.ask(question("red", "old"))
    done = False

    async def reset() -> None:
        nonlocal done
        if not done:
            done = True
            await study.store.reset("zoo", dynamic=True, static=False, class_ids=None)

    study.store.before = reset
    readings = await study.ask_together(question("red", "1"), question("green", "2"))
    assert outcomes(readings) == ["filled", "filled"]
    assert study.store.pushes == [["old"], ["1", "2"], ["1", "2"]]
    assert await study.contents() == {"red": {"1"}, "green": {"2"}}
    record = await study.store.get("zoo")
    assert record is not None
    assert {reading.stamp for reading in readings if isinstance(reading, Reading)} == {record.stamp}
    assert study.updates() == {"filled": 3}


async def test_a_memory_that_keeps_changing_ends_in_a_refusal_and_is_fine_afterwards(study: Study) -> None:
    await study.create()

    async def always() -> None:
        raise ReloadNeeded

    study.store.before = always
    readings = await study.ask_together(question("red", "1"), question("red", "2"))
    assert [type(told) for told in readings] == [StoreDown, StoreDown]
    assert isinstance(readings[0], StoreDown)
    assert readings[0].retry_after_s
    assert len(study.store.pushes) == 3
    study.store.before = None
    assert outcomes(await study.ask(question("red", "1"))) == ["filled"]
    assert not study.desk._queues


async def test_a_store_that_is_down_reaches_everybody_who_waits_and_nobody_after(study: Study) -> None:
    await study.create()

    async def down() -> None:
        raise StoreDown("down")

    study.store.before = down
    readings = await study.ask_together(*(question("red", f"{n:02}") for n in range(GROUP + 2)))
    assert {type(told) for told in readings} == {StoreDown}
    study.store.before = None
    assert outcomes(await study.ask(question("red", "1"))) == ["filled"]


async def test_a_fault_of_the_reading_reaches_its_callers_and_no_other_tenant(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tenant in ("zoo", "farm"):
        await study.create(tenant)
    with monkeypatch.context() as patched:
        patched.setattr(desk_module, "classify", _broken)
        assert outcomes(await study.ask_together(question("red", "1"), question("red", "2"))) == ["KeyError"] * 2
    assert outcomes(await study.ask(question("red", "1"))) == ["filled"]
    assert outcomes(await study.ask(question("red", "1"), tenant="farm")) == ["filled"]


def _broken(*_: object) -> Answers:
    raise KeyError


async def test_a_tenant_that_cannot_be_opened_says_why(study: Study) -> None:
    with pytest.raises(UnknownTenant):
        await study.ask(question("red", "1"))
    await study.store.replace("zoo", TenantConfig(), "fake-1", expected=None, slots={})
    with pytest.raises(NoClasses):
        await study.ask(question("red", "1"))
    assert not study.desk._queues


# Bytes ----------------------------------------------------------------------------------------------------------------


async def test_a_full_tenant_takes_no_more_slots_and_says_skipped() -> None:
    study = Study(tenant_max_bytes=2 * ONE)
    await study.create(slots=5)
    readings = await study.ask(
        question("red", "1"), question("green", "2"), question("red", "3"), question("blue", "4")
    )
    assert outcomes(readings) == ["filled", "filled", "skipped", "skipped"]
    assert readings[3].learned.slot is None
    assert await study.contents() == {"red": {"1"}, "green": {"2"}}
    study.worker.close()


async def test_a_full_tenant_still_replaces() -> None:
    study = Study(tenant_max_bytes=1 * ONE)
    await study.create(slots=1)
    readings = await study.ask(question("red", "1", 0.4), question("green", "2"), question("red", "3", 0.1))
    assert outcomes(readings) == ["filled", "skipped", "replaced"]
    study.worker.close()


async def test_a_group_fills_no_more_than_the_room_that_is_left() -> None:
    study = Study(tenant_max_bytes=3 * ONE)
    await study.create(slots=5)
    await study.ask(question("blue", "0"))
    readings = await study.ask_together(*(question("red", f"{n}", 0.1 * n) for n in range(1, 6)))
    assert outcomes(readings).count("filled") == 2
    assert sum(map(len, (await study.contents()).values())) == 3
    study.worker.close()


async def test_a_group_that_outdoes_its_own_images_does_not_grow_a_full_tenant() -> None:
    study = Study(tenant_max_bytes=0)
    await study.create(slots=1)
    readings = await study.ask_together(question("red", "1", 0.6), question("red", "2", 0.5), question("red", "3", 0.4))
    assert await study.contents() == {}
    assert outcomes(readings) == ["skipped"] * 3
    study.worker.close()


async def test_shots_and_their_images_count() -> None:
    study = Study(tenant_max_bytes=3 * ONE)
    stamp = await study.create(slots=5)
    own = StoredShot(id="s", class_id=class_id("red"), feature=bytes(ONE), image=bytes(ONE))
    await study.store.add_shots("zoo", stamp, [replace(own, feature=encode_feature(look("red")))])
    assert outcomes(await study.ask(question("red", "1"), question("red", "2"))) == ["filled", "skipped"]
    study.worker.close()


# Explaining -----------------------------------------------------------------------------------------------------------


async def test_an_answer_is_explained_where_it_is_asked_for(study: Study) -> None:
    await study.create()
    plain, told = await study.ask_together(question("red", "1"), question("red", "2", explain=True))
    assert isinstance(plain, Reading)
    assert isinstance(told, Reading)
    assert plain.explanation is None
    assert told.explanation is not None


async def test_an_explanation_names_the_three_strongest_of_each_memory_in_order(study: Study) -> None:
    stamp = await study.create(slots=4)
    shots = [
        StoredShot(id=f"s{n}", class_id=class_id(name), feature=encode_feature(look(name, 0.1 * n)))
        for n, name in enumerate(("red", "red", "green", "red", "blue"))
    ]
    await study.store.add_shots("zoo", stamp, shots)
    await study.ask(*(question(name, f"{n}", 0.1 * n) for n, name in enumerate(("red", "red", "green", "red", "blue"))))
    stored = await study.store.load("zoo")
    assert stored is not None
    x = look("red", 0.15)
    names = {class_id(name): name for name in NAMES}
    kept = [(slot, names[own]) for own, bank in stored.slots.items() for slot in bank]
    slots = sorted(kept, key=lambda one: -_affinity(x, one[0].feature))[:3]
    (reading,) = await study.ask(question("red", "new", 0.15, explain=True, learn=False))
    told = reading.explanation
    assert told is not None
    for trace, (slot, name) in zip(told.dynamic, slots, strict=True):
        assert (trace.id, trace.label, trace.entropy) == (slot.id, name, slot.entropy)
        assert trace.affinity == pytest.approx(_affinity(x, slot.feature), abs=1e-5)
    strongest = sorted(shots, key=lambda shot: -_affinity(x, shot.feature))[:3]
    for trace, shot in zip(told.static, strongest, strict=True):
        assert (trace.id, class_id(trace.label), trace.entropy) == (shot.id, shot.class_id, None)
        assert trace.affinity == pytest.approx(_affinity(x, shot.feature), abs=1e-5)


async def test_an_image_that_was_stored_stands_first_in_its_own_explanation(study: Study) -> None:
    await study.create()
    _, reading = await study.ask(question("red", "1", 0.3), question("red", "2", 0.1, explain=True))
    assert reading.explanation is not None
    assert [trace.id for trace in reading.explanation.dynamic] == ["2", "1"]
    assert reading.explanation.dynamic[0].affinity == pytest.approx(1.0, abs=1e-2)


def _affinity(x: Tensor, feature: bytes) -> float:
    key = torch.frombuffer(bytearray(feature), dtype=torch.float16).float()
    return float(affinity(unit(key) @ x, 5.5))


async def test_an_empty_memory_explains_with_nothing(study: Study) -> None:
    await study.create(slots=0)
    (reading,) = await study.ask(question("red", "1", explain=True))
    assert reading.explanation is not None
    assert (reading.explanation.dynamic, reading.explanation.static) == ((), ())


async def test_an_answer_has_a_static_branch_exactly_if_there_are_shots(study: Study) -> None:
    stamp = await study.create()
    (without,) = await study.ask(question("red", "1"))
    assert without.static is None
    own = StoredShot(id="s", class_id=class_id("red"), feature=encode_feature(look("red")))
    await study.store.add_shots("zoo", replace(stamp, version=stamp.version + 1), [own])
    study.archive.drop("zoo")
    (with_,) = await study.ask(question("red", "1"))
    assert with_.static is not None
    assert with_.static.shape == (3,)
