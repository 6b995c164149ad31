"""What every store keeps to, seen through the protocol of `service.stores.protocol` alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.memory.codec import decode_features, encode_feature
from core.memory.dynamic import Candidate, DynamicMemory, Outcome, apply, propose
from service.domain.memory import Stamp, StoredBank, StoredShot, StoredSlot, digest_of
from service.domain.records import Job, JobState, Remembered, SnapshotInfo
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.stores.in_process import JOBS
from service.stores.protocol import Change, Conflict, MemoryStore, PushCandidate, Pushed, ReloadNeeded, Synced, Verdict
from tests.contract.conftest import Opened, Row

CATS, DOGS = class_id("cats"), class_id("dogs")
FINGERPRINT = "made-with-this"

FEATURES = tuple(encode_feature(torch.tensor(v)) for v in ((1.0, 0.0), (0.6, 0.8), (0.0, 1.0), (-0.6, 0.8)))
"""A few stored features of size 2."""

Contents = Mapping[str, Mapping[str, StoredSlot]]


def config(*names: str, slots: int = 2) -> TenantConfig:
    return TenantConfig(classes=tuple(ClassSpec(name=name) for name in names), slots=slots)


def slot(id_: str, entropy: float, feature: bytes = FEATURES[0]) -> StoredSlot:
    return StoredSlot(id=id_, entropy=entropy, feature=feature)


def candidate(id_: str, entropy: float, feature: bytes = FEATURES[0], class_: str = CATS) -> PushCandidate:
    return PushCandidate(class_id=class_, slot=slot(id_, entropy, feature))


def shot(id_: str, class_: str = CATS, image: bytes | None = None) -> StoredShot:
    return StoredShot(id=id_, class_id=class_, feature=FEATURES[1], image=image)


async def put(
    store: MemoryStore,
    tenant: str,
    made: TenantConfig,
    fingerprint: str,
    *,
    expected: Stamp | None,
    exact: bool = False,
    slots: Mapping[str, Iterable[StoredSlot]] | None = None,
    shots: Iterable[StoredShot] | None = None,
) -> Stamp:
    """Create or replace a tenant whose slots are scored as it says."""
    banks = None if slots is None else {own: StoredBank.of(bank) for own, bank in slots.items()}
    return await store.replace(
        tenant,
        made,
        fingerprint,
        expected=expected,
        exact=exact,
        labelling=made.labelling,
        origin={"encoder": fingerprint},
        slots=banks,
        shots=shots,
    )


async def create(
    store: MemoryStore, tenant: str = "zoo", *, slots: int = 2, names: Sequence[str] = ("cats", "dogs")
) -> Stamp:
    return await put(store, tenant, config(*names, slots=slots), FINGERPRINT, expected=None, slots={})


async def contents(store: MemoryStore, tenant: str = "zoo") -> Contents:
    """Return the slots by class and id; classes without slots may or may not be named by a store."""
    stored = await store.load(tenant)
    assert stored is not None
    return {own: {one.id: one for one in bank} for own, bank in stored.slots.items() if bank}


async def shots(store: MemoryStore, tenant: str = "zoo") -> set[StoredShot]:
    stored = await store.load(tenant, images=True)
    assert stored is not None
    for own, bank in stored.shots.items():
        assert all(one.class_id == own for one in bank)
    return {one for bank in stored.shots.values() for one in bank}


async def stamp_of(store: MemoryStore, tenant: str = "zoo") -> Stamp:
    record = await store.get(tenant)
    assert record is not None
    return record.stamp


async def push(store: MemoryStore, *candidates: PushCandidate, since: Stamp | None = None) -> Pushed:
    """Push as a worker would that is up to date."""
    return await store.push("zoo", await stamp_of(store) if since is None else since, candidates)


def outcomes(pushed: Pushed) -> list[str]:
    return [str(verdict.outcome) for verdict in pushed.verdicts]


# Tenants --------------------------------------------------------------------------------------------------------------


async def test_a_tenant_that_was_never_made_is_not_there(store: MemoryStore) -> None:
    assert await store.get("zoo") is None
    assert await store.load("zoo") is None
    assert await store.delete("zoo") is False
    assert await store.remove_shots("zoo", ["1"]) == 0
    assert await store.reset("zoo", dynamic=True, static=True, class_ids=None) is None
    assert await store.purge("zoo", CATS, "1") is False
    assert list(await store.names(after="", limit=10)) == []


@pytest.mark.parametrize("call", ["sync", "push", "add_shots"])
async def test_a_worker_of_a_tenant_that_is_not_there_is_told_to_load(store: MemoryStore, call: str) -> None:
    stamp = Stamp(epoch=1, version=0)
    with pytest.raises(ReloadNeeded):
        await _as_worker(store, call, stamp)
    assert await store.get("zoo") is None


async def _as_worker(store: MemoryStore, call: str, since: Stamp) -> Synced | Pushed | Stamp:
    if call == "sync":
        return await store.sync("zoo", since)
    if call == "push":
        return await store.push("zoo", since, [candidate("new", 0.1)])
    return await store.add_shots("zoo", since, [shot("new")])


async def test_a_tenant_is_read_back_as_it_was_made(store: MemoryStore) -> None:
    made = TenantConfig(
        classes=(ClassSpec(name="cats"), ClassSpec(name="Hunde öäü 犬", prompts=("a dog.", "ein {} Hund"))),
        templates=("a photo of a {}.", "{}"),
        slots=7,
        beta=3.25,
        weights=(1.0, 0.5, 0.0),
        learn=False,
        retention="images",
    )
    stamp = await put(store, "zoo", made, FINGERPRINT, expected=None, slots={CATS: [slot("1", 0.5)]})
    record, stored = await store.get("zoo"), await store.load("zoo")
    assert record is not None
    assert stored is not None
    assert (record.name, record.config, record.fingerprint, record.stamp) == ("zoo", made, FINGERPRINT, stamp)
    assert stored.record == record
    assert await contents(store) == {CATS: {"1": slot("1", 0.5)}}


async def test_a_tenant_is_made_once(store: MemoryStore) -> None:
    stamp = await create(store)
    with pytest.raises(Conflict):
        await put(store, "zoo", config("other"), "x", expected=None, slots={})
    record = await store.get("zoo")
    assert record is not None
    assert (record.config, record.stamp) == (config("cats", "dogs"), stamp)


async def test_a_tenant_that_is_not_there_cannot_be_replaced(store: MemoryStore) -> None:
    with pytest.raises(Conflict):
        await put(store, "zoo", config("cats"), FINGERPRINT, expected=Stamp(epoch=1, version=0), slots={})
    assert await store.get("zoo") is None


@pytest.mark.parametrize("between", ["push", "add_shots", "purge", "reset", "replace"])
async def test_replacing_fails_if_anything_changed_since_the_tenant_was_read(store: MemoryStore, between: str) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    seen = await stamp_of(store)
    changes: dict[str, Callable[[], Awaitable[object]]] = {
        "push": lambda: store.push("zoo", seen, [candidate("2", 0.5)]),
        "add_shots": lambda: store.add_shots("zoo", seen, [shot("s")]),
        "purge": lambda: store.purge("zoo", CATS, "1"),
        "reset": lambda: store.reset("zoo", dynamic=True, static=False, class_ids=None),
        "replace": lambda: put(store, "zoo", config("cats"), FINGERPRINT, expected=seen, slots={}),
    }
    await changes[between]()
    before = await store.load("zoo")
    with pytest.raises(Conflict):
        await put(store, "zoo", config("birds"), FINGERPRINT, expected=seen, exact=True, slots={})
    assert await store.load("zoo") == before


async def test_of_many_who_replace_at_once_one_wins(store: MemoryStore) -> None:
    seen = await create(store)
    calls = (put(store, "zoo", config(f"c{i}"), FINGERPRINT, expected=seen, slots={}) for i in range(8))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Conflict"] * 7 + ["Stamp"]
    winner = next(i for i, result in enumerate(results) if isinstance(result, Stamp))
    record = await store.get("zoo")
    assert record is not None
    assert (record.config, record.stamp) == (config(f"c{winner}"), results[winner])


async def test_replacing_puts_the_given_slots_in_place_of_the_old_in_a_new_epoch(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("old", 0.5), candidate("kept", 0.4, class_=DOGS))
    seen = await stamp_of(store)
    slots = {DOGS: [slot("kept", 0.3)], CATS: [slot("new", 0.2)]}
    stamp = await put(store, "zoo", config("dogs", "cats"), "other", expected=seen, slots=slots)
    assert await contents(store) == {DOGS: {"kept": slot("kept", 0.3)}, CATS: {"new": slot("new", 0.2)}}
    assert stamp.epoch != seen.epoch
    assert stamp > seen
    assert await stamp_of(store) == stamp


async def test_replacing_keeps_the_shots_of_classes_that_stay_and_no_others(store: MemoryStore) -> None:
    stamp = await create(store)
    stamp = await store.add_shots("zoo", stamp, [shot("c"), shot("d", DOGS)])
    stamp = await put(store, "zoo", config("birds", "dogs"), FINGERPRINT, expected=stamp, slots={})
    assert await shots(store) == {shot("d", DOGS)}
    await put(store, "zoo", config("cats", "dogs"), FINGERPRINT, expected=stamp, slots={})
    assert await shots(store) == {shot("d", DOGS)}


@given(
    names=st.sets(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True), max_size=12),
    limit=st.integers(1, 5),
)
@settings(max_examples=25)
async def test_pages_of_names_hold_every_name_once_in_order(row: Row, names: set[str], limit: int) -> None:
    async with row.open(60.0, 100) as opened:
        for name in names:
            await create(opened.store, name)
        found: list[str] = []
        while page := list(await opened.store.names(after=found[-1] if found else "", limit=limit)):
            assert len(page) <= limit
            found += page
        assert found == sorted(names)


async def test_names_go_on_after_a_name_that_is_gone(store: MemoryStore) -> None:
    for name in ("a", "b", "c"):
        await create(store, name)
    await store.delete("b")
    assert list(await store.names(after="b", limit=10)) == ["c"]


async def test_tenants_do_not_see_each_other(store: MemoryStore) -> None:
    for tenant in ("a", "b"):
        stamp = await create(store, tenant)
        await store.push(tenant, stamp, [candidate(tenant, 0.5)])
        await store.add_shots(tenant, await stamp_of(store, tenant), [shot(f"s{tenant}")])
    await store.reset("a", dynamic=True, static=True, class_ids=None)
    assert await contents(store, "a") == {}
    assert await contents(store, "b") == {CATS: {"b": slot("b", 0.5)}}
    assert await shots(store, "b") == {shot("sb")}


async def test_deleting_leaves_nothing(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    await store.add_shots("zoo", await stamp_of(store), [shot("s")])
    assert await store.delete("zoo") is True
    assert await store.load("zoo") is None
    assert await store.delete("zoo") is False
    await create(store)
    assert await contents(store) == {}
    assert await shots(store) == set()


async def test_a_tenant_that_is_deleted_and_made_again_never_returns_to_an_old_epoch(store: MemoryStore) -> None:
    stamps = []
    for _ in range(4):
        stamps.append(await create(store))
        await push(store, candidate("1", 0.5))
        await store.delete("zoo")
    assert len({stamp.epoch for stamp in stamps}) == 4
    await create(store)
    for old in stamps:
        with pytest.raises(ReloadNeeded):
            await store.push("zoo", old, [candidate("late", 0.1)])
    assert await contents(store) == {}


async def test_what_was_loaded_does_not_change_any_more(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    stored = await store.load("zoo")
    assert stored is not None
    banks, own = dict(stored.slots), dict(stored.shots)
    await push(store, candidate("2", 0.4), candidate("3", 0.3))
    await store.add_shots("zoo", await stamp_of(store), [shot("s")])
    assert (dict(stored.slots), dict(stored.shots)) == (banks, own)


# Pushing --------------------------------------------------------------------------------------------------------------


async def test_a_free_slot_is_filled(store: MemoryStore) -> None:
    await create(store)
    pushed = await push(store, candidate("1", 0.9), candidate("2", 0.1))
    assert outcomes(pushed) == ["filled", "filled"]
    assert await contents(store) == {CATS: {"1": slot("1", 0.9), "2": slot("2", 0.1)}}


async def test_a_full_class_gives_up_its_largest_for_a_smaller_one(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.9), candidate("2", 0.1))
    pushed = await push(store, candidate("3", 0.5))
    assert pushed.verdicts == (Verdict(outcome=Outcome.REPLACED, evicted="1"),)
    assert set((await contents(store))[CATS]) == {"2", "3"}


async def test_a_full_class_rejects_what_is_larger_than_its_largest(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.9), candidate("2", 0.1))
    before = await stamp_of(store)
    assert outcomes(await push(store, candidate("3", 0.91))) == ["rejected"]
    assert set((await contents(store))[CATS]) == {"1", "2"}
    assert await stamp_of(store) == before


@pytest.mark.parametrize(("id_", "outcome"), [("a", "replaced"), ("z", "rejected")])
async def test_of_equal_entropies_the_smaller_id_stays(store: MemoryStore, id_: str, outcome: str) -> None:
    await create(store, slots=1)
    await push(store, candidate("m", 0.5))
    assert outcomes(await push(store, candidate(id_, 0.5))) == [outcome]


@pytest.mark.parametrize(
    ("entropy", "feature", "kept"),
    [
        (0.4, FEATURES[0], True),
        (0.6, FEATURES[0], False),
        (0.5, FEATURES[0], False),
        (0.5, min(FEATURES), True),
        (0.5, max(FEATURES), False),
        (0.4, max(FEATURES), True),
        (0.6, min(FEATURES), False),
    ],
)
async def test_of_one_id_the_lower_entropy_and_then_feature_stays(
    store: MemoryStore, entropy: float, feature: bytes, *, kept: bool
) -> None:
    middle = sorted(FEATURES)[1] if feature != FEATURES[0] else FEATURES[0]
    await create(store)
    await push(store, candidate("1", 0.5, middle))
    before = await stamp_of(store)
    pushed = await push(store, candidate("1", entropy, feature))
    assert pushed.verdicts == (Verdict(outcome=Outcome.DUPLICATE),)
    assert await contents(store) == {CATS: {"1": slot("1", entropy, feature) if kept else slot("1", 0.5, middle)}}
    change = Change(class_id=CATS, slot=slot("1", entropy, feature))
    assert pushed.synced.changes == ((change,) if kept else ())
    assert (await stamp_of(store) == before) is not kept


@given(features=st.lists(st.binary(min_size=2, max_size=8), min_size=1, max_size=6), random=st.randoms())
@settings(max_examples=50)
async def test_features_of_one_id_and_entropy_are_compared_byte_by_byte(
    row: Row, features: list[bytes], random: Random
) -> None:
    """As numbers without a sign and not as letters of some language, so that all stores agree."""
    random.shuffle(features)
    async with row.open(60.0, 100) as opened:
        stamp = await create(opened.store)
        await opened.store.push("zoo", stamp, [candidate("1", 0.5, feature) for feature in features])
        assert await contents(opened.store) == {CATS: {"1": slot("1", 0.5, min(features))}}


@given(ids=st.sets(st.text("0123456789abcdefABCXYZ_-", min_size=1, max_size=6), min_size=1, max_size=8))
@settings(max_examples=50)
async def test_ids_of_one_entropy_are_compared_letter_by_letter(row: Row, ids: set[str]) -> None:
    async with row.open(60.0, 100) as opened:
        stamp = await create(opened.store, slots=1)
        await opened.store.push("zoo", stamp, [candidate(id_, 0.5) for id_ in ids])
        assert await contents(opened.store) == {CATS: {min(ids): slot(min(ids), 0.5)}}


async def test_a_repeated_image_cannot_fill_a_bank(store: MemoryStore) -> None:
    await create(store, slots=5)
    assert outcomes(await push(store, *[candidate("1", 0.5)] * 4)) == ["filled", *["duplicate"] * 3]
    assert await contents(store) == {CATS: {"1": slot("1", 0.5)}}


async def test_without_slots_nothing_enters(store: MemoryStore) -> None:
    await create(store, slots=0)
    before = await stamp_of(store)
    assert outcomes(await push(store, candidate("1", 0.0))) == ["rejected"]
    assert await contents(store) == {}
    assert await stamp_of(store) == before


async def test_classes_have_room_of_their_own(store: MemoryStore) -> None:
    await create(store, slots=1)
    pushed = await push(store, candidate("1", 0.5), candidate("1", 0.7, class_=DOGS), candidate("2", 0.6))
    assert outcomes(pushed) == ["filled", "filled", "rejected"]
    assert await contents(store) == {CATS: {"1": slot("1", 0.5)}, DOGS: {"1": slot("1", 0.7)}}


async def test_verdicts_and_changes_come_in_the_order_of_the_candidates(store: MemoryStore) -> None:
    stamp = await create(store, slots=1)
    given_ = [candidate("1", 0.9), candidate("2", 0.5), candidate("2", 0.5), candidate("3", 0.6), candidate("4", 0.1)]
    pushed = await push(store, *given_)
    assert outcomes(pushed) == ["filled", "replaced", "duplicate", "rejected", "replaced"]
    assert [verdict.evicted for verdict in pushed.verdicts] == [None, "1", None, None, "2"]
    assert pushed.synced.changes == (
        Change(class_id=CATS, slot=slot("1", 0.9)),
        Change(class_id=CATS, slot=slot("2", 0.5), evicted="1"),
        Change(class_id=CATS, slot=slot("4", 0.1), evicted="2"),
    )
    now = pushed.synced.stamp
    assert (now.epoch, now.version) == (stamp.epoch, stamp.version + 3)
    assert await stamp_of(store) == now


@given(
    id_=st.from_regex(r"[0-9a-f]{1,20}", fullmatch=True),
    entropy=st.floats(0, 1e3),
    feature=st.binary(min_size=1, max_size=40),
)
@settings(max_examples=25)
async def test_slots_and_shots_come_back_bit_for_bit(row: Row, id_: str, entropy: float, feature: bytes) -> None:
    async with row.open(60.0, 100) as opened:
        store, own = opened.store, StoredShot(id=id_, class_id=DOGS, feature=feature, image=feature[::-1])
        stamp = await create(store)
        pushed = await store.push("zoo", stamp, [candidate(id_, entropy, feature)])
        await store.add_shots("zoo", pushed.synced.stamp, [own])
        assert pushed.synced.changes == (Change(class_id=CATS, slot=slot(id_, entropy, feature)),)
        assert await contents(store) == {CATS: {id_: slot(id_, entropy, feature)}}
        assert await shots(store) == {own}


# Any number of workers, in any order ----------------------------------------------------------------------------------


@dataclass
class Mirror:
    """A worker: its copy of the dynamic memory, kept up by changes alone, with the stamp that it has seen."""

    store: MemoryStore
    stamp: Stamp
    banks: dict[str, dict[str, StoredSlot]] = field(default_factory=dict)

    async def push(self, candidates: Sequence[PushCandidate]) -> tuple[Verdict, ...]:
        pushed = await self.store.push("zoo", self.stamp, candidates)
        self._take(pushed.synced)
        return pushed.verdicts

    async def sync(self) -> None:
        self._take(await self.store.sync("zoo", self.stamp))

    def _take(self, synced: Synced) -> None:
        for change in synced.changes:
            bank = self.banks.setdefault(change.class_id, {})
            if change.evicted is not None:
                del bank[change.evicted]
            bank[change.slot.id] = change.slot
        self.stamp = synced.stamp


CLASSES = (CATS, DOGS)

CANDIDATES = st.lists(
    st.builds(
        candidate,
        id_=st.sampled_from("abcdefgh"),
        entropy=st.sampled_from((0.0, 0.25, 0.5, 0.75)) | st.floats(0, 2),
        feature=st.sampled_from(FEATURES),
        class_=st.sampled_from(CLASSES),
    ),
    max_size=40,
)

LAWS = settings(max_examples=60)


def by_core(memory: DynamicMemory, one: PushCandidate) -> tuple[DynamicMemory, Verdict]:
    """Return what core's rule does with a candidate."""
    sample = Candidate(
        label=CLASSES.index(one.class_id),
        key=decode_features(one.slot.feature, 2)[0],
        entropy=one.slot.entropy,
        id=one.slot.id,
    )
    write = propose(memory, sample)
    evicted = None if write.evicted is None else str(write.evicted)
    return apply(memory, write), Verdict(outcome=write.outcome, evicted=evicted)


def held_by_core(memory: DynamicMemory) -> Contents:
    banks = {
        own: {
            str(id_): slot(str(id_), entropy, encode_feature(key))
            for id_, entropy, key in zip(bank.ids, bank.entropies, bank.keys, strict=True)
        }
        for own, bank in zip(CLASSES, memory.classes, strict=True)
    }
    return {own: bank for own, bank in banks.items() if bank}


@given(candidates=CANDIDATES, slots=st.integers(0, 4))
@LAWS
async def test_a_store_decides_as_core_does(row: Row, candidates: list[PushCandidate], slots: int) -> None:
    async with row.open(60.0, 100) as opened:
        stamp = await create(opened.store, slots=slots)
        memory, expected = DynamicMemory.empty(2, 2, slots, dtype=torch.float16), []
        for one in candidates:
            memory, verdict = by_core(memory, one)
            expected.append(verdict)
        pushed = await opened.store.push("zoo", stamp, candidates)
        assert list(pushed.verdicts) == expected
        assert await contents(opened.store) == held_by_core(memory)


@given(
    candidates=CANDIDATES,
    slots=st.integers(0, 4),
    random=st.randoms(),
    workers=st.integers(1, 4),
    choosy=st.booleans(),
)
@LAWS
async def test_workers_converge_on_what_core_makes_of_the_whole_stream_in_any_order(
    row: Row, candidates: list[PushCandidate], slots: int, random: Random, workers: int, *, choosy: bool
) -> None:
    """`choosy` workers push only what their own, perhaps stale, copy would take."""
    memory = DynamicMemory.empty(2, 2, slots, dtype=torch.float16)
    for one in candidates:
        memory, _ = by_core(memory, one)
    shuffled = list(candidates)
    random.shuffle(shuffled)
    async with row.open(60.0, 100) as opened:
        stamp = await create(opened.store, slots=slots)
        mirrors = [Mirror(store=opened.store, stamp=stamp) for _ in range(workers)]
        while shuffled:
            size = random.randint(1, 5)
            part, shuffled = shuffled[:size], shuffled[size:]
            mirror = random.choice(mirrors)
            await mirror.push([one for one in part if not choosy or _would_take(mirror, one, slots)])
        for mirror in mirrors:
            await mirror.sync()
        held = await contents(opened.store)
        assert held == held_by_core(memory)
        for mirror in mirrors:
            assert {own: bank for own, bank in mirror.banks.items() if bank} == held
            assert mirror.stamp == await stamp_of(opened.store)


def _would_take(mirror: Mirror, one: PushCandidate, slots: int) -> bool:
    bank = mirror.banks.get(one.class_id, {})
    if one.slot.id in bank:
        known = bank[one.slot.id]
        return (one.slot.entropy, one.slot.feature) < (known.entropy, known.feature)
    largest = max(((known.entropy, known.id) for known in bank.values()), default=(0.0, ""))
    return len(bank) < slots or (slots > 0 and (one.slot.entropy, one.slot.id) < largest)


async def test_workers_that_push_at_the_same_time_converge(store: MemoryStore) -> None:
    stamp = await create(store, slots=3)
    mirrors = [Mirror(store=store, stamp=stamp) for _ in range(6)]
    await asyncio.gather(
        *(m.push([candidate(f"{i}{j}", (7 * i + j) / 50) for j in range(5)]) for i, m in enumerate(mirrors))
    )
    await asyncio.gather(*(mirror.sync() for mirror in mirrors))
    held = await contents(store)
    assert set(held[CATS]) == {"00", "01", "02"}
    assert all(mirror.banks == held for mirror in mirrors)


async def test_a_push_may_be_repeated(store: MemoryStore) -> None:
    stamp = await create(store, slots=2)
    candidates = [candidate("1", 0.9), candidate("2", 0.5), candidate("3", 0.4)]
    first = await push(store, *candidates, since=stamp)
    held = await contents(store)
    again = await push(store, *candidates, since=stamp)
    assert outcomes(again) == ["rejected", "duplicate", "duplicate"]
    assert await contents(store) == held
    assert again.synced == first.synced


# Following ------------------------------------------------------------------------------------------------------------


async def test_slots_that_are_written_meanwhile_do_not_keep_a_tenant_from_being_configured(store: MemoryStore) -> None:
    seen = await create(store)
    await push(store, candidate("1", 0.5))
    stamp = await put(store, "zoo", config("cats", "birds"), FINGERPRINT, expected=seen)
    assert set((await contents(store))[CATS]) == {"1"}
    assert stamp == await stamp_of(store)


async def test_who_is_up_to_date_hears_of_no_change(store: MemoryStore) -> None:
    stamp = await create(store)
    assert await store.sync("zoo", stamp) == Synced(stamp=stamp)
    assert await store.push("zoo", stamp, []) == Pushed(verdicts=(), synced=Synced(stamp=stamp))


async def test_changes_are_told_in_order_from_the_stamp_on(store: MemoryStore) -> None:
    start = await create(store, slots=1)
    after_one = (await push(store, candidate("1", 0.9))).synced.stamp
    last = (await push(store, candidate("2", 0.5), candidate("3", 0.1))).synced.stamp
    told = (await store.sync("zoo", start)).changes
    assert [(change.slot.id, change.evicted) for change in told] == [("1", None), ("2", "1"), ("3", "2")]
    assert await store.sync("zoo", after_one) == Synced(stamp=last, changes=told[1:])
    assert await store.sync("zoo", last) == Synced(stamp=last)


async def test_a_push_tells_what_others_changed_before_its_own(store: MemoryStore) -> None:
    start = await create(store)
    await push(store, candidate("theirs", 0.5), since=start)
    pushed = await push(store, candidate("mine", 0.4), since=start)
    assert [change.slot.id for change in pushed.synced.changes] == ["theirs", "mine"]


async def _reset(store: MemoryStore) -> None:
    await store.reset("zoo", dynamic=False, static=True, class_ids=[DOGS])


async def _replace(store: MemoryStore) -> None:
    await put(store, "zoo", config("cats", "dogs"), FINGERPRINT, expected=await stamp_of(store), slots={})


async def _remove_shots(store: MemoryStore) -> None:
    await store.add_shots("zoo", await stamp_of(store), [shot("for removal")])
    await store.remove_shots("zoo", ["for removal"])


async def _recreate(store: MemoryStore) -> None:
    await store.delete("zoo")
    await create(store)


async def _add_shots(store: MemoryStore) -> None:
    await store.add_shots("zoo", await stamp_of(store), [shot("added")])


async def _purge(store: MemoryStore) -> None:
    await push(store, candidate("purged", 0.0))
    await store.purge("zoo", CATS, "purged")


NEW_EPOCH = (_reset, _replace, _remove_shots, _recreate)
SETTLING = (*NEW_EPOCH, _add_shots, _purge)
"""Changes that are no slot writes: who is behind them has to load."""

Step = Callable[[MemoryStore], Awaitable[None]]


@pytest.mark.parametrize("step", NEW_EPOCH)
async def test_removing_or_rescoring_starts_a_new_epoch(store: MemoryStore, step: Step) -> None:
    old = await create(store)
    await step(store)
    assert (await stamp_of(store)).epoch != old.epoch


@pytest.mark.parametrize("step", [_add_shots, _purge])
async def test_what_only_adds_or_purges_stays_in_its_epoch_and_counts_a_version(store: MemoryStore, step: Step) -> None:
    old = await create(store)
    await step(store)
    new = await stamp_of(store)
    assert new.epoch == old.epoch
    assert new.version > old.version


@pytest.mark.parametrize("step", SETTLING)
async def test_who_is_behind_more_than_slots_has_to_load_and_writes_nothing(store: MemoryStore, step: Step) -> None:
    old = await create(store)
    await step(store)
    before = await store.load("zoo")
    with pytest.raises(ReloadNeeded):
        await store.sync("zoo", old)
    with pytest.raises(ReloadNeeded):
        await store.push("zoo", old, [candidate("late", 0.0)])
    assert await store.load("zoo") == before


@pytest.mark.parametrize("step", SETTLING)
async def test_who_loads_anew_goes_on_as_usual(store: MemoryStore, step: Step) -> None:
    await create(store)
    await step(store)
    fresh = await stamp_of(store)
    pushed = await store.push("zoo", fresh, [candidate("new", 0.1)])
    assert outcomes(pushed) == ["filled"]
    assert [change.slot.id for change in (await store.sync("zoo", fresh)).changes] == ["new"]


async def _fall_behind(store: MemoryStore, changes: int) -> Stamp:
    """Return a stamp with that many slot changes since."""
    stamp = await create(store, slots=1)
    for start in range(0, changes, 32):
        numbers = range(start, min(start + 32, changes))
        await push(store, *(candidate(f"{n:06}", 1.0 / (1 + n)) for n in numbers))
    return stamp


async def test_the_log_reaches_back_as_far_as_it_says(row: Row, store: MemoryStore) -> None:
    stamp = await _fall_behind(store, row.log_length)
    assert len((await store.sync("zoo", stamp)).changes) == row.log_length


async def test_a_gap_in_the_log_means_a_load(row: Row, store: MemoryStore) -> None:
    stamp = await _fall_behind(store, row.log_length + 1)
    with pytest.raises(ReloadNeeded):
        await store.sync("zoo", stamp)


async def test_a_push_over_a_gap_in_the_log_writes_nothing(row: Row, store: MemoryStore) -> None:
    stamp = await _fall_behind(store, row.log_length + 1)
    before = await store.load("zoo")
    with pytest.raises(ReloadNeeded):
        await store.push("zoo", stamp, [candidate("late", 0.0)])
    assert await store.load("zoo") == before


async def test_a_push_whose_own_writes_cut_the_log_writes_nothing(row: Row, store: MemoryStore) -> None:
    """The log just reaches back to the worker, and would not any more after the push."""
    stamp = await _fall_behind(store, row.log_length)
    before = await store.load("zoo")
    try:
        pushed = await store.push("zoo", stamp, [candidate("late", 0.0)])
    except ReloadNeeded:
        assert await store.load("zoo") == before
    else:
        assert [change.slot.id for change in pushed.synced.changes][-1:] == ["late"]
        assert len(pushed.synced.changes) == row.log_length + 1


# Shots ----------------------------------------------------------------------------------------------------------------


async def test_shots_are_kept_with_their_images(store: MemoryStore) -> None:
    stamp = await create(store)
    given_ = [shot("1"), shot("2", DOGS, image=b"\xff\xd8\0jpeg\n")]
    await store.add_shots("zoo", stamp, given_)
    assert await shots(store) == set(given_)


async def test_adding_a_shot_again_changes_nothing(store: MemoryStore) -> None:
    stamp = await create(store)
    first = await store.add_shots("zoo", stamp, [shot("1")])
    assert await store.add_shots("zoo", stamp, [shot("1")]) == first
    assert await store.add_shots("zoo", first, [shot("1", image=b"other")]) == first
    assert await shots(store) == {shot("1")}


async def test_shots_that_are_new_are_added_beside_known_ones(store: MemoryStore) -> None:
    stamp = await create(store)
    stamp = await store.add_shots("zoo", stamp, [shot("1")])
    later = await store.add_shots("zoo", stamp, [shot("1"), shot("2"), shot("2")])
    assert later > stamp
    assert await shots(store) == {shot("1"), shot("2")}


async def test_slot_writes_of_others_do_not_keep_shots_out(store: MemoryStore) -> None:
    stamp = await create(store)
    await push(store, candidate("1", 0.5))
    await store.add_shots("zoo", stamp, [shot("s")])
    assert await shots(store) == {shot("s")}


async def test_shots_are_added_beside_those_that_were_counted_and_no_others(store: MemoryStore) -> None:
    await create(store)
    before = await store.get("zoo")
    assert before is not None
    await store.add_shots("zoo", before.stamp, [shot("a")], beside=before.shown)
    with pytest.raises(ReloadNeeded):
        await store.add_shots("zoo", before.stamp, [shot("b")], beside=before.shown)
    after = await store.get("zoo")
    assert after is not None
    assert after.shown != before.shown
    await push(store, candidate("slot", 0.1))
    await store.add_shots("zoo", after.stamp, [shot("b")], beside=after.shown)
    stored = await store.load("zoo")
    assert stored is not None
    assert {one.id for own in stored.shots.values() for one in own} == {"a", "b"}


@pytest.mark.parametrize("step", NEW_EPOCH)
async def test_shots_for_another_epoch_are_refused_whole(store: MemoryStore, step: Step) -> None:
    old = await create(store)
    await step(store)
    before = await store.load("zoo")
    with pytest.raises(ReloadNeeded):
        await store.add_shots("zoo", old, [shot("late")])
    assert await store.load("zoo") == before


async def test_removing_shots_says_how_many_there_were(store: MemoryStore) -> None:
    stamp = await create(store)
    await store.add_shots("zoo", stamp, [shot("1"), shot("2"), shot("3", DOGS)])
    assert await store.remove_shots("zoo", ["1", "3", "unknown"]) == 2
    assert await shots(store) == {shot("2")}


async def test_removing_no_shot_starts_no_epoch(store: MemoryStore) -> None:
    stamp = await create(store)
    assert await store.remove_shots("zoo", ["unknown"]) == 0
    assert await store.remove_shots("zoo", []) == 0
    assert await stamp_of(store) == stamp


async def test_removing_shots_leaves_the_slots(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    await _remove_shots(store)
    assert await contents(store) == {CATS: {"1": slot("1", 0.5)}}


# Emptying -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ("cats",), ("cats", "dogs"), ()])
@pytest.mark.parametrize(("dynamic", "static"), [(True, False), (False, True), (True, True)])
async def test_a_reset_empties_what_it_names_and_nothing_else(
    store: MemoryStore, names: tuple[str, ...] | None, *, dynamic: bool, static: bool
) -> None:
    await create(store)
    await push(store, candidate("1", 0.5), candidate("2", 0.5, class_=DOGS))
    await store.add_shots("zoo", await stamp_of(store), [shot("c"), shot("d", DOGS)])
    seen = await stamp_of(store)
    ids = None if names is None else [class_id(name) for name in names]
    stamp = await store.reset("zoo", dynamic=dynamic, static=static, class_ids=ids)
    gone = set(CLASSES) if ids is None else set(ids)
    slots = {CATS: {"1": slot("1", 0.5)}, DOGS: {"2": slot("2", 0.5)}}
    assert await contents(store) == {own: bank for own, bank in slots.items() if not (dynamic and own in gone)}
    assert {one.id for one in await shots(store)} == {
        one.id for one in (shot("c"), shot("d", DOGS)) if not (static and one.class_id in gone)
    }
    assert stamp == await stamp_of(store)
    if gone:
        assert stamp is not None
        assert stamp.epoch != seen.epoch


async def test_a_reset_leaves_the_configuration(store: MemoryStore) -> None:
    await create(store)
    await store.reset("zoo", dynamic=True, static=True, class_ids=None)
    record = await store.get("zoo")
    assert record is not None
    assert (record.config, record.fingerprint) == (config("cats", "dogs"), FINGERPRINT)


async def test_a_purged_slot_is_gone_and_leaves_room(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5), candidate("2", 0.6))
    assert await store.purge("zoo", CATS, "1") is True
    assert outcomes(await push(store, candidate("3", 0.9))) == ["filled"]
    assert set((await contents(store))[CATS]) == {"2", "3"}


async def test_purging_what_is_not_there_changes_nothing(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    before = await store.load("zoo")
    assert await store.purge("zoo", CATS, "2") is False
    assert await store.purge("zoo", DOGS, "1") is False
    assert await store.load("zoo") == before
    assert await store.purge("zoo", CATS, "1") is True
    assert await store.purge("zoo", CATS, "1") is False


async def test_a_purged_slot_cannot_come_back_while_its_bank_lasts(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    await store.purge("zoo", CATS, "1")
    for _ in range(2):
        assert outcomes(await push(store, candidate("1", 0.0))) == ["rejected"]
    for step in (_add_shots, _remove_shots, _reset):
        await step(store)
        assert outcomes(await push(store, candidate("1", 0.0))) == ["rejected"]
    await put(store, "zoo", config("cats", "birds"), FINGERPRINT, expected=await stamp_of(store))
    assert outcomes(await push(store, candidate("1", 0.0))) == ["rejected"]
    assert await contents(store) == {}


async def test_a_purged_slot_bars_its_own_class_alone(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    await store.purge("zoo", CATS, "1")
    assert outcomes(await push(store, candidate("1", 0.5, class_=DOGS), candidate("2", 0.5))) == ["filled", "filled"]


async def test_a_load_tells_what_is_barred(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5), candidate("2", 0.5, class_=DOGS))
    await store.purge("zoo", CATS, "1")
    await store.purge("zoo", DOGS, "2")
    assert await barred(store) == {(CATS, "1"), (DOGS, "2")}
    await store.reset("zoo", dynamic=True, static=False, class_ids=[CATS])
    assert await barred(store) == {(DOGS, "2")}


async def barred(store: MemoryStore) -> frozenset[tuple[str, str]]:
    stored = await store.load("zoo")
    assert stored is not None
    return stored.barred


async def test_a_bank_that_is_written_anew_bars_what_it_is_told_to(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    await store.purge("zoo", CATS, "1")
    stamp = await store.replace(
        "zoo",
        config("cats", "dogs"),
        FINGERPRINT,
        expected=await stamp_of(store),
        labelling="",
        origin={},
        slots={DOGS: StoredBank.of([slot("4", 0.5)])},
        barred=[(CATS, "2"), (DOGS, "4"), (class_id("gone"), "3")],
    )
    assert await barred(store) == {(CATS, "2")}
    assert (await contents(store))[DOGS] == {"4": slot("4", 0.5)}
    pushed = await push(store, candidate("1", 0.5), candidate("2", 0.5), since=stamp)
    assert outcomes(pushed) == ["filled", "rejected"]


@pytest.mark.parametrize("emptying", ["reset", "replace", "recreate"])
async def test_a_purged_slot_may_come_back_once_its_class_was_emptied(store: MemoryStore, emptying: str) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    await store.purge("zoo", CATS, "1")
    if emptying == "reset":
        await store.reset("zoo", dynamic=True, static=False, class_ids=[CATS])
    else:
        await (_replace if emptying == "replace" else _recreate)(store)
    assert outcomes(await push(store, candidate("1", 0.5))) == ["filled"]


# What a replacement keeps ---------------------------------------------------------------------------------------------


async def test_a_new_configuration_keeps_slots_and_shots_that_it_is_not_given(store: MemoryStore) -> None:
    await create(store, slots=3)
    await push(store, candidate("1", 0.5), candidate("2", 0.4, class_=DOGS))
    await store.add_shots("zoo", await stamp_of(store), [shot("a"), shot("b", DOGS, b"picture")])
    before, had = await contents(store), await shots(store)
    stamp = await put(
        store, "zoo", config("dogs", "birds", "cats", slots=1), FINGERPRINT, expected=await stamp_of(store)
    )
    assert (await contents(store), await shots(store)) == (before, had)
    assert outcomes(await push(store, candidate("3", 0.1, class_=class_id("birds")), since=stamp)) == ["filled"]
    assert outcomes(await push(store, candidate("4", 0.1), since=stamp)) == ["replaced"]


async def test_a_class_that_leaves_takes_its_slots_and_shots_along_and_no_others(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5), candidate("2", 0.4, class_=DOGS))
    await store.add_shots("zoo", await stamp_of(store), [shot("a"), shot("b", DOGS)])
    stamp = await put(store, "zoo", config("dogs"), FINGERPRINT, expected=await stamp_of(store))
    assert set(await contents(store)) == {DOGS}
    assert {one.id for one in await shots(store)} == {"b"}
    await put(store, "zoo", config("dogs", "cats"), FINGERPRINT, expected=stamp)
    assert set(await contents(store)) == {DOGS}
    assert {one.id for one in await shots(store)} == {"b"}


async def test_shots_that_are_given_take_the_place_of_all(store: MemoryStore) -> None:
    await create(store)
    await store.add_shots("zoo", await stamp_of(store), [shot("old"), shot("kept", DOGS)])
    given_ = [shot("new", DOGS, b"picture"), shot("kept", DOGS), shot("stray", class_id("nobody"))]
    await put(store, "zoo", config("cats", "dogs"), FINGERPRINT, expected=await stamp_of(store), shots=given_)
    assert await shots(store) == set(given_[:2])


async def test_another_fingerprint_keeps_of_a_memory_the_images_alone(store: MemoryStore) -> None:
    await create(store)
    await push(store, candidate("1", 0.5))
    await store.add_shots("zoo", await stamp_of(store), [shot("bare"), shot("kept", CATS, b"picture")])
    stamp = await put(store, "zoo", config("cats", "dogs"), "another", expected=await stamp_of(store))
    assert await contents(store) == {}
    blank = StoredShot(id="kept", class_id=CATS, feature=b"", image=b"picture")
    assert await shots(store) == {blank}
    read = replace(blank, feature=FEATURES[2])
    assert (await store.add_shots("zoo", stamp, [read])).version == stamp.version + 1
    assert await shots(store) == {read}
    assert await store.add_shots("zoo", stamp, [replace(read, feature=FEATURES[0])]) == await stamp_of(store)
    assert await shots(store) == {read}


async def test_images_are_read_only_when_asked_for_and_count_all_the_same(store: MemoryStore) -> None:
    stamp = await create(store)
    await store.add_shots("zoo", stamp, [shot("a", CATS, b"picture"), shot("b", CATS)])
    for images in (False, True):
        stored = await store.load("zoo", images=images)
        assert stored is not None
        assert [one.nbytes for one in stored.shots[CATS]] == [len(FEATURES[1]) + 7, len(FEATURES[1])]
        assert [one.image for one in stored.shots[CATS]] == [b"picture" if images else None, None]


async def test_banks_are_read_in_the_order_of_entropy_and_id_and_shots_in_that_of_ids(store: MemoryStore) -> None:
    stamp = await create(store, slots=5)
    await push(store, candidate("b", 0.5), candidate("a", 0.5), candidate("c", 0.1), since=stamp)
    await store.add_shots("zoo", stamp, [shot("2"), shot("10"), shot("1")])
    stored = await store.load("zoo")
    assert stored is not None
    assert stored.slots[CATS].ids == ("c", "a", "b")
    assert [one.id for one in stored.shots[CATS]] == ["1", "10", "2"]


async def test_a_record_says_where_its_features_come_from_and_what_labelled_its_slots(store: MemoryStore) -> None:
    await store.replace("zoo", config("cats"), "f", expected=None, labelling="v1", origin={"encoder": "one"})
    record = await store.get("zoo")
    assert record is not None
    assert (record.fingerprint, record.labelling, dict(record.origin)) == ("f", "v1", {"encoder": "one"})


# Versions and digests -------------------------------------------------------------------------------------------------


async def test_stamps_of_many_tenants_come_together(store: MemoryStore) -> None:
    await create(store)
    await create(store, "farm")
    await push(store, candidate("1", 0.5))
    assert list(await store.stamps(["farm", "nobody", "zoo"])) == [
        await stamp_of(store, "farm"),
        None,
        await stamp_of(store),
    ]


async def test_digests_tell_whether_two_copies_agree(store: MemoryStore) -> None:
    await create(store, slots=9)
    await push(store, candidate("b", 0.1 + 0.2), candidate("a", 0.3), candidate("c", -1e-8), candidate("d", 2.0))
    stored = await store.load("zoo")
    assert stored is not None
    bank = stored.slots[CATS]
    told = await store.digests("zoo", stored.record.stamp, [CATS, DOGS])
    assert told == {CATS: digest_of(bank.ids, bank.entropies), DOGS: digest_of((), ())}
    await push(store, candidate("e", 0.0))
    with pytest.raises(ReloadNeeded):
        await store.digests("zoo", stored.record.stamp, [CATS])
    assert (await store.digests("zoo", await stamp_of(store), [CATS]))[CATS] != told[CATS]


# Snapshots ------------------------------------------------------------------------------------------------------------


def info(id_: str, created: float = 1.0, reason: str = "manual") -> SnapshotInfo:
    return SnapshotInfo(
        id=id_,
        created=created,
        reason=reason,
        fingerprint=FINGERPRINT,
        stamp=Stamp(epoch=1, version=2),
        classes=2,
        slots=3,
        shots=4,
        bytes=5,
    )


async def parts_of(store: MemoryStore, id_: str) -> list[bytes]:
    parts: list[bytes] = []
    while (part := await store.read_snapshot("zoo", id_, len(parts))) is not None:
        parts.append(part)
    return parts


async def test_a_snapshot_is_read_back_part_by_part_and_listed_by_age(store: MemoryStore) -> None:
    await create(store)
    assert await store.keep_snapshot("zoo", info("late", 2.0, "reset"), iter((b"one", b"\0two")))
    assert await store.keep_snapshot("zoo", info("early", 1.0), (b"",))
    assert list(await store.snapshots("zoo")) == [info("early", 1.0), info("late", 2.0, "reset")]
    assert await parts_of(store, "late") == [b"one", b"\0two"]
    assert await parts_of(store, "nothing") == []


async def test_a_snapshot_outlives_whatever_happens_to_the_memory(store: MemoryStore) -> None:
    await create(store)
    await store.keep_snapshot("zoo", info("s"), (b"one",))
    for step in NEW_EPOCH:
        if step is not _recreate:
            await step(store)
    assert await parts_of(store, "s") == [b"one"]
    assert list(await store.snapshots("zoo")) == [info("s")]


async def test_a_snapshot_that_is_dropped_is_gone(store: MemoryStore) -> None:
    await create(store)
    await store.keep_snapshot("zoo", info("s"), (b"one",))
    assert await store.drop_snapshot("zoo", "s") is True
    assert await store.drop_snapshot("zoo", "s") is False
    assert (list(await store.snapshots("zoo")), await parts_of(store, "s")) == ([], [])


async def test_snapshots_and_jobs_go_with_their_tenant(store: MemoryStore) -> None:
    assert await store.keep_snapshot("zoo", info("s"), (b"one",)) is False
    assert await store.note_job("zoo", job("j")) is False
    await create(store)
    await store.keep_snapshot("zoo", info("s"), (b"one",))
    await store.note_job("zoo", job("j"))
    await store.delete("zoo")
    await create(store)
    assert (list(await store.snapshots("zoo")), await parts_of(store, "s")) == ([], [])
    assert list(await store.jobs("zoo")) == []


# Jobs and claims ------------------------------------------------------------------------------------------------------


def job(id_: str, created: float = 1.0, state: JobState = JobState.RUNNING, **values: Any) -> Job:
    return Job(id=id_, kind="rescore", state=state, created=created, updated=created, **values)


async def test_a_job_stands_as_it_was_last_written_down(store: MemoryStore) -> None:
    await create(store)
    done = job("b", 2.0, JobState.DONE, progress=1.0, result={"slots": 3})
    for known in (job("b", 2.0, JobState.QUEUED), job("a", 1.0, progress=0.25, eta_s=3.5), done):
        assert await store.note_job("zoo", known) is True
    assert list(await store.jobs("zoo")) == [job("a", 1.0, progress=0.25, eta_s=3.5), done]


@pytest.mark.parametrize("state", [JobState.DONE, JobState.FAILED, JobState.CANCELLED])
async def test_a_job_that_is_over_stays_as_it_is(store: MemoryStore, state: JobState) -> None:
    await create(store)
    await store.note_job("zoo", job("a", state=state))
    assert await store.note_job("zoo", job("a")) is False
    assert list(await store.jobs("zoo")) == [job("a", state=state)]


async def test_of_many_jobs_the_oldest_that_are_over_are_forgotten(store: MemoryStore) -> None:
    await create(store)
    await store.note_job("zoo", job("first", 0.0))
    for number in range(1, JOBS + 3):
        await store.note_job("zoo", job(f"{number:03}", float(number), JobState.DONE))
    known = [one.id for one in await store.jobs("zoo")]
    assert known == ["first", *(f"{number:03}" for number in range(4, JOBS + 3))]


async def test_one_of_many_gets_a_claim_until_it_ends(store: MemoryStore) -> None:
    assert sorted([await store.claim("zoo", "rescore", 60.0) for _ in range(3)]) == [False, False, True]
    assert await store.claim("farm", "rescore", 60.0) is True
    assert await store.claim("zoo", "snapshot", 60.0) is True


# Answers --------------------------------------------------------------------------------------------------------------


def answer(body: bytes = b"{}", digest: str = "d") -> Remembered:
    return Remembered(digest=digest, status=201, media_type="application/json", body=body)


async def test_an_answer_is_recalled_as_it_was_for_its_tenant_and_key_alone(store: MemoryStore) -> None:
    kept = answer(b"\0\xff{}\n", "digest")
    await store.remember("a", "key", kept)
    assert await store.recall("a", "key") == kept
    assert await store.recall("b", "key") is None
    assert await store.recall("a", "other") is None
    assert await store.recall("a:key", "") is None


async def test_a_later_answer_stands_for_its_key(store: MemoryStore) -> None:
    await store.remember("a", "key", answer(b"1"))
    await store.remember("a", "key", answer(b"2"))
    assert await store.recall("a", "key") == answer(b"2")


async def test_an_answer_is_forgotten_when_its_time_is_over(opened: Opened) -> None:
    await opened.store.remember("a", "old", answer())
    opened.later(59.0)
    await opened.store.remember("a", "new", answer())
    assert await opened.store.recall("a", "old") == answer()
    opened.later(1.5)
    assert await opened.store.recall("a", "old") is None
    assert await opened.store.recall("a", "new") == answer()


async def test_remembering_again_gives_an_answer_its_whole_time(opened: Opened) -> None:
    await opened.store.remember("a", "key", answer())
    opened.later(40.0)
    await opened.store.remember("a", "key", answer())
    opened.later(40.0)
    assert await opened.store.recall("a", "key") == answer()


async def test_the_oldest_answers_make_room_for_new_ones(store: MemoryStore) -> None:
    for key in ("1", "2", "3"):
        await store.remember("a", key, answer(bytes(40)))
    assert await store.recall("a", "1") is None
    assert await store.recall("a", "2") == answer(bytes(40))
    assert await store.recall("a", "3") == answer(bytes(40))


async def test_an_answer_that_has_no_room_is_not_kept_and_harms_nothing(store: MemoryStore) -> None:
    await store.remember("a", "huge", answer(bytes(1000)))
    assert await store.recall("a", "huge") is None
    await store.remember("a", "small", answer())
    assert await store.recall("a", "small") == answer()


async def test_answers_of_one_tenant_make_no_room_at_the_cost_of_anothers(store: MemoryStore) -> None:
    await store.remember("a", "key", answer(bytes(60)))
    for key in range(5):
        await store.remember("b", str(key), answer(bytes(60)))
    assert await store.recall("a", "key") == answer(bytes(60))


async def test_an_answer_that_is_replaced_gives_its_room_back(store: MemoryStore) -> None:
    for _ in range(5):
        await store.remember("a", "key", answer(bytes(60)))
    await store.remember("a", "other", answer(bytes(40)))
    assert await store.recall("a", "key") == answer(bytes(60))


async def test_forgotten_answers_give_their_room_back(opened: Opened) -> None:
    await opened.store.remember("a", "old", answer(bytes(90)))
    opened.later(61.0)
    assert await opened.store.recall("a", "old") is None
    await opened.store.remember("a", "1", answer(bytes(50)))
    await opened.store.remember("a", "2", answer(bytes(50)))
    assert await opened.store.recall("a", "1") == answer(bytes(50))


async def test_deleting_a_tenant_forgets_its_answers_and_no_others(store: MemoryStore) -> None:
    await create(store, "a")
    await store.remember("a", "key", answer())
    await store.remember("b", "key", answer())
    await store.delete("a")
    assert await store.recall("a", "key") is None
    assert await store.recall("b", "key") == answer()


async def test_a_store_that_is_there_answers(store: MemoryStore) -> None:
    await store.ping()
