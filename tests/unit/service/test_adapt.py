"""What changes a tenant is whole or did not happen, and classes that stay keep what they learnt."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.classify import Sample, classify
from core.codec import encode_feature
from core.encoder import Encoder
from core.numerics import unit
from service import adapt, upkeep
from service.adapt import LabelledImage, Shot
from service.app import open_rooms
from service.archive import held_bytes
from service.errors import (
    DuplicateClass,
    FingerprintMismatch,
    InvalidRequest,
    LimitExceeded,
    StoreDown,
    TooManyImages,
    UnknownClass,
    UnknownShot,
    UnknownSlot,
    UnknownTenant,
)
from service.images import ImageUnreadable
from service.rooms import Rooms
from service.settings import DEFAULT_TENANT, Settings
from service.stores.base import (
    Conflict,
    JobState,
    PushCandidate,
    ReloadNeeded,
    Stamp,
    StoredBank,
    StoredMemory,
    StoredShot,
    StoredSlot,
)
from service.tenants import ClassSpec, TenantConfig, class_id
from tests.support.fakes import FakeEncoder, picture

FOREVER = float("inf")
PATIENCE_S = 20.0


class Compass(FakeEncoder):
    """Two dimensions, and words at angles in degrees: what is labelled what can be worked out by hand.

    The text of a class is its name, such as `0` or `90`; a feature is its own angle; the logit scale is 2.
    """

    dim = 2
    logit_scale = 2.0

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.texts += len(texts)
        return torch.stack([at(float(text)) if text.isdecimal() else at(45) for text in texts])

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.stack([at(0)] * len(pixels))


def at(degrees: float) -> Tensor:
    """Return the unit vector at an angle."""
    return torch.tensor((math.cos(math.radians(degrees)), math.sin(math.radians(degrees))))


def entropy_at(degrees: float, *classes: float) -> float:
    """Return the entropy of the label of a feature at an angle among classes at angles, Eq. (2) to (4)."""
    logits = [2.0 * math.cos(math.radians(degrees - own)) for own in classes]
    whole = sum(map(math.exp, logits))
    return -sum(math.exp(logit) / whole * (logit - math.log(whole)) for logit in logits)


def angles(*names: str, slots: int = 5) -> TenantConfig:
    return TenantConfig(classes=tuple(ClassSpec(name=name) for name in names), templates=("{}",), slots=slots)


def colours(*names: str, slots: int = 5) -> TenantConfig:
    return TenantConfig(classes=tuple(ClassSpec(name=name) for name in names), slots=slots)


async def rooms_of(encoder: Encoder, **settings: object) -> AsyncIterator[Rooms]:
    async with open_rooms(Settings(drain_delay_s=0, **settings), encoder) as rooms:  # type: ignore[arg-type]
        yield rooms


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a change wait until what it causes is done, however busy the machine is."""
    monkeypatch.setattr(adapt, "_SOON_S", PATIENCE_S)


@pytest.fixture
async def rooms() -> AsyncIterator[Rooms]:
    async for rooms in rooms_of(FakeEncoder(), max_images=8, batch_images=3, max_shots=4, max_text_chars=400):
        yield rooms


@pytest.fixture
async def compass() -> AsyncIterator[Rooms]:
    async for rooms in rooms_of(Compass()):
        yield rooms


async def stored(rooms: Rooms, tenant: str = "zoo") -> StoredMemory:
    found = await rooms.store.load(tenant, images=True)
    assert found is not None
    return found


async def slots_of(rooms: Rooms, tenant: str = "zoo") -> dict[str, dict[str, float]]:
    """Return ids and entropies by class name."""
    memory = await stored(rooms, tenant)
    names = {spec.id: spec.name for spec in memory.record.config.classes}
    return {names[own]: {slot.id: slot.entropy for slot in bank} for own, bank in memory.slots.items() if bank}


async def put(
    rooms: Rooms,
    config: TenantConfig,
    *,
    fingerprint: str | None = None,
    slots: Mapping[str, Sequence[StoredSlot]] | None = None,
) -> Stamp:
    """Replace the tenant past all that looks after it, as another worker might."""
    record = await rooms.store.get("zoo")
    return await rooms.store.replace(
        "zoo",
        config,
        fingerprint or rooms.encoder.fingerprint,
        expected=None if record is None else record.stamp,
        labelling=config.labelling,
        origin={"encoder": fingerprint or rooms.encoder.name},
        slots={own: StoredBank.of(bank) for own, bank in (slots or {}).items()},
    )


async def fill(rooms: Rooms, slots: Mapping[str, Sequence[tuple[str, float]]], tenant: str = "zoo") -> None:
    """Write slots (id, angle) of classes, with the entropies that the tenant's classes give them."""
    record = await rooms.store.get(tenant)
    assert record is not None
    classes = [float(spec.name) for spec in record.config.classes]
    candidates = [
        PushCandidate(
            class_id=class_id(name),
            slot=StoredSlot(id=id_, entropy=entropy_at(degrees, *classes), feature=encode_feature(at(degrees))),
        )
        for name, bank in slots.items()
        for id_, degrees in bank
    ]
    await rooms.store.push(tenant, record.stamp, candidates)


# Configuring ----------------------------------------------------------------------------------------------------------


async def test_a_tenant_is_made_and_then_replaced(rooms: Rooms) -> None:
    first = await adapt.put_tenant(rooms, "zoo", colours("red"))
    assert (first.created, first.job) == (True, None)
    assert first.record == await rooms.store.get("zoo")
    second = await adapt.put_tenant(rooms, "zoo", colours("red", "green"))
    assert (second.created, second.job) == (False, None)
    record = await rooms.store.get("zoo")
    assert record is not None
    assert record.config == second.record.config == colours("red", "green")
    assert record.labelling == record.config.labelling
    assert record.stamp.epoch != first.record.stamp.epoch


@pytest.mark.parametrize("name", ["", "a/b", "-a"])
async def test_a_tenant_with_a_malformed_name_is_not_made(rooms: Rooms, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await adapt.put_tenant(rooms, name, colours("red"))
    assert await rooms.store.get(name) is None


async def test_a_configuration_that_is_refused_leaves_the_old_one(rooms: Rooms) -> None:
    before = (await adapt.put_tenant(rooms, "zoo", colours("red"))).record
    with pytest.raises(DuplicateClass):
        await adapt.put_tenant(rooms, "zoo", colours("green", " green"))
    with pytest.raises(DuplicateClass):
        await adapt.add_classes(rooms, "zoo", [ClassSpec(name="red")])
    assert await rooms.store.get("zoo") == before


async def test_classes_are_added_and_removed_while_running(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red", "green"))
    record = (await adapt.add_classes(rooms, "zoo", [ClassSpec(name=" blue ")])).record
    assert [spec.name for spec in record.config.classes] == ["red", "green", "blue"]
    await adapt.remove_class(rooms, "zoo", "green")
    assert [spec.name for spec in (await stored(rooms)).record.config.classes] == ["red", "blue"]


async def test_who_changes_an_unknown_tenant_or_class_is_told_so(rooms: Rooms) -> None:
    with pytest.raises(UnknownTenant):
        await adapt.add_classes(rooms, "zoo", [ClassSpec(name="red")])
    with pytest.raises(UnknownTenant):
        await adapt.remove_class(rooms, "zoo", "red")
    await adapt.put_tenant(rooms, "zoo", colours("red"))
    with pytest.raises(UnknownClass):
        await adapt.remove_class(rooms, "zoo", "green")


async def test_a_class_of_any_allowed_length_can_be_removed_reset_and_looked_at(rooms: Rooms) -> None:
    long = "x" * 300
    await adapt.put_tenant(rooms, "zoo", colours("red", long))
    await adapt.reset(rooms, "zoo", dynamic=True, static=True, classes=[long])
    await adapt.remove_label(rooms, "zoo", long)
    await adapt.remove_class(rooms, "zoo", long)


async def test_there_are_no_more_tenants_than_allowed() -> None:
    async for rooms in rooms_of(FakeEncoder(), max_tenants=2):
        await adapt.put_tenant(rooms, "zoo", colours("red"))
        with pytest.raises(LimitExceeded):
            await adapt.put_tenant(rooms, "farm", colours("red"))
        await adapt.put_tenant(rooms, "zoo", colours("green"))
        await adapt.delete_tenant(rooms, "zoo")
        await adapt.put_tenant(rooms, "farm", colours("red"))


async def test_a_change_that_another_writer_crossed_is_made_anew_on_what_is_there(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red"))
    real, crossed = rooms.store.replace, False

    async def crossing(tenant: str, config: TenantConfig, *args: object, **others: object) -> object:
        nonlocal crossed
        if not crossed:
            crossed = True
            record = await rooms.archive.record(tenant)
            theirs = record.config.with_classes([ClassSpec(name="theirs")])
            others_own = {**others, "expected": record.stamp, "labelling": theirs.labelling}
            await real(tenant, theirs, record.fingerprint, **others_own)  # type: ignore[arg-type]
        return await real(tenant, config, *args, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(rooms.store, "replace", crossing)
    record = (await adapt.add_classes(rooms, "zoo", [ClassSpec(name="mine")])).record
    assert [spec.name for spec in record.config.classes] == ["red", "theirs", "mine"]


async def test_a_change_that_is_crossed_again_and_again_ends_in_a_refusal(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red"))

    async def conflict(*_: object, **__: object) -> None:
        raise Conflict

    monkeypatch.setattr(rooms.store, "replace", conflict)
    with pytest.raises(StoreDown):
        await adapt.add_classes(rooms, "zoo", [ClassSpec(name="green")])


async def test_a_deleted_tenant_is_gone_and_the_default_one_comes_back_without_classes(rooms: Rooms) -> None:
    for tenant in ("zoo", DEFAULT_TENANT):
        await adapt.put_tenant(rooms, tenant, colours("red"))
        async with rooms.archive.open(tenant):
            pass
        await adapt.delete_tenant(rooms, tenant)
    with pytest.raises(UnknownTenant):
        await rooms.archive.record("zoo")
    with pytest.raises(UnknownTenant):
        await adapt.delete_tenant(rooms, "zoo")
    assert (await rooms.archive.record(DEFAULT_TENANT)).config == TenantConfig()


# Re-scoring, by hand --------------------------------------------------------------------------------------------------


async def test_slots_are_rescored_and_relabelled_when_a_class_is_added(compass: Rooms) -> None:
    """Among 0 and 90 degrees a feature at 40 is a 0; among 0, 90 and 45 it is a 45."""
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5), ("b", 40)], "90": [("c", 85), ("d", 60)]})
    await adapt.add_classes(compass, "zoo", [ClassSpec(name="45")])
    found = await slots_of(compass)
    assert {name: set(bank) for name, bank in found.items()} == {"0": {"a"}, "45": {"b", "d"}, "90": {"c"}}
    for bank, id_, degrees in (("0", "a", 5), ("45", "b", 40), ("45", "d", 60), ("90", "c", 85)):
        assert found[bank][id_] == pytest.approx(entropy_at(degrees, 0, 90, 45), abs=1e-3)


async def test_of_rescored_slots_the_surest_stay(compass: Rooms) -> None:
    """All four move to one class that holds two."""
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=2))
    await fill(compass, {"0": [("a", 30), ("b", 40)], "90": [("c", 46), ("d", 65)]})
    await adapt.add_classes(compass, "zoo", [ClassSpec(name="45")])
    entropies = {id_: entropy_at(degrees, 0, 90, 45) for id_, degrees in (("a", 30), ("b", 40), ("c", 46), ("d", 65))}
    assert entropies["c"] != pytest.approx(entropies["b"])
    surest = sorted(entropies, key=lambda id_: entropies[id_])[:2]
    assert {name: set(bank) for name, bank in (await slots_of(compass)).items()} == {"45": set(surest)}


async def test_the_features_of_rescored_slots_stay_bit_for_bit(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5)], "90": [("c", 85)]})
    before = {slot.id: slot.feature for bank in (await stored(compass)).slots.values() for slot in bank}
    await adapt.add_classes(compass, "zoo", [ClassSpec(name="45")])
    assert {slot.id: slot.feature for bank in (await stored(compass)).slots.values() for slot in bank} == before


async def test_removing_a_class_drops_its_own_slots_and_rescores_the_others(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90", "45"))
    await fill(compass, {"0": [("a", 5)], "45": [("b", 45)], "90": [("c", 70)]})
    await adapt.remove_class(compass, "zoo", "45")
    found = await slots_of(compass)
    assert {name: set(bank) for name, bank in found.items()} == {"0": {"a"}, "90": {"c"}}
    assert found["90"]["c"] == pytest.approx(entropy_at(70, 0, 90), abs=1e-3)


@pytest.mark.parametrize("order", [("90", "0"), ("0", "90")])
async def test_without_a_new_labelling_slots_keep_their_entropies(compass: Rooms, order: tuple[str, ...]) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5)], "90": [("c", 85)]})
    before = await slots_of(compass)
    await adapt.put_tenant(compass, "zoo", replace(angles(*order), beta=1.0, weights=(1.0, 0.0, 0.0), learn=False))
    assert await slots_of(compass) == before


async def test_fewer_slots_keep_the_surest_and_more_keep_all(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=3))
    await fill(compass, {"0": [("a", 30), ("b", 10), ("c", 20)]})
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=2))
    assert set((await slots_of(compass))["0"]) == {"b", "c"}
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=9))
    assert set((await slots_of(compass))["0"]) == {"b", "c"}
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=0))
    assert await slots_of(compass) == {}


async def test_shots_stay_with_their_class_when_others_come_and_go(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    record = await compass.store.get("zoo")
    assert record is not None
    own = StoredShot(id="s", class_id=class_id("90"), feature=encode_feature(at(0)))
    await compass.store.add_shots("zoo", record.stamp, [own])
    await adapt.add_classes(compass, "zoo", [ClassSpec(name="45")])
    await adapt.remove_class(compass, "zoo", "0")
    assert (await stored(compass)).shots == {class_id("90"): (own,)}


async def test_a_rescored_slot_has_the_entropy_that_classification_gives_its_feature(rooms: Rooms) -> None:
    """However sure the label: old slots and new images stand in one order."""
    await adapt.put_tenant(rooms, "zoo", colours("red", "green"))
    sure = rooms.encoder.encode_texts(["a red red red photo."])[0]
    slots = {class_id("red"): [StoredSlot(id="1", entropy=0.5, feature=encode_feature(sure))]}
    await put(rooms, colours("red", "green"), slots=slots)
    await adapt.add_classes(rooms, "zoo", [ClassSpec(name="blue")])
    entropy = (await slots_of(rooms))["red"]["1"]
    async with rooms.archive.open("zoo") as hot:
        feature = hot.snapshot.dynamic.classes[0].keys[0].float()
        write = classify(hot.shelves, [Sample(views=feature[None], id="2", learn=False)]).writes[0]
    assert entropy == pytest.approx(write.candidate.entropy, rel=1e-4)


async def test_rescoring_many_slots_goes_through_all_of_them(compass: Rooms) -> None:
    count = 1500
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=256))
    config = replace(angles("0", "90"), slots=2 * count)
    bank = [StoredSlot(id=f"{n:04}", entropy=0.5, feature=encode_feature(at(80.0))) for n in range(count)]
    await put(compass, config, slots={class_id("0"): bank})
    await adapt.put_tenant(compass, "zoo", angles("0", "90", "1", slots=256))
    found = await slots_of(compass)
    assert set(found) == {"90"}
    assert set(found["90"]) == {f"{n:04}" for n in range(256)}


async def test_a_change_waits_a_moment_for_the_rescoring_and_then_tells_of_its_job(
    compass: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5), ("b", 40)]})
    monkeypatch.setattr(adapt, "_SOON_S", 0.0)
    gate = threading.Event()
    real = upkeep._scored

    def slowly(*args: object) -> object:
        gate.wait(PATIENCE_S)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(upkeep, "_scored", slowly)
    changed = await adapt.add_classes(compass, "zoo", [ClassSpec(name="45")])
    assert changed.job is not None
    assert (changed.job.kind, changed.job.state) == ("rescore", JobState.RUNNING)
    assert set((await slots_of(compass))["0"]) == {"a", "b"}
    record = await compass.archive.record("zoo")
    assert record.labelling == angles("0", "90").labelling != record.config.labelling
    gate.set()
    await compass.jobs.wait(changed.job.id, PATIENCE_S)
    assert {name: set(bank) for name, bank in (await slots_of(compass)).items()} == {"0": {"a"}, "45": {"b"}}


async def test_a_change_whose_memory_another_replica_rescores_tells_of_no_job(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    record = await compass.archive.record("zoo")
    assert await compass.store.claim("zoo", f"rescore:{record.stamp.epoch + 1}", 60.0)
    assert (await adapt.add_classes(compass, "zoo", [ClassSpec(name="45")])).job is None
    record = await compass.archive.record("zoo")
    assert record.labelling != record.config.labelling


async def test_a_change_that_labels_alike_needs_no_job(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5)]})
    assert (await adapt.put_tenant(compass, "zoo", replace(angles("90", "0"), beta=1.0, slots=3))).job is None
    assert await compass.jobs.every("zoo") == []


async def test_a_slot_that_is_written_while_the_memory_is_thinned_out_is_not_lost(
    compass: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=3))
    await fill(compass, {"0": [("a", 30), ("b", 20)]})
    real, crossed = compass.store.load, False

    async def crossing(tenant: str, **others: bool) -> StoredMemory | None:
        nonlocal crossed
        found = await real(tenant, **others)
        if not crossed:
            crossed = True
            await fill(compass, {"0": [("c", 10)]})
        return found

    monkeypatch.setattr(compass.store, "load", crossing)
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=2))
    assert set((await slots_of(compass))["0"]) == {"b", "c"}


async def test_fewer_slots_that_cross_a_new_label_set_do_not_pass_its_slots_off_as_scored(
    compass: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots that are thinned out must be those that were scored under the label set that the record names."""
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=3))
    real, crossed = compass.store.load, False

    async def crossing(tenant: str, **others: bool) -> StoredMemory | None:
        nonlocal crossed
        if not crossed:
            crossed = True
            await put(compass, angles("0", "45", slots=3))
            await fill(compass, {"0": [("a", 5), ("b", 10), ("c", 15)]})
        return await real(tenant, **others)

    monkeypatch.setattr(compass.store, "load", crossing)
    await adapt.put_tenant(compass, "zoo", angles("0", "90", slots=2))
    found = await slots_of(compass)
    assert found["0"]["a"] == pytest.approx(entropy_at(5, 0, 90), abs=1e-3)


# Another encoder ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def foreign(rooms: Rooms) -> Rooms:
    """Return rooms whose tenant `zoo` was made with another encoder, slots, shots and all."""
    slots = {class_id("red"): [StoredSlot(id="1", entropy=0.5, feature=b"xx")]}
    stamp = await put(rooms, colours("red", "green"), fingerprint="other", slots=slots)
    shots = [
        StoredShot(id="s", class_id=class_id("red"), feature=b"xx"),
        StoredShot(id="kept", class_id=class_id("red"), feature=b"xx", image=picture("red")),
        StoredShot(id="gone", class_id=class_id("green"), feature=b"xx", image=picture("green")),
    ]
    await rooms.store.add_shots("zoo", stamp, shots)
    return rooms


async def test_replacing_a_tenant_of_another_encoder_starts_it_anew_but_for_the_images_that_it_kept(
    foreign: Rooms,
) -> None:
    changed = await adapt.put_tenant(foreign, "zoo", colours("red"))
    assert (changed.created, changed.job) == (False, None)
    memory = await stored(foreign)
    assert memory.record.config == changed.record.config
    assert memory.record.fingerprint == foreign.encoder.fingerprint
    assert memory.record.origin["encoder"] == foreign.encoder.name
    assert not any(memory.slots.values())
    ((shot,),) = memory.shots.values()
    assert (shot.id, shot.image) == ("kept", picture("red"))
    again, _ = await adapt.add_shots(foreign, "zoo", [LabelledImage(label="red", image=shot.image)], deadline=FOREVER)
    fresh = {own.id: own for own in (await stored(foreign)).shots[class_id("red")]}
    assert isinstance(again[0], Shot)
    assert shot.feature == fresh[again[0].id].feature


async def test_adding_a_class_to_a_tenant_of_another_encoder_is_refused_and_loses_nothing(foreign: Rooms) -> None:
    before = await stored(foreign)
    with pytest.raises(FingerprintMismatch):
        await adapt.add_classes(foreign, "zoo", [ClassSpec(name="blue")])
    assert await stored(foreign) == before


async def test_removing_a_class_of_a_tenant_of_another_encoder_is_refused_and_loses_nothing(foreign: Rooms) -> None:
    before = await stored(foreign)
    with pytest.raises(FingerprintMismatch):
        await adapt.remove_class(foreign, "zoo", "green")
    assert await stored(foreign) == before


async def test_shots_are_not_added_to_a_tenant_of_another_encoder(foreign: Rooms) -> None:
    before = await stored(foreign)
    with pytest.raises(FingerprintMismatch):
        await adapt.add_shots(foreign, "zoo", [LabelledImage(label="red", image=picture())], deadline=FOREVER)
    assert await stored(foreign) == before


# Shots ----------------------------------------------------------------------------------------------------------------


def labelled(*shots: tuple[str, int]) -> list[LabelledImage]:
    """Return pictures of the colour of their label, by seed."""
    return [LabelledImage(label=label, image=picture(label, seed)) for label, seed in shots]


async def test_shots_are_stored_with_their_features_and_told_in_order(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red", "green"))
    told, stamp = await adapt.add_shots(rooms, "zoo", labelled(("green", 1), ("red", 2)), deadline=FOREVER)
    memory = await stored(rooms)
    assert [shot.label for shot in told if isinstance(shot, Shot)] == ["green", "red"]
    assert [shot.id for shot in told if isinstance(shot, Shot)] == [
        memory.shots[class_id(name)][0].id for name in ("green", "red")
    ]
    assert stamp == memory.record.stamp
    assert all(shot.image is None for own in memory.shots.values() for shot in own)
    async with rooms.archive.open("zoo") as hot:
        assert [len(bank) for bank in hot.snapshot.static.classes] == [1, 1]


async def test_a_tenant_that_keeps_images_keeps_them_and_their_bytes_count(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", replace(colours("red"), retention="images"))
    await adapt.add_shots(rooms, "zoo", labelled(("red", 1)), deadline=FOREVER)
    ((shot,),) = (await stored(rooms)).shots.values()
    assert shot.image == picture("red", 1)
    unread = await rooms.store.load("zoo")
    assert unread is not None
    for memory in (unread, await stored(rooms)):
        assert held_bytes(memory, rooms.encoder.dim) == 2 * rooms.encoder.dim + len(picture("red", 1))


async def test_a_shot_that_is_uploaded_again_is_the_same_one_and_of_another_class_another(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red", "green"))
    first, stamp = await adapt.add_shots(rooms, "zoo", labelled(("red", 1)), deadline=FOREVER)
    again, later = await adapt.add_shots(rooms, "zoo", labelled(("red", 1), ("red", 1)), deadline=FOREVER)
    assert again == first * 2
    assert later == stamp
    other, _ = await adapt.add_shots(
        rooms, "zoo", [LabelledImage(label="green", image=picture("red", 1))], deadline=FOREVER
    )
    assert other != first
    assert sum(map(len, (await stored(rooms)).shots.values())) == 2


async def test_a_bad_image_fails_alone(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red"))
    given = [*labelled(("red", 1)), LabelledImage(label="red", image=b"no picture"), *labelled(("red", 2))]
    told, _ = await adapt.add_shots(rooms, "zoo", given, deadline=FOREVER)
    assert [type(one) for one in told] == [Shot, ImageUnreadable, Shot]
    assert sum(map(len, (await stored(rooms)).shots.values())) == 2
    value = rooms.metrics.registry.get_sample_value("dmn_image_errors_total", {"reason": "image-unreadable"})
    assert value == 1


async def test_an_unknown_label_or_tenant_or_too_many_images_store_nothing(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red"))
    with pytest.raises(UnknownClass):
        await adapt.add_shots(rooms, "zoo", labelled(("red", 1), ("green", 2)), deadline=FOREVER)
    with pytest.raises(UnknownTenant):
        await adapt.add_shots(rooms, "farm", labelled(("red", 1)), deadline=FOREVER)
    with pytest.raises(TooManyImages):
        await adapt.add_shots(rooms, "zoo", labelled(*[("red", n) for n in range(9)]), deadline=FOREVER)
    assert (await stored(rooms)).shots == {}


async def test_a_class_takes_no_more_shots_than_allowed_and_then_none_of_the_call(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red", "green"))
    await adapt.add_shots(rooms, "zoo", labelled(*[("red", n) for n in range(3)]), deadline=FOREVER)
    with pytest.raises(LimitExceeded):
        await adapt.add_shots(rooms, "zoo", labelled(("green", 1), ("red", 4), ("red", 5)), deadline=FOREVER)
    assert sum(map(len, (await stored(rooms)).shots.values())) == 3
    await adapt.add_shots(rooms, "zoo", labelled(("red", 1), ("red", 4)), deadline=FOREVER)
    assert sum(map(len, (await stored(rooms)).shots.values())) == 4


async def test_a_tenant_holds_no_more_bytes_than_allowed() -> None:
    one = 2 * FakeEncoder.dim
    async for rooms in rooms_of(FakeEncoder(), tenant_max_bytes=3 * one):
        await adapt.put_tenant(rooms, "zoo", colours("red"))
        record = await rooms.store.get("zoo")
        assert record is not None
        slot = StoredSlot(id="1", entropy=0.5, feature=bytes(one))
        await rooms.store.push("zoo", record.stamp, [PushCandidate(class_id=class_id("red"), slot=slot)])
        await adapt.add_shots(rooms, "zoo", labelled(("red", 1), ("red", 2)), deadline=FOREVER)
        with pytest.raises(LimitExceeded):
            await adapt.add_shots(rooms, "zoo", labelled(("red", 3)), deadline=FOREVER)
        await adapt.add_shots(rooms, "zoo", labelled(("red", 2)), deadline=FOREVER)


async def test_a_zip_may_hold_more_images_than_a_call(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red", "green", "blue"))
    many = labelled(*[(name, n) for name in ("red", "green", "blue") for n in range(4)])
    told, _ = await adapt.add_shots(rooms, "zoo", many, deadline=FOREVER, bounded=False)
    assert len(told) == 12
    assert all(isinstance(one, Shot) for one in told)
    assert rooms.batcher.taken == 0


async def test_an_upload_that_another_writer_crossed_is_checked_anew(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red", "green"))
    real, crossed = rooms.store.add_shots, False

    async def crossing(tenant: str, since: object, shots: object, *, beside: str | None) -> object:
        nonlocal crossed
        if not crossed:
            crossed = True
            await put(rooms, colours("green"))
        return await real(tenant, since, shots, beside=beside)  # type: ignore[arg-type]

    monkeypatch.setattr(rooms.store, "add_shots", crossing)
    with pytest.raises(UnknownClass):
        await adapt.add_shots(rooms, "zoo", labelled(("red", 1)), deadline=FOREVER)
    assert (await stored(rooms)).shots == {}


async def test_an_upload_that_is_crossed_again_and_again_ends_in_a_refusal(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red"))

    async def crossed(*_: object, **_more: object) -> None:
        raise ReloadNeeded

    monkeypatch.setattr(rooms.store, "add_shots", crossed)
    with pytest.raises(StoreDown):
        await adapt.add_shots(rooms, "zoo", labelled(("red", 1)), deadline=FOREVER)


async def test_an_upload_whose_client_leaves_at_once_leaves_no_loose_ends(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red"))
    async with rooms.archive.open("zoo"):
        pass
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        upload = asyncio.create_task(adapt.add_shots(rooms, "zoo", labelled(("red", 1)), deadline=FOREVER))
        await asyncio.sleep(0)
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        del upload
        gc.collect()
    assert not [str(one.message) for one in told]
    assert rooms.batcher.taken == 0


async def test_shots_are_removed_by_id_or_by_label(rooms: Rooms) -> None:
    await adapt.put_tenant(rooms, "zoo", colours("red", "green"))
    told, _ = await adapt.add_shots(rooms, "zoo", labelled(("red", 1), ("red", 2), ("green", 3)), deadline=FOREVER)
    first = told[0]
    assert isinstance(first, Shot)
    await adapt.remove_shot(rooms, "zoo", first.id)
    with pytest.raises(UnknownShot):
        await adapt.remove_shot(rooms, "zoo", first.id)
    assert sum(map(len, (await stored(rooms)).shots.values())) == 2
    await adapt.remove_label(rooms, "zoo", " red ")
    assert set((await stored(rooms)).shots) == {class_id("green")}
    await adapt.remove_label(rooms, "zoo", "red")
    with pytest.raises(UnknownClass):
        await adapt.remove_label(rooms, "zoo", "blue")
    with pytest.raises(UnknownTenant):
        await adapt.remove_shot(rooms, "farm", first.id)


# Emptying -------------------------------------------------------------------------------------------------------------


async def test_a_reset_names_classes_or_all(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5)], "90": [("c", 85)]})
    async with compass.archive.open("zoo"):
        pass
    stamp, saved = await adapt.reset(compass, "zoo", dynamic=True, static=False, classes=["0"])
    assert saved is not None
    assert (saved.reason, saved.slots) == ("reset", 2)
    assert set(await slots_of(compass)) == {"90"}
    async with compass.archive.open("zoo") as hot:
        assert [len(bank) for bank in hot.snapshot.dynamic.classes] == [0, 1]
        assert hot.stamp == stamp
    await adapt.reset(compass, "zoo", dynamic=True, static=False, classes=None)
    assert await slots_of(compass) == {}


async def test_a_reset_that_names_an_unknown_class_or_tenant_empties_nothing(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5)]})
    with pytest.raises(UnknownClass):
        await adapt.reset(compass, "zoo", dynamic=True, static=True, classes=["0", "1"])
    with pytest.raises(UnknownTenant):
        await adapt.reset(compass, "farm", dynamic=True, static=True, classes=None)
    assert set(await slots_of(compass)) == {"0"}


async def test_a_purged_slot_leaves_the_hot_memory_too(compass: Rooms) -> None:
    await adapt.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5), ("b", 10)]})
    async with compass.archive.open("zoo"):
        pass
    await adapt.purge(compass, "zoo", "0", "a")
    async with compass.archive.open("zoo") as hot:
        assert hot.snapshot.dynamic.classes[0].ids == ("b",)
    for label, slot, error in (("0", "a", UnknownSlot), ("90", "b", UnknownSlot), ("1", "b", UnknownClass)):
        with pytest.raises(error):
            await adapt.purge(compass, "zoo", label, slot)


def test_the_compass_agrees_with_the_hand() -> None:
    """A feature at 40 degrees is nearer to 0 than to 90, and nearer to 45 than to either."""
    head = torch.stack([at(0), at(90), at(45)])
    assert int((head[:2] @ at(40)).argmax()) == 0
    assert int((head @ at(40)).argmax()) == 2
    assert torch.allclose(unit(at(40)), at(40))
