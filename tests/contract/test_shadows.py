"""What every store keeps of a tenant under the next encoder: beside it, and apart from it."""

from __future__ import annotations

from service.domain.memory import StoredSlot
from service.domain.tenant import shadow_of
from service.stores.protocol import MemoryStore, PushCandidate
from tests.contract.test_store import create

SHADOW = shadow_of("a")


async def filled(store: MemoryStore, name: str, slot: str) -> None:
    """Make a tenant, or a shadow, with one slot."""
    stamp = await create(store, name)
    record = await store.get(name)
    assert record is not None
    own = StoredSlot(id=slot, entropy=0.5, feature=b"\x00" * 8)
    await store.push(name, stamp, [PushCandidate(class_id=record.config.classes[0].id, slot=own)])


async def ids(store: MemoryStore, name: str) -> list[str]:
    memory = await store.load(name)
    return [] if memory is None else [slot.id for bank in memory.slots.values() for slot in bank]


async def test_a_shadow_is_in_no_list(store: MemoryStore) -> None:
    for name in ("a", SHADOW, "b"):
        await create(store, name)
    assert list(await store.names(after="", limit=10)) == ["a", "b"]


async def test_a_shadow_and_its_tenant_hold_their_own(store: MemoryStore) -> None:
    await filled(store, "a", "1")
    await filled(store, SHADOW, "2")
    assert (await ids(store, "a"), await ids(store, SHADOW)) == (["1"], ["2"])
    await store.reset(SHADOW, dynamic=True, static=True, class_ids=None)
    assert (await ids(store, "a"), await ids(store, SHADOW)) == (["1"], [])


async def test_a_shadow_goes_alone_and_can_come_again(store: MemoryStore) -> None:
    await filled(store, "a", "1")
    await filled(store, SHADOW, "2")
    assert await store.delete(SHADOW)
    assert not await store.delete(SHADOW)
    assert (await ids(store, "a"), await store.get(SHADOW)) == (["1"], None)
    await filled(store, SHADOW, "3")
    assert await ids(store, SHADOW) == ["3"]


async def test_a_shadow_is_there_whether_its_tenant_is_or_not(store: MemoryStore) -> None:
    await filled(store, SHADOW, "2")
    assert await store.get("a") is None
    await filled(store, "a", "1")
    await store.delete("a")
    assert await ids(store, SHADOW) == ["2"]
