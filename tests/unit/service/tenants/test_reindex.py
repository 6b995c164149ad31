"""What a memory needs after its label set or its encoder changed: done once, whole, and taken up where it was left."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from core.memory.codec import decode_features, encode_feature
from core.numerics import unit
from core.snapshot import Snapshot
from service.background.jobs import Report
from service.classify import ClassifyCall, classify
from service.domain.memory import Stamp, StoredBank, StoredMemory, StoredShot, StoredSlot
from service.domain.records import Job, JobState
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import Contended
from service.inference.results import Reading
from service.memory.fingerprint import origin_of
from service.services import Rooms
from service.stores.protocol import Conflict, PushCandidate
from service.tenants import configuration, reindex
from tests.support.fakes import FakeEncoder, picture
from tests.support.replicas import PATIENCE_S, Replicas, replicas

TAU = FakeEncoder.logit_scale
COLOURS = ("red", "green", "blue", "yellow")
RED, GREEN, BLUE, YELLOW = map(class_id, COLOURS)


class Other(FakeEncoder):
    """Another encoder, whose features are those of the first one backwards."""

    def __init__(self) -> None:
        super().__init__("fake-2")

    def encode_images(self, pixels: Tensor) -> Tensor:
        return super().encode_images(pixels).flip(1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return super().encode_texts(texts).flip(1)


class House(Replicas):
    """Replicas, and a tenant `zoo` that another label set scored."""

    async def put(
        self,
        config: TenantConfig,
        *,
        labelling: str = "another",
        fingerprint: str = "fake-1",
        slots: Mapping[str, Sequence[StoredSlot]] | None = None,
        barred: Sequence[tuple[str, str]] = (),
        shots: Sequence[StoredShot] = (),
    ) -> Stamp:
        """Write the tenant `zoo` with slots that another label set scored."""
        record = await self.store.get("zoo")
        return await self.store.replace(
            "zoo",
            config,
            fingerprint,
            expected=None if record is None else record.stamp,
            labelling=labelling,
            origin={"encoder": "fake"},
            slots={own: StoredBank.of(bank) for own, bank in (slots or {}).items()},
            barred=barred,
            shots=shots,
        )


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with replicas(House) as house:
        yield house


@pytest.fixture
async def rooms(house: House) -> Rooms:
    return await house.open()


def colours(*names: str, slots: int = 5, kept: bool = False) -> TenantConfig:
    classes = tuple(ClassSpec(name=name) for name in names or COLOURS)
    return TenantConfig(classes=classes, slots=slots, retention="images" if kept else "features")


def look(name: str, doubt: float = 0.0) -> Tensor:
    """Return a feature near that of a colour's text; the more doubt, the larger its entropy."""
    every = FakeEncoder().encode_texts([f"a {own}." for own in COLOURS])
    return unit(every[COLOURS.index(name)] + doubt * unit(every.sum(0)))


def slot(id_: str, feature: Tensor, entropy: float = 0.5) -> StoredSlot:
    return StoredSlot(id=id_, entropy=entropy, feature=encode_feature(feature))


def shot(seed: int, name: str = "red", image: bytes | None = None) -> StoredShot:
    """Return a shot as the first encoder left it, with its image."""
    made = picture(name, seed) if image is None else image
    id_ = hashlib.sha256(made).hexdigest()[:20]
    return StoredShot(id=id_, class_id=class_id(name), feature=encode_feature(look(name)), image=made)


async def done(rooms: Rooms, job: Job | None) -> Job:
    """Return a job when it is over."""
    assert job is not None
    await rooms.jobs.wait(job.id, PATIENCE_S)
    return await rooms.jobs.get("zoo", job.id)


async def resumed(rooms: Rooms) -> Job:
    return await done(rooms, await reindex.resume(rooms, "zoo"))


class Gate:
    """Holds the scoring, in the worker, at its n-th part until it is opened."""

    def __init__(self, *, at: int) -> None:
        self._real, self._at = reindex._scored, at
        self._open, self._loop, self.reached = threading.Event(), asyncio.get_running_loop(), asyncio.Event()

    def __call__(
        self, slots: Sequence[StoredSlot], snapshot: Snapshot, counted: set[str]
    ) -> tuple[list[tuple[int, StoredSlot]], Snapshot]:
        self._at -= 1
        if not self._at:
            self._loop.call_soon_threadsafe(self.reached.set)
            self._open.wait(PATIENCE_S)
        return self._real(slots, snapshot, counted)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
async def gate(house: House, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gate]:
    """Yield a gate before the first part; it is opened before the house is left."""
    del house
    gate = Gate(at=1)
    monkeypatch.setattr(reindex, "_scored", gate)
    yield gate
    gate.open()


class Door:
    """Holds `upkeep.read_anew` at its n-th image until it is opened; the worker is free meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: int) -> None:
        self._real, self._at = reindex.read_anew, at
        self.reached, self._open = asyncio.Event(), asyncio.Event()
        monkeypatch.setattr(reindex, "read_anew", self)

    async def __call__(self, rooms: Rooms, tenant: str, own: StoredShot, image: bytes | None) -> StoredShot | None:
        self._at -= 1
        if not self._at:
            self.reached.set()
            await self._open.wait()
        return await self._real(rooms, tenant, own, image)

    def open(self) -> None:
        self._open.set()


# Scoring anew ---------------------------------------------------------------------------------------------------------


def by_hand(feature: bytes, text: Tensor) -> tuple[int, float]:
    """Return label and entropy of a stored feature, Eq. (4), worked out in double precision by itself."""
    x = decode_features(feature, FakeEncoder.dim)[0].double()
    p = (TAU * text.double() @ x).softmax(0).numpy()
    return int(p.argmax()), float(-(p * np.log(p + 1e-8)).sum())


async def test_every_slot_gets_the_label_and_entropy_of_its_feature(house: House, rooms: Rooms) -> None:
    config = colours(slots=1000)
    generator = torch.Generator().manual_seed(0)
    features = [
        unit(look(COLOURS[n % 4], 0.1 * (n % 7)) + 0.05 * torch.randn(FakeEncoder.dim, generator=generator))
        for n in range(60)
    ]
    bank = [slot(f"{n:02}", feature) for n, feature in enumerate(features)]
    await house.put(config, slots={RED: bank[:30], BLUE: bank[30:]})
    job = await resumed(rooms)
    assert (job.kind, job.state, job.result) == ("rescore", JobState.DONE, {"slots": 60})
    text = await rooms.texts.class_weights([config.prompts(spec) for spec in config.classes])
    found = await house.slots()
    assert len(found) > 2
    for own, kept in found.items():
        for one in kept.values():
            label, nats = by_hand(one.feature, text)
            assert own == config.classes[label].id
            assert one.entropy == pytest.approx(nats, rel=1e-4, abs=1e-7)
    assert {id_: one.feature for kept in found.values() for id_, one in kept.items()} == {
        one.id: one.feature for one in bank
    }
    memory = await house.memory()
    assert memory.record.labelling == config.labelling
    assert memory.record.config == config


async def test_the_order_of_a_class_is_that_of_the_new_entropies_and_the_surest_stay(
    house: House, rooms: Rooms
) -> None:
    doubts = {"a": 0.6, "b": 0.0, "c": 0.3, "d": 0.1}
    # Another label set thought otherwise of them.
    bank = [slot(id_, look("red", doubt), entropy=1.0 - doubt) for id_, doubt in doubts.items()]
    await house.put(colours(slots=3), slots={GREEN: bank})
    await resumed(rooms)
    assert {own: bank.ids for own, bank in (await house.memory()).slots.items() if len(bank)} == {RED: ("b", "d", "c")}


async def test_of_equal_entropies_the_lower_id_stays(house: House, rooms: Rooms) -> None:
    """Where there is but one class everything is as sure; elsewhere the last bits depend on the place in a batch."""
    await house.put(colours("red", slots=2), slots={RED: [slot(id_, look("red")) for id_ in "dbca"]})
    await resumed(rooms)
    kept = (await house.slots())[RED]
    assert kept.keys() == {"a", "b"}
    (nats,) = {one.entropy for one in kept.values()}
    assert nats < 1e-6, "they were not scored anew"


async def test_of_two_slots_with_one_id_the_surer_stays_as_anywhere(house: House, rooms: Rooms) -> None:
    """The same image, learned with other views, may have been stored under two labels."""
    one, other = slot("1", look("red", 0.1)), slot("1", look("red", 0.3))
    for slots in ({GREEN: [one], BLUE: [other]}, {GREEN: [other], BLUE: [one]}):
        await house.put(colours(), slots=slots)
        house.clock.advance(60.0)
        await resumed(rooms)
        (kept,) = (await house.slots())[RED].values()
        assert kept.feature == one.feature


async def test_what_is_barred_stays_barred(house: House, rooms: Rooms) -> None:
    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]}, barred=[(RED, "2"), (GREEN, "3")])
    await resumed(rooms)
    memory = await house.memory()
    assert memory.barred == {(RED, "2"), (GREEN, "3")}
    pushed = await house.store.push(
        "zoo", memory.record.stamp, [PushCandidate(class_id=RED, slot=slot("2", look("red")))]
    )
    assert str(pushed.verdicts[0].outcome) == "rejected"


async def test_a_slot_does_not_come_back_to_where_it_was_purged(house: House, rooms: Rooms) -> None:
    await house.put(colours(), slots={GREEN: [slot("1", look("red")), slot("2", look("red"))]}, barred=[(RED, "1")])
    job = await resumed(rooms)
    assert set((await house.slots())[RED]) == {"2"}
    assert job.result == {"slots": 1}


async def test_slots_beyond_one_call_of_the_worker_are_all_scored_and_progress_is_told(
    house: House, rooms: Rooms, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reindex, "_ROWS", 3)
    gate._at = 3
    await house.put(colours(slots=100), slots={GREEN: [slot(f"{n}", look("red")) for n in range(8)]})
    job = await reindex.resume(rooms, "zoo")
    async with asyncio.timeout(PATIENCE_S):
        await gate.reached.wait()
    assert job is not None
    assert (await rooms.jobs.get("zoo", job.id)).progress == pytest.approx(6 / 8)
    gate.open()
    assert (await done(rooms, job)).progress == 1.0
    assert len((await house.slots())[RED]) == 8


async def test_an_image_is_counted_once_whatever_slots_it_has_and_a_purged_one_is_not(
    house: House, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reindex, "_ROWS", 2)
    twice = [slot("1", look("red")), slot("2", look("red")), slot("3", look("blue"))]
    await house.put(colours(), slots={GREEN: twice, BLUE: twice}, barred=[(YELLOW, "2")])
    await resumed(rooms)
    images = np.frombuffer((await house.memory()).statistics.shared, "<f4")[0]
    assert images == 2.0


async def test_a_memory_without_slots_or_classes_is_done_at_once(house: House, rooms: Rooms) -> None:
    for config in (colours(), TenantConfig()):
        await house.put(config)
        assert (await resumed(rooms)).result == {"slots": 0}
        assert (await house.memory()).record.labelling == config.labelling


async def test_only_one_of_two_replicas_does_it(house: House, rooms: Rooms) -> None:
    other = await house.open()
    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})
    job = await reindex.resume(rooms, "zoo")
    assert await reindex.resume(other, "zoo") is None
    assert await reindex.resume(rooms, "zoo") is None
    assert (await done(rooms, job)).state is JobState.DONE
    assert [one.kind for one in await other.jobs.every("zoo")] == ["rescore"]


async def test_of_two_who_look_at_the_same_moment_and_find_nobody_at_it_one_begins(
    house: House, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await house.open()
    real, looked = house.store.jobs, asyncio.Barrier(2)

    async def together(tenant: str) -> Sequence[Job]:
        found = await real(tenant)
        await looked.wait()
        return found

    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})
    with monkeypatch.context() as patched:
        patched.setattr(house.store, "jobs", together)
        async with asyncio.timeout(PATIENCE_S):
            told = await asyncio.gather(*(reindex.resume(each, "zoo") for each in (rooms, other)))
    assert len([job for job in told if job is not None]) == 1


async def test_work_that_takes_long_is_not_begun_twice(house: House, rooms: Rooms, gate: Gate) -> None:
    """However long: a job that is written down every other second is at it."""
    other = await house.open()
    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})
    job = await reindex.resume(rooms, "zoo")
    async with asyncio.timeout(PATIENCE_S):
        await gate.reached.wait()
    assert job is not None
    for _ in range(10):
        house.clock.advance(20.0)
        await house.store.note_job("zoo", replace(job, updated=house.clock.now))
        assert await reindex.resume(rooms, "zoo") is None
        assert await reindex.resume(other, "zoo") is None
    gate.open()
    assert (await done(rooms, job)).state is JobState.DONE


async def test_what_another_worker_wrote_meanwhile_is_scored_too(house: House, rooms: Rooms, gate: Gate) -> None:
    """Nothing that was stored before the exchange is lost by it."""
    stamp = await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})
    job = await reindex.resume(rooms, "zoo")
    async with asyncio.timeout(PATIENCE_S):
        await gate.reached.wait()
    await house.store.push("zoo", stamp, [PushCandidate(class_id=BLUE, slot=slot("2", look("yellow")))])
    gate.open()
    assert (await done(rooms, job)).result == {"slots": 2}
    assert {own: set(bank) for own, bank in (await house.slots()).items()} == {RED: {"1"}, YELLOW: {"2"}}


async def test_a_memory_that_changes_again_and_again_ends_in_a_failure_and_is_still_due(
    house: House, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})

    async def conflict(*_: object, **__: object) -> None:
        raise Conflict

    with monkeypatch.context() as patched:
        patched.setattr(rooms.store, "replace", conflict)
        job = await resumed(rooms)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error["detail"] == Contended().detail
    house.clock.advance(60.0)
    assert (await resumed(rooms)).state is JobState.DONE


async def test_scoring_that_is_cancelled_leaves_everything_as_it_was_and_is_done_by_the_next_one(
    house: House, rooms: Rooms, gate: Gate
) -> None:
    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})
    before = await house.memory()
    job = await reindex.resume(rooms, "zoo")
    assert job is not None
    async with asyncio.timeout(PATIENCE_S):
        await gate.reached.wait()
    await rooms.jobs.cancel("zoo", job.id)
    gate.open()
    assert await house.memory() == before
    house.clock.advance(60.0)
    assert (await resumed(await house.open())).state is JobState.DONE
    assert set((await house.slots())[RED]) == {"1"}


async def test_a_tenant_that_is_deleted_meanwhile_stays_deleted(house: House, rooms: Rooms, gate: Gate) -> None:
    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})
    job = await reindex.resume(rooms, "zoo")
    assert job is not None
    async with asyncio.timeout(PATIENCE_S):
        await gate.reached.wait()
    await house.store.delete("zoo")
    gate.open()
    await rooms.jobs.wait(job.id, PATIENCE_S)
    assert await house.store.get("zoo") is None


async def test_a_tenant_that_is_not_there_or_of_another_encoder_is_nobodys_to_keep(house: House, rooms: Rooms) -> None:
    assert await reindex.resume(rooms, "zoo") is None
    await house.put(colours(), fingerprint="fake-9")
    assert await reindex.resume(rooms, "zoo") is None
    assert await rooms.jobs.every("zoo") == []


async def test_once_it_is_done_nobody_finds_the_memory_due_not_even_who_was_loading_it(
    house: House, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, score = house.store.load, reindex._scored_anew
    read, scored, gate = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slowly(tenant: str, **others: bool) -> StoredMemory | None:
        found = await load(tenant, **others)
        if not read.is_set():
            read.set()
            await gate.wait()
        return found

    async def noted(rooms: Rooms, stored: StoredMemory, report: Report) -> dict[str, StoredBank]:
        banks = await score(rooms, stored, report)
        scored.set()
        return banks

    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})
    monkeypatch.setattr(rooms.store, "load", slowly)
    monkeypatch.setattr(reindex, "_scored_anew", noted)
    loading = asyncio.create_task(_is_due(rooms))
    async with asyncio.timeout(PATIENCE_S):
        await read.wait()
        job = await reindex.resume(rooms, "zoo")
        await scored.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        gate.set()
        await loading
    await done(rooms, job)
    assert not await _is_due(rooms)


async def _is_due(rooms: Rooms) -> bool:
    async with rooms.archive.open("zoo") as hot:
        return hot.due


async def test_whoever_meets_a_memory_that_is_due_has_it_seen_to(house: House, rooms: Rooms) -> None:
    """As after the process that was at it died."""
    await house.put(colours(), slots={GREEN: [slot("1", look("red"))]})
    call = ClassifyCall(
        tenant="zoo", images=[picture("blue")] * 2, learn=True, views=1, explain=False, deadline=math.inf
    )
    first = await classify(rooms, call)
    assert [(one.due, one.learned.outcome) for one in first if isinstance(one, Reading)] == [(True, "skipped")] * 2
    (job,) = await rooms.jobs.every("zoo")
    assert (await done(rooms, job)).state is JobState.DONE
    second = await classify(rooms, call)
    assert [(one.stale, one.learned.outcome) for one in second if isinstance(one, Reading)] == [
        (False, "filled"),
        (False, "duplicate"),
    ]
    assert len(await rooms.jobs.every("zoo")) == 1


# Reading anew ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def newer(house: House) -> Rooms:
    """Return rooms with an encoder that the tenant `zoo` was not made with."""
    return await house.open(Other())


async def changed(house: House, newer: Rooms, shots: Sequence[StoredShot]) -> Job | None:
    """Bring a tenant with slots and shots to another encoder, and return the job that reads its images."""
    config = colours(kept=True)
    await house.put(config, labelling=config.labelling, slots={RED: [slot("1", look("red"))]}, shots=shots)
    return (await configuration.put_tenant(newer, "zoo", config)).job


async def features(newer: Rooms, images: Sequence[bytes]) -> list[bytes]:
    """Return what the encoder makes of images, one at a time."""
    made = []
    for image in images:
        developed = await newer.darkroom.develop(image, tenant="zoo")
        made.append(encode_feature(newer.encoder.encode_images(developed.pixels)[0]))
    return made


async def test_kept_images_are_read_with_the_new_encoder_and_the_dynamic_memory_starts_afresh(
    house: House, newer: Rooms
) -> None:
    shots = [shot(n, name) for n, name in enumerate(("red", "green", "red", "blue"))]
    assert await changed(house, newer, shots) is None
    (job,) = await newer.jobs.every("zoo")
    assert (job.kind, job.state, job.result) == ("reencode", JobState.DONE, {"shots": 4, "failed": []})
    memory = await house.memory()
    assert (memory.record.fingerprint, memory.record.origin) == ("fake-2", origin_of(newer.encoder))
    assert await house.slots() == {}
    images = [one.image for one in shots if one.image is not None]
    for one, feature in zip(shots, await features(newer, images), strict=True):
        assert (await house.shots())[one.id] == replace(one, feature=feature)
        assert feature != one.feature
    async with newer.archive.open("zoo") as hot:
        assert not hot.due
        assert hot.snapshot.static.filled


async def test_shots_without_an_image_cannot_be_read_and_are_gone(house: House, newer: Rooms) -> None:
    without = replace(shot(1), image=None)
    await changed(house, newer, [without, shot(2)])
    assert set(await house.shots()) == {shot(2).id}


async def test_a_shot_whose_image_cannot_be_read_is_dropped_and_named(house: House, newer: Rooms) -> None:
    bad = shot(0, image=b"no picture")
    await changed(house, newer, [shot(1), bad, shot(2, "green")])
    (job,) = await newer.jobs.every("zoo")
    assert job.result == {"shots": 2, "failed": [bad.id]}
    assert set(await house.shots()) == {shot(1).id, shot(2, "green").id}
    async with newer.archive.open("zoo") as hot:
        assert not hot.due


async def _in_between(house: House, newer: Rooms, monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[Job, Door]:
    """Return the job that reads so many images, four at a time, and the door that holds it at the sixth."""
    monkeypatch.setattr(reindex, "_SHOTS", 4)
    monkeypatch.setattr(reindex, "_SOON_S", 0.0)
    door = Door(monkeypatch, at=6)
    job = await changed(house, newer, [shot(n) for n in range(count)])
    assert job is not None
    async with asyncio.timeout(PATIENCE_S):
        await door.reached.wait()
    return job, door


async def test_reading_that_is_cancelled_keeps_what_it_read_and_is_taken_up_by_the_next_one(
    house: House, newer: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, door = await _in_between(house, newer, monkeypatch, 10)
    assert (await newer.jobs.get("zoo", job.id)).progress == pytest.approx(4 / 10)
    await newer.jobs.cancel("zoo", job.id)
    door.open()
    assert sum(bool(one.feature) for one in (await house.shots()).values()) == 4
    async with newer.archive.open("zoo") as hot:
        assert (hot.due, hot.unread) == (True, 6)
    house.clock.advance(60.0)
    assert (await resumed(newer)).result == {"shots": 6, "failed": []}
    shots = await house.shots()
    assert set(shots) == {shot(n).id for n in range(10)}
    images = [one.image for one in shots.values() if one.image is not None]
    assert [one.feature for one in shots.values()] == await features(newer, images)


async def test_reading_goes_on_when_the_memory_begins_a_new_epoch_meanwhile(
    house: House, newer: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, door = await _in_between(house, newer, monkeypatch, 10)
    await house.store.reset("zoo", dynamic=True, static=False, class_ids=None)
    door.open()
    over = await done(newer, job)
    assert (over.state, over.error) == (JobState.DONE, None)
    assert all(one.feature for one in (await house.shots()).values())
    assert len(await house.shots()) == 10


async def test_a_shot_that_is_removed_meanwhile_stays_removed(
    house: House, newer: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, door = await _in_between(house, newer, monkeypatch, 10)
    gone = [one.id for one in (await house.shots()).values() if not one.feature][-1]
    await house.store.remove_shots("zoo", [gone])
    door.open()
    assert (await done(newer, job)).state is JobState.DONE
    shots = await house.shots()
    assert set(shots) == {shot(n).id for n in range(10)} - {gone}
    assert all(one.feature for one in shots.values())


async def test_reading_ends_when_the_tenant_goes_back_to_another_encoder(
    house: House, newer: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between two releases of which one is rolled out and back."""
    job, door = await _in_between(house, newer, monkeypatch, 10)
    older = await house.open()
    await configuration.put_tenant(older, "zoo", colours(kept=True))
    door.open()
    over = await done(newer, job)
    assert (over.state, over.result) == (JobState.DONE, {"shots": 4, "failed": []})
    assert (await house.memory()).record.fingerprint == "fake-1"


async def test_while_images_wait_to_be_read_nothing_is_learned_and_answers_say_so(
    house: House, newer: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, door = await _in_between(house, newer, monkeypatch, 6)
    async with newer.archive.open("zoo") as hot:
        assert (hot.stale, hot.unread) == (True, 2)
        assert [len(bank) for bank in hot.snapshot.static.classes] == [4, 0, 0, 0]
    door.open()
    await done(newer, job)
    async with newer.archive.open("zoo") as hot:
        assert not hot.stale


async def test_callers_come_before_it_when_the_server_is_full(
    house: House, newer: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals, twice = 0, asyncio.Event()

    def soon() -> float:
        nonlocal refusals
        refusals += 1
        if refusals == 2:
            twice.set()
        return 0.001

    monkeypatch.setattr(newer.batcher, "retry_after_s", soon)
    monkeypatch.setattr(reindex, "_SOON_S", 0.0)
    with newer.batcher.admit(newer.settings.tenant_queue_images, tenant="zoo"):
        job = await changed(house, newer, [shot(1)])
        assert job is not None
        async with asyncio.timeout(PATIENCE_S):
            await twice.wait()
        assert (await newer.jobs.get("zoo", job.id)).state is JobState.RUNNING
    assert (await done(newer, job)).result == {"shots": 1, "failed": []}
