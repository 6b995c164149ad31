"""What changes a tenant is whole or did not happen, and classes that stay keep what they learnt."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.classify import Sample, classify
from core.memory.codec import encode_feature
from service.domain.memory import Stamp, StoredBank, StoredMemory, StoredShot, StoredSlot
from service.domain.records import JobState
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import FingerprintMismatch, InvalidRequest, StoreDown, TooManyImages, UnknownClass
from service.services import Rooms
from service.stores.protocol import Conflict, PushCandidate, ReloadNeeded
from service.tenants import configuration, reindex, reset
from service.tenants.shots import LabelledImage, add_shots
from tests.support.fakes import FakeEncoder, picture
from tests.support.replicas import PATIENCE_S, Replicas, replicas

FOREVER = float("inf")


@pytest.fixture
async def house() -> AsyncIterator[Replicas]:
    async with replicas(Replicas) as house:
        yield house


@pytest.fixture
async def rooms(house: Replicas) -> Rooms:
    return await house.open()


@pytest.fixture
async def compass(house: Replicas) -> Rooms:
    return await house.open(Compass())


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


@pytest.mark.parametrize("name", ["", "a/b", "-a"])
async def test_a_tenant_with_a_malformed_name_is_not_made(rooms: Rooms, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await configuration.put_tenant(rooms, name, colours("red"))
    assert await rooms.store.get(name) is None


async def test_a_change_that_another_writer_crossed_is_made_anew_on_what_is_there(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await configuration.put_tenant(rooms, "zoo", colours("red"))
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
    record = (await configuration.add_classes(rooms, "zoo", [ClassSpec(name="mine")])).record
    assert [spec.name for spec in record.config.classes] == ["red", "theirs", "mine"]


@pytest.mark.parametrize(
    ("call", "fault", "change"),
    [
        ("replace", Conflict, lambda rooms: configuration.add_classes(rooms, "zoo", [ClassSpec(name="green")])),
        (
            "add_shots",
            ReloadNeeded,
            lambda rooms: add(rooms, ("red", 1)),
        ),
    ],
    ids=["a class", "shots"],
)
async def test_a_change_that_is_crossed_again_and_again_ends_in_a_refusal(
    rooms: Rooms,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    fault: type[Exception],
    change: Callable[[Rooms], Awaitable[object]],
) -> None:
    await configuration.put_tenant(rooms, "zoo", colours("red"))

    async def crossed(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(rooms.store, call, crossed)
    with pytest.raises(StoreDown):
        await change(rooms)


# Re-scoring, by hand --------------------------------------------------------------------------------------------------


async def test_slots_are_rescored_and_relabelled_when_a_class_is_added(compass: Rooms) -> None:
    """Among 0 and 90 degrees a feature at 40 is a 0; among 0, 90 and 45 it is a 45."""
    await configuration.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5), ("b", 40)], "90": [("c", 85), ("d", 60)]})
    await configuration.add_classes(compass, "zoo", [ClassSpec(name="45")])
    found = await slots_of(compass)
    assert {name: set(bank) for name, bank in found.items()} == {"0": {"a"}, "45": {"b", "d"}, "90": {"c"}}
    for bank, id_, degrees in (("0", "a", 5), ("45", "b", 40), ("45", "d", 60), ("90", "c", 85)):
        assert found[bank][id_] == pytest.approx(entropy_at(degrees, 0, 90, 45), abs=1e-3)


async def test_removing_a_class_drops_its_own_slots_and_rescores_the_others(compass: Rooms) -> None:
    await configuration.put_tenant(compass, "zoo", angles("0", "90", "45"))
    await fill(compass, {"0": [("a", 5)], "45": [("b", 45)], "90": [("c", 70)]})
    await configuration.remove_class(compass, "zoo", "45")
    found = await slots_of(compass)
    assert {name: set(bank) for name, bank in found.items()} == {"0": {"a"}, "90": {"c"}}
    assert found["90"]["c"] == pytest.approx(entropy_at(70, 0, 90), abs=1e-3)


async def test_a_rescored_slot_has_the_entropy_that_classification_gives_its_feature(rooms: Rooms) -> None:
    """However sure the label: old slots and new images stand in one order."""
    await configuration.put_tenant(rooms, "zoo", colours("red", "green"))
    sure = rooms.encoder.encode_texts(["a red red red photo."])[0]
    slots = {class_id("red"): [StoredSlot(id="1", entropy=0.5, feature=encode_feature(sure))]}
    await put(rooms, colours("red", "green"), slots=slots)
    await configuration.add_classes(rooms, "zoo", [ClassSpec(name="blue")])
    entropy = (await slots_of(rooms))["red"]["1"]
    async with rooms.archive.open("zoo") as hot:
        feature = hot.snapshot.dynamic.classes[0].keys[0].float()
        write = classify(hot.shelves, [Sample(views=feature[None], id="2", learn=False)]).writes[0]
    assert entropy == pytest.approx(write.candidate.entropy, rel=1e-4)


async def test_a_change_waits_a_moment_for_the_rescoring_and_then_tells_of_its_job(
    compass: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await configuration.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5), ("b", 40)]})
    monkeypatch.setattr(reindex, "_SOON_S", 0.0)
    gate = threading.Event()
    real = reindex._scored

    def slowly(*args: object) -> object:
        gate.wait(PATIENCE_S)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reindex, "_scored", slowly)
    changed = await configuration.add_classes(compass, "zoo", [ClassSpec(name="45")])
    assert changed.job is not None
    assert (changed.job.kind, changed.job.state) == ("rescore", JobState.RUNNING)
    assert set((await slots_of(compass))["0"]) == {"a", "b"}
    record = await compass.archive.record("zoo")
    assert record.labelling == angles("0", "90").labelling != record.config.labelling
    gate.set()
    await compass.jobs.wait(changed.job.id, PATIENCE_S)
    assert {name: set(bank) for name, bank in (await slots_of(compass)).items()} == {"0": {"a"}, "45": {"b"}}


async def test_a_change_whose_memory_another_replica_rescores_tells_of_no_job(compass: Rooms) -> None:
    await configuration.put_tenant(compass, "zoo", angles("0", "90"))
    record = await compass.archive.record("zoo")
    assert await compass.store.claim("zoo", f"rescore:{record.stamp.epoch + 1}", 60.0)
    assert (await configuration.add_classes(compass, "zoo", [ClassSpec(name="45")])).job is None
    record = await compass.archive.record("zoo")
    assert record.labelling != record.config.labelling


async def test_a_change_that_labels_alike_needs_no_job_and_keeps_purged_slots_barred(compass: Rooms) -> None:
    await configuration.put_tenant(compass, "zoo", angles("0", "90"))
    await fill(compass, {"0": [("a", 5), ("purged", 10)]})
    await reset.purge(compass, "zoo", "0", "purged")
    assert (await configuration.put_tenant(compass, "zoo", replace(angles("90", "0"), beta=1.0, slots=3))).job is None
    assert await compass.jobs.every("zoo") == []
    assert (await stored(compass)).barred == {(class_id("0"), "purged")}


async def test_a_slot_that_is_written_while_the_memory_is_thinned_out_is_not_lost(
    compass: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await configuration.put_tenant(compass, "zoo", angles("0", "90", slots=3))
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
    await configuration.put_tenant(compass, "zoo", angles("0", "90", slots=2))
    assert set((await slots_of(compass))["0"]) == {"b", "c"}


async def test_fewer_slots_that_cross_a_new_label_set_do_not_pass_its_slots_off_as_scored(
    compass: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots that are thinned out must be those that were scored under the label set that the record names."""
    await configuration.put_tenant(compass, "zoo", angles("0", "90", slots=3))
    real, crossed = compass.store.load, False

    async def crossing(tenant: str, **others: bool) -> StoredMemory | None:
        nonlocal crossed
        if not crossed:
            crossed = True
            await put(compass, angles("0", "45", slots=3))
            await fill(compass, {"0": [("a", 5), ("b", 10), ("c", 15)]})
        return await real(tenant, **others)

    monkeypatch.setattr(compass.store, "load", crossing)
    await configuration.put_tenant(compass, "zoo", angles("0", "90", slots=2))
    found = await slots_of(compass)
    assert found["0"]["a"] == pytest.approx(entropy_at(5, 0, 90), abs=1e-3)


# Another encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda rooms: configuration.add_classes(rooms, "zoo", [ClassSpec(name="blue")]),
        lambda rooms: configuration.remove_class(rooms, "zoo", "green"),
        lambda rooms: add(rooms, ("red", 1)),
    ],
    ids=["add a class", "remove a class", "add shots"],
)
async def test_a_tenant_of_another_encoder_is_not_changed_and_loses_nothing(
    rooms: Rooms, change: Callable[[Rooms], Awaitable[object]]
) -> None:
    slots = {class_id("red"): [StoredSlot(id="1", entropy=0.5, feature=b"xx")]}
    stamp = await put(rooms, colours("red", "green"), fingerprint="other", slots=slots)
    shot = StoredShot(id="kept", class_id=class_id("red"), feature=b"xx", image=picture("red"))
    await rooms.store.add_shots("zoo", stamp, [shot])
    before = await stored(rooms)
    with pytest.raises(FingerprintMismatch):
        await change(rooms)
    assert await stored(rooms) == before


# Shots ----------------------------------------------------------------------------------------------------------------


def labelled(*shots: tuple[str, int]) -> list[LabelledImage]:
    """Return pictures of the colour of their label, by seed."""
    return [LabelledImage(label=label, image=picture(label, seed)) for label, seed in shots]


async def add(rooms: Rooms, *shots: tuple[str, int]) -> object:
    """Add shots of the colour of their label to the tenant `zoo`."""
    return await add_shots(rooms, "zoo", labelled(*shots), deadline=FOREVER)


async def test_a_call_of_more_images_than_allowed_stores_nothing(house: Replicas) -> None:
    rooms = await house.open(max_images=2)
    await configuration.put_tenant(rooms, "zoo", colours("red"))
    with pytest.raises(TooManyImages):
        await add(rooms, *(("red", n) for n in range(3)))
    assert await house.shots() == {}


async def test_an_upload_that_another_writer_crossed_is_checked_anew(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    await configuration.put_tenant(rooms, "zoo", colours("red", "green"))
    real, crossed = rooms.store.add_shots, False

    async def crossing(tenant: str, since: object, shots: object, *, beside: str | None) -> object:
        nonlocal crossed
        if not crossed:
            crossed = True
            await put(rooms, colours("green"))
        return await real(tenant, since, shots, beside=beside)  # type: ignore[arg-type]

    monkeypatch.setattr(rooms.store, "add_shots", crossing)
    with pytest.raises(UnknownClass):
        await add(rooms, ("red", 1))
    assert (await stored(rooms)).shots == {}


async def test_an_upload_whose_client_leaves_at_once_leaves_no_loose_ends(rooms: Rooms) -> None:
    await configuration.put_tenant(rooms, "zoo", colours("red"))
    async with rooms.archive.open("zoo"):
        pass
    gc.freeze()  # what earlier tests left is no loose end of this one
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            upload = asyncio.create_task(add(rooms, ("red", 1)))
            await asyncio.sleep(0)
            upload.cancel()
            await asyncio.gather(upload, return_exceptions=True)
            del upload
            gc.collect()
    finally:
        gc.unfreeze()
    assert not [str(one.message) for one in told]
    assert rooms.batcher.taken == 0
