"""The desk: the samples of one tenant against its memory, as many at a time as have gathered.

While a tenant's memory is held, samples gather; when it is free, all of them are read together, which is one readout
and one push for the tenant's share of an encode batch. The answers do not depend on who else was in the group.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from core.classify import Answers
from core.memory.codec import FEATURE_BYTES, encode_feature
from core.memory.dynamic import Outcome, SlotWrite
from service.concurrency.worker_thread import Worker
from service.domain.memory import StoredSlot
from service.errors import Contended, ServiceError, StoreAway, StoreDown
from service.memory.cache import Archive
from service.memory.hot_memory import HotMemory
from service.memory.outbox import Outbox
from service.stores.protocol import MemoryStore, PushCandidate, ReloadNeeded, Verdict
from service.telemetry import logs
from service.telemetry.metrics import Lap, Metrics

from .results import Learned, Question, Reading
from .scoring import Scored, count_group, is_barred, score_group

GROUP = 32
"""Images read together, and so candidates in one push, at most."""
_HELD = (Outcome.FILLED, Outcome.REPLACED, Outcome.DUPLICATE, "pending")
_TRIES = 3
_NEW_EPOCH = "the memory began a new epoch"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Waiting:
    question: Question
    future: asyncio.Future[Reading] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Desk:
    """Reads and writes tenants' memories, one group of samples a tenant at a time."""

    def __init__(
        self,
        archive: Archive,
        store: MemoryStore,
        worker: Worker,
        metrics: Metrics,
        *,
        tenant_max_bytes: Callable[[str], int],
        pending_images: int = 0,
        serve_stale: bool = False,
    ) -> None:
        self._archive, self._store, self._worker, self._metrics = archive, store, worker, metrics
        self._tenant_max_bytes, self._serve_stale = tenant_max_bytes, serve_stale
        self._outbox = Outbox(room=pending_images)
        self._queues: dict[str, deque[_Waiting]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> int:
        """Writes that wait for the store."""
        return len(self._outbox)

    async def ask(self, tenant: str, question: Question) -> Reading:
        """Return the answer to one image.

        Raises:
            UnknownTenant, NoClasses, FingerprintMismatch, StoreDown: as the tenant's memory is opened.
        """
        waiting = _Waiting(question=question)
        if tenant not in self._queues:
            self._queues[tenant] = deque()
            task = asyncio.create_task(self._work_off(tenant, self._queues[tenant]), name="dmn-desk")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._queues[tenant].append(waiting)
        return await waiting.future

    async def deliver(self) -> None:
        """Push what waits for the store, as far as it answers."""
        for tenant in self._outbox.tenants:
            try:
                async with self._archive.open(tenant) as hot:
                    await self._catch_up(hot)
            except ReloadNeeded:
                self._archive.drop(tenant)
            except StoreDown:
                continue
            except ServiceError:
                self._lose(len(self._outbox.take(tenant)[1]), tenant, "the tenant is gone")
            except Exception as error:  # noqa: BLE001 - a fault with one tenant is no fault of the others
                logs.event(logs.UPKEEP_FAILED, level=logging.ERROR, error=error, tenant=tenant)

    async def drain(self) -> None:
        """Wait until every group under way is done, and what waits for the store is pushed or, if need be, given up."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for _ in range(_TRIES):  # a memory that changed in between is pushed to once it is read again
            await self.deliver()
        for tenant in self._outbox.tenants:
            self._lose(len(self._outbox.take(tenant)[1]), tenant, "the service stops")

    async def _work_off(self, tenant: str, queue: deque[_Waiting]) -> None:
        """Answer a tenant's samples until none waits; a task of its own, so that no client's leaving stops others."""
        tries = 0
        while queue:
            group: list[_Waiting] = []
            laps: list[Lap] = []
            try:
                async with self._archive.open(tenant, laps) as hot:
                    await self._catch_up(hot)
                    group = _take(queue)
                    await self._answer(hot, group, laps)
                tries = 0
            except ReloadNeeded:
                # The memory began a new life between its reading and the push: nothing was written; read it again.
                self._archive.drop(tenant)
                queue.extendleft(reversed(group))
                tries += 1
                if tries == _TRIES:
                    _fail(queue, Contended())
            except Exception as error:  # noqa: BLE001 - whatever it is, every caller must hear of it
                _fail(group, error)
                _fail(queue, error)
        del self._queues[tenant]

    async def _answer(self, hot: HotMemory, group: list[_Waiting], laps: list[Lap]) -> None:
        answers, said, group = await self._read(hot, group, laps)
        if answers is None:
            return
        with self._metrics.stage("store", laps):
            learned = await self._learn(hot, group, answers)
        if answers.adapted is not None:
            await self._worker.run(count_group, hot, [waiting.question for waiting in group], answers.adapted)
            self._metrics.counted.labels("counted").inc(sum(map(len, answers.adapted.counted)))
        for waiting, own, one in zip(group, learned, said, strict=True):
            if waiting.future.done():
                continue
            reading = Reading(
                probabilities=one.probabilities,
                top=one.top,
                text=one.firsts["text"],
                dynamic=one.firsts["dynamic"],
                static=one.firsts.get("static"),
                statistics=one.firsts.get("statistics"),
                learned=own,
                explanation=one.explanation,
                stamp=hot.stamp,
                stale=hot.stale,
                due=hot.due,
                laps=[*laps],
                digest=waiting.question.digest,
            )
            waiting.future.set_result(reading)

    async def _read(
        self, hot: HotMemory, group: list[_Waiting], laps: list[Lap]
    ) -> tuple[Answers | None, list[Scored], list[_Waiting]]:
        """Return the answers to those of a group who wait to the end; who leaves meanwhile leaves no trace in them."""
        while group:
            questions = [waiting.question for waiting in group]
            room = self._room(hot)
            with self._metrics.stage("memory", laps):
                answers, said = await self._worker.run(score_group, hot, questions, room)
            stay = [waiting for waiting in group if not waiting.future.done()]
            if len(stay) == len(group):
                return answers, said, group
            group = stay
        return None, [], []

    async def _learn(self, hot: HotMemory, group: Sequence[_Waiting], answers: Answers) -> list[Learned]:
        """Push what the memory took, take the store's changes back, and return what became of each image."""
        wanted = [i for i, took in enumerate(answers.learned) if took]
        verdicts: dict[int, Verdict] = {}
        pending: set[int] = set()
        if wanted:
            candidates = [_candidate(hot, answers.writes[i]) for i in wanted]
            try:
                verdicts = dict(zip(wanted, await self._push(hot, candidates), strict=True))
            except StoreDown:
                if not self._serve_stale:
                    raise
                hot.away = True
                pending = set(self._put_off(hot, wanted, candidates))
        learned = [
            _learned(hot, waiting.question, write, verdicts.get(i), pending=i in pending)
            for i, (waiting, write) in enumerate(zip(group, answers.writes, strict=True))
        ]
        for outcome, images in Counter(own.outcome for own in learned).items():
            self._metrics.updates.labels(outcome).inc(images)
        for own in learned:
            self._metrics.entropy_nats.observe(own.entropy)
        return learned

    def _room(self, hot: HotMemory) -> int:
        """Return how many more slots the tenant may fill; what waits for the store may fill some."""
        each = FEATURE_BYTES * hot.snapshot.text.shape[-1]
        held = hot.filled + self._outbox.count(hot.record.name)
        return (self._tenant_max_bytes(hot.record.name) - hot.static_bytes) // each - held

    async def _push(self, hot: HotMemory, candidates: Sequence[PushCandidate]) -> tuple[Verdict, ...]:
        if hot.away:
            raise StoreAway("The store did not answer a moment ago.", retry_after_s=1.0)
        pushed = await self._store.push(hot.record.name, hot.stamp, candidates)
        await self._archive.take_back(hot, pushed.synced.stamp, pushed.synced.changes)
        return pushed.verdicts

    def _put_off(self, hot: HotMemory, wanted: Sequence[int], candidates: Sequence[PushCandidate]) -> list[int]:
        """Keep writes for later; return which of them there was room for."""
        name, epoch = hot.record.name, hot.stamp.epoch
        self._lose(self._outbox.forget(name, but=epoch), name, _NEW_EPOCH)
        kept = [i for i, own in zip(wanted, candidates, strict=True) if self._outbox.add(name, epoch, own)]
        if len(kept) < len(wanted):
            self._lose(len(wanted) - len(kept), name, "no more room for writes that wait")
        return kept

    async def _catch_up(self, hot: HotMemory) -> None:
        """Push what waited for the store; what belongs to another epoch is given up: it would undo a reset."""
        if hot.away or hot.record.name not in self._outbox:
            return
        name, epoch = hot.record.name, hot.stamp.epoch
        self._lose(self._outbox.forget(name, but=epoch), name, _NEW_EPOCH)
        waiting = self._outbox.take(name)[1]
        for start in range(0, len(waiting), GROUP):
            try:
                await self._push(hot, waiting[start : start + GROUP])
            except BaseException as error:
                # Whatever it was, cancelled or not: pushing again what may have been written changes nothing.
                self._put_off(hot, range(len(waiting) - start), waiting[start:])
                if not isinstance(error, StoreDown):
                    raise
                hot.away = True
                return
        if waiting:
            logs.event(logs.WRITES_DELIVERED, tenant=name, images=len(waiting))

    def _lose(self, images: int, tenant: str, why: str) -> None:
        if images:
            self._metrics.updates.labels("lost").inc(images)
            logs.event(logs.WRITES_LOST, level=logging.WARNING, tenant=tenant, images=images, why=why)


def _take(queue: deque[_Waiting]) -> list[_Waiting]:
    """Take a group, passing over those that nobody waits for."""
    group: list[_Waiting] = []
    while queue and len(group) < GROUP:
        waiting = queue.popleft()
        if not waiting.future.done():
            group.append(waiting)
    return group


def _fail(waiting: Collection[_Waiting], error: Exception) -> None:
    for one in waiting:
        if not one.future.done():
            one.future.set_exception(error)
    if isinstance(waiting, deque):
        waiting.clear()


def _candidate(hot: HotMemory, write: SlotWrite) -> PushCandidate:
    sample = write.candidate
    slot = StoredSlot(id=str(sample.id), entropy=sample.entropy, feature=encode_feature(sample.key))
    return PushCandidate(class_id=hot.config.classes[sample.label].id, slot=slot)


def _learned(
    hot: HotMemory, question: Question, write: SlotWrite, verdict: Verdict | None, *, pending: bool
) -> Learned:
    """Return what became of an image: the store's verdict, or why nothing was pushed."""
    if verdict is not None:
        outcome = str(verdict.outcome)
    elif pending:
        outcome = "pending"
    elif not question.learn or not hot.config.learn:
        outcome = "skipped"
    elif write.slot is None:
        outcome = str(write.outcome)
    else:
        outcome = str(Outcome.REJECTED) if is_barred(hot, write) else "skipped"
    sample = write.candidate
    return Learned(
        outcome=outcome,
        label=hot.names[sample.label],
        entropy=sample.entropy,
        slot=str(sample.id) if outcome in _HELD else None,
        evicted=None if verdict is None else verdict.evicted,
    )
