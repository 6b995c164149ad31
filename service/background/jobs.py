"""Long work for a tenant, done in the background; how it stands is in the store, so that any replica can tell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

from service.domain.records import Job, JobState
from service.errors import Draining, Internal, ServiceError, StoreDown, UnknownJob, UnknownTenant
from service.problem_types import PROBLEMS
from service.stores.protocol import MemoryStore
from service.telemetry import logs
from service.telemetry.metrics import Metrics

HEARTBEAT_S = 2.0
"""How often a job that runs is written down."""

LOST_S = 30.0
"""A job that nobody has written down for so long has lost its process."""


class Report(Protocol):
    """Told by the work how far it is, from 0 to 1, and what it can say of its result by then."""

    def __call__(self, progress: float, result: Mapping[str, Any] | None = None) -> None:
        """Note it."""


Work = Callable[[Report], Awaitable[Mapping[str, Any]]]
"""Does the work and returns its result."""


class Jobs:
    """Starts jobs and tells how they stand. `wall` is wall time in seconds, the same for all replicas."""

    def __init__(self, store: MemoryStore, metrics: Metrics, wall: Callable[[], float]) -> None:
        self._store, self._metrics, self._wall = store, metrics, wall
        self._own: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._began: dict[str, float] = {}
        self._leaving = False

    async def start(self, tenant: str, kind: str, work: Work, *, turn: asyncio.Lock | None = None) -> Job:
        """Start work in the background and return its job; with `turn`, queue it until that is free.

        Raises:
            UnknownTenant, StoreDown: it could not be written down; nothing was started.
        """
        now = self._wall()
        state = JobState.RUNNING if turn is None else JobState.QUEUED
        job = Job(id=uuid4().hex, kind=kind, state=state, created=now, updated=now)
        if not await self._store.note_job(tenant, job):
            raise UnknownTenant(f"There is no tenant {tenant!r}.")
        self._own[job.id] = job
        task = asyncio.create_task(self._through(tenant, job.id, work, turn), name=f"dmn-{kind}")
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._forget(job.id))
        return job

    async def wait(self, id_: str, seconds: float) -> None:
        """Return when a job of this process is over, or after so many seconds."""
        task = self._tasks.get(id_)
        if task is not None:
            await asyncio.wait((task,), timeout=seconds)

    def under_way(self, kind: str) -> int:
        """Return how many jobs of a kind this process has, those that wait for their turn among them."""
        return sum(job.kind == kind and not job.over for job in self._own.values())

    async def get(self, tenant: str, id_: str) -> Job:
        """Return how a job stands.

        Raises:
            UnknownJob: there is none of that id.
        """
        for job in await self.every(tenant):
            if job.id == id_:
                return job
        raise UnknownJob(f"There is no job {id_!r}.")

    async def every(self, tenant: str) -> list[Job]:
        """Return a tenant's latest jobs, the oldest first."""
        return [self._own.get(job.id) or self._judged(job) for job in await self._store.jobs(tenant)]

    async def cancel(self, tenant: str, id_: str) -> None:
        """Cancel a job, wherever it runs; one that is over stays as it is.

        Raises:
            UnknownJob: there is none of that id.
        """
        job = await self.get(tenant, id_)
        cancelled = replace(job, state=JobState.CANCELLED, updated=self._wall(), eta_s=None, result=None)
        await self._store.note_job(tenant, cancelled)
        await self._stop(id_)

    async def aclose(self) -> None:
        """Stop what runs; what it was to do is found undone by whoever needs it next."""
        self._leaving = True
        await asyncio.gather(*(self._stop(id_) for id_ in self._tasks))

    async def _stop(self, id_: str) -> None:
        """Stop a job of this process and wait until it has; one that only writes down its end is let do so."""
        task = self._tasks.get(id_)
        if task is None:
            return
        if not self._own[id_].over:
            task.cancel()
        await asyncio.wait((task,))

    async def _through(self, tenant: str, id_: str, work: Work, turn: asyncio.Lock | None) -> None:
        """Do the work when its turn has come, and write down how it goes and how it ends."""
        kind, task = self._own[id_].kind, asyncio.current_task()
        self._metrics.jobs.labels(kind, self._own[id_].state).inc()
        beat = asyncio.create_task(self._beat(tenant, id_, task), name="dmn-job-beat")
        try:
            async with turn or nullcontext():
                self._begin(id_)
                result = await work(partial(self._report, id_))
            self._move(id_, state=JobState.DONE, progress=1.0, eta_s=0.0, result=dict(result))
        except asyncio.CancelledError:
            if self._leaving:
                self._fail(id_, Draining("The process that did this job was stopped."))
            else:
                self._move(id_, state=JobState.CANCELLED, eta_s=None, result=None)
        except ServiceError as error:
            self._fail(id_, error)
        except Exception as error:  # noqa: BLE001 - nobody awaits a job: it has to say itself what became of it
            logs.event(logs.JOB_FAILED, level=logging.ERROR, error=error, tenant=tenant, kind=kind)
            self._fail(id_, Internal("An unexpected error ended the job."))
        finally:
            beat.cancel()
            state = self._own[id_].state
            logs.event(logs.JOB_OVER, tenant=tenant, kind=kind, state=str(state))
            with suppress(StoreDown):
                await self._store.note_job(tenant, self._own[id_])

    async def _beat(self, tenant: str, id_: str, task: asyncio.Task[None] | None) -> None:
        """Write the job down again and again; when it was cancelled from elsewhere, cancel it here."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._update(id_)
            with suppress(StoreDown):
                if not await self._store.note_job(tenant, self._own[id_]) and task is not None:
                    task.cancel()
                    return

    def _begin(self, id_: str) -> None:
        self._began[id_] = self._wall()
        self._move(id_, state=JobState.RUNNING)

    def _report(self, id_: str, progress: float, result: Mapping[str, Any] | None = None) -> None:
        done = min(1.0, max(0.0, progress))
        spent = self._wall() - self._began[id_]
        told = self._own[id_].result if result is None else dict(result)
        self._update(id_, progress=done, eta_s=spent * (1 - done) / done if done else None, result=told)

    def _fail(self, id_: str, error: ServiceError) -> None:
        self._move(id_, state=JobState.FAILED, eta_s=None, result=None, error=_problem(error))

    def _move(self, id_: str, *, state: JobState, **values: Any) -> None:
        """Go on to another state, and count it there."""
        job = self._own[id_]
        self._metrics.jobs.labels(job.kind, job.state).dec()
        self._metrics.jobs.labels(job.kind, state).inc()
        self._update(id_, state=state, **values)

    def _update(self, id_: str, **values: Any) -> None:
        self._own[id_] = replace(self._own[id_], updated=self._wall(), **values)

    def _forget(self, id_: str) -> None:
        del self._tasks[id_], self._own[id_]
        self._began.pop(id_, None)

    def _judged(self, job: Job) -> Job:
        if job.over or self._wall() - job.updated < LOST_S:
            return job
        return replace(
            job, state=JobState.FAILED, eta_s=None, error=_problem(Draining("The process that did this job is gone."))
        )


def _problem(error: ServiceError) -> dict[str, Any]:
    known = PROBLEMS[error.slug]
    return {"type": f"/problems/{error.slug}", "title": known.title, "status": known.status, "detail": error.detail}
