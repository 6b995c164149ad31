"""What is about to be lost is kept, and what was kept comes back bit for bit, or nothing changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.memory.codec import encode_feature
from core.numerics import unit
from service.domain.memory import StoredBank, StoredSlot
from service.domain.records import SnapshotInfo
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import FingerprintMismatch, InvalidRequest, LimitExceeded, ServiceError, UnknownSnapshot
from service.inference.results import Question
from service.services import Rooms
from service.stores.protocol import PushCandidate
from service.tenants import configuration, reset, snapshots
from service.tenants.shots import LabelledImage, add_shots, remove_label
from tests.support.fakes import FakeEncoder, picture
from tests.support.replicas import PATIENCE_S, Replicas, replicas

FOREVER = float("inf")
DAY_S = 86_400.0
NAMES = ("red", "green", "blue")
RED, GREEN, BLUE = map(class_id, NAMES)


class House(Replicas):
    """Replicas, and what a test of snapshots asks of the tenant `zoo`."""

    async def whole(self, tenant: str = "zoo") -> tuple[object, ...]:
        """Return everything of a tenant that a snapshot keeps: all but where in its life it is."""
        memory = await self.memory(tenant)
        record, slots = memory.record, {own: bank for own, bank in memory.slots.items() if len(bank)}
        return record.config, record.fingerprint, record.labelling, slots, memory.shots, memory.barred

    async def learn(self, *ids: str, class_: str = RED, seed: int = 0) -> None:
        """Let other workers write slots."""
        stamp = (await self.memory()).record.stamp
        await self.store.push("zoo", stamp, [PushCandidate(class_id=class_, slot=slot(id_, seed)) for id_ in ids])


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with replicas(House) as house:
        yield house


@pytest.fixture
async def rooms(house: House) -> Rooms:
    return await house.open()


@pytest.fixture
async def zoo(house: House, rooms: Rooms) -> Rooms:
    """Return rooms with a tenant that has slots, shots with images, and a barred slot."""
    await configuration.put_tenant(rooms, "zoo", colours())
    shots = [LabelledImage(label=name, image=picture(name, n)) for n, name in enumerate(NAMES)]
    await add_shots(rooms, "zoo", shots, deadline=FOREVER)
    await house.learn("1", "2", "3")
    await house.learn("4", class_=GREEN)
    await reset.purge(rooms, "zoo", "red", "3")
    return rooms


def colours(*names: str, slots: int = 4) -> TenantConfig:
    classes = tuple(ClassSpec(name=name) for name in names or NAMES)
    return TenantConfig(classes=classes, slots=slots, retention="images")


def look(id_: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(map(ord, id_)))
    return unit(torch.randn(FakeEncoder.dim, generator=generator))


def slot(id_: str, seed: int = 0, entropy: float | None = None) -> StoredSlot:
    nats = 0.5 / (1 + sum(map(ord, id_)) + seed) if entropy is None else entropy
    return StoredSlot(id=id_, entropy=nats, feature=encode_feature(look(id_, seed)))


async def answers(rooms: Rooms) -> Tensor:
    """Return what the tenant says to a few images, without learning them."""
    questions = [Question(views=look(f"q{n}")[None], digest=f"q{n}", learn=False, explain=False) for n in range(6)]
    return torch.stack([(await rooms.desk.ask("zoo", question)).probabilities for question in questions])


async def upset(house: House, rooms: Rooms) -> None:
    """Change everything that a tenant has."""
    await house.learn(*(f"late{n}" for n in range(20)), seed=100)
    await house.learn(*(f"blue{n}" for n in range(20)), class_=BLUE, seed=100)
    await configuration.remove_class(rooms, "zoo", "green")
    await configuration.add_classes(rooms, "zoo", [ClassSpec(name="yellow", prompts=("a lemon.",))])
    await add_shots(rooms, "zoo", [LabelledImage(label="yellow", image=picture("yellow"))], deadline=FOREVER)
    await remove_label(rooms, "zoo", "red")


# Taking and looking ---------------------------------------------------------------------------------------------------


async def test_a_snapshot_tells_what_it_holds(house: House, zoo: Rooms) -> None:
    memory = await house.memory()
    house.clock.advance(5.0)
    info = await snapshots.take(zoo, "zoo")
    assert info == SnapshotInfo(
        id=info.id,
        created=1005.0,
        reason="manual",
        fingerprint="fake-1",
        stamp=memory.record.stamp,
        classes=3,
        slots=3,
        shots=3,
        bytes=info.bytes,
    )
    assert not info.automatic
    parts = [await house.store.read_snapshot("zoo", info.id, n) for n in range(2)]
    assert parts[0] is not None
    assert (len(parts[0]), parts[1]) == (info.bytes, None)
    assert await snapshots.find(zoo, "zoo", info.id) == info
    assert await house.memory() == memory


# Going back -----------------------------------------------------------------------------------------------------------


async def test_a_snapshot_brings_everything_back_bit_for_bit(house: House, zoo: Rooms) -> None:
    before, said = await house.whole(), await answers(zoo)
    info = await snapshots.take(zoo, "zoo")
    await upset(house, zoo)
    changed = await house.memory()
    assert not torch.equal(await answers(zoo), said)  # and the changed memory is hot
    record, saved = await snapshots.restore(zoo, "zoo", info.id)
    assert await house.whole() == before
    assert record == (await house.memory()).record
    assert record.stamp > changed.record.stamp
    assert record.stamp.epoch > changed.record.stamp.epoch
    assert torch.equal(await answers(zoo), said)
    assert saved is not None
    assert (saved.reason, saved.stamp) == ("restore", changed.record.stamp)


async def test_other_replicas_go_back_too_when_they_look_the_next_time(house: House, zoo: Rooms) -> None:
    other = await house.open()
    said = await answers(other)
    info = await snapshots.take(zoo, "zoo")
    await upset(house, zoo)
    house.clock.advance(1.0)
    assert (await answers(other)).shape != said.shape or not torch.equal(await answers(other), said)
    await snapshots.restore(zoo, "zoo", info.id)
    house.clock.advance(1.0)
    assert torch.equal(await answers(other), said)


async def test_a_memory_that_waits_to_be_rescored_comes_back_as_one_that_waits(house: House, zoo: Rooms) -> None:
    """Even with more slots than its new configuration allows: those that stay are known once they are scored."""
    memory = await house.memory()
    fewer = replace(memory.record.config, slots=1, templates=("a {}.",))
    await house.store.replace(
        "zoo",
        fewer,
        "fake-1",
        expected=memory.record.stamp,
        labelling=memory.record.labelling,
        origin=memory.record.origin,
    )
    before = await house.whole()
    info = await snapshots.take(zoo, "zoo")
    await reset.reset(zoo, "zoo", dynamic=True, static=True, classes=None)
    record, _ = await snapshots.restore(zoo, "zoo", info.id)
    assert await house.whole() == before
    assert record.labelling != record.config.labelling


# What changes nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "error"),
    [(0.0, UnknownSnapshot), (0.01, UnknownSnapshot), (0.99, UnknownSnapshot), (None, InvalidRequest)],
)
async def test_a_snapshot_that_is_cut_or_has_nothing_but_its_size_changes_nothing(
    house: House, zoo: Rooms, share: float | None, error: type[ServiceError]
) -> None:
    info = await snapshots.take(zoo, "zoo")
    data = await house.store.read_snapshot("zoo", info.id, 0)
    assert data is not None
    part = bytes(info.bytes) if share is None else data[: int(share * len(data))]
    await house.store.keep_snapshot("zoo", info, [part])
    await _refused(house, zoo, info, error)


async def _refused(
    house: House, rooms: Rooms, info: SnapshotInfo, error: type[ServiceError], match: str | None = None
) -> None:
    before, known = await house.memory(), list(await house.store.snapshots("zoo"))
    with pytest.raises(error, match=match):
        await snapshots.restore(rooms, "zoo", info.id)
    assert await house.memory() == before
    assert list(await house.store.snapshots("zoo")) == known


async def test_a_snapshot_of_another_encoder_changes_nothing_and_says_which_one_it_needs(
    house: House, zoo: Rooms
) -> None:
    info = await snapshots.take(zoo, "zoo")
    other = await house.open(FakeEncoder("fake-2"))
    await configuration.put_tenant(other, "zoo", colours())
    await _refused(house, other, info, FingerprintMismatch, "fake-1")


async def test_a_restore_that_cannot_save_what_is_there_changes_nothing(house: House, zoo: Rooms) -> None:
    small = await house.open(max_snapshots=1)
    info = await snapshots.take(zoo, "zoo")
    await house.learn("late", seed=100)
    await _refused(house, small, info, LimitExceeded, "DMN_SNAPSHOTS")


@pytest.mark.usefixtures("zoo")
async def test_nothing_is_lost_that_cannot_be_saved(house: House) -> None:
    small = await house.open(snapshot_max_bytes=10)
    before = await house.memory()
    with pytest.raises(LimitExceeded):
        await reset.reset(small, "zoo", dynamic=True, static=True, classes=None)
    with pytest.raises(LimitExceeded):
        await configuration.remove_class(small, "zoo", "red")
    assert await house.memory() == before


# Moving ---------------------------------------------------------------------------------------------------------------


async def _sent(rooms: Rooms, path: Path) -> Path:
    size, parts = await snapshots.send_out(rooms, "zoo")
    assert await asyncio.to_thread(path.write_bytes, b"".join(parts)) == size
    return path


async def test_no_more_tenants_are_brought_in_than_allowed(house: House, zoo: Rooms, tmp_path: Path) -> None:
    path = await _sent(zoo, tmp_path / "zoo")
    full = await house.open(max_tenants=2)
    with pytest.raises(LimitExceeded):
        await snapshots.bring_in(full, "farm", path)
    assert await house.store.get("farm") is None
    await snapshots.bring_in(full, "zoo", path)


# By themselves --------------------------------------------------------------------------------------------------------


async def test_one_is_taken_before_whatever_loses_something(house: House, zoo: Rooms, tmp_path: Path) -> None:
    path = await _sent(zoo, tmp_path / "zoo")
    before = await house.memory()
    stamps = []
    for n, lose in enumerate(
        (
            lambda: configuration.remove_class(zoo, "zoo", "blue"),
            lambda: configuration.put_tenant(zoo, "zoo", colours("red", "blue")),
            lambda: reset.reset(zoo, "zoo", dynamic=True, static=False, classes=["red"]),
            lambda: snapshots.bring_in(zoo, "zoo", path),
        )
    ):
        house.clock.advance(1.0)
        stamps.append((await house.memory()).record.stamp)
        await lose()  # type: ignore[no-untyped-call]
        assert len(list(await house.store.snapshots("zoo"))) == n + 1
    infos = await house.store.snapshots("zoo")
    assert [info.reason for info in infos] == ["class-removal", "class-removal", "reset", "import"]
    assert [info.stamp for info in infos] == stamps
    assert all(info.automatic for info in infos)
    assert infos[0].stamp == before.record.stamp


async def test_one_is_taken_before_the_encoder_changes(house: House, zoo: Rooms) -> None:
    before = await house.whole()
    other = await house.open(FakeEncoder("fake-2"))
    await configuration.put_tenant(other, "zoo", colours())
    (saved,) = await house.store.snapshots("zoo")
    assert saved.reason == "encoder-change"
    await configuration.put_tenant(zoo, "zoo", colours())
    await snapshots.restore(zoo, "zoo", saved.id)
    assert await house.whole() == before


async def test_what_loses_nothing_takes_none(house: House, zoo: Rooms) -> None:
    await configuration.put_tenant(zoo, "zoo", replace(colours(), beta=1.0))
    await configuration.add_classes(zoo, "zoo", [ClassSpec(name="yellow")])
    await configuration.put_tenant(zoo, "empty", colours())
    await configuration.remove_class(zoo, "empty", "red")
    _, saved = await reset.reset(zoo, "empty", dynamic=True, static=True, classes=None)
    assert saved is None
    assert await house.reasons() == []
    assert list(await house.store.snapshots("empty")) == []


@pytest.mark.usefixtures("zoo")
async def test_none_is_taken_where_none_is_to_be_kept(house: House) -> None:
    without = await house.open(snapshots=0)
    _, saved = await reset.reset(without, "zoo", dynamic=True, static=True, classes=None)
    assert saved is None
    assert await house.reasons() == []


async def test_what_a_refused_change_would_have_lost_is_not_saved_either(house: House, zoo: Rooms) -> None:
    for refused in (
        lambda: configuration.remove_class(zoo, "zoo", "yellow"),
        lambda: reset.reset(zoo, "zoo", dynamic=True, static=True, classes=["yellow"]),
    ):
        with pytest.raises(ServiceError):
            await refused()  # type: ignore[no-untyped-call]
    assert await house.reasons() == []


# How many are kept ----------------------------------------------------------------------------------------------------


async def _kept(house: House, rooms: Rooms, reasons: Sequence[str]) -> list[str]:
    """Take one after the other, and return the reasons of those that are left."""
    for reason in reasons:
        house.clock.advance(1.0)
        await snapshots.take(rooms, "zoo", reason)
    return await house.reasons()


@pytest.mark.usefixtures("zoo")
async def test_of_automatic_ones_the_youngest_are_kept_and_of_manual_ones_all(house: House) -> None:
    few = await house.open(snapshots=2)
    kept = await _kept(house, few, ["a", "manual", "b", "c", "manual", "d", "manual"])
    assert kept == ["manual", "c", "manual", "d", "manual"]


async def test_automatic_ones_go_when_bytes_are_wanted_and_manual_ones_do_not(house: House, zoo: Rooms) -> None:
    each = (await snapshots.take(zoo, "zoo", "a")).bytes
    few = await house.open(snapshot_max_bytes=3 * each)
    assert await _kept(house, few, ["b", "manual", "manual"]) == ["b", "manual", "manual"]
    assert await _kept(house, few, ["manual"]) == ["manual"] * 3
    before = list(await house.store.snapshots("zoo"))
    for reason in ("manual", "a"):
        with pytest.raises(LimitExceeded, match=str(3 * each)):
            await snapshots.take(few, "zoo", reason)
    assert list(await house.store.snapshots("zoo")) == before


@pytest.mark.usefixtures("zoo")
async def test_there_are_no_more_of_all_kinds_than_allowed(house: House) -> None:
    few = await house.open(max_snapshots=2)
    assert await _kept(house, few, ["a", "manual", "b"]) == ["manual", "b"]
    assert await _kept(house, few, ["manual"]) == ["manual", "manual"]
    with pytest.raises(LimitExceeded):
        await snapshots.take(few, "zoo")
    assert await house.reasons() == ["manual", "manual"]


async def test_one_that_there_is_no_room_for_drives_no_other_out(house: House, zoo: Rooms) -> None:
    each = (await snapshots.take(zoo, "zoo", "a")).bytes
    few = await house.open(snapshot_max_bytes=each - 1)
    with pytest.raises(LimitExceeded):
        await snapshots.take(few, "zoo", "b")
    assert await house.reasons() == ["a"]


async def test_a_restore_of_the_oldest_one_is_not_cut_short_by_what_it_saves(house: House, zoo: Rooms) -> None:
    """What it saves may drive out the very one that is restored."""
    few = await house.open(snapshots=1)
    info = await snapshots.take(zoo, "zoo", "schedule")
    before = await house.whole()
    house.clock.advance(1.0)
    await house.learn("late", seed=100)
    await snapshots.restore(few, "zoo", info.id)
    assert await house.whole() == before
    assert await house.reasons() == ["restore"]


# On schedule ----------------------------------------------------------------------------------------------------------


async def _periods(house: House, rooms: Rooms, count: int) -> None:
    """Let so many periods pass, with a look at the schedule at the end of each."""
    for _ in range(count):
        house.clock.advance(DAY_S)
        await snapshots.on_schedule(rooms, "zoo")


async def test_the_first_one_on_schedule_comes_after_a_period_and_then_one_a_period(house: House, zoo: Rooms) -> None:
    for _ in range(3):
        await snapshots.on_schedule(zoo, "zoo")
        assert await house.reasons() == []
    for day in range(3):
        await house.learn(f"day{day}", seed=day)
        house.clock.advance(DAY_S - 1.0)
        await snapshots.on_schedule(zoo, "zoo")
        assert await house.reasons() == ["schedule"] * day
        house.clock.advance(1.0)
        await snapshots.on_schedule(zoo, "zoo")
        assert await house.reasons() == ["schedule"] * (day + 1)


async def test_of_two_replicas_one_takes_it_whichever_comes_first(house: House, zoo: Rooms) -> None:
    other = await house.open()
    for rooms in (zoo, other):
        await snapshots.on_schedule(rooms, "zoo")
    for day in range(4):
        await house.learn(f"day{day}", seed=day)
        house.clock.advance(DAY_S)
        for rooms in (zoo, other) if day % 2 else (other, zoo):
            await snapshots.on_schedule(rooms, "zoo")
            assert await house.reasons() == ["schedule"] * (day + 1)


async def test_of_two_who_find_it_due_at_the_same_moment_one_takes_it(
    house: House, zoo: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await house.open()
    real, looked, looks = house.store.snapshots, asyncio.Barrier(2), 0

    async def together(tenant: str) -> Sequence[SnapshotInfo]:
        nonlocal looks
        looks += 1
        found = await real(tenant)
        if looks <= 2:
            await looked.wait()
        return found

    house.clock.advance(DAY_S)
    for rooms in (zoo, other):
        monkeypatch.setattr(rooms.store, "snapshots", together)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(snapshots.on_schedule(rooms, "zoo") for rooms in (zoo, other)))
    assert await house.reasons() == ["schedule"]


async def test_one_that_was_taken_for_another_reason_does_not_put_it_off(house: House, zoo: Rooms) -> None:
    house.clock.advance(DAY_S / 2)
    await snapshots.take(zoo, "zoo")
    await house.learn("new", seed=9)
    house.clock.advance(DAY_S / 2)
    await snapshots.on_schedule(zoo, "zoo")
    assert await house.reasons() == ["manual", "schedule"]


async def test_a_tenant_in_use_never_misses_one(house: House, zoo: Rooms) -> None:
    await snapshots.on_schedule(zoo, "zoo")
    for day in range(20):
        await house.learn(f"day{day}", seed=day)
        await reset.reset(zoo, "zoo", dynamic=True, static=False, classes=["green"])
        await _periods(house, zoo, 1)
        last = (await house.store.snapshots("zoo"))[-1]
        assert (last.reason, last.created) == ("schedule", house.clock.now)


async def test_on_schedule_none_is_taken_of_what_did_not_change(house: House, zoo: Rooms) -> None:
    await snapshots.on_schedule(zoo, "zoo")
    await snapshots.take(zoo, "zoo")
    await _periods(house, zoo, 3)
    assert await house.reasons() == ["manual"]
    await house.learn("new", seed=9)
    await _periods(house, zoo, 3)
    assert await house.reasons() == ["manual", "schedule"]


async def test_on_schedule_none_is_taken_of_an_empty_memory_or_of_nobody(house: House, rooms: Rooms) -> None:
    await configuration.put_tenant(rooms, "zoo", colours())
    for tenant in ("zoo", "farm"):
        for _ in range(3):
            await snapshots.on_schedule(rooms, tenant)
            house.clock.advance(DAY_S)
    assert await house.reasons() == []


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("settings", [{"snapshot_every_s": 0.0}, {"snapshots": 0}])
async def test_without_a_schedule_none_is_taken(house: House, settings: dict[str, float]) -> None:
    await _periods(house, await house.open(**settings), 3)
    assert await house.reasons() == []


async def test_a_bank_of_the_store_reads_the_same_after_any_number_of_journeys(house: House, zoo: Rooms) -> None:
    """Slots with equal entropies, and ids in another order than that of their coming."""
    slots = [slot(id_, entropy=0.25) for id_ in "dbca"]
    record = (await house.memory()).record
    await house.store.replace(
        "zoo",
        record.config,
        record.fingerprint,
        expected=record.stamp,
        labelling=record.labelling,
        origin=record.origin,
        slots={BLUE: StoredBank.of(slots)},
    )
    before = await house.whole()
    for _ in range(3):
        house.clock.advance(1.0)
        await snapshots.restore(zoo, "zoo", (await snapshots.take(zoo, "zoo")).id)
    assert await house.whole() == before
