"""Workers that push candidates to memories on a cluster or under Sentinels, and what the memories have to hold then."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from random import Random

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from service.domain.memory import Stamp, StoredSlot
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import StoreDown
from service.stores.connection.pools import connect
from service.stores.protocol import Change, PushCandidate, ReloadNeeded
from service.stores.redis.keys import Keys
from service.stores.redis.store import RedisStore
from tests.support.servers import HOST, Cluster, Guarded, Node

PATIENCE_S = 120.0
"""How long any one load may take; what hangs fails by it."""

CONFIG = TenantConfig(classes=tuple(ClassSpec(name=name) for name in ("cats", "dogs", "birds", "fish")), slots=8)
NODE_TIMEOUT_MS = 5000
"""How long a node may be silent before a replica takes over: longer than a machine that is busy holds one up."""

TIMEOUT_S = 2.0
"""How long a worker waits for one answer of the store, as the service does by default."""

FINGERPRINT = "made-with-this"
_CLASS_IDS = tuple(spec.id for spec in CONFIG.classes)
_BATCH = 3
_PAUSE_S = 0.05
_PACE_S = 0.002
_WAIT_MS = 200
_BALLAST, _PART = 32, 1 << 20

Banks = Mapping[str, Mapping[str, StoredSlot]]
"""Slots by class and id."""

Topology = Cluster | Guarded


def store_of(topology: Topology, timeout_s: float = TIMEOUT_S) -> RedisStore:
    """Return a store as a worker opens it."""
    client = connect(topology.urls, timeout_s=timeout_s)
    spread = isinstance(topology, Cluster)
    return RedisStore(client, clock=time.time, remember_s=60.0, remember_bytes=1 << 20, spread=spread)


async def create(store: RedisStore, tenant: str) -> Stamp:
    """Make a tenant that is not there."""
    return await store.replace(
        tenant, CONFIG, FINGERPRINT, expected=None, labelling=CONFIG.labelling, origin={"encoder": "none"}
    )


async def stamp_of(store: RedisStore, tenant: str) -> Stamp:
    """Return where a tenant is."""
    record = await store.get(tenant)
    assert record is not None, f"the tenant {tenant} is gone"
    return record.stamp


def tenants_on(whole: Cluster, node: Node, prefix: str) -> Iterable[str]:
    """Return names of tenants whose keys a primary has, without end."""
    names = (f"{prefix}{number}" for number in count())
    return (name for name in names if whole.owner(Keys(name).config) is node)


# What is right --------------------------------------------------------------------------------------------------------


def order(slot: StoredSlot) -> tuple[float, str]:
    """Return what slots are sorted by, Eq. (5)."""
    return slot.entropy, slot.id


def best(candidates: Iterable[PushCandidate]) -> Banks:
    """Return the best-known form of each slot that was offered."""
    found: dict[str, dict[str, StoredSlot]] = {}
    for one in candidates:
        own = found.setdefault(one.class_id, {})
        known = own.get(one.slot.id)
        if known is None or (one.slot.entropy, one.slot.feature) < (known.entropy, known.feature):
            own[one.slot.id] = one.slot
    return found


def top(candidates: Iterable[PushCandidate]) -> Banks:
    """Return what a memory holds that was offered all of them, in any order."""
    return {
        class_id: {slot.id: slot for slot in sorted(own.values(), key=order)[: CONFIG.slots]}
        for class_id, own in best(candidates).items()
    }


def missing(held: Banks, promised: Iterable[PushCandidate]) -> list[str]:
    """Return the ids of slots that a memory should hold, or hold better ones than, and does not."""
    gone = []
    for class_id, own in best(promised).items():
        bank = held.get(class_id, {})
        worst = max((order(slot) for slot in bank.values()), default=(0.0, ""))
        full = len(bank) >= CONFIG.slots
        gone += [slot.id for slot in own.values() if slot.id not in bank and not (full and worst < order(slot))]
    return gone


def invented(held: Banks, sent: Iterable[PushCandidate]) -> list[str]:
    """Return the ids of slots that a memory holds in a form that nobody sent, and of those beyond its limit."""
    known = {(one.class_id, one.slot) for one in sent}
    strange = [slot.id for own, bank in held.items() for slot in bank.values() if (own, slot) not in known]
    return strange + [id_ for bank in held.values() for id_ in list(bank)[CONFIG.slots :]]


# Workers --------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Copy:
    """What a worker believes that a tenant's memory holds."""

    stamp: Stamp
    banks: dict[str, dict[str, StoredSlot]]

    @staticmethod
    async def load(store: RedisStore, tenant: str) -> Copy:
        """Read the memory."""
        stored = await store.load(tenant)
        assert stored is not None, f"the tenant {tenant} is gone"
        banks = {class_id: {slot.id: slot for slot in bank} for class_id, bank in stored.slots.items()}
        return Copy(stamp=stored.record.stamp, banks=banks)

    def take(self, stamp: Stamp, changes: Sequence[Change]) -> None:
        """Follow the store."""
        for change in changes:
            own = self.banks.setdefault(change.class_id, {})
            own.pop(change.evicted or "", None)
            own[change.slot.id] = change.slot
        self.stamp = stamp

    async def follow(self, store: RedisStore, tenant: str) -> Copy:
        """Return what a worker with this copy holds once it has heard of everything."""
        try:
            synced = await store.sync(tenant, self.stamp)
        except ReloadNeeded:
            return await Copy.load(store, tenant)
        self.take(synced.stamp, synced.changes)
        return self

    @property
    def held(self) -> Banks:
        """The banks that hold something."""
        return {class_id: bank for class_id, bank in self.banks.items() if bank}


@dataclass(frozen=True, kw_only=True)
class Acknowledged:
    """A candidate that the store has decided on. `began` and `ended` are moments of one clock, in seconds.

    `replicated` says that the replica of the primary that decided had it before the worker went on; `kept_by` is that
    primary, and which of its lives it was, if it still was the one just after.
    """

    candidate: PushCandidate
    began: float
    ended: float
    replicated: bool = False
    kept_by: tuple[Node, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A call that the store did not answer, and when the caller was told to come back."""

    began: float
    ended: float
    retry_after_s: float | None
    says: str


@dataclass(kw_only=True)
class Book:
    """What was done to one tenant's memory."""

    tenant: str
    sent: list[PushCandidate] = field(default_factory=list)
    acknowledged: list[Acknowledged] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    reloads: int = 0

    def back_after(self, moment: float) -> float:
        """Return how long after a moment the first call was acknowledged that began after it, in seconds."""
        return min(one.ended for one in self.acknowledged if one.began > moment) - moment

    def gap(self) -> float:
        """Return the longest time in which nothing was acknowledged, in seconds."""
        moments = sorted(one.ended for one in self.acknowledged)
        return max((later - sooner for sooner, later in pairwise(moments)), default=0.0)


class Witness:
    """Says whether the replica has what a primary has acknowledged: by a write after it, and by waiting for that.

    The primary is chosen before the call, and the write after the call has to be taken by the same one: then it was
    that one that decided, and its replica, which is sent writes in order, has both or none.
    """

    def __init__(self, topology: Topology, tenant: str) -> None:
        self._topology, self._key = topology, f"{{{tenant}}}:witness"
        self._node: Node | None = None
        self._client: Redis | None = None

    async def choose(self) -> None:
        """Go to the primary that has the tenant, unless there."""
        if self._client is None:
            try:
                node = self._topology.owner(self._key)
            except (RedisError, OSError, LookupError):
                return
            self._node = node
            self._client = Redis(host=HOST, port=node.port, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))

    async def confirm(self) -> tuple[bool, tuple[Node, int] | None]:
        """Return whether the replica has everything so far, and who took the write that says so."""
        if self._client is None or self._node is None:
            return False, None
        by = (self._node, self._node.lives)
        try:
            pipe = self._client.pipeline(transaction=False)
            pipe.execute_command("SET", self._key, "1")
            pipe.execute_command("WAIT", 1, _WAIT_MS)
            _, replicas = await pipe.execute()
        except (RedisError, OSError):
            await self.aclose()
            return False, None
        return replicas >= 1, by

    async def aclose(self) -> None:
        """Leave; another primary may be chosen."""
        if self._client is not None:
            await self._client.aclose()
        self._client = None


class Pusher:
    """A worker that pushes candidates of its own to a tenant, and brings each home before it goes on."""

    def __init__(self, store: RedisStore, book: Book, name: str, witness: Witness | None) -> None:
        self.copy: Copy | None = None
        self._store, self._book, self._name, self._witness = store, book, name, witness
        self._sent = 0

    async def run(self, load: Load) -> None:
        """Push until the load is over."""
        try:
            while not load.over:
                await self._deliver(self._draw(), load)
                await asyncio.sleep(_PACE_S)  # so that all workers, and the servers, get their turn
        finally:
            if self._witness is not None:
                await self._witness.aclose()

    def _draw(self) -> list[PushCandidate]:
        """Return the next candidates: ever surer ones, so that some of them always enter; ties are common."""
        drawn = []
        for number in range(self._sent, self._sent + _BATCH):
            draw = Random(f"{self._name}/{number}")
            id_ = hashlib.sha1(f"{self._name}/{number}".encode(), usedforsecurity=False).hexdigest()
            entropy = round(2.0 * draw.random() * 100 / (100 + number), 3)
            slot = StoredSlot(id=id_, entropy=entropy, feature=bytes.fromhex(id_)[:16])
            drawn.append(PushCandidate(class_id=draw.choice(_CLASS_IDS), slot=slot))
        self._sent += _BATCH
        return drawn

    async def _deliver(self, batch: Sequence[PushCandidate], load: Load) -> None:
        """Push until it is acknowledged, as a caller does that is told to come back."""
        self._book.sent += batch
        while True:
            began = time.monotonic()
            if self._witness is not None:
                await self._witness.choose()
            try:
                await self._push(batch)
            except StoreDown as told:
                self._book.refused.append(
                    Refused(began=began, ended=time.monotonic(), retry_after_s=told.retry_after_s, says=str(told))
                )
                await load.note()
                _leave_if_told()
                await asyncio.sleep(_PAUSE_S)  # sooner than it was told: to see when the store is back
                continue
            break
        ended = time.monotonic()
        replicated, by = (False, None) if self._witness is None else await self._witness.confirm()
        self._book.acknowledged += [
            Acknowledged(candidate=one, began=began, ended=ended, replicated=replicated, kept_by=by) for one in batch
        ]
        await load.note()

    async def _push(self, batch: Sequence[PushCandidate]) -> None:
        while True:
            if self.copy is None:
                self.copy = await Copy.load(self._store, self._book.tenant)
            try:
                pushed = await self._store.push(self._book.tenant, self.copy.stamp, batch)
            except ReloadNeeded:
                self.copy = None
                self._book.reloads += 1
            else:
                self.copy.take(pushed.synced.stamp, pushed.synced.changes)
                return


def _leave_if_told() -> None:
    """Heed a cancellation that a library has swallowed: `asyncio.wait_for` of Python 3.11 does, now and then."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Load:
    """Workers at work on several tenants."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.books: dict[str, Book] = {}
        self.pushers: dict[str, list[Pusher]] = {}
        self.idle: dict[str, list[Copy]] = {}
        self.stores: list[RedisStore] = []
        self.over = False
        self.tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()

    async def note(self) -> None:
        """Tell those who wait that something came to an end."""
        async with self._changed:
            self._changed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once something holds of the books."""
        async with self._changed:
            await self._changed.wait_for(holds)

    async def meets(self, tenant: str) -> None:
        """Return once a call for a tenant that begins from now on has ended, well or not."""
        book, now = self.books[tenant], time.monotonic()
        known, refused = len(book.acknowledged), len(book.refused)
        await self.until(lambda: any(one.began > now for one in (*book.acknowledged[known:], *book.refused[refused:])))

    async def goes_on(self, tenant: str, calls: int = 8) -> float:
        """Return once so many calls of a tenant that begin from now on are acknowledged: the seconds to the first."""
        now, acknowledged = time.monotonic(), self.books[tenant].acknowledged
        known = len(acknowledged)
        await self.until(lambda: sum(one.began > now for one in acknowledged[known:]) >= calls * _BATCH)
        return self.books[tenant].back_after(now)

    async def push_surest(self, tenant: str) -> None:
        """Have a candidate acknowledged that no other keeps out of its class."""
        id_ = "5" * 40
        one = PushCandidate(
            class_id=_CLASS_IDS[0], slot=StoredSlot(id=id_, entropy=0.0, feature=bytes.fromhex(id_)[:16])
        )
        book, began = self.books[tenant], time.monotonic()
        book.sent.append(one)
        while True:
            copy = await Copy.load(self.stores[0], tenant)
            with suppress(ReloadNeeded):
                await self.stores[0].push(tenant, copy.stamp, [one])
                break
        book.acknowledged.append(Acknowledged(candidate=one, began=began, ended=time.monotonic()))

    async def look_away(self, tenant: str) -> None:
        """Let one more worker have a copy that it does nothing with before all is over."""
        self.idle[tenant] = [await Copy.load(self.stores[0], tenant)]

    async def overtakes(self, tenant: str) -> None:
        """Return once the store has counted as many changes as the idle ones have seen, and more."""
        (idle,) = self.idle[tenant]
        while (await stamp_of(self.stores[0], tenant)).version <= idle.stamp.version:
            await self.goes_on(tenant, calls=1)

    def copies(self, tenant: str) -> list[Copy]:
        """Return what every worker believes."""
        own = [one.copy for one in self.pushers[tenant]]
        return [copy for copy in (*own, *self.idle.get(tenant, ())) if copy is not None]

    async def finish(self) -> None:
        """Let the workers bring home what they have in hand, and return once they have."""
        self.over = True
        await asyncio.gather(*self.tasks)


@asynccontextmanager
async def load(
    topology: Topology,
    tenants: Sequence[str],
    *,
    witnessed: bool = False,
    services: int = 2,
    workers: int = 2,
    timeout_s: float = TIMEOUT_S,
) -> AsyncIterator[Load]:
    """Let workers push to new tenants until the block ends or finishes them.

    There are so many services with a pool of connections of their own, and in each so many workers a tenant.
    """
    work = Load(topology)
    work.stores = [store_of(topology, timeout_s) for _ in range(services)]
    try:
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            for tenant in tenants:
                await create(work.stores[0], tenant)
                work.books[tenant] = book = Book(tenant=tenant)
                work.pushers[tenant] = [
                    Pusher(store, book, f"{tenant}/{at}/{i}", Witness(topology, tenant) if witnessed else None)
                    for at, store in enumerate(work.stores)
                    for i in range(workers)
                ]
                work.tasks += [group.create_task(one.run(work)) for one in work.pushers[tenant]]
            try:
                yield work
            finally:
                work.over = True
    except TimeoutError as error:
        told = {book.tenant: [one.says for one in book.refused[-1:]] for book in work.books.values()}
        raise AssertionError(f"the load did not end in {PATIENCE_S:g} s; last refusals: {told}") from error
    finally:
        for store in work.stores:
            await store.aclose()


# Laws -----------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Found:
    """What became of one tenant's memory under a load; seconds where it says so.

    `lost` are slots that had to be there, `invented` those that nobody sent, `astray` workers that believe something
    else than the store holds, `rude` refusals that do not say when to come back: all have to be 0. `unsure` are
    acknowledged slots that are gone and that no replica had: what the engine does not promise.
    """

    tenant: str
    acknowledged: int
    replicated: int
    refused: int
    reloads: int
    gap_s: float
    lost: int
    unsure: int
    invented: int
    astray: int
    rude: int

    @property
    def broken(self) -> list[str]:
        """The laws that do not hold."""
        return [name for name in ("lost", "invented", "astray", "rude") if getattr(self, name)]


async def judge(work: Load, tenant: str, *, survived: bool) -> Found:
    """Compare what a tenant's memory holds after a load with what it has to hold.

    Where every node `survived`, that is exactly the best of what was sent; otherwise what a replica had, and what was
    acknowledged by a primary that lives, has to be there, or better ones.
    """
    book = work.books[tenant]
    held = (await Copy.load(work.stores[0], tenant)).held
    owner = work.topology.owner(key_of(tenant))
    promised = [one.candidate for one in book.acknowledged if survived or _is_promised(one, owner)]
    lost = missing(held, promised)
    gone = missing(held, (one.candidate for one in book.acknowledged))
    return Found(
        tenant=tenant,
        acknowledged=len(book.acknowledged),
        replicated=sum(one.replicated for one in book.acknowledged),
        refused=len(book.refused),
        reloads=book.reloads,
        gap_s=round(book.gap(), 2),
        lost=len(lost),
        unsure=len(gone) - len(lost),
        invented=len(invented(held, book.sent)),
        astray=sum([(await one.follow(work.stores[0], tenant)).held != held for one in work.copies(tenant)]),
        rude=sum(not one.retry_after_s for one in book.refused),
    )


def _is_promised(one: Acknowledged, owner: Node) -> bool:
    return one.replicated or (owner.alive and one.kept_by == (owner, owner.lives))


def key_of(tenant: str) -> str:
    """Return a key of a tenant: all lie in one slot."""
    return Keys(tenant).config
