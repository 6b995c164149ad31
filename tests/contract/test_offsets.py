"""How every store keeps trained offsets: whole, with their memory, and gone when what they were trained for is."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from service.domain.memory import Stamp, StoredOffsets, TenantRecord, Training, labelling_of
from service.domain.tenant import TenantConfig, class_id
from service.stores.protocol import Conflict, MemoryStore, ReloadNeeded
from tests.contract.test_store import CATS, DOGS, FINGERPRINT, candidate, config, contents, create, push, shot, stamp_of

TRAINING = Training(
    id="t1",
    created=12.5,
    seed=3,
    epochs=20,
    learning_rate=1e-4,
    shots=16,
    dim=2,
    before={"text": 50.0, "fused": 62.5},
    after={"text": 75.0, "fused": 87.5},
)


def row(first: float) -> bytes:
    return struct.pack("<10f", *(first + i for i in range(10)))


OFFSETS = StoredOffsets(training=TRAINING, rows={CATS: row(0.0), DOGS: row(-7.25)})


async def put(
    store: MemoryStore,
    made: TenantConfig,
    offsets: StoredOffsets | None = None,
    *,
    fingerprint: str = FINGERPRINT,
    expected: Stamp | None = None,
) -> Stamp:
    at = await stamp_of(store) if expected is None else expected
    return await store.replace(
        "zoo", made, fingerprint, expected=at, labelling=made.labelling, origin={}, offsets=offsets
    )


async def trained(store: MemoryStore) -> Stamp:
    await create(store)
    await push(store, candidate("1", 0.5))
    await store.add_shots("zoo", await stamp_of(store), [shot("a"), shot("b", DOGS)])
    return await put(store, config("cats", "dogs"), OFFSETS)


async def offsets_of(store: MemoryStore) -> StoredOffsets:
    stored = await store.load("zoo")
    assert stored is not None
    assert stored.record.training == stored.offsets.training
    record = await store.get("zoo")
    assert record is not None
    assert record.training == stored.record.training
    return stored.offsets


async def test_a_tenant_has_no_offsets_until_it_is_given_some(store: MemoryStore) -> None:
    await create(store)
    assert await offsets_of(store) == StoredOffsets()


async def test_offsets_come_back_bit_for_bit_and_leave_the_memory_as_it_is(store: MemoryStore) -> None:
    await trained(store)
    assert await offsets_of(store) == OFFSETS
    assert set(await contents(store)) == {CATS}


async def test_new_offsets_start_a_new_epoch_for_all_who_read(store: MemoryStore) -> None:
    await create(store)
    before = await stamp_of(store)
    assert (await put(store, config("cats", "dogs"), OFFSETS)).epoch != before.epoch
    with pytest.raises(ReloadNeeded):
        await store.sync("zoo", before)


async def test_offsets_that_come_too_late_are_not_kept(store: MemoryStore) -> None:
    await create(store)
    seen = await stamp_of(store)
    await store.add_shots("zoo", seen, [shot("a")])
    with pytest.raises(Conflict):
        await put(store, config("cats", "dogs"), OFFSETS, expected=seen)
    assert await offsets_of(store) == StoredOffsets()


async def test_later_offsets_take_the_place_of_earlier_ones(store: MemoryStore) -> None:
    await trained(store)
    later = StoredOffsets(training=replace(TRAINING, id="t2", before=None, after=None), rows={DOGS: row(5.0)})
    await put(store, config("cats", "dogs"), later)
    assert await offsets_of(store) == later


async def test_a_new_configuration_keeps_the_offsets(store: MemoryStore) -> None:
    await trained(store)
    await put(store, config("dogs", "birds", "cats", slots=7))
    assert await offsets_of(store) == OFFSETS


async def test_a_class_that_leaves_takes_its_row_along_and_makes_them_other_offsets(store: MemoryStore) -> None:
    await trained(store)
    await put(store, config("dogs"))
    left = await offsets_of(store)
    assert left == StoredOffsets(training=TRAINING.without([CATS]), rows={DOGS: OFFSETS.rows[DOGS]})
    await put(store, config("dogs", "cats"))
    assert await offsets_of(store) == left


async def test_offsets_of_classes_that_are_not_there_are_not_kept(store: MemoryStore) -> None:
    await create(store)
    stray = {**OFFSETS.rows, class_id("nobody"): row(1.0)}
    await put(store, config("cats", "dogs"), replace(OFFSETS, rows=stray))
    assert await offsets_of(store) == OFFSETS


async def test_offsets_are_removed_by_giving_none(store: MemoryStore) -> None:
    await trained(store)
    await put(store, config("cats", "dogs"), StoredOffsets())
    assert await offsets_of(store) == StoredOffsets()
    assert set(await contents(store)) == {CATS}


async def test_another_fingerprint_drops_the_offsets(store: MemoryStore) -> None:
    await trained(store)
    await put(store, config("cats", "dogs"), fingerprint="another")
    assert await offsets_of(store) == StoredOffsets()


@pytest.mark.parametrize("dynamic", [False, True])
async def test_offsets_go_with_the_whole_static_memory(store: MemoryStore, *, dynamic: bool) -> None:
    await trained(store)
    await store.reset("zoo", dynamic=dynamic, static=True, class_ids=None)
    assert await offsets_of(store) == StoredOffsets()


@pytest.mark.parametrize("static", [False, True])
async def test_a_reset_of_some_classes_or_of_slots_leaves_the_offsets(store: MemoryStore, *, static: bool) -> None:
    await trained(store)
    await store.reset("zoo", dynamic=True, static=static, class_ids=[CATS] if static else None)
    assert await offsets_of(store) == OFFSETS


async def test_shots_that_come_or_go_leave_the_offsets(store: MemoryStore) -> None:
    await trained(store)
    await store.remove_shots("zoo", ["a"])
    await store.add_shots("zoo", await stamp_of(store), [shot("c")])
    assert await offsets_of(store) == OFFSETS


async def test_offsets_go_with_their_tenant(store: MemoryStore) -> None:
    await trained(store)
    await store.delete("zoo")
    await create(store)
    assert await offsets_of(store) == StoredOffsets()


async def test_offsets_of_many_classes_come_back_whole(store: MemoryStore) -> None:
    """More than a store reads or writes in one command."""
    names = [f"class {i}" for i in range(300)]
    await create(store, names=names)
    rows = {class_id(name): struct.pack("<f", i) * 5 * 512 for i, name in enumerate(names)}
    large = StoredOffsets(training=replace(TRAINING, dim=512), rows=rows)
    await put(store, config(*names), large)
    assert await offsets_of(store) == large


def test_offsets_are_part_of_what_labels_the_slots() -> None:
    made = config("cats", "dogs")
    bare = TenantRecord(
        name="zoo", config=made, fingerprint="f", stamp=Stamp(epoch=1, version=0), labelling=made.labelling
    )
    assert bare.due_labelling == made.labelling == labelling_of(made, None)
    others = (TRAINING, replace(TRAINING, id="t2"), TRAINING.without([CATS]))
    assert len({made.labelling, *(replace(bare, training=one).due_labelling for one in others)}) == 4
    assert TRAINING.without([]) == TRAINING
