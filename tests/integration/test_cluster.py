"""Memories on a cluster of three primaries and three replicas, and while it is taken apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.domain.memory import Stamp, StoredBank, StoredShot, StoredSlot
from service.domain.records import Job, JobState, Remembered, SnapshotInfo
from service.errors import StoreDown
from service.stores.protocol import PushCandidate
from service.stores.redis.keys import TENANTS, Keys
from service.stores.redis.store import RedisStore
from tests.soak.cluster import CONFIG, NODE_TIMEOUT_MS, PATIENCE_S, Witness, create, stamp_of, store_of, tenants_on
from tests.support.fakes import COLOURS, picture
from tests.support.house import Build, House
from tests.support.servers import BINARIES, Cluster, Node, client_of, cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed"),
]

CLASSES = tuple(spec.id for spec in CONFIG.classes)
FINGERPRINT = "made-with-this"


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    """Run one cluster for all tests here."""
    with cluster(str(BINARIES["valkey"]), replicas=1, node_timeout_ms=NODE_TIMEOUT_MS) as own:
        yield own


@pytest.fixture
def whole(running: Cluster) -> Cluster:
    """Return the cluster, empty and with all its nodes, whatever was done to it before."""
    running.heal()
    running.flush()
    for node in running.nodes:
        node.call("CONFIG", "SET", "cluster-require-full-coverage", "yes")
    return running


@pytest_asyncio.fixture(loop_scope="session")
async def store(whole: Cluster) -> AsyncIterator[RedisStore]:
    """Yield a store on the cluster."""
    own = store_of(whole, PATIENCE_S)
    yield own
    await own.aclose()


def primaries(whole: Cluster) -> list[Node]:
    return [member.node for member in whole.members() if member.primary]


def one_on_each(whole: Cluster, prefix: str = "t") -> list[str]:
    """Return the names of tenants, one on each primary."""
    return [next(iter(tenants_on(whole, node, prefix))) for node in primaries(whole)]


# Where a tenant lies --------------------------------------------------------------------------------------------------


def slot(id_: str, entropy: float) -> StoredSlot:
    return StoredSlot(id=id_, entropy=entropy, feature=b"feature!")


def candidates(number: int, seed: int = 0) -> list[PushCandidate]:
    """Return some candidates, of all classes in turn."""
    draw = Random(seed)
    return [
        PushCandidate(class_id=CLASSES[at % len(CLASSES)], slot=slot(f"{seed}-{at}", draw.random()))
        for at in range(number)
    ]


def snapshot(id_: str) -> SnapshotInfo:
    return SnapshotInfo(
        id=id_,
        created=1.0,
        reason="manual",
        fingerprint=FINGERPRINT,
        stamp=Stamp(epoch=1, version=1),
        classes=4,
        slots=1,
        shots=1,
        bytes=9,
    )


def shot(id_: str) -> StoredShot:
    return StoredShot(id=id_, class_id=CLASSES[0], feature=b"feature!", image=b"image of " + id_.encode())


def job(id_: str) -> Job:
    return Job(id=id_, kind="rescore", state=JobState.RUNNING, created=1.0, updated=1.0)


async def replace(store: RedisStore, tenant: str, slots: Mapping[str, StoredBank] | None = None) -> Stamp:
    """Replace a tenant by itself, with other slots if they are given."""
    at = await stamp_of(store, tenant)
    return await store.replace(
        tenant, CONFIG, FINGERPRINT, expected=at, labelling=CONFIG.labelling, origin={}, slots=slots
    )


async def live(store: RedisStore, tenant: str) -> None:
    """Let a tenant have whatever a tenant can have."""
    await create(store, tenant)
    await store.push(tenant, await stamp_of(store, tenant), candidates(30))
    await store.add_shots(tenant, await stamp_of(store, tenant), [shot("1"), shot("2")])
    await store.remove_shots(tenant, ["2"])
    first = (await store.load(tenant)).slots[CLASSES[1]]  # type: ignore[union-attr]
    assert await store.purge(tenant, CLASSES[1], first.ids[0])
    await replace(store, tenant, {CLASSES[0]: StoredBank.of([slot("new", 0.1)])})
    await replace(store, tenant)
    await store.push(tenant, await stamp_of(store, tenant), candidates(9, seed=1))
    await store.reset(tenant, dynamic=True, static=False, class_ids=[CLASSES[2]])
    await store.remember(tenant, "key", Remembered(digest="d", status=200, media_type="text/plain", body=b"body"))
    assert await store.keep_snapshot(tenant, snapshot("s"), [b"part", b"parts"])
    assert await store.note_job(tenant, job("j"))
    assert await store.claim(tenant, "sweep", 60.0)
    assert await store.digests(tenant, await stamp_of(store, tenant), CLASSES)


def keys_on(node: Node) -> set[str]:
    with client_of(node.port) as client:
        return set(client.scan_iter(count=1000))


async def test_all_keys_of_a_tenant_lie_on_one_node_and_tenants_are_spread(whole: Cluster, store: RedisStore) -> None:
    tenants = [f"tenant-{number}" for number in range(12)]
    for tenant in tenants:
        await live(store, tenant)
    await store.delete(tenants[0])
    await create(store, tenants[0])
    found = {node: keys_on(node) for node in primaries(whole)}
    homes = {
        tenant: {node for node, keys in found.items() if any(f"{{{tenant}}}" in key for key in keys)}
        for tenant in tenants
    }
    assert homes == {tenant: {whole.owner(Keys(tenant).config)} for tenant in tenants}
    assert set().union(*homes.values()) == set(found)
    tagged = tuple(f"dmn:{{{tenant}}}:" for tenant in tenants)
    assert {key for keys in found.values() for key in keys if not key.startswith(tagged)} == {TENANTS}
    assert list(await store.names(after="", limit=100)) == sorted(tenants)
    assert None not in await store.stamps(tenants)


# A slot that moves ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Kept:
    """What a store has acknowledged, by the kind of call."""

    shots: set[str] = field(default_factory=set)
    jobs: set[str] = field(default_factory=set)
    snapshots: set[str] = field(default_factory=set)
    answers: set[str] = field(default_factory=set)
    refused: list[StoreDown] = field(default_factory=list)


def calls(store: RedisStore, tenant: str, number: int, kept: Kept) -> list[Callable[[], Awaitable[object]]]:
    """Return one call of each kind; what it keeps is noted once it is acknowledged."""
    name = str(number)

    async def add_shot() -> None:
        await store.add_shots(tenant, await stamp_of(store, tenant), [shot(name)])
        kept.shots.add(name)

    async def note_job() -> None:
        assert await store.note_job(tenant, job(name))
        kept.jobs.add(name)

    async def keep_snapshot() -> None:
        assert await store.keep_snapshot(tenant, snapshot(name), [b"part", name.encode()])
        kept.snapshots.add(name)
        assert await store.read_snapshot(tenant, name, 1) == name.encode()

    async def remember() -> None:
        answer = Remembered(digest=name, status=200, media_type="text/plain", body=b"body")
        await store.remember(tenant, name, answer)
        kept.answers.add(name)
        assert await store.recall(tenant, name) == answer

    async def read() -> None:
        stored = await store.load(tenant, images=True)
        assert stored is not None
        assert {one for own in stored.shots.values() for one in own} >= {shot(one) for one in before}
        assert sum(len(bank) for bank in stored.slots.values()) == SLOTS_BEFORE

    async def ask() -> None:
        assert await store.stamps([tenant]) != [None]
        assert tenant in await store.names(after="", limit=100)

    before = frozenset(kept.shots)
    return [add_shot, note_job, keep_snapshot, remember, read, ask]


SLOTS_BEFORE = 20


async def refusable(call: Callable[[], Awaitable[object]], kept: Kept) -> None:
    try:
        await call()
    except StoreDown as told:
        kept.refused.append(told)


async def test_every_call_on_a_half_moved_slot_is_done_whole_or_refused_with_a_time_to_come_back(
    whole: Cluster, store: RedisStore
) -> None:
    tenant = one_on_each(whole)[0]
    await create(store, tenant)
    await store.push(tenant, await stamp_of(store, tenant), candidates(SLOTS_BEFORE))
    kept = Kept()
    target = primaries(whole)[1]
    for number, _ in enumerate(whole.move_key_by_key(Keys(tenant).config, target)):
        if number % 4 == 0:
            await asyncio.gather(*(refusable(call, kept) for call in calls(store, tenant, number, kept)))
    assert all(told.retry_after_s for told in kept.refused)
    done = len(kept.refused)
    await asyncio.gather(*(refusable(call, kept) for call in calls(store, tenant, 999, kept)))
    assert len(kept.refused) == done, "the slot is whole again"
    stored = await store.load(tenant, images=True)
    assert stored is not None
    assert {one for own in stored.shots.values() for one in own} >= {shot(one) for one in kept.shots}
    assert {one.id for one in await store.jobs(tenant)} >= kept.jobs
    assert {one.id for one in await store.snapshots(tenant)} >= kept.snapshots
    assert all([await store.recall(tenant, key) is not None for key in kept.answers])


# Over HTTP ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Learned:
    """An image that a caller was told is learned, or will be: its slot, and whether it must outlive its primary."""

    slot: str
    pending: bool
    began: float
    replicated: bool
    kept_by: tuple[Node, int] | None


@dataclass(kw_only=True)
class Traffic:
    """Callers of one tenant, each with pictures that nobody else has."""

    house: House
    whole: Cluster
    tenant: str
    learned: list[Learned] = field(default_factory=list)
    states: set[str] = field(default_factory=set)
    refused: int = 0
    over: bool = False

    async def call(self, seeds: Iterator[int]) -> None:
        """Send pictures until it is over; one that is refused is sent again, as its sender is told."""
        witness = Witness(self.whole, self.tenant)
        while not self.over:
            seed = next(seeds)
            image = picture(list(COLOURS)[seed % 3], seed)
            await witness.choose()
            began = time.monotonic()
            while not self._answered(answer := await self.house.classify(image, tenant=self.tenant)):
                self.refused += 1
                await asyncio.sleep(0.05)
            await self._note(answer.json(), began, witness)
        await witness.aclose()

    async def back(self) -> None:
        """Return once a picture sent from now on was learned at once."""
        now = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            while not any(one.began > now and not one.pending for one in self.learned):  # noqa: ASYNC110 - HTTP
                await asyncio.sleep(0.01)

    def promised(self) -> set[str]:
        """Return the slots that have to be there now: what a replica had, what a living primary took, what waited."""
        owner = self.whole.owner(Keys(self.tenant).config)
        living = (owner, owner.lives)
        return {one.slot for one in self.learned if one.pending or one.replicated or one.kept_by == living}

    def _answered(self, answer: httpx.Response) -> bool:
        """Return whether a call was answered; else it has to be a problem that says when to come back."""
        if answer.status_code == 200:
            return True
        assert answer.status_code == 503, answer.text
        told = answer.json()
        assert told["type"] == "/problems/store-down", told
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert int(answer.headers["retry-after"]) >= 1
        assert told["retry_after"] > 0
        return False

    async def _note(self, told: dict[str, Any], began: float, witness: Witness) -> None:
        (prediction,), state = told["predictions"], told["memory"]["state"]
        assert prediction["error"] is None
        own = prediction["learned"]
        assert own["outcome"] in ("filled", "duplicate", "pending"), own
        assert own["outcome"] != "pending" or state == "stale"
        self.states.add(state)
        pending = own["outcome"] == "pending"
        replicated, by = (False, None) if pending else await witness.confirm()
        self.learned.append(Learned(slot=own["slot"], pending=pending, began=began, replicated=replicated, kept_by=by))


@asynccontextmanager
async def traffic(house: House, whole: Cluster, tenants: Sequence[str]) -> AsyncIterator[list[Traffic]]:
    """Let callers send pictures to new tenants until the block ends and each was served once more."""
    work = [Traffic(house=house, whole=whole, tenant=tenant) for tenant in tenants]
    for tenant in tenants:
        assert (await house.put(tenant, slots=256)).status_code == 201
    seeds = count()
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as callers:
        for one in work:
            for _ in range(2):
                callers.create_task(one.call(seeds))
            await one.back()
        yield work
        for one in work:
            await one.back()
            one.over = True


async def held(store: RedisStore, tenant: str) -> set[str]:
    """Return the ids of all slots."""
    stored = await store.load(tenant)
    assert stored is not None
    return {id_ for bank in stored.slots.values() for id_ in bank.ids}


@pytest.mark.parametrize("policy", ["serve", "refuse"])
async def test_over_http_the_loss_of_a_primary_is_answered_and_costs_no_image_that_its_replica_had(
    whole: Cluster, store: RedisStore, build: Build, policy: str
) -> None:
    house = await build(store=whole.urls, store_down=policy)
    tenants = one_on_each(whole, "shop")[:2]
    async with traffic(house, whole, tenants) as work:
        whole.owner(Keys(tenants[0]).config).kill()
        await work[0].back()
    await house.rooms.desk.deliver()
    for one in work:
        assert one.promised() <= await held(store, one.tenant)
        assert any(known.replicated for known in one.learned)
        assert one.states <= ({"fresh"} if policy == "refuse" else {"fresh", "stale"})


async def test_over_http_tenants_of_other_primaries_notice_nothing_of_a_loss(whole: Cluster, build: Build) -> None:
    """Where the cluster is set to serve the slots that it has."""
    for node in whole.nodes:
        node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
    house = await build(store=whole.urls, sync_ms=0, store_timeout_ms=60_000)
    tenants = one_on_each(whole, "shop")[:2]
    async with traffic(house, whole, tenants) as work:
        whole.owner(Keys(tenants[0]).config).kill()
        await work[0].back()
    assert work[1].states == {"fresh"}
    assert not work[1].refused
    assert not any(known.pending for known in work[1].learned)
