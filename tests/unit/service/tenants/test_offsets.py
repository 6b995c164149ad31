"""Trained offsets on their way through the service: read, part of what labels, moved in files, dropped."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.classify import text_scores
from core.errors import IncompatibleMemory
from core.memory.codec import decode_features
from core.numerics import entropy
from core.readout.projection import Projection, project_text
from service.classify import ClassifyCall, classify
from service.domain.memory import StoredMemory, StoredOffsets, Training
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import InvalidRequest, LimitExceeded
from service.memory.convert import encode_offsets, held_bytes, projection_of
from service.serialization import reader, writer
from service.services import Rooms
from service.settings import Settings
from service.tenants import configuration, reindex, reset, shots, snapshots
from tests.support.fakes import FakeEncoder, picture
from tests.support.replicas import PATIENCE_S, Replicas, replicas
from tests.unit.service.serialization.test_serialization import CAT, CREATED, DIM, DOG, Raw, given, memory
from tests.unit.service.tenants.test_configuration import colours, stored

ABOUT = Training(id="t1", created=1.0, seed=0, epochs=20, learning_rate=1e-4, shots=4, dim=FakeEncoder.dim)
NAMES = ("red", "green", "blue")


def offsets(classes: int, dim: int = FakeEncoder.dim, *, size: float = 0.3) -> Projection:
    generator = torch.Generator().manual_seed(1)
    return Projection(**{one.name: size * torch.randn(classes, dim, generator=generator) for one in fields(Projection)})


@pytest.fixture
async def house() -> AsyncIterator[Replicas]:
    async with replicas(Replicas) as house:
        yield house


@pytest.fixture
async def rooms(house: Replicas) -> Rooms:
    return await house.open(sync_ms=0)


async def ask(rooms: Rooms, *, learn: bool = True) -> list[Any]:
    images = [picture(name, seed) for seed, name in enumerate(NAMES * 3)]
    call = ClassifyCall(tenant="zoo", images=images, learn=learn, views=1, explain=False, deadline=rooms.clock() + 60.0)
    return await classify(rooms, call)


async def swap_in(rooms: Rooms, projection: Projection, names: tuple[str, ...] = NAMES) -> None:
    record = await rooms.archive.record("zoo")
    rows = encode_offsets(projection, [class_id(name) for name in names])
    await rooms.store.replace(
        "zoo",
        record.config,
        record.fingerprint,
        expected=record.stamp,
        labelling=record.labelling,
        origin=record.origin,
        offsets=StoredOffsets(training=ABOUT, rows=rows),
    )


async def rescored(rooms: Rooms) -> StoredMemory:
    job = await reindex.resume(rooms, "zoo")
    assert job is not None
    await rooms.jobs.wait(job.id, PATIENCE_S)
    found = await stored(rooms)
    assert found.record.labelling == found.record.due_labelling
    return found


# Read -----------------------------------------------------------------------------------------------------------------


def test_offsets_are_read_back_bit_for_bit_by_the_place_of_their_class() -> None:
    projection, specs = offsets(2, DIM), memory().record.config.classes
    rows = encode_offsets(projection, [DOG, CAT])
    kept = replace(memory(), offsets=StoredOffsets(training=ABOUT, rows=rows))
    read = projection_of(kept, torch.zeros(len(specs), DIM))
    assert read is not None
    for one in fields(Projection):
        own, expected = getattr(read, one.name), getattr(projection, one.name)
        assert torch.equal(own[[1, 0]], expected)
        assert not own[2].any()


def test_without_a_training_nothing_is_projected_and_a_wrong_size_is_refused() -> None:
    like = torch.zeros(3, DIM)
    assert projection_of(memory(), like) is None
    with pytest.raises(IncompatibleMemory, match="bytes a class"):
        projection_of(replace(memory(), offsets=StoredOffsets(training=ABOUT, rows={CAT: b"\0" * 8})), like)


async def test_answers_come_from_the_offsets_as_soon_as_they_are_there(rooms: Rooms) -> None:
    await configuration.put_tenant(rooms, "zoo", colours(*NAMES))
    before = await ask(rooms, learn=False)
    projection = offsets(3)
    await swap_in(rooms, projection)
    after = await ask(rooms, learn=False)
    async with rooms.archive.open("zoo") as hot:
        head = project_text(hot.snapshot.text, projection)
        assert hot.nbytes > 4 * 5 * 3 * FakeEncoder.dim
    assert all(one.text.score != other.text.score for one, other in zip(before, after, strict=True))
    feature = rooms.encoder.encode_images((await rooms.darkroom.develop(picture("red", 0), tenant="zoo")).pixels)
    expected = text_scores(feature, head, rooms.encoder.logit_scale)[0].exp()
    assert after[0].text.score == pytest.approx(float(expected.max()), rel=1e-4, abs=1e-6)


# Part of what labels --------------------------------------------------------------------------------------------------


async def test_stored_slots_are_scored_anew_under_the_offsets_and_again_without_them(rooms: Rooms) -> None:
    await configuration.put_tenant(rooms, "zoo", colours(*NAMES))
    await ask(rooms)
    before = await stored(rooms)
    await swap_in(rooms, offsets(3))
    record = await rooms.archive.record("zoo")
    assert record.labelling != record.due_labelling
    found = await rescored(rooms)
    head = project_text(
        await rooms.texts.class_weights([found.record.config.prompts(spec) for spec in found.record.config.classes]),
        offsets(3),
    )
    count = 0
    for at, spec in enumerate(found.record.config.classes):
        for slot in found.slots.get(spec.id, ()):
            feature = decode_features(slot.feature, FakeEncoder.dim)[0].float()[None]
            p = text_scores(feature, head, rooms.encoder.logit_scale).exp()
            assert int(p.argmax()) == at
            assert slot.entropy == pytest.approx(entropy(p).item(), rel=1e-5)
            count += 1
    assert count == sum(map(len, before.slots.values()))
    await reset.reset(rooms, "zoo", dynamic=False, static=True, classes=None)
    after = await stored(rooms)
    assert after.record.labelling == after.record.due_labelling == after.record.config.labelling
    entropies = {slot.id: slot.entropy for bank in before.slots.values() for slot in bank}
    assert {s.id: s.entropy for bank in after.slots.values() for s in bank} == pytest.approx(entropies, abs=1e-5)


async def test_nothing_is_learned_until_slots_are_scored_under_the_offsets(rooms: Rooms) -> None:
    await configuration.put_tenant(rooms, "zoo", colours(*NAMES))
    await swap_in(rooms, offsets(3))
    assert {one.due for one in await ask(rooms)} == {True}


async def test_a_configuration_with_the_same_classes_keeps_the_offsets_and_scores_nothing_anew(rooms: Rooms) -> None:
    await configuration.put_tenant(rooms, "zoo", colours(*NAMES))
    await ask(rooms)
    await swap_in(rooms, offsets(3))
    before = await rescored(rooms)
    changed = await configuration.put_tenant(rooms, "zoo", colours(*NAMES, slots=1))
    after = await stored(rooms)
    assert changed.job is None
    assert changed.record == after.record
    assert after.offsets == before.offsets
    assert after.record.labelling == before.record.labelling
    assert all(len(bank) <= 1 for bank in after.slots.values())


async def test_a_class_that_comes_back_comes_back_untrained_and_is_scored_so(rooms: Rooms) -> None:
    await configuration.put_tenant(rooms, "zoo", colours(*NAMES))
    await swap_in(rooms, offsets(3))
    trained = (await rescored(rooms)).record
    await configuration.remove_class(rooms, "zoo", "blue")
    await configuration.add_classes(rooms, "zoo", [ClassSpec(name="blue")])
    found = await stored(rooms)
    assert set(found.offsets.rows) == {class_id("red"), class_id("green")}
    assert found.record.labelling == found.record.due_labelling != trained.labelling


async def test_offsets_count_against_the_limit_of_a_tenant(house: Replicas) -> None:
    row = 4 * 5 * FakeEncoder.dim
    rooms = await house.open(tenant_max_bytes=3 * row + 10)
    await configuration.put_tenant(rooms, "zoo", colours(*NAMES))
    await swap_in(rooms, offsets(3))
    assert held_bytes(await stored(rooms), FakeEncoder.dim) == 3 * row
    shot = shots.LabelledImage(label="red", image=picture("red", 1))
    with pytest.raises(LimitExceeded):
        await shots.add_shots(rooms, "zoo", [shot], deadline=rooms.clock() + 60)
    assert {one.learned.outcome for one in await ask(rooms)} == {"skipped"}


# Moved ----------------------------------------------------------------------------------------------------------------


async def test_a_snapshot_brings_offsets_back_and_takes_them_away(rooms: Rooms) -> None:
    await configuration.put_tenant(rooms, "zoo", colours(*NAMES))
    bare = await snapshots.take(rooms, "zoo")
    await swap_in(rooms, offsets(3))
    kept = (await stored(rooms)).offsets
    info = await snapshots.take(rooms, "zoo")
    await snapshots.restore(rooms, "zoo", bare.id)
    assert (await stored(rooms)).offsets == StoredOffsets()
    await snapshots.restore(rooms, "zoo", info.id)
    assert (await stored(rooms)).offsets == kept


async def test_offsets_of_another_size_than_the_encoder_s_are_not_brought_in(rooms: Rooms, tmp_path: Path) -> None:
    config = TenantConfig(classes=(ClassSpec(name="cat"),))
    record = replace(
        memory().record, config=config, fingerprint=rooms.encoder.fingerprint, training=replace(ABOUT, dim=DIM)
    )
    odd = StoredMemory(record=record, slots={}, shots={}, offsets=StoredOffsets(training=record.training))
    writer.write(odd, tmp_path / "odd", created=CREATED)
    with pytest.raises(InvalidRequest, match="this encoder has"):
        await snapshots.bring_in(rooms, "zoo", tmp_path / "odd")
    assert await rooms.store.get("zoo") is None


def trained_memory(*, both: bool = True) -> StoredMemory:
    about = replace(ABOUT, dim=DIM, before={"text": 50.0, "static": 60.0, "fused": 70.0}, after={"fused": 100.0})
    rows = encode_offsets(offsets(2, DIM), [CAT, DOG])
    return replace(
        memory(),
        record=replace(memory().record, training=about),
        offsets=StoredOffsets(training=about, rows=rows if both else {DOG: rows[DOG]}),
    )


@pytest.mark.parametrize("both", [False, True])
def test_a_file_with_offsets_is_read_back_as_it_was(tmp_path: Path, *, both: bool) -> None:
    kept = trained_memory(both=both)
    size = writer.write(kept, tmp_path / "file", created=CREATED)
    assert reader.read(tmp_path / "file", settings=Settings()) == kept
    assert size == writer.size_of(kept, created=CREATED)


def about(**changed: Any) -> dict[str, str]:
    known = trained_memory().record.training
    assert known is not None
    return {"training": json.dumps({**asdict(known), **changed})}


def numbers(value: float, rows: int = 2, width: int = 5 * DIM) -> Raw:
    table = np.zeros((rows, width), "<f4")
    table[-1, -1] = value
    return Raw("F32", table.shape, table.tobytes())


HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a value that is no number": ({"offsets.rows": numbers(float("nan"))}, {}, "no finite number"),
    "an endless value": ({"offsets.rows": numbers(float("-inf"))}, {}, "no finite number"),
    "a huge value": ({"offsets.rows": numbers(1e30)}, {}, "no finite number"),
    "a row too few": ({"offsets.rows": numbers(0.0, rows=1)}, {}, "is not 20 numbers for each class"),
    "rows too short": ({"offsets.rows": numbers(0.0, width=5)}, {}, "is not 20 numbers for each class"),
    "rows of another size than features": (
        {"offsets.rows": numbers(0.0, width=5)},
        about(dim=1),
        "not of the size of its features",
    ),
    "two rows of a class": ({"offsets.classes": np.array([0, 0], "<i4")}, {}, "more than one row of offsets"),
    "a class that is not there": ({"offsets.classes": np.array([0, 9], "<i4")}, {}, "beyond the 3"),
    "rows without a training": ({}, {"training": None}, "which version '1' does not know"),
    "a training without rows": ({"offsets.rows": None}, {}, "lacks the tensor 'offsets.rows'"),
    "a training that is no JSON": ({}, {"training": "x"}, "training is no valid JSON"),
    "an unknown field": ({}, about(colour="red"), "has one that is not known"),
    "a number as text": ({}, about(seed="1"), "training is wrong at 'seed'"),
    "an odd id": ({}, about(id="../x"), "an id or a number that cannot be"),
    "a negative count": ({}, about(epochs=-1), "an id or a number that cannot be"),
    "no size": ({}, about(dim=0), "an id or a number that cannot be"),
    "an unknown branch": ({}, about(before={"colour": 5.0}), "no percentage of a known branch"),
    "more than all": ({}, about(after={"fused": 101.0}), "no percentage of a known branch"),
    "an endless rate": ({}, about(learning_rate=1e999), "not finite"),
}


@pytest.mark.parametrize(("columns", "said", "why"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_with_hostile_offsets_is_refused(
    columns: Mapping[str, Any], said: Mapping[str, Any], why: str, tmp_path: Path
) -> None:
    given(tmp_path / "file", columns, said=said, stored=trained_memory())
    with pytest.raises(InvalidRequest, match=why):
        reader.read(tmp_path / "file", settings=Settings())


def test_offsets_count_among_the_bytes_of_a_file(tmp_path: Path) -> None:
    writer.write(trained_memory(), tmp_path / "file", created=CREATED)
    with pytest.raises(LimitExceeded, match="holds 230 bytes"):
        reader.read(tmp_path / "file", settings=Settings(tenant_max_bytes=229))
