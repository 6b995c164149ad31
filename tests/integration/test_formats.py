"""What another version of the service stored is refused with a clear line, and nothing of it is touched."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from service.domain.memory import Stamp, StoredOffsets, Training
from service.domain.records import Job, JobState, SnapshotInfo, StoredKey
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import FingerprintMismatch, StoreDown
from service.settings import Settings
from service.stores.connection.pools import connect
from service.stores.redis.store import RedisStore
from service.wiring import open_rooms
from tests.support.fakes import FakeEncoder
from tests.support.servers import BINARIES, Running, server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed"),
]

PATIENCE_S = 60.0

CONFIG = TenantConfig(classes=(ClassSpec(name="red"),))
PAPERS = replace(CONFIG, method="dmn")
STAMP = Stamp(epoch=1, version=0)
KEY = StoredKey(id="default_0123456789ab", digest="0" * 64, scopes=("classify",), created=0.0)


class Shelf:
    """A store whose tenant `default` was written by another version, and a client that looks at it."""

    def __init__(self, url: str, client: Redis, store: RedisStore) -> None:
        self.url, self.client, self.store = url, client, store

    async def contents(self) -> dict[bytes, object]:
        """Return what every key holds; the bytes of a hash's dump may change their order by themselves."""
        keys = sorted(await self.client.keys("*"))
        hashes = {key for key in keys if await self.client.type(key) == b"hash"}
        return {key: await (self.client.hgetall(key) if key in hashes else self.client.dump(key)) for key in keys}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """Yield a server of this file's own."""
    with server(str(BINARIES["valkey"])) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def shelf(running: Running) -> AsyncIterator[Shelf]:
    """Yield a store with one tenant, whose format is not ours."""
    client = Redis.from_url(running.url)
    await client.flushall()
    connection = connect(running.url, timeout_s=PATIENCE_S)
    store = RedisStore(connection, clock=lambda: 0.0, remember_s=1.0, remember_bytes=1)
    await store.replace("default", CONFIG, "f", expected=None, labelling="", origin={})
    await store.keep_snapshot("default", _info(), (b"file",))
    await store.note_job("default", Job(id="j", kind="k", state=JobState.DONE, created=0.0, updated=0.0))
    await store.keep_key(KEY)
    await client.hset("dmn:{default}:cfg", "format", "9")
    yield Shelf(running.url, client, store)
    await store.aclose()
    await client.aclose()


def _info() -> SnapshotInfo:
    return SnapshotInfo(
        id="s", created=0.0, reason="manual", fingerprint="f", stamp=STAMP, classes=1, slots=0, shots=0, bytes=4
    )


CALLS: dict[str, Callable[[RedisStore], Awaitable[object]]] = {
    "get": lambda store: store.get("default"),
    "load": lambda store: store.load("default"),
    "replace": lambda store: store.replace("default", CONFIG, "f", expected=STAMP, labelling="", origin={}),
    "delete": lambda store: store.delete("default"),
    "purge": lambda store: store.purge("default", CONFIG.classes[0].id, "1"),
    "reset": lambda store: store.reset("default", dynamic=True, static=True, class_ids=None),
    "remove_shots": lambda store: store.remove_shots("default", ["1"]),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_tenant_of_another_format_is_refused_and_stays_as_it_is(shelf: Shelf, call: str) -> None:
    before = await shelf.contents()
    with pytest.raises(FingerprintMismatch, match="'default' is stored in format"):
        await CALLS[call](shelf.store)
    assert await shelf.contents() == before


async def test_only_a_tenant_with_the_method_auto_is_kept_from_versions_that_do_not_know_it(shelf: Shelf) -> None:
    for config, format_ in ((replace(CONFIG, method="dmn"), b"1"), (replace(CONFIG, method="auto"), b"3")):
        await shelf.store.delete("other")
        await shelf.store.replace("other", config, "f", expected=None, labelling="", origin={})
        kept = await shelf.client.hgetall("dmn:{other}:cfg")
        assert kept[b"format"] == format_
        assert (b'"method"' in kept[b"config"]) is (config.method == "auto")


async def test_only_a_tenant_with_offsets_is_kept_from_versions_that_do_not_know_them(shelf: Shelf) -> None:
    """What has none is written as it always was, and what was written so is read."""
    key, row = "dmn:{other}:cfg", {CONFIG.classes[0].id: b"\x00" * 20}
    training = Training(id="t", created=0.0, seed=0, epochs=1, learning_rate=1e-4, shots=2, dim=1)
    stamp = await shelf.store.replace("other", PAPERS, "f", expected=None, labelling="", origin={})
    bare = await shelf.client.hgetall(key)
    assert bare[b"format"] == b"1"
    assert not {b"frame", b"training"} & set(bare)
    for offsets, format_ in ((StoredOffsets(training=training, rows=row), b"2"), (StoredOffsets(), b"1")):
        stamp = await shelf.store.replace(
            "other", PAPERS, "f", expected=stamp, labelling="", origin={}, offsets=offsets
        )
        assert await shelf.client.hget(key, "format") == format_
        loaded = await shelf.store.load("other")
        assert loaded is not None
        assert loaded.offsets == offsets
    assert set(await shelf.client.hgetall(key)) == set(bare)
    assert await shelf.client.keys("dmn:{other}:o*") == []
    assert await shelf.store.delete("other")


@pytest.mark.parametrize("what", ["snaps", "jobs"])
async def test_a_snapshot_or_job_of_another_format_is_refused_and_stays_as_it_is(shelf: Shelf, what: str) -> None:
    key = f"dmn:{{default}}:{what}"
    ((id_, text),) = (await shelf.client.hgetall(key)).items()
    await shelf.client.hset(key, id_, json.dumps({**json.loads(text), "format": 9}))
    before = await shelf.contents()
    with pytest.raises(FingerprintMismatch, match="format 9"):
        await {"snaps": shelf.store.snapshots, "jobs": shelf.store.jobs}[what]("default")
    assert await shelf.contents() == before


async def test_a_key_of_another_format_opens_nothing_and_keeps_no_other_from_being_found(shelf: Shelf) -> None:
    other = replace(KEY, id="default_ba9876543210")
    await shelf.store.keep_key(other)
    text = json.loads(await shelf.client.hget("dmn:{default}:keys", KEY.id))
    await shelf.client.hset("dmn:{default}:keys", KEY.id, json.dumps({**text, "format": 9}))
    before = await shelf.contents()
    refused, found = await shelf.store.find_keys([KEY.id, other.id])
    assert isinstance(refused, StoreDown)
    assert "format 9" in refused.detail
    assert found == other
    with pytest.raises(FingerprintMismatch, match="format 9"):
        await shelf.store.keys()
    assert await shelf.contents() == before


async def test_a_service_does_not_start_on_a_store_of_another_format(shelf: Shelf) -> None:
    before = await shelf.contents()
    with pytest.raises(FingerprintMismatch, match="Serve it with the version that wrote it"):
        async with open_rooms(Settings(store=shelf.url, store_timeout_ms=1000 * PATIENCE_S), FakeEncoder()):
            pass
    assert await shelf.contents() == before
