"""The queue of images for the next encoder: bounded, fair, and in order."""

from __future__ import annotations

import asyncio

import pytest

from service.background.shadow_queue import Glimpse, Shadows

PATIENCE_S = 60.0


def glimpse(tenant: str = "a", size: int = 100, digest: str = "") -> Glimpse:
    return Glimpse(tenant=tenant, image=bytes(size), digest=digest, views=1, epoch=1)


async def taken(queue: Shadows) -> Glimpse:
    async with asyncio.timeout(PATIENCE_S):
        return await queue.take()


async def test_what_is_put_is_taken_in_order() -> None:
    queue = Shadows(max_bytes=1 << 20)
    for digest in "123":
        assert queue.put(glimpse(digest=digest))
    assert [(await taken(queue)).digest for _ in range(3)] == ["1", "2", "3"]
    assert queue.nbytes == 0


async def test_who_takes_waits_for_the_first() -> None:
    queue = Shadows(max_bytes=1 << 20)
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    assert not taking.done()
    queue.put(glimpse(digest="1"))
    async with asyncio.timeout(PATIENCE_S):
        assert (await taking).digest == "1"


async def test_it_never_holds_more_than_its_bytes_and_takes_in_again_what_there_is_room_for() -> None:
    one = glimpse()
    queue = Shadows(max_bytes=3 * one.nbytes)
    assert [queue.put(glimpse()) for _ in range(5)] == [True, True, True, False, False]
    assert queue.nbytes == 3 * one.nbytes
    await taken(queue)
    assert queue.put(glimpse())
    assert not queue.put(glimpse())


async def test_an_image_that_is_larger_than_all_room_is_dropped() -> None:
    queue = Shadows(max_bytes=1000)
    assert not queue.put(glimpse(size=1000))
    assert queue.nbytes == 0


async def test_small_images_count_for_what_they_cost_besides_their_bytes() -> None:
    queue = Shadows(max_bytes=10_000)
    assert sum(queue.put(glimpse(size=0)) for _ in range(100)) < 10


async def test_beside_others_a_tenant_has_a_share_and_one_who_comes_finds_room() -> None:
    one = glimpse()
    queue = Shadows(max_bytes=12 * one.nbytes)
    assert queue.put(glimpse("b"))
    flood = [queue.put(glimpse("a")) for _ in range(20)]
    assert sum(flood) == 4  # a third: there is b, and who may come
    assert queue.put(glimpse("c"))


async def test_tenants_take_turns() -> None:
    queue = Shadows(max_bytes=1 << 20)
    for digest in "12":
        queue.put(glimpse("a", digest=digest))
    queue.put(glimpse("b", digest="3"))
    assert [(await taken(queue)).digest for _ in range(3)] == ["1", "3", "2"]


@pytest.mark.parametrize("tenants", [1, 7])
async def test_nothing_is_left_of_who_has_nothing_waiting(tenants: int) -> None:
    queue = Shadows(max_bytes=1 << 20)
    for tenant in range(tenants):
        queue.put(glimpse(str(tenant)))
    for _ in range(tenants):
        await taken(queue)
    assert not queue._held
