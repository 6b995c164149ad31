"""Long work in the background: any replica can tell how it stands, and stop it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.background import jobs as jobs_module
from service.background.jobs import LOST_S, Jobs, Report
from service.domain.records import Job, JobState
from service.domain.tenant import TenantConfig
from service.errors import LimitExceeded, StoreAway, UnknownJob, UnknownTenant
from service.stores.in_process import InProcessStore
from service.telemetry import logs
from service.telemetry.metrics import Metrics

PATIENCE_S = 60.0


class Store(InProcessStore):
    """The in-process store, which tells when a job was written down, and is away where a test asks for it."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0, remember_s=1.0, remember_bytes=1)
        self.noted = asyncio.Event()
        self.away = False

    async def note_job(self, tenant: str, job: Job) -> bool:
        self.noted.set()
        if self.away:
            raise StoreAway("away")
        return await super().note_job(tenant, job)


class Work:
    """Work that goes on when it is told to, and reports what it is told to."""

    def __init__(self, *reports: float, fault: Exception | None = None) -> None:
        self.reports, self.fault = reports, fault
        self.started, self.gate, self.stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, report: Report) -> Mapping[str, Any]:
        try:
            for progress in self.reports:
                report(progress)
            self.started.set()
            await self.gate.wait()
        finally:
            self.stopped.set()
        if self.fault is not None:
            raise self.fault
        return {"made": 7}


class Office:
    """A store with the tenant `zoo`, wall time that stands still until it is told, and replicas that share both."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.store = Store()
        self.replicas: list[Jobs] = []
        self.metrics: list[Metrics] = []

    def replica(self) -> Jobs:
        self.metrics.append(Metrics(CollectorRegistry()))
        self.replicas.append(Jobs(self.store, self.metrics[-1], lambda: self.now))
        return self.replicas[-1]

    def counted(self, kind: str, replica: int = 0) -> dict[str, float]:
        values = {
            str(state): self.metrics[replica].registry.get_sample_value("dmn_jobs", {"kind": kind, "state": state})
            for state in JobState
        }
        return {state: value for state, value in values.items() if value}


@pytest.fixture
async def office() -> AsyncIterator[Office]:
    office = Office()
    await office.store.replace("zoo", TenantConfig(), "f", expected=None, labelling="", origin={})
    yield office
    for replica in office.replicas:
        await replica.aclose()


@pytest.fixture
def jobs(office: Office) -> Jobs:
    return office.replica()


async def begun(jobs: Jobs, work: Work) -> Job:
    """Start work, and return its job when it is under way."""
    job = await jobs.start("zoo", "bake", work)
    async with asyncio.timeout(PATIENCE_S):
        await work.started.wait()
    return job


async def ended(jobs: Jobs, job: Job) -> Job:
    await jobs.wait(job.id, PATIENCE_S)
    return await jobs.get("zoo", job.id)


# Its life -------------------------------------------------------------------------------------------------------------


async def test_a_job_runs_in_the_background_and_then_has_a_result(office: Office, jobs: Jobs) -> None:
    work = Work()
    job = await begun(jobs, work)
    assert (job.kind, job.state, job.created, job.progress, job.result) == ("bake", JobState.RUNNING, 1000.0, 0.0, None)
    assert office.counted("bake") == {"running": 1}
    office.now += 5.0
    work.gate.set()
    done = await ended(jobs, job)
    assert (done.id, done.state, done.progress, done.eta_s, done.result) == (
        job.id,
        JobState.DONE,
        1.0,
        0.0,
        {"made": 7},
    )
    assert (done.created, done.updated, done.over, done.error) == (1000.0, 1005.0, True, None)
    assert office.counted("bake") == {"done": 1}


async def test_every_replica_can_tell_how_a_job_stands(office: Office, jobs: Jobs) -> None:
    other = office.replica()
    work = Work()
    job = await begun(jobs, work)
    assert await other.get("zoo", job.id) == job
    work.gate.set()
    done = await ended(jobs, job)
    assert await other.get("zoo", job.id) == done
    assert await other.every("zoo") == [done]


async def test_jobs_are_told_in_the_order_of_their_start(office: Office, jobs: Jobs) -> None:
    works = [Work(), Work(), Work()]
    started = []
    for work in works:
        started.append(await begun(jobs, work))
        office.now += 1.0
    works[1].gate.set()
    await ended(jobs, started[1])
    assert [job.id for job in await jobs.every("zoo")] == [job.id for job in started]


async def test_an_unknown_job_is_unknown(jobs: Jobs) -> None:
    for call in (jobs.get, jobs.cancel):
        with pytest.raises(UnknownJob):
            await call("zoo", "none")
    with pytest.raises(UnknownJob):
        await jobs.get("farm", "none")


async def test_a_job_of_one_tenant_is_unknown_to_another(office: Office, jobs: Jobs) -> None:
    await office.store.replace("farm", TenantConfig(), "f", expected=None, labelling="", origin={})
    job = await begun(jobs, Work())
    with pytest.raises(UnknownJob):
        await jobs.cancel("farm", job.id)
    assert (await jobs.get("zoo", job.id)).state is JobState.RUNNING


async def test_what_cannot_be_written_down_is_not_started(office: Office, jobs: Jobs) -> None:
    office.store.away = True
    work = Work()
    with pytest.raises(StoreAway):
        await jobs.start("zoo", "bake", work)
    office.store.away = False
    assert await jobs.every("zoo") == []
    assert not work.started.is_set()
    assert office.counted("bake") == {}


async def test_what_belongs_to_nobody_is_not_started(office: Office, jobs: Jobs) -> None:
    """The tenant may have been deleted a moment ago."""
    work = Work()
    with pytest.raises(UnknownTenant):
        await jobs.start("farm", "bake", work)
    assert not work.started.is_set()
    assert office.counted("bake") == {}


async def test_waiting_ends_with_the_job_or_with_patience(jobs: Jobs) -> None:
    work = Work()
    job = await begun(jobs, work)
    await jobs.wait(job.id, 0.0)
    assert not (await jobs.get("zoo", job.id)).over
    work.gate.set()
    await jobs.wait(job.id, PATIENCE_S)
    assert (await jobs.get("zoo", job.id)).over
    await jobs.wait(job.id, PATIENCE_S)
    await jobs.wait("none", PATIENCE_S)


# Progress -------------------------------------------------------------------------------------------------------------


async def test_what_is_left_is_told_from_what_is_done(office: Office, jobs: Jobs) -> None:
    reports: asyncio.Queue[Report] = asyncio.Queue()

    async def work(report: Report) -> Mapping[str, Any]:
        reports.put_nowait(report)
        await asyncio.Event().wait()
        return {}

    job = await jobs.start("zoo", "bake", work)
    async with asyncio.timeout(PATIENCE_S):
        report = await reports.get()
    office.now += 10.0
    for progress, told, eta_s in (
        (0.0, 0.0, None),
        (0.25, 0.25, 30.0),
        (0.5, 0.5, 10.0),
        (2.0, 1.0, 0.0),
        (-1.0, 0.0, None),
    ):
        report(progress)
        now = await jobs.get("zoo", job.id)
        assert (now.state, now.progress, now.eta_s) == (JobState.RUNNING, told, eta_s)


async def test_other_replicas_hear_of_progress_with_every_beat(
    office: Office, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "HEARTBEAT_S", 0.001)
    job = await begun(jobs, Work(0.5))
    office.now += 7.0
    office.store.noted.clear()
    async with asyncio.timeout(PATIENCE_S):
        await office.store.noted.wait()
    told = await office.replica().get("zoo", job.id)
    assert (told.progress, told.updated) == (0.5, 1007.0)


async def test_a_store_that_is_away_for_a_while_stops_no_job(
    office: Office, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "HEARTBEAT_S", 0.001)
    work = Work()
    job = await begun(jobs, work)
    for away in (True, True, False):
        office.store.away = away
        office.store.noted.clear()
        async with asyncio.timeout(PATIENCE_S):
            await office.store.noted.wait()
    work.gate.set()
    assert (await ended(jobs, job)).state is JobState.DONE


# Failure --------------------------------------------------------------------------------------------------------------


async def test_a_job_that_is_refused_fails_with_the_problem(office: Office, jobs: Jobs) -> None:
    work = Work(0.5, fault=LimitExceeded("It would be too large."))
    job = await begun(jobs, work)
    work.gate.set()
    failed = await ended(jobs, job)
    assert (failed.state, failed.progress, failed.eta_s, failed.result) == (JobState.FAILED, 0.5, None, None)
    assert failed.error == {
        "type": "/problems/limit-exceeded",
        "title": "A limit is exceeded",
        "status": 422,
        "detail": "It would be too large.",
    }
    assert office.counted("bake") == {"failed": 1}


async def test_an_unexpected_error_is_logged_and_leaks_nothing(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    work = Work(fault=KeyError("secret"))
    work.gate.set()
    with caplog.at_level(logging.ERROR, logs.logger.name):
        failed = await ended(jobs, await begun(jobs, work))
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert (failed.error["type"], failed.error["status"]) == ("/problems/internal", 500)
    assert "secret" not in str(failed.error)
    (line,) = [one for one in caplog.records if one.message == logs.JOB_FAILED]
    assert line.exc_info is not None
    assert isinstance(line.exc_info[1], KeyError)


# Cancelling -----------------------------------------------------------------------------------------------------------


async def test_a_cancelled_job_stops_at_once(office: Office, jobs: Jobs) -> None:
    work = Work(0.5)
    job = await begun(jobs, work)
    await jobs.cancel("zoo", job.id)
    assert work.stopped.is_set()
    told = await jobs.get("zoo", job.id)
    assert (told.state, told.eta_s, told.result, told.error) == (JobState.CANCELLED, None, None, None)
    assert office.counted("bake") == {"cancelled": 1}


async def test_a_job_that_runs_elsewhere_is_cancelled_there(
    office: Office, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "HEARTBEAT_S", 0.001)
    other, work = office.replica(), Work()
    job = await begun(jobs, work)
    await other.cancel("zoo", job.id)
    async with asyncio.timeout(PATIENCE_S):
        await work.stopped.wait()
    await jobs.wait(job.id, PATIENCE_S)
    for replica in (jobs, other):
        assert (await replica.get("zoo", job.id)).state is JobState.CANCELLED
    assert office.counted("bake") == {"cancelled": 1}


async def test_a_job_that_was_cancelled_elsewhere_stays_so_even_if_it_is_done_before_it_hears_of_it(
    office: Office, jobs: Jobs
) -> None:
    other, work = office.replica(), Work()
    job = await begun(jobs, work)
    await other.cancel("zoo", job.id)
    work.gate.set()
    assert (await ended(jobs, job)).state is JobState.CANCELLED


async def test_a_job_that_is_over_stays_as_it_is(office: Office, jobs: Jobs) -> None:
    work = Work()
    work.gate.set()
    done = await ended(jobs, await begun(jobs, work))
    office.now += 1.0
    for replica in (jobs, office.replica()):
        await replica.cancel("zoo", done.id)
        assert await replica.get("zoo", done.id) == done


async def test_a_job_that_is_cancelled_before_it_began_never_begins(jobs: Jobs) -> None:
    work = Work()
    job = await jobs.start("zoo", "bake", work)
    await jobs.cancel("zoo", job.id)
    assert not work.started.is_set()
    assert (await jobs.get("zoo", job.id)).state is JobState.CANCELLED


# Lost -----------------------------------------------------------------------------------------------------------------


async def test_a_job_whose_process_is_gone_is_told_as_failed_after_a_while(office: Office) -> None:
    lost = Job(id="1", kind="bake", state=JobState.RUNNING, created=900.0, updated=1000.0, progress=0.5, eta_s=9.0)
    await office.store.note_job("zoo", lost)
    jobs = office.replica()
    office.now += LOST_S - 0.1
    assert await jobs.get("zoo", "1") == lost
    office.now += 0.1
    told = await jobs.get("zoo", "1")
    assert (told.state, told.progress, told.eta_s) == (JobState.FAILED, 0.5, None)
    assert told.error is not None
    assert (told.error["type"], told.error["status"]) == ("/problems/draining", 503)


async def test_a_job_that_is_over_is_never_lost(office: Office, jobs: Jobs) -> None:
    work = Work()
    work.gate.set()
    done = await ended(jobs, await begun(jobs, work))
    office.now += 10 * LOST_S
    assert await office.replica().get("zoo", done.id) == done


async def test_a_lost_job_can_be_cancelled_for_good(office: Office, jobs: Jobs) -> None:
    lost = Job(id="1", kind="bake", state=JobState.RUNNING, created=0.0, updated=0.0)
    await office.store.note_job("zoo", lost)
    await jobs.cancel("zoo", "1")
    assert (await jobs.get("zoo", "1")).over
    assert not await office.store.note_job("zoo", replace(lost, updated=office.now))


# Closing --------------------------------------------------------------------------------------------------------------


async def test_closing_stops_every_job_and_says_why(office: Office, jobs: Jobs) -> None:
    works = [Work(), Work()]
    started = [await begun(jobs, work) for work in works]
    async with asyncio.timeout(PATIENCE_S):
        await jobs.aclose()
    other = office.replica()
    for job, work in zip(started, works, strict=True):
        assert work.stopped.is_set()
        told = await other.get("zoo", job.id)
        assert told.state is JobState.FAILED
        assert told.error is not None
        assert told.error["type"] == "/problems/draining"
    assert office.counted("bake") == {"failed": 2}


async def test_closing_leaves_what_is_over_as_it_is(office: Office, jobs: Jobs) -> None:
    work = Work()
    work.gate.set()
    done = await ended(jobs, await begun(jobs, work))
    await jobs.aclose()
    await jobs.aclose()
    assert await office.replica().get("zoo", done.id) == done


async def test_closing_while_the_store_is_away_ends_all_the_same(office: Office, jobs: Jobs) -> None:
    work = Work()
    await begun(jobs, work)
    office.store.away = True
    async with asyncio.timeout(PATIENCE_S):
        await jobs.aclose()
    assert work.stopped.is_set()
    office.store.away = False


async def test_how_a_job_ended_is_written_down_even_if_the_service_closes_at_that_moment(
    office: Office, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work()
    job = await begun(jobs, work)
    arrived, gate = asyncio.Event(), asyncio.Event()
    real = office.store.note_job

    async def slowly(tenant: str, own: Job) -> bool:
        if own.over:
            arrived.set()
            await gate.wait()
        return await real(tenant, own)

    monkeypatch.setattr(office.store, "note_job", slowly)
    work.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        await arrived.wait()
        closing = asyncio.create_task(jobs.aclose())
        for _ in range(5):
            await asyncio.sleep(0)
        gate.set()
        await closing
    assert (await office.replica().get("zoo", job.id)).state is JobState.DONE
