"""How every store keeps API keys: found by id, dropped by id, and gone with their tenant."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from service.domain.records import StoredKey, tenant_of_key
from service.stores.protocol import MemoryStore
from tests.contract.test_store import create

TENANTS = ("zoo", "a_b", "a", "x.y-z", "")
"""Some that begin alike, and none."""


def key(tenant: str = "zoo", number: int = 1, **changes: object) -> StoredKey:
    id_ = f"{tenant}_{number:012x}" if tenant else f"{number:012x}"
    made = StoredKey(id=id_, digest=f"{number:064x}", scopes=("classify", "memory"), created=12.5, expires=99.25)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tenant", TENANTS)
def test_an_id_says_whose_key_it_is(tenant: str) -> None:
    assert tenant_of_key(key(tenant).id) == key(tenant).tenant == tenant


@pytest.mark.parametrize("tenant", TENANTS)
@pytest.mark.parametrize("expires", [None, 1e10, 0.5])
async def test_a_key_is_found_as_it_was_kept(store: MemoryStore, tenant: str, expires: float | None) -> None:
    own = key(tenant, expires=expires)
    assert await store.keep_key(own)
    assert await store.find_keys([own.id]) == [own]
    assert await store.keys(tenant) == [own]
    assert await store.keys() == [own]


async def test_many_keys_are_found_in_the_order_in_which_they_are_asked_for(store: MemoryStore) -> None:
    made = [key(tenant, number) for tenant in TENANTS for number in range(3)]
    for one in made:
        assert await store.keep_key(one)
    asked = [*reversed(made), key("zoo", 77), key("nobody")]
    assert await store.find_keys([one.id for one in asked]) == [*reversed(made), None, None]
    assert await store.find_keys([made[0].id, made[0].id]) == [made[0], made[0]]
    assert await store.find_keys([]) == []


async def test_keys_are_listed_by_tenant_and_all_together_by_id(store: MemoryStore) -> None:
    made = [key(tenant, number) for tenant in TENANTS for number in (2, 1)]
    for one in made:
        await store.keep_key(one)
    for tenant in TENANTS:
        assert await store.keys(tenant) == [key(tenant, 1), key(tenant, 2)]
    assert await store.keys("nobody") == []
    assert await store.keys() == sorted(made, key=lambda one: one.id)


async def test_an_id_is_given_once_and_keeping_the_same_key_again_changes_nothing(store: MemoryStore) -> None:
    assert await store.keep_key(key())
    assert await store.keep_key(key())
    assert not await store.keep_key(key(digest="f" * 64))
    assert not await store.keep_key(key(scopes=("admin",)))
    assert await store.find_keys([key().id]) == [key()]


async def test_a_dropped_key_is_gone_and_the_others_stay(store: MemoryStore) -> None:
    for one in (key(number=1), key(number=2), key("a")):
        await store.keep_key(one)
    assert await store.drop_key(key(number=1).id)
    assert not await store.drop_key(key(number=1).id)
    assert not await store.drop_key(key("nobody").id)
    assert await store.find_keys([key(number=1).id]) == [None]
    assert await store.keys() == [key("a"), key(number=2)]


async def test_a_tenant_whose_last_key_was_dropped_may_have_keys_again(store: MemoryStore) -> None:
    await store.keep_key(key())
    await store.drop_key(key().id)
    assert await store.keys() == []
    await store.keep_key(key(number=2))
    assert await store.keys() == [key(number=2)]


async def test_the_keys_of_a_deleted_tenant_die_with_it_and_nobody_elses(store: MemoryStore) -> None:
    await create(store)
    for one in (key(number=1), key(number=2), key("zoo_x"), key("")):
        await store.keep_key(one)
    assert await store.delete("zoo")
    assert await store.find_keys([key(number=1).id, key(number=2).id]) == [None, None]
    assert await store.keys() == [key(""), key("zoo_x")]
    await create(store)
    assert await store.keys("zoo") == []


async def test_a_tenant_may_have_keys_before_it_is_there_and_deleting_nobody_leaves_them(store: MemoryStore) -> None:
    await store.keep_key(key())
    assert not await store.delete("zoo")
    assert await store.keys("zoo") == [key()]
    await create(store)
    assert await store.keys("zoo") == [key()]


async def test_keys_made_and_dropped_at_the_same_time_are_all_listed_or_gone(store: MemoryStore) -> None:
    old, new = [key(number=number) for number in range(8)], [key(number=number) for number in range(8, 16)]
    for one in old:
        await store.keep_key(one)
    await asyncio.gather(*(store.drop_key(one.id) for one in old), *(store.keep_key(one) for one in new))
    assert await store.keys() == await store.keys("zoo") == new
