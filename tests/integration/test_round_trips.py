"""What a call asks of the store, counted by the server itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tests.support.fakes import picture
from tests.support.house import Build, House
from tests.support.servers import BINARIES, Running
from tests.support.servers import server as running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed"),
]

QUIET = {"housekeeping": False, "store_timeout_ms": 60_000}
"""Nothing is asked but for calls, and a server that stands still for a while is not taken for one that is away."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Yield a server of this file's own."""
    with running(str(BINARIES["valkey"])) as own:
        yield own


@pytest_asyncio.fixture(loop_scope="session")
async def client(server: Running) -> AsyncIterator[Redis]:
    """Yield a client that looks at the server, which is empty."""
    own = Redis.from_url(server.url)
    await own.flushall()
    yield own
    await own.aclose()


async def opened(build: Build, server: Running, **settings: Any) -> House:
    house = await build(store=server.url, **(QUIET | settings))
    await house.put(slots=4)
    await house.predictions(picture("red", 0))
    return house


async def asked(client: Redis, doing: Any) -> dict[str, int]:
    """Return how often each command ran while something was done, but for those that ask for it."""
    await client.config_resetstat()
    await doing
    told = await client.info("commandstats")
    counts = {name.removeprefix("cmdstat_"): values["calls"] for name, values in told.items()}
    return {name: count for name, count in counts.items() if not name.startswith(("config", "info"))}


async def test_a_call_that_learns_is_one_round_trip_however_many_images_it_has(
    build: Build, server: Running, client: Redis
) -> None:
    house = await opened(build, server, sync_ms=1e9)
    images = [picture(colour, seed) for seed in range(1, 4) for colour in ("red", "green", "blue")]
    counts = await asked(client, house.predictions(*images))
    # All others are the script's own: it reads where the tenant is once, and no configuration is read beside it.
    assert (counts["evalsha"], counts["hmget"]) == (1, 1)
    assert not {"hgetall", "get", "exec", "eval", "ping"} & set(counts)


async def test_a_call_that_teaches_nothing_new_asks_the_store_nothing(
    build: Build, server: Running, client: Redis
) -> None:
    house = await opened(build, server, sync_ms=1e9)
    assert await asked(client, house.outcomes(picture("red", 0))) == {}
    assert await asked(client, house.predictions(picture("red", 1), learn=False)) == {}


async def test_what_is_less_sure_than_all_that_a_class_holds_asks_the_store_nothing(
    build: Build, server: Running, client: Redis
) -> None:
    house = await opened(build, server, sync_ms=1e9)
    told = await house.predictions(*(picture("red", seed) for seed in range(1, 40)), learn=False)
    order = sorted(range(39), key=lambda i: told[i]["learned"]["entropy"])
    await house.outcomes(*(picture("red", 1 + i) for i in order[:5]))
    unsure = [picture("red", 1 + i) for i in order[-8:]]
    counts = await asked(client, house.predictions(*unsure))
    assert set(await house.outcomes(*unsure)) == {"rejected"}
    assert counts == {}


async def test_a_memory_that_has_grown_old_asks_for_its_version_and_for_nothing_else(
    build: Build, server: Running, client: Redis
) -> None:
    house = await opened(build, server, sync_ms=0)
    assert await asked(client, house.predictions(picture("red", 1), learn=False)) == {"hmget": 1}


async def test_the_versions_of_many_tenants_are_asked_for_together(
    build: Build, server: Running, client: Redis
) -> None:
    house = await opened(build, server, sync_ms=0)
    names = [f"t{number}" for number in range(5)]
    for name in names:
        await house.put(name)
        await house.predictions(picture("red", 0), tenant=name)
    calls: list[int] = []
    stamps = house.rooms.store.stamps

    async def counted(tenants: list[str]) -> Any:
        calls.append(len(tenants))
        return await stamps(tenants)

    house.rooms.store.stamps = counted  # type: ignore[method-assign,assignment]
    rooms = house.rooms

    async def read(name: str) -> None:
        async with rooms.archive.open(name):
            pass

    assert await asked(client, asyncio.gather(*(read(name) for name in names))) == {"hmget": len(names)}
    assert calls == [len(names)]
