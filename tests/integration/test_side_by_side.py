"""Releases that share a store: what an earlier one wrote is read, what a later one adds is left alone or refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from scripts.freeze_store import TENANTS, SmallEncoder, thaw, told_of
from service.domain.memory import StoredShot, shown_of
from service.domain.records import StoredKey
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import FingerprintMismatch
from service.settings import Settings
from service.stores.connection.pools import connect
from service.stores.redis.store import RedisStore
from service.wiring import open_rooms
from tests.support.fakes import picture
from tests.support.house import House, Json, opened, problem
from tests.support.servers import BINARIES, server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed"),
]

FROZEN = sorted((Path(__file__).parents[1] / "golden/stores").glob("*.json"))
NEW = {"red": 200, "green": 201, "blue": 202}
"""Seeds of pictures that nobody has seen yet."""


class Shared:
    """A store with what an earlier release left in it."""

    def __init__(self, url: str, client: Any, told: Json) -> None:
        self.url, self.client, self.told = url, client, told

    async def keys(self, tenant: str) -> set[str]:
        """Return the names of a tenant's keys that last, without its name."""
        own = f"dmn:{{{tenant}}}:"
        names = [key.decode() for key in await self.client.keys(f"{own}*")]
        return {name.removeprefix(own) for name in names if await self.client.pttl(name) < 0}


@pytest_asyncio.fixture(loop_scope="session", params=FROZEN, ids=lambda path: path.stem)
async def shared(request: pytest.FixtureRequest) -> AsyncIterator[Shared]:
    file = json.loads(request.param.read_text())
    with server(str(BINARIES["valkey"])) as running:
        async with Redis.from_url(running.url) as client:
            await thaw(client, file["keys"])
            yield Shared(running.url, client, file["told"])


@pytest_asyncio.fixture(loop_scope="session")
async def house(shared: Shared) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(opened(SmallEncoder(), store=shared.url))


def test_there_is_what_an_earlier_release_wrote() -> None:
    assert FROZEN


async def test_what_an_earlier_release_wrote_is_told_as_it_told_it(shared: Shared, house: House) -> None:
    for tenant in TENANTS:
        told, was = await told_of(house.client, tenant), shared.told[tenant]
        answers, before = told.pop("answers"), was.pop("answers")
        assert _without_numbers(told) == _without_numbers(was)
        for top, then in zip(answers, before, strict=True):
            scores = {one["label"]: one["score"] for one in top}
            assert scores == pytest.approx({one["label"]: one["score"] for one in then}, abs=1e-4)


async def test_a_tenant_of_an_earlier_release_goes_on_and_comes_back_to_its_snapshots(
    shared: Shared, house: House
) -> None:
    for tenant in TENANTS:
        who = {"X-Tenant": tenant}
        slots = await house.banks(tenant)
        for colour, seed in NEW.items():
            (one,) = await house.predictions(picture(colour, seed), tenant=tenant)
            assert one["learned"]["outcome"] in {"filled", "replaced", "rejected"}
            assert (await house.upload(colour, picture(colour, seed), tenant=tenant)).status_code == 201
        every = (await house.client.get("/admin/memory/snapshots", headers=who)).json()["items"]
        (saved,) = [one for one in every if one["reason"] == "manual"]
        answer = await house.client.post(f"/admin/memory/snapshots/{saved['id']}/restore", headers=who)
        assert answer.status_code == 200, answer.text
        assert await house.banks(tenant) == slots
        assert (await house.client.delete(f"/tenants/{tenant}")).status_code == 204
        assert await shared.keys(tenant) == {"epochs"}


async def test_what_a_later_release_adds_without_a_number_is_passed_over_and_stays(shared: Shared) -> None:
    config, aside = "dmn:{auto}:cfg", "dmn:{auto}:new"
    await shared.client.hset(config, "novelty", "1")
    await shared.client.set(aside, "1")
    for name in ("snaps", "jobs"):
        for tenant in TENANTS:
            key = f"dmn:{{{tenant}}}:{name}"
            for id_, text in (await shared.client.hgetall(key)).items():
                await shared.client.hset(key, id_, json.dumps({**json.loads(text), "novelty": [1]}))
    training = json.loads(await shared.client.hget("dmn:{trained}:cfg", "training"))
    await shared.client.hset("dmn:{trained}:cfg", "training", json.dumps({**training, "novelty": 1}))
    async with opened(SmallEncoder(), store=shared.url) as house:
        for tenant in TENANTS:
            assert (await house.client.get("/jobs", headers={"X-Tenant": tenant})).status_code == 200
            told = await told_of(house.client, tenant)
            assert told["snapshots"]
            await house.predictions(picture("red", NEW["red"]), tenant=tenant)
        added = await house.client.post("/tenants/auto/classes", json={"classes": ["white"]})
        assert added.status_code == 201, added.text
        await house.reset("dynamic", "auto")
    assert await shared.client.hget(config, "novelty") == b"1"
    assert await shared.client.get(aside) == b"1"


async def test_a_tenant_of_a_later_minor_format_is_refused_alone(shared: Shared, house: House) -> None:
    await shared.client.hset("dmn:{auto}:cfg", "format", "4")
    before = await shared.client.hgetall("dmn:{auto}:cfg")
    told = problem(await house.classify(picture(), tenant="auto"), "fingerprint-mismatch")
    assert told["detail"].startswith("The tenant 'auto' is stored in format 4; this version reads 1, 2 and 3.")
    assert await shared.client.hgetall("dmn:{auto}:cfg") == before
    assert await house.predictions(picture(), tenant="paper")


async def test_a_key_with_a_value_that_is_not_known_opens_nothing(shared: Shared, house: House) -> None:
    key = StoredKey(id="auto_0123456789ab", digest="0" * 64, scopes=("classify",), created=0.0)
    await house.rooms.store.keep_key(key)
    assert await house.rooms.store.find_keys([key.id]) == [key]
    text = json.loads(await shared.client.hget("dmn:{auto}:keys", key.id))
    await shared.client.hset("dmn:{auto}:keys", key.id, json.dumps({**text, "from_addresses": ["10.0.0.1"]}))
    (found,) = await house.rooms.store.find_keys([key.id])
    assert "format 1 with more in it" in str(found)


async def test_a_store_of_another_major_format_is_refused_at_the_start_and_left_as_it_is(shared: Shared) -> None:
    await shared.client.set("dmn:format", "2")
    before = {key: await shared.client.type(key) for key in await shared.client.keys("*")}
    with pytest.raises(FingerprintMismatch, match="The store is of format 2; this version reads 1") as refused:
        async with open_rooms(Settings(store=shared.url, store_timeout_ms=60_000), SmallEncoder()):
            pass
    assert "\n" not in str(refused.value)
    assert {key: await shared.client.type(key) for key in await shared.client.keys("*")} == before


async def test_shots_that_a_release_added_without_counting_them_are_counted_when_they_come_to_label(
    shared: Shared,
) -> None:
    """Releases before `auto` keep no hash of the shots; with `auto` it decides whether slots are scored anew."""
    store = RedisStore(connect(shared.url, timeout_s=60.0), clock=lambda: 0.0, remember_s=1.0, remember_bytes=1)
    config = TenantConfig(classes=(ClassSpec(name="red"),), method="dmn")
    stamp = await store.replace("old", config, "f", expected=None, labelling="", origin={})
    shots = [StoredShot(id=id_, class_id=config.classes[0].id, feature=b"1") for id_ in ("1", "2")]
    await store.add_shots("old", stamp, shots)
    await shared.client.hset("dmn:{old}:cfg", "shown", "")
    record = await store.get("old")
    assert record is not None
    auto = TenantConfig(classes=config.classes, method="auto")
    await store.replace("old", auto, "f", expected=record.stamp, labelling="", origin={})
    record = await store.get("old")
    assert record is not None
    assert record.shown == shown_of(("1", "2"))
    await store.aclose()


def _without_numbers(told: Any) -> Any:
    """Return what was told, its entropies and the like rounded: they go through other hands than the store's."""
    if isinstance(told, dict):
        return {name: _without_numbers(own) for name, own in told.items()}
    if isinstance(told, list):
        return [_without_numbers(own) for own in told]
    return round(told, 4) if isinstance(told, float) else told
