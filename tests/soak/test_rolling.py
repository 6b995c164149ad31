"""Real instances behind a real proxy are restarted one after the other under load.

Several `dmn serve` on one Valkey, or on a cluster of three nodes, stand behind HAProxy, which asks them whether they
are ready. Tenants are asked without pause through it. One instance after the other is told to stop, ends, is started
again and is waited for, once, or until the time is over. Every call has to be answered 2xx, and rightly; each instance
has to end with status 0; all that was acknowledged has to be there at last, whichever instance is asked; and each has
to hold the memory of every tenant again, in the long run within 10 s of being ready again.

Where the proxy spreads connections and speaks no HTTP, what an instance says while it leaves goes to the clients
themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

import numpy as np
import pytest

from tests.soak.proxy import BINARY, MISSING, By, Proxy, proxy
from tests.soak.report import tell
from tests.soak.traffic import Traffic, lost, promised, uncounted
from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Service, until
from tests.support.servers import BINARIES, cluster, free_ports, server

pytestmark = [
    pytest.mark.skipif(BINARY is None, reason=MISSING),
    pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed"),
]

SETTINGS = {
    "DMN_DRAIN_DELAY_S": "2",
    "DMN_DRAIN_TIMEOUT_S": "30",
    "DMN_STORE_TIMEOUT_MS": "60000",
    "DMN_LOG_LEVEL": "warning",
    "OMP_NUM_THREADS": "1",
}
_METRIC = re.compile(r"^(dmn_\S+) (\S+)$", re.MULTILINE)
_LOADS = 'dmn_store_duration_seconds_{}{{op="load"}}'


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size of a run: whole rounds of restarts, as many as begin within some seconds, and one at least.

    `rate` are calls a second: it is they that bring memories back, within `warm_s`.
    """

    instances: int = 2
    on_cluster: bool = False
    by: By = "request"
    seconds: float = 0.0
    rate: float = 30.0
    tenants: int = 4
    renewed: float = 0.2
    seed: int = 0
    warm_s: float = inf


LONG = Options(seconds=90.0, rate=50.0, tenants=10, renewed=0.04, warm_s=10.0)
OPTIONS = {
    ("short", "one store"): Options(by="connection"),
    ("short", "cluster"): Options(on_cluster=True),
    ("long", "one store"): LONG,
    ("long", "cluster"): replace(LONG, instances=3, on_cluster=True),
}


@dataclass(frozen=True, kw_only=True)
class Restart:
    """One restart, in seconds: to end, from start to readiness, and then until all memories were ready.

    `waited_s` of the last its first thread waited for a processor that others had. `load_ms` is how long the store took
    to give a memory, on average; `slowest_ms` the slowest answer of all while one instance was not warm yet.
    """

    instance: str
    ended_s: float
    ready_s: float
    warm_s: float
    waited_s: float
    load_ms: float
    slowest_ms: float


@dataclass(kw_only=True)
class Report:
    """What a run did, and what it found to be broken; `faults` are sentences."""

    options: Options
    restarts: list[Restart] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    redispatched: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    slots: int = 0
    shots: int = 0
    made: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Calls that were not answered 2xx."""
        return sum(count for status, count in self.statuses.items() if not status.startswith("2"))

    def figures(self) -> dict[str, Any]:
        """Return what is told of it."""
        restarts = [{name: _rounded(value) for name, value in vars(one).items()} for one in self.restarts]
        warm = _rounded(max((one.warm_s for one in self.restarts), default=0.0))
        told = asdict(self.options) | vars(self) | {"restarts": restarts, "warm_again_s_max": warm}
        return {name: value for name, value in told.items() if name not in ("options", "warm_s")}


class Instance(Service):
    """`dmn serve` on a port of its own, one process after the other."""

    def __init__(self, name: str, port: int, store: str) -> None:
        super().__init__("fake", store=store, port=port, **SETTINGS)
        self.name = name

    def stop(self) -> list[str]:
        """Tell it to stop, wait until it has, and return what is wrong with how it ended."""
        self.command.signal(signal.SIGTERM)
        status, said = self.command.ended(), self.said()
        fine = status == 0 and "Traceback" not in said
        return [] if fine else [f"{self.name} ended with status {status}: {said[-2000:]}"]

    def metrics(self) -> dict[str, float]:
        """Return all its metrics."""
        return {name: float(value) for name, value in _METRIC.findall(self.client.get("/metrics").text)}

    def answers(self, tenant: str) -> bool:
        """Return whether it answers a picture of a tenant from a memory that is as the store has it."""
        told, red = {"X-Tenant": tenant, "Content-Type": "image/png"}, picture("red")
        answer = self.client.post("/classify", params={"learn": "false"}, content=red, headers=told)
        return answer.status_code == 200 and answer.json()["memory"]["state"] == "fresh"


class Run:
    """Restarts under traffic."""

    def __init__(self, report: Report, instances: Sequence[Instance], before: Proxy, traffic: Traffic) -> None:
        self._report, self._instances, self._proxy, self._traffic = report, instances, before, traffic
        self._tenants = list(traffic.ledgers)

    async def rounds(self) -> None:
        """Restart all, one after the other, as long as there is time."""
        async with self._under_load():
            for instance in self._instances:
                await self._warm(instance)
            ends = time.monotonic() + self._report.options.seconds
            while True:
                for instance in self._instances:
                    self._report.restarts.append(await self._restart(instance))
                if time.monotonic() > ends:
                    return

    async def check(self) -> None:
        """Hold every instance against what was promised."""
        for instance in self._instances:
            found = await asyncio.to_thread(lost, self._traffic, instance.client)
            self._report.faults += [f"{instance.name}: {fault}" for fault in found]

            def counted(own: Instance = instance) -> bool:
                return not uncounted(self._traffic, own.client)

            with contextlib.suppress(AssertionError):  # what others counted comes with time, and nobody tells when
                await _until("all pictures are counted", counted)
            self._report.faults += [f"{instance.name}: {fault}" for fault in uncounted(self._traffic, instance.client)]

    @asynccontextmanager
    async def _under_load(self) -> AsyncIterator[None]:
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._traffic.run())
            try:
                yield
            finally:
                self._traffic.stop()
        self._report.seconds = time.monotonic() - started

    async def _restart(self, instance: Instance) -> Restart:
        told = time.monotonic()
        self._report.faults += await asyncio.to_thread(instance.stop)
        ended = time.monotonic()
        instance.start()
        await _until(f"{instance.name} is ready", instance.is_ready)
        ready = time.monotonic()
        _, waited = instance.processor_s()
        warm_s, load_ms = await self._warm(instance)
        waited_s = instance.processor_s()[1] - waited
        if warm_s > self._report.options.warm_s:
            took = f"{warm_s:.1f} s after it was ready again, {waited_s:.1f} s of them for want of a processor"
            self._report.faults.append(f"{instance.name} held all memories {took}")
        await _until(f"{instance.name} is sent calls", lambda: self._proxy.is_up(instance.name))
        meanwhile = [one.seconds for one in self._traffic.answered if one.sent >= ready]
        return Restart(
            instance=instance.name,
            ended_s=ended - told,
            ready_s=ready - ended,
            warm_s=warm_s,
            waited_s=waited_s,
            load_ms=load_ms,
            slowest_ms=1000 * max(meanwhile, default=0.0),
        )

    async def _warm(self, instance: Instance) -> tuple[float, float]:
        """Return when an instance held every memory, in seconds from now, and what one took to come, in milliseconds.

        It is the traffic that warms it; nobody asks it beside that before it is.
        """
        start = time.monotonic()
        await _until(
            f"{instance.name} holds all memories",
            lambda: instance.metrics()["dmn_hot_tenants"] >= len(self._tenants),
        )
        seconds, seen = time.monotonic() - start, instance.metrics()
        answered = await asyncio.to_thread(lambda: [tenant for tenant in self._tenants if instance.answers(tenant)])
        if missing := set(self._tenants) - set(answered):
            self._report.faults.append(f"{instance.name} did not answer for {sorted(missing)}")
        return seconds, 1000 * seen[_LOADS.format("sum")] / seen[_LOADS.format("count")]


async def run(options: Options) -> Report:
    """Restart instances under load, check what was promised, and report."""
    report = Report(options=options)
    with _store(options) as store, _instances(options, store) as instances:
        for instance in instances:
            await _until(f"{instance.name} is ready", instance.is_ready)
        with proxy({one.name: one.port for one in instances}, options.by) as before:
            traffic = Traffic(
                before.url, tenants=options.tenants, rate=options.rate, renewed=options.renewed, seed=options.seed
            )
            await traffic.prepare()
            own = Run(report, instances, before, traffic)
            await own.rounds()
            _note(report, traffic, before)
        await own.check()
        ends = await asyncio.gather(*(asyncio.to_thread(instance.stop) for instance in instances))
        report.faults += [fault for end in ends for fault in end]
    return report


def _note(report: Report, traffic: Traffic, before: Proxy) -> None:
    """Take note of what traffic and proxy counted."""
    report.calls, report.statuses = dict(traffic.calls), dict(traffic.statuses)
    report.redispatched, report.taken = before.redispatched(), before.taken()
    took = [1000 * one.seconds for one in traffic.answered]
    report.latency_ms = {f"p{at:g}": _rounded(float(np.percentile(took, at))) for at in (50, 99, 100)}
    report.slots, report.shots = promised(traffic), sum(len(own) for own in traffic.shots.values())
    report.made = len(traffic.made)
    report.faults += traffic.faults


@contextmanager
def _store(options: Options) -> Iterator[str]:
    binary = BINARIES["valkey"]
    assert binary, "no Valkey or Redis server is installed"
    if options.on_cluster:
        with cluster(str(binary)) as whole:
            yield whole.urls
    else:
        with server(str(binary)) as own:
            yield own.url


@contextmanager
def _instances(options: Options, store: str) -> Iterator[list[Instance]]:
    ports = free_ports(options.instances)
    with ExitStack() as stack:
        instances = [Instance(f"instance-{at}", port, store) for at, port in enumerate(ports)]
        for instance in instances:
            stack.callback(instance.close)
            instance.start()
        yield instances


async def _until(what: str, probe: Callable[[], bool]) -> None:
    """Return once something holds; it is asked beside the traffic."""
    await asyncio.to_thread(until, what, probe, 2 * PATIENCE_S)


def _rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


@pytest.mark.parametrize("store", ["one store", "cluster"])
async def test_instances_restart_in_turn_and_no_call_fails_no_write_is_lost_and_memories_are_warm_again(
    store: str, scale: str
) -> None:
    options = OPTIONS[scale, store]
    report = await run(options)
    tell(f"rolling restarts on {store}", report.figures())
    assert not report.faults, "\n".join(report.faults)
    assert report.failed == 0
    assert {one.instance for one in report.restarts} == set(report.taken)
    assert all(report.taken.values()), "an instance was never asked"
    assert report.slots > 10
    assert report.shots
    assert report.made
