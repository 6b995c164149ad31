"""Memories on a primary and its replica under Sentinels, and what a failover leaves of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from tests.soak.cluster import judge, load
from tests.support.servers import BINARIES, HOST, PATIENCE_S, SERVICE, Guarded, sentinel

DOWN_AFTER_MS = 4000
"""Longer than a primary that is there may stand still."""

KINDS = [kind for kind, binary in BINARIES.items() if binary is not None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KINDS, reason="no Valkey or Redis server is installed"),
]


@pytest.fixture(params=KINDS)
def guarded(request: pytest.FixtureRequest) -> Iterator[Guarded]:
    """Run servers and their Sentinels."""
    with sentinel(str(BINARIES[request.param]), down_after_ms=DOWN_AFTER_MS) as own:
        yield own


async def failed_over(heard: PubSub) -> int:
    """Return the port of the next primary that a Sentinel announces."""
    async with asyncio.timeout(PATIENCE_S):
        while (message := await heard.get_message(ignore_subscribe_messages=True, timeout=None)) is None:
            pass
    name, _, _, _, port = str(message["data"]).split()
    assert name == SERVICE
    return int(port)


@pytest.mark.parametrize("loss", ["kill", "hold"])
async def test_after_a_failover_writes_go_on_at_the_new_primary_and_nothing_that_it_had_is_lost(
    guarded: Guarded, loss: str
) -> None:
    watcher = Redis(host=HOST, port=guarded.sentinels[0].port, decode_responses=True)
    async with watcher, watcher.pubsub() as heard, load(guarded, ["zoo"], witnessed=True) as work:
        await heard.subscribe("+switch-master")
        await work.goes_on("zoo")
        old, (new,) = guarded.owner(), guarded.servers[1:]
        getattr(old, loss)()
        assert await failed_over(heard) == new.port
        await work.goes_on("zoo")
        await work.finish()
        found = await judge(work, "zoo", survived=False)
        assert guarded.owner() is new
    assert not found.broken, found
    assert found.replicated > 0


async def test_a_store_finds_the_primary_as_long_as_one_sentinel_is_left(guarded: Guarded) -> None:
    for one in guarded.sentinels[:2]:
        one.kill()
    async with load(guarded, ["zoo"]) as work:
        await work.goes_on("zoo")
        await work.finish()
        found = await judge(work, "zoo", survived=True)
    assert not found.broken, found
    assert not found.refused
