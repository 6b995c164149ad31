"""What is about to be lost is kept, and what was kept comes back bit for bit, or nothing changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.codec import encode_feature
from core.numerics import unit
from service import adapt, app, snapshots
from service.adapt import LabelledImage
from service.desk import Question
from service.errors import (
    FingerprintMismatch,
    InvalidRequest,
    LimitExceeded,
    ServiceError,
    UnknownSnapshot,
    UnknownTenant,
)
from service.rooms import Rooms
from service.settings import Settings
from service.stores import opening
from service.stores.base import PushCandidate, SnapshotInfo, StoredBank, StoredMemory, StoredSlot
from service.stores.memory import InProcessStore
from service.tenants import ClassSpec, TenantConfig, class_id
from tests.support.fakes import FakeEncoder, picture

FOREVER = float("inf")
PATIENCE_S = 20.0
DAY_S = 86_400.0
NAMES = ("red", "green", "blue")
RED, GREEN, BLUE = map(class_id, NAMES)


class Clock:
    """Monotonic and wall time, which stand still until they are told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class House:
    """Replicas of a service that share one store and one clock, without a housekeeper."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.clock, self._stack = Clock(), stack
        self.store = InProcessStore(clock=self.clock.monotonic, remember_s=1.0, remember_bytes=1)

    async def open(self, encoder: FakeEncoder | None = None, **settings: object) -> Rooms:
        made = Settings(store="memory", **settings)  # type: ignore[arg-type]
        return await self._stack.enter_async_context(app.open_rooms(made, encoder or FakeEncoder()))

    async def memory(self, tenant: str = "zoo") -> StoredMemory:
        stored = await self.store.load(tenant, images=True)
        assert stored is not None
        return stored

    async def whole(self, tenant: str = "zoo") -> tuple[object, ...]:
        """Return everything of a tenant that a snapshot keeps: all but where in its life it is."""
        memory = await self.memory(tenant)
        record, slots = memory.record, {own: bank for own, bank in memory.slots.items() if len(bank)}
        return record.config, record.fingerprint, record.labelling, slots, memory.shots, memory.barred

    async def learn(self, *ids: str, class_: str = RED, seed: int = 0) -> None:
        """Let other workers write slots."""
        stamp = (await self.memory()).record.stamp
        await self.store.push("zoo", stamp, [PushCandidate(class_id=class_, slot=slot(id_, seed)) for id_ in ids])

    async def told(self) -> list[tuple[str, str]]:
        """Return id and reason of every snapshot, the oldest first."""
        return [(info.id, info.reason) for info in await self.store.snapshots("zoo")]

    async def reasons(self) -> list[str]:
        return [reason for _, reason in await self.told()]


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        house = House(stack)

        async def nobody(_: Rooms) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(app, "time", house.clock)
        monkeypatch.setattr(opening, "InProcessStore", lambda **_: house.store)
        monkeypatch.setattr(app, "keep_house", nobody)
        monkeypatch.setattr(adapt, "_SOON_S", PATIENCE_S)
        yield house


@pytest.fixture
async def rooms(house: House) -> Rooms:
    return await house.open()


@pytest.fixture
async def zoo(house: House, rooms: Rooms) -> Rooms:
    """Return rooms with a tenant that has slots, shots with images, and a barred slot."""
    await adapt.put_tenant(rooms, "zoo", colours())
    shots = [LabelledImage(label=name, image=picture(name, n)) for n, name in enumerate(NAMES)]
    await adapt.add_shots(rooms, "zoo", shots, deadline=FOREVER)
    await house.learn("1", "2", "3")
    await house.learn("4", class_=GREEN)
    await adapt.purge(rooms, "zoo", "red", "3")
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
    await adapt.remove_class(rooms, "zoo", "green")
    await adapt.add_classes(rooms, "zoo", [ClassSpec(name="yellow", prompts=("a lemon.",))])
    await adapt.add_shots(rooms, "zoo", [LabelledImage(label="yellow", image=picture("yellow"))], deadline=FOREVER)
    await adapt.remove_label(rooms, "zoo", "red")


# Taking and looking ---------------------------------------------------------------------------------------------------


async def test_a_snapshot_tells_what_it_holds(house: House, zoo: Rooms) -> None:
    memory = await house.memory()
    house.clock.now += 5.0
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


async def test_taking_one_changes_nothing(house: House, zoo: Rooms) -> None:
    before = await house.memory()
    await snapshots.take(zoo, "zoo")
    assert await house.memory() == before


async def test_they_are_told_in_the_order_of_their_taking(house: House, zoo: Rooms) -> None:
    taken = []
    for _ in range(3):
        house.clock.now += 1.0
        taken.append((await snapshots.take(zoo, "zoo")).id)
    assert [id_ for id_, _ in await house.told()] == taken


async def test_one_that_is_dropped_is_gone_and_the_memory_stays(house: House, zoo: Rooms) -> None:
    before = await house.memory()
    info = await snapshots.take(zoo, "zoo")
    await snapshots.drop(zoo, "zoo", info.id)
    assert await house.told() == []
    assert await house.store.read_snapshot("zoo", info.id, 0) is None
    assert await house.memory() == before


async def test_what_is_not_there_is_unknown(zoo: Rooms) -> None:
    for call in (snapshots.find, snapshots.drop, snapshots.restore):
        with pytest.raises(UnknownSnapshot):
            await call(zoo, "zoo", "none")
    with pytest.raises(UnknownTenant):
        await snapshots.take(zoo, "farm")


async def test_a_snapshot_of_one_tenant_is_unknown_to_another(zoo: Rooms) -> None:
    info = await snapshots.take(zoo, "zoo")
    await adapt.put_tenant(zoo, "farm", colours())
    with pytest.raises(UnknownSnapshot):
        await snapshots.restore(zoo, "farm", info.id)


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


async def test_a_restore_is_undone_by_restoring_what_it_saved(house: House, zoo: Rooms) -> None:
    info = await snapshots.take(zoo, "zoo")
    await upset(house, zoo)
    after, said = await house.whole(), await answers(zoo)
    _, saved = await snapshots.restore(zoo, "zoo", info.id)
    assert await house.whole() != after
    assert saved is not None
    await snapshots.restore(zoo, "zoo", saved.id)
    assert await house.whole() == after
    assert torch.equal(await answers(zoo), said)


async def test_a_reset_is_undone_by_restoring_what_it_saved(house: House, zoo: Rooms) -> None:
    before = await house.whole()
    _, saved = await adapt.reset(zoo, "zoo", dynamic=True, static=True, classes=None)
    assert saved is not None
    await snapshots.restore(zoo, "zoo", saved.id)
    assert await house.whole() == before


async def test_other_replicas_go_back_too_when_they_look_the_next_time(house: House, zoo: Rooms) -> None:
    other = await house.open()
    said = await answers(other)
    info = await snapshots.take(zoo, "zoo")
    await upset(house, zoo)
    house.clock.now += 1.0
    assert (await answers(other)).shape != said.shape or not torch.equal(await answers(other), said)
    await snapshots.restore(zoo, "zoo", info.id)
    house.clock.now += 1.0
    assert torch.equal(await answers(other), said)


async def test_what_another_worker_learned_before_a_restore_does_not_come_into_it(house: House, zoo: Rooms) -> None:
    before = await house.whole()
    info = await snapshots.take(zoo, "zoo")
    behind = (await house.memory()).record.stamp
    await snapshots.restore(zoo, "zoo", info.id)
    late = PushCandidate(class_id=RED, slot=slot("late", entropy=0.0))
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever tells it to load anew
        await house.store.push("zoo", behind, [late])
    assert await house.whole() == before


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
    await adapt.reset(zoo, "zoo", dynamic=True, static=True, classes=None)
    record, _ = await snapshots.restore(zoo, "zoo", info.id)
    assert await house.whole() == before
    assert record.labelling != record.config.labelling


async def test_a_deleted_tenant_takes_its_snapshots_along(house: House, zoo: Rooms) -> None:
    info = await snapshots.take(zoo, "zoo")
    await adapt.delete_tenant(zoo, "zoo")
    with pytest.raises(UnknownSnapshot):
        await snapshots.restore(zoo, "zoo", info.id)
    assert await house.store.get("zoo") is None


# What changes nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
async def test_a_snapshot_that_is_cut_changes_nothing(house: House, zoo: Rooms, share: float) -> None:
    info = await snapshots.take(zoo, "zoo")
    data = await house.store.read_snapshot("zoo", info.id, 0)
    assert data is not None
    await house.store.keep_snapshot("zoo", info, [data[: int(share * len(data))]])
    await _refused(house, zoo, info, UnknownSnapshot)


async def test_a_snapshot_whose_size_is_right_and_nothing_else_changes_nothing(house: House, zoo: Rooms) -> None:
    info = await snapshots.take(zoo, "zoo")
    await house.store.keep_snapshot("zoo", info, [bytes(info.bytes)])
    await _refused(house, zoo, info, InvalidRequest)


async def _refused(house: House, rooms: Rooms, info: SnapshotInfo, error: type[ServiceError]) -> None:
    before, known = await house.memory(), await house.told()
    with pytest.raises(error):
        await snapshots.restore(rooms, "zoo", info.id)
    assert await house.memory() == before
    assert await house.told() == known


async def test_a_snapshot_of_another_encoder_changes_nothing_and_says_which_one_it_needs(
    house: House, zoo: Rooms
) -> None:
    info = await snapshots.take(zoo, "zoo")
    other = await house.open(FakeEncoder("fake-2"))
    await adapt.put_tenant(other, "zoo", colours())
    before, known = await house.memory(), await house.told()
    with pytest.raises(FingerprintMismatch, match="fake-1"):
        await snapshots.restore(other, "zoo", info.id)
    assert await house.memory() == before
    assert await house.told() == known


async def test_a_restore_that_cannot_save_what_is_there_changes_nothing(house: House, zoo: Rooms) -> None:
    small = await house.open(max_snapshots=1)
    info = await snapshots.take(zoo, "zoo")
    await house.learn("late", seed=100)
    before, known = await house.memory(), await house.told()
    with pytest.raises(LimitExceeded, match="DMN_SNAPSHOTS"):
        await snapshots.restore(small, "zoo", info.id)
    assert await house.memory() == before
    assert await house.told() == known


@pytest.mark.usefixtures("zoo")
async def test_nothing_is_lost_that_cannot_be_saved(house: House) -> None:
    small = await house.open(snapshot_max_bytes=10)
    before = await house.memory()
    with pytest.raises(LimitExceeded):
        await adapt.reset(small, "zoo", dynamic=True, static=True, classes=None)
    with pytest.raises(LimitExceeded):
        await adapt.remove_class(small, "zoo", "red")
    assert await house.memory() == before


async def test_a_file_that_is_no_memory_is_not_brought_in(house: House, zoo: Rooms, tmp_path: Path) -> None:
    await asyncio.to_thread((tmp_path / "a").write_bytes, b"no memory" * 10)
    before, known = await house.memory(), await house.told()
    with pytest.raises(InvalidRequest):
        await snapshots.bring_in(zoo, "zoo", tmp_path / "a")
    assert (await house.memory(), await house.told()) == (before, known)


# Moving ---------------------------------------------------------------------------------------------------------------


async def _sent(rooms: Rooms, path: Path) -> Path:
    size, parts = await snapshots.send_out(rooms, "zoo")
    assert await asyncio.to_thread(path.write_bytes, b"".join(parts)) == size
    return path


async def test_an_exported_memory_is_the_same_under_another_name(house: House, zoo: Rooms, tmp_path: Path) -> None:
    path = await _sent(zoo, tmp_path / "zoo")
    record, saved = await snapshots.bring_in(zoo, "farm", path)
    assert saved is None
    assert record.name == "farm"
    assert await house.whole("farm") == await house.whole("zoo")


async def test_no_more_tenants_are_brought_in_than_allowed(house: House, zoo: Rooms, tmp_path: Path) -> None:
    path = await _sent(zoo, tmp_path / "zoo")
    full = await house.open(max_tenants=2)
    with pytest.raises(LimitExceeded):
        await snapshots.bring_in(full, "farm", path)
    assert await house.store.get("farm") is None
    await snapshots.bring_in(full, "zoo", path)


async def test_an_unknown_tenant_is_not_exported(zoo: Rooms) -> None:
    with pytest.raises(UnknownTenant):
        await snapshots.send_out(zoo, "farm")


# By themselves --------------------------------------------------------------------------------------------------------


async def test_one_is_taken_before_whatever_loses_something(house: House, zoo: Rooms, tmp_path: Path) -> None:
    path = await _sent(zoo, tmp_path / "zoo")
    before = await house.memory()
    stamps = []
    for n, lose in enumerate(
        (
            lambda: adapt.remove_class(zoo, "zoo", "blue"),
            lambda: adapt.put_tenant(zoo, "zoo", colours("red", "blue")),
            lambda: adapt.reset(zoo, "zoo", dynamic=True, static=False, classes=["red"]),
            lambda: snapshots.bring_in(zoo, "zoo", path),
        )
    ):
        house.clock.now += 1.0
        stamps.append((await house.memory()).record.stamp)
        await lose()  # type: ignore[no-untyped-call]
        assert len(await house.told()) == n + 1
    infos = await house.store.snapshots("zoo")
    assert [info.reason for info in infos] == ["class-removal", "class-removal", "reset", "import"]
    assert [info.stamp for info in infos] == stamps
    assert all(info.automatic for info in infos)
    assert infos[0].stamp == before.record.stamp


async def test_one_is_taken_before_the_encoder_changes(house: House, zoo: Rooms) -> None:
    before = await house.whole()
    other = await house.open(FakeEncoder("fake-2"))
    await adapt.put_tenant(other, "zoo", colours())
    ((id_, reason),) = await house.told()
    assert reason == "encoder-change"
    await adapt.put_tenant(zoo, "zoo", colours())
    await snapshots.restore(zoo, "zoo", id_)
    assert await house.whole() == before


async def test_what_loses_nothing_takes_none(house: House, zoo: Rooms) -> None:
    await adapt.put_tenant(zoo, "zoo", replace(colours(), beta=1.0))
    await adapt.add_classes(zoo, "zoo", [ClassSpec(name="yellow")])
    await adapt.put_tenant(zoo, "empty", colours())
    await adapt.remove_class(zoo, "empty", "red")
    _, saved = await adapt.reset(zoo, "empty", dynamic=True, static=True, classes=None)
    assert saved is None
    assert await house.told() == []
    assert list(await house.store.snapshots("empty")) == []


@pytest.mark.usefixtures("zoo")
async def test_none_is_taken_where_none_is_to_be_kept(house: House) -> None:
    without = await house.open(snapshots=0)
    _, saved = await adapt.reset(without, "zoo", dynamic=True, static=True, classes=None)
    assert saved is None
    assert await house.told() == []


async def test_what_a_refused_change_would_have_lost_is_not_saved_either(house: House, zoo: Rooms) -> None:
    for refused in (
        lambda: adapt.remove_class(zoo, "zoo", "yellow"),
        lambda: adapt.reset(zoo, "zoo", dynamic=True, static=True, classes=["yellow"]),
    ):
        with pytest.raises(ServiceError):
            await refused()  # type: ignore[no-untyped-call]
    assert await house.told() == []


# How many are kept ----------------------------------------------------------------------------------------------------


async def _kept(house: House, rooms: Rooms, reasons: Sequence[str]) -> list[str]:
    """Take one after the other, and return the reasons of those that are left."""
    for reason in reasons:
        house.clock.now += 1.0
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
    before = await house.told()
    for reason in ("manual", "a"):
        with pytest.raises(LimitExceeded, match=str(3 * each)):
            await snapshots.take(few, "zoo", reason)
    assert await house.told() == before


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
    house.clock.now += 1.0
    await house.learn("late", seed=100)
    await snapshots.restore(few, "zoo", info.id)
    assert await house.whole() == before
    assert await house.reasons() == ["restore"]


# On schedule ----------------------------------------------------------------------------------------------------------


async def _periods(house: House, rooms: Rooms, count: int) -> None:
    """Let so many periods pass, with a look at the schedule at the end of each."""
    for _ in range(count):
        house.clock.now += DAY_S
        await snapshots.on_schedule(rooms, "zoo")


async def test_the_first_one_on_schedule_comes_after_a_period_and_then_one_a_period(house: House, zoo: Rooms) -> None:
    for _ in range(3):
        await snapshots.on_schedule(zoo, "zoo")
        assert await house.reasons() == []
    for day in range(3):
        await house.learn(f"day{day}", seed=day)
        house.clock.now += DAY_S - 1.0
        await snapshots.on_schedule(zoo, "zoo")
        assert await house.reasons() == ["schedule"] * day
        house.clock.now += 1.0
        await snapshots.on_schedule(zoo, "zoo")
        assert await house.reasons() == ["schedule"] * (day + 1)


async def test_of_two_replicas_one_takes_it_whichever_comes_first(house: House, zoo: Rooms) -> None:
    other = await house.open()
    for rooms in (zoo, other):
        await snapshots.on_schedule(rooms, "zoo")
    for day in range(4):
        await house.learn(f"day{day}", seed=day)
        house.clock.now += DAY_S
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

    house.clock.now += DAY_S
    for rooms in (zoo, other):
        monkeypatch.setattr(rooms.store, "snapshots", together)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(snapshots.on_schedule(rooms, "zoo") for rooms in (zoo, other)))
    assert await house.reasons() == ["schedule"]


async def test_one_that_was_taken_for_another_reason_does_not_put_it_off(house: House, zoo: Rooms) -> None:
    house.clock.now += DAY_S / 2
    await snapshots.take(zoo, "zoo")
    await house.learn("new", seed=9)
    house.clock.now += DAY_S / 2
    await snapshots.on_schedule(zoo, "zoo")
    assert await house.reasons() == ["manual", "schedule"]


async def test_a_tenant_in_use_never_misses_one(house: House, zoo: Rooms) -> None:
    await snapshots.on_schedule(zoo, "zoo")
    for day in range(20):
        await house.learn(f"day{day}", seed=day)
        await adapt.reset(zoo, "zoo", dynamic=True, static=False, classes=["green"])
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
    await adapt.put_tenant(rooms, "zoo", colours())
    for tenant in ("zoo", "farm"):
        for _ in range(3):
            await snapshots.on_schedule(rooms, tenant)
            house.clock.now += DAY_S
    assert await house.told() == []


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("settings", [{"snapshot_every_s": 0.0}, {"snapshots": 0}])
async def test_without_a_schedule_none_is_taken(house: House, settings: dict[str, float]) -> None:
    await _periods(house, await house.open(**settings), 3)
    assert await house.told() == []


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
        house.clock.now += 1.0
        await snapshots.restore(zoo, "zoo", (await snapshots.take(zoo, "zoo")).id)
    assert await house.whole() == before
