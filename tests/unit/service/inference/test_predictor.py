"""Samples of one tenant against its memory: read together, answered as if each had come alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from core.classify import Answers, Sample
from core.classify import classify as classify_in_core
from core.memory.codec import encode_feature
from core.numerics import affinity, unit
from core.prepared_banks import Shelves
from core.snapshot import Method
from service.concurrency.worker_thread import Worker
from service.domain.memory import Stamp, StoredBank, StoredMemory, StoredShot, StoredSlot
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import Contended, NoClasses, StoreAway, StoreDown, UnknownTenant
from service.inference import scoring
from service.inference.predictor import Desk
from service.inference.results import Question, Reading
from service.memory.cache import Archive
from service.memory.text_features import TextFeatures
from service.stores.in_process import InProcessStore
from service.stores.protocol import PushCandidate, Pushed, ReloadNeeded
from service.telemetry.metrics import OUTCOMES, Metrics
from tests.support.fakes import FakeEncoder

PATIENCE_S = 60.0
SYNC_S = 1.0
NAMES = ("red", "green", "blue")
DIM = FakeEncoder.dim
GROUP = 32
"""Candidates in one push, at most."""

ONE = 2 * DIM
"""Bytes of one stored feature."""


class Store(InProcessStore):
    """The in-process store, which notes the pushes and does something before each where a test asks for it.

    While there is a `fault`, the calls of a desk and its archive raise it.
    """

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0, remember_s=1.0, remember_bytes=1)
        self.pushes: list[list[str]] = []
        self.before: Callable[[], Awaitable[None]] | None = None
        self.fault: Exception | None = None

    async def load(self, tenant: str, *, images: bool = False) -> StoredMemory | None:
        self._ask()
        return await super().load(tenant, images=images)

    async def stamps(self, tenants: Sequence[str]) -> Sequence[Stamp | None]:
        self._ask()
        return await super().stamps(tenants)

    async def push(self, tenant: str, since: Stamp, candidates: Sequence[PushCandidate]) -> Pushed:
        self._ask()
        self.pushes.append([one.slot.id for one in candidates])
        if self.before is not None:
            await self.before()
        return await super().push(tenant, since, candidates)

    def _ask(self) -> None:
        if self.fault is not None:
            raise self.fault


class Study:
    """A desk with its archive and store; time stands still until it is told, and until then no memory looks around."""

    def __init__(self, *, tenant_max_bytes: int = 1 << 30, pending_images: int = 100, serve_stale: bool = True) -> None:
        self.now = 0.0
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
            max_bytes=1 << 30,
            sync_s=SYNC_S,
            serve_stale=serve_stale,
        )
        self.desk = Desk(
            self.archive,
            self.store,
            self.worker,
            self.metrics,
            tenant_max_bytes=lambda _: tenant_max_bytes,
            pending_images=pending_images,
            serve_stale=serve_stale,
        )

    async def create(
        self,
        tenant: str = "zoo",
        *,
        slots: int = 2,
        learn: bool = True,
        labelling: str | None = None,
        method: Method = "dmn",
    ) -> Stamp:
        classes = tuple(ClassSpec(name=name) for name in NAMES)
        config = TenantConfig(classes=classes, slots=slots, learn=learn, method=method)
        return await self.put(tenant, config, labelling=labelling)

    async def put(self, tenant: str, config: TenantConfig, *, labelling: str | None = None) -> Stamp:
        return await self.store.replace(
            tenant,
            config,
            self.encoder.fingerprint,
            expected=None,
            labelling=labelling or config.labelling,
            origin={"encoder": "fake"},
            slots={},
        )

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

    async def banks(self, tenant: str = "zoo") -> dict[str, StoredBank]:
        """Return the bank of each class that holds any slot, to the last bit."""
        stored = await self.store.load(tenant)
        assert stored is not None
        return {name: stored.slots[class_id(name)] for name in NAMES if stored.slots.get(class_id(name))}

    async def contents(self, tenant: str = "zoo") -> dict[str, set[str]]:
        """Return the ids in each class that holds any."""
        return {name: set(bank.ids) for name, bank in (await self.banks(tenant)).items()}

    def leave(self, fault: Exception | None = None) -> None:
        """Let the store be away, or do otherwise what it is not asked, from the next look on."""
        self.store.fault = fault or StoreAway("away")
        self.now += SYNC_S

    def come_back(self) -> None:
        self.store.fault = None
        self.now += SYNC_S

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
    close = torch.allclose(one.probabilities, other.probabilities, atol=1e-5) and all(
        own.label == theirs.label and own.score == pytest.approx(theirs.score, abs=1e-5)
        for own, theirs in ((one.text, other.text), (one.dynamic, other.dynamic))
    )
    return close and replace(one.learned, entropy=0.0) == replace(other.learned, entropy=0.0)


# What became of an image ----------------------------------------------------------------------------------------------


async def test_an_image_fills_a_free_slot_of_its_class(study: Study) -> None:
    await study.create()
    (reading,) = await study.ask(question("red", "1"))
    assert reading.fused.label == "red"
    assert {choice.label for choice in reading.top} == set(NAMES)
    assert reading.top[0] == (NAMES[reading.fused.position], reading.fused.position, float(reading.probabilities.max()))
    assert (reading.learned.outcome, reading.learned.label, reading.learned.slot) == ("filled", "red", "1")
    assert reading.learned.evicted is None
    stored = await study.store.load("zoo")
    assert stored is not None
    assert list(stored.slots[class_id("red")]) == [
        StoredSlot(id="1", entropy=reading.learned.entropy, feature=encode_feature(look("red")))
    ]
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
    torch.testing.assert_close(readings[0].probabilities, readings[1].probabilities)


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
    assert torch.equal(looked.probabilities, learnt.probabilities)
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

    monkeypatch.setattr(scoring, "classify", counting)
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
    assert [type(told) for told in readings] == [Contended, Contended]
    assert isinstance(readings[0], Contended)
    assert readings[0].retry_after_s
    assert len(study.store.pushes) == 3
    study.store.before = None
    assert outcomes(await study.ask(question("red", "1"))) == ["filled"]
    assert not study.desk._queues


async def test_a_fault_of_the_reading_reaches_its_callers_and_no_other_tenant(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tenant in ("zoo", "farm"):
        await study.create(tenant)
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "classify", _broken)
        assert outcomes(await study.ask_together(question("red", "1"), question("red", "2"))) == ["KeyError"] * 2
    assert outcomes(await study.ask(question("red", "1"))) == ["filled"]
    assert outcomes(await study.ask(question("red", "1"), tenant="farm")) == ["filled"]


def _broken(*_: object) -> Answers:
    raise KeyError


async def test_a_tenant_that_cannot_be_opened_says_why(study: Study) -> None:
    with pytest.raises(UnknownTenant):
        await study.ask(question("red", "1"))
    await study.put("zoo", TenantConfig())
    with pytest.raises(NoClasses):
        await study.ask(question("red", "1"))
    assert not study.desk._queues


# While the store is away ----------------------------------------------------------------------------------------------

OUTAGES = [(1, len(STREAM)), (1, 2), (3, 9), (7, 12)]
"""From which image of the stream on the store is away, and from which on it is back."""


async def through(study: Study, leaves: int, returns: int) -> list[Reading]:
    """Ask the stream one after the other, with the store away for a part of it."""
    readings: list[Reading] = []
    for n, asked in enumerate(STREAM):
        if n == leaves:
            study.leave()
        if n == returns:
            study.come_back()
        readings += await study.ask(asked)
    study.come_back()
    return readings


@pytest.mark.parametrize(("leaves", "returns"), OUTAGES)
async def test_answers_go_on_from_the_hot_memory_and_say_so(study: Study, leaves: int, returns: int) -> None:
    await study.create()
    readings = await through(study, leaves, returns)
    assert [reading.stale for reading in readings] == [leaves <= n < returns for n in range(len(STREAM))]
    assert not any(reading.due for reading in readings)
    away = outcomes(readings[leaves:returns])
    assert set(away) <= {"pending", "duplicate", "rejected", "skipped"}
    assert "pending" in away
    assert "pending" not in outcomes(readings[:leaves] + readings[returns:])


async def test_an_image_that_waits_for_the_store_gets_the_answer_of_one_that_is_stored(study: Study) -> None:
    """It sees itself; those that wait beside it are not there yet."""
    await study.create()
    await study.ask(question("red", "0"))
    (calm,) = await study.ask(question("green", "1", learn=False))
    study.leave()
    (reading, other) = await study.ask(question("green", "1"), question("green", "2", learn=False))
    assert (reading.learned.outcome, reading.learned.slot, reading.learned.evicted) == ("pending", "1", None)
    assert torch.equal(reading.probabilities, calm.probabilities)
    alone = Study()
    await alone.create()
    assert same((await alone.ask(question("red", "0"), question("green", "2", learn=False)))[1], other)
    alone.worker.close()


@pytest.mark.parametrize("slots", [1, 2, 50])
@pytest.mark.parametrize(("leaves", "returns"), OUTAGES)
@pytest.mark.parametrize("how", ["next question", "deliver", "drain"])
async def test_once_it_is_back_the_memory_is_as_if_the_store_had_never_been_away(
    slots: int, leaves: int, returns: int, how: str
) -> None:
    calm, stormy = Study(), Study()
    for study in (calm, stormy):
        await study.create(slots=slots)
    await calm.ask(*STREAM)
    await through(stormy, leaves, returns)
    if how == "next question":
        await stormy.ask(question("blue", "0", learn=False))
    else:
        await getattr(stormy.desk, how)()
    assert await stormy.banks() == await calm.banks()
    assert stormy.desk.pending == 0
    assert stormy.updates().get("lost", 0) == 0
    for study in (calm, stormy):
        study.worker.close()


async def test_what_waited_is_there_before_the_next_answer_is_given(study: Study) -> None:
    await study.create()
    study_of_calm = Study()
    await study_of_calm.create()
    for each in (study, study_of_calm):
        await each.ask(question("blue", "0"))
    study.leave()
    await study.ask(question("red", "1"), question("green", "2"))
    study.come_back()
    await study_of_calm.ask(question("red", "1"), question("green", "2"))
    (one,), (other,) = [await each.ask(question("red", "3")) for each in (study, study_of_calm)]
    assert same(one, other)
    assert not one.stale
    study_of_calm.worker.close()


async def test_a_push_that_finds_the_store_away_is_kept_for_later(study: Study) -> None:
    """Even if it came through and only its answer did not: pushed again, it changes nothing."""
    await study.create()
    for n, comes_through in enumerate((False, True)):

        async def away(n: int = n, *, comes_through: bool = comes_through) -> None:
            if comes_through:
                stamp = (await study.archive.record("zoo")).stamp
                own = StoredSlot(id=f"{n}", entropy=0.5, feature=encode_feature(look("red")))
                await InProcessStore.push(
                    study.store, "zoo", stamp, [PushCandidate(class_id=class_id("red"), slot=own)]
                )
            raise StoreAway("away")

        study.store.before = away
        (reading,) = await study.ask(question("red", f"{n}"))
        assert (reading.learned.outcome, reading.stale) == ("pending", True)
        study.store.before = None
        study.come_back()
        await study.desk.deliver()
    assert await study.contents() == {"red": {"0", "1"}}


@pytest.mark.parametrize("fault", [StoreDown("full"), Contended()])
async def test_a_store_that_answers_but_does_not_write_is_as_good_as_away(study: Study, fault: StoreDown) -> None:
    await study.create()
    await study.ask(question("blue", "0"))

    async def refuse() -> None:
        raise fault

    study.store.before = refuse
    readings = await study.ask(question("red", "1"), question("green", "2"))
    assert outcomes(readings) == ["pending", "pending"]
    study.store.before = None
    study.come_back()
    await study.desk.deliver()
    assert await study.contents() == {"red": {"1"}, "green": {"2"}, "blue": {"0"}}


async def test_a_store_that_is_away_is_refused_to_everybody_who_waits_where_that_is_the_policy() -> None:
    study = Study(serve_stale=False)
    await study.create()
    await study.ask(question("red", "0"))
    study.leave()
    readings = await study.ask_together(*(question("red", f"{n:02}") for n in range(GROUP + 2)))
    assert {type(told) for told in readings} == {StoreAway}
    study.come_back()
    assert outcomes(await study.ask(question("red", "1"))) == ["filled"]
    assert study.desk.pending == 0
    study.worker.close()


async def test_a_push_that_fails_is_refused_too_where_that_is_the_policy() -> None:
    study = Study(serve_stale=False)
    await study.create()

    async def away() -> None:
        raise StoreAway("away")

    study.store.before = away
    assert outcomes(await study.ask_together(question("red", "1"))) == ["StoreAway"]
    assert study.desk.pending == 0
    study.worker.close()


async def test_a_memory_that_is_not_hot_cannot_be_answered_from(study: Study) -> None:
    await study.create()
    study.leave()
    assert outcomes(await study.ask_together(question("red", "1"), question("red", "2"))) == ["StoreAway"] * 2


async def test_writes_of_an_epoch_that_is_over_are_lost_and_counted(study: Study) -> None:
    await study.create()
    await study.ask(question("blue", "0"))
    study.leave()
    await study.ask(question("red", "1"), question("green", "2"))
    await study.store.reset("zoo", dynamic=True, static=False, class_ids=None)
    study.come_back()
    await study.desk.deliver()
    assert await study.contents() == {}
    assert study.desk.pending == 0
    assert study.updates() == {"filled": 1, "pending": 2, "lost": 2}


async def test_they_are_lost_and_counted_too_if_the_store_leaves_again_before_they_are_looked_at(study: Study) -> None:
    await study.create()
    await study.ask(question("blue", "0"))
    study.leave()
    await study.ask(question("red", "1"), question("green", "2"))
    await study.store.reset("zoo", dynamic=True, static=False, class_ids=None)
    study.come_back()
    async with study.archive.open("zoo"):
        pass  # somebody else looks at the memory, and brings it into its new epoch
    study.leave()
    await study.ask(question("red", "3"))
    study.come_back()
    await study.desk.deliver()
    assert await study.contents() == {"red": {"3"}}
    assert study.updates() == {"filled": 1, "pending": 3, "lost": 2}


async def test_writes_of_a_tenant_that_is_gone_are_lost_and_counted(study: Study) -> None:
    await study.create()
    await study.ask(question("blue", "0"))
    study.leave()
    await study.ask(question("red", "1"))
    await study.store.delete("zoo")
    study.come_back()
    await study.desk.deliver()
    assert study.desk.pending == 0
    assert study.updates()["lost"] == 1


async def test_writes_beyond_the_bound_are_lost_and_counted_and_claim_no_slot() -> None:
    study = Study(pending_images=2)
    await study.create(slots=9)
    await study.ask(question("blue", "0"))
    study.leave()
    readings = await study.ask(*(question("red", f"{n}", 0.1 * n) for n in range(1, 6)))
    assert outcomes(readings) == ["pending", "pending", "skipped", "skipped", "skipped"]
    assert [reading.learned.slot for reading in readings] == ["1", "2", None, None, None]
    assert study.desk.pending == 2
    assert study.updates()["lost"] == 3
    study.come_back()
    await study.desk.deliver()
    assert await study.contents() == {"blue": {"0"}, "red": {"1", "2"}}
    study.worker.close()


async def test_what_is_purged_meanwhile_does_not_come_back(study: Study) -> None:
    await study.create()
    await study.ask(question("red", "1", 0.3))
    study.leave()
    await study.ask(question("red", "1", 0.1), question("red", "2"))
    await study.store.purge("zoo", class_id("red"), "1")
    study.come_back()
    await study.desk.deliver()
    assert await study.contents() == {"red": {"2"}}


async def test_many_writes_are_delivered_in_groups(study: Study) -> None:
    await study.create(slots=100)
    await study.ask(question("blue", "0"))
    study.leave()
    count = 2 * GROUP + 3
    await study.ask_together(*(question("red", f"{n:02}") for n in range(count)))
    study.store.pushes.clear()
    study.come_back()
    await study.desk.deliver()
    assert [len(push) for push in study.store.pushes] == [GROUP, GROUP, 3]
    assert len((await study.contents())["red"]) == count


@pytest.mark.parametrize("fault", [StoreAway("away"), StoreDown("full"), ReloadNeeded(), KeyError("torn")])
async def test_a_delivery_that_fails_in_the_middle_is_taken_up_again(study: Study, fault: Exception) -> None:
    await study.create(slots=100)
    await study.ask(question("blue", "0"))
    study.leave()
    count = 2 * GROUP
    await study.ask_together(*(question("red", f"{n:02}") for n in range(count)))
    study.come_back()

    async def second() -> None:
        if len(study.store.pushes) == 3:
            raise fault

    study.store.before = second
    with suppress(KeyError):
        await study.desk.deliver()
    assert study.desk.pending == GROUP
    study.come_back()
    await study.desk.deliver()
    assert study.desk.pending == 0
    assert len((await study.contents())["red"]) == count
    assert "lost" not in study.updates()


async def test_a_delivery_that_is_cancelled_loses_nothing(study: Study) -> None:
    """As it is when the service stops."""
    await study.create()
    await study.ask(question("blue", "0"))
    study.leave()
    await study.ask(question("red", "1"), question("green", "2"))
    study.come_back()
    arrived = asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await asyncio.Event().wait()

    study.store.before = wait
    delivering = asyncio.create_task(study.desk.deliver())
    async with asyncio.timeout(PATIENCE_S):
        await arrived.wait()
    delivering.cancel()
    await asyncio.gather(delivering, return_exceptions=True)
    study.store.before = None
    await study.desk.drain()
    assert await study.contents() == {"red": {"1"}, "green": {"2"}, "blue": {"0"}}
    assert "lost" not in study.updates()


@pytest.mark.parametrize("cold", [False, True])
async def test_a_tenant_whose_delivery_fails_holds_up_no_other(study: Study, *, cold: bool) -> None:
    for tenant in ("zoo", "farm"):
        await study.create(tenant)
        await study.ask(question("blue", "0"), tenant=tenant)
    study.leave()
    for tenant in ("zoo", "farm"):
        await study.ask(question("red", "1"), tenant=tenant)
    study.come_back()
    if cold:
        study.archive.drop("zoo")
    real, failed = study.store._ask, False

    def once() -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise StoreAway("away")
        real()

    study.store._ask = once  # type: ignore[method-assign]
    await study.desk.deliver()
    assert study.desk.pending == 1
    assert await study.contents("zoo") == {"blue": {"0"}}
    assert await study.contents("farm") == {"red": {"1"}, "blue": {"0"}}


async def test_draining_does_not_give_up_what_a_changed_memory_held_up(study: Study) -> None:
    """Somebody may add a shot between the look at the memory and the push."""
    stamp = await study.create()
    await study.ask(question("blue", "0"))
    study.leave()
    await study.ask(question("red", "1"))
    study.come_back()
    done = False

    async def add_shot() -> None:
        nonlocal done
        if not done:
            done = True
            own = StoredShot(id="s", class_id=class_id("red"), feature=encode_feature(look("red")))
            await study.store.add_shots("zoo", stamp, [own])

    study.store.before = add_shot
    await study.desk.drain()
    assert await study.contents() == {"red": {"1"}, "blue": {"0"}}
    assert "lost" not in study.updates()


async def test_draining_gives_up_what_cannot_be_delivered_and_counts_it(study: Study) -> None:
    await study.create()
    await study.ask(question("blue", "0"))
    study.leave()
    await study.ask(question("red", "1"), question("green", "2"))
    async with asyncio.timeout(PATIENCE_S):
        await study.desk.drain()
    assert study.desk.pending == 0
    assert study.updates()["lost"] == 2


async def test_what_was_put_off_a_moment_ago_is_delivered_as_soon_as_the_store_is_back(study: Study) -> None:
    """However young the memory is: the service may be about to stop."""
    await study.create()
    await study.ask(question("blue", "0"))
    study.store.fault = StoreAway("away")
    await study.ask(question("red", "1"))
    study.store.fault = None
    await study.desk.drain()
    assert await study.contents() == {"red": {"1"}, "blue": {"0"}}


async def test_writes_that_wait_count_against_the_tenants_bytes() -> None:
    study = Study(tenant_max_bytes=3 * ONE)
    await study.create(slots=9)
    await study.ask(question("blue", "0"))
    study.leave()
    readings = await study.ask(*(question("red", f"{n}", 0.1 * n) for n in range(1, 6)))
    assert outcomes(readings) == ["pending", "pending", "skipped", "skipped", "skipped"]
    study.come_back()
    await study.desk.deliver()
    assert sum(map(len, (await study.contents()).values())) == 3
    study.worker.close()


# Due ------------------------------------------------------------------------------------------------------------------


async def test_a_memory_that_waits_to_be_rescored_learns_nothing_and_answers_all_the_same(study: Study) -> None:
    await study.create(labelling="another")
    readings = await study.ask_together(question("red", "1"), question("green", "2"), question("red", "3", learn=False))
    assert outcomes(readings) == ["skipped"] * 3
    for reading, name in zip(readings, ("red", "green", "red"), strict=True):
        assert isinstance(reading, Reading)
        assert (reading.stale, reading.due, reading.learned.slot) == (True, True, None)
        assert reading.fused.label == name
    assert study.store.pushes == []


async def test_a_memory_whose_shots_wait_to_be_read_is_due_too(study: Study) -> None:
    stamp = await study.create()
    waiting = StoredShot(id="s", class_id=class_id("red"), feature=b"", image=b"an image")
    await study.store.add_shots("zoo", stamp, [waiting])
    (reading,) = await study.ask(question("red", "1"))
    assert (reading.stale, reading.due, reading.learned.outcome) == (True, True, "skipped")
    assert reading.static is None


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
