"""Restarted one after the other under load: `python -m tests.soak.rolling [--instances 3 --cluster --seconds 90]`.

Several `dmn serve` on one Valkey, or on a cluster of three nodes, stand behind HAProxy, which asks them whether they
are ready. Tenants are asked without pause through it. One instance after the other is told to stop, ends, is started
again and is waited for, until the time is over. Every call has to be answered 2xx, and rightly; each instance has to
end with status 0 and soon; all that was acknowledged has to be there at last, whichever instance is asked; and each has
to hold the memory of every tenant again within 10 s of being ready again. Status 1 if it is not so.

With `--by connection` the proxy spreads connections and speaks no HTTP: then what an instance says while it leaves goes
to the clients themselves. The short forms are in `tests/e2e/test_rolling.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np

from service.bench.telling import stamp
from tests.soak.proxy import BINARY, MISSING, By, Proxy, proxy
from tests.soak.traffic import Traffic, lost, promised, uncounted
from tests.support.fakes import picture
from tests.support.process import Command
from tests.support.servers import BINARIES, cluster, free_ports, server

WARM_S = 10.0
"""Within which an instance that is ready again has to hold every tenant's memory."""

DRAIN_DELAY_S, DRAIN_TIMEOUT_S = 2.0, 30.0
GRACE_S = DRAIN_DELAY_S + DRAIN_TIMEOUT_S + 30.0
"""Within which an instance has to end that was told to stop, as the README has it."""

_PATIENCE_S = 120.0
_LOOK_S = 0.05
_METRIC = re.compile(r"^(dmn_\S+) (\S+)$", re.MULTILINE)
_LOADS = 'dmn_store_duration_seconds_{}{{op="load"}}'

_SCRIPT = """
import sys
from types import ModuleType
from tests.support.fakes import FakeEncoder
light = ModuleType("core.openclip")
light.load = lambda *_, **__: FakeEncoder()
sys.modules["core.openclip"] = light
from service.cli import main
sys.argv[0] = "dmn"
main()
"""
"""The command as it is, but for its encoder; open_clip itself takes seconds to import."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size of a run: whole rounds of restarts, as many as begin within some seconds, and one at least."""

    instances: int = 2
    on_cluster: bool = False
    by: By = "request"
    seconds: float = 90.0
    rate: float = 50.0
    tenants: int = 10
    seed: int = 0
    warm_s: float = WARM_S


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

    def json(self) -> dict[str, Any]:
        return {
            **asdict(self.options),
            "restarts": [{name: _rounded(value) for name, value in asdict(one).items()} for one in self.restarts],
            "warm_again_s_max": _rounded(max((one.warm_s for one in self.restarts), default=0.0)),
            "calls": self.calls,
            "statuses": self.statuses,
            "failed": self.failed,
            "redispatched": self.redispatched,
            "taken": self.taken,
            "latency_ms": self.latency_ms,
            "told_to_be_held": self.slots,
            "shots": self.shots,
            "tenants_made": self.made,
            "seconds": _rounded(self.seconds),
            "faults": self.faults,
        }


class Instance:
    """`dmn serve` on a port of its own, one process after the other."""

    def __init__(self, name: str, port: int, store: str) -> None:
        self.name, self.port, self._store = name, port, store
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_PATIENCE_S, trust_env=False)
        self._stack = ExitStack()
        self._command: Command | None = None

    def start(self) -> None:
        """Start it; return at once."""
        own = {
            "DMN_DRAIN_DELAY_S": str(DRAIN_DELAY_S),
            "DMN_DRAIN_TIMEOUT_S": str(DRAIN_TIMEOUT_S),
            "DMN_LOG_LEVEL": "warning",
            "OMP_NUM_THREADS": "1",
        }
        command = Command("fake", "serve", "--port", str(self.port), store=self._store, script=_SCRIPT, **own)
        self._command = self._stack.enter_context(command)

    def stop(self) -> list[str]:
        """Tell it to stop, wait until it has, and return what is wrong with how it ended."""
        assert self._command is not None
        self._command.signal(signal.SIGTERM)
        status, said = self._command.process.wait(GRACE_S), "".join(self._command.err)
        self._stack.close()
        fine = status == 0 and "Traceback" not in said
        return [] if fine else [f"{self.name} ended with status {status}: {said[-2000:]}"]

    def close(self) -> None:
        """End it, however it stands."""
        self._stack.close()
        self.client.close()

    def is_ready(self) -> bool:
        """Return whether it says that it is ready.

        Raises:
            AssertionError: it has ended.
        """
        assert self._command is not None
        ended = self._command.process.poll()
        assert ended is None, f"{self.name} ended with status {ended}: {''.join(self._command.err)[-2000:]}"
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/readyz").status_code == 200
        return False

    def waited_s(self) -> float:
        """Return how long its first thread has waited for a processor, in seconds; 0 where nobody counts that."""
        assert self._command is not None
        counted = Path(f"/proc/{self._command.process.pid}/schedstat")
        return int(counted.read_text().split()[1]) / 1e9 if counted.exists() else 0.0

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

            def counted(own: httpx.Client = instance.client) -> bool:
                return not uncounted(self._traffic, own)

            with contextlib.suppress(TimeoutError):  # what others counted comes with time, and nobody tells when
                await _until(counted, "count", WARM_S)
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
        await _until(instance.is_ready, f"readiness of {instance.name}")
        ready = time.monotonic()
        waited = instance.waited_s()
        warm_s, load_ms = await self._warm(instance)
        waited_s = instance.waited_s() - waited
        if warm_s > self._report.options.warm_s:
            took = f"{warm_s:.1f} s after it was ready again, {waited_s:.1f} s of them for want of a processor"
            self._report.faults.append(f"{instance.name} held all memories {took}")
        await _until(lambda: self._proxy.is_up(instance.name), f"call for {instance.name}")
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
            lambda: instance.metrics()["dmn_hot_tenants"] >= len(self._tenants), f"hot memories of {instance.name}"
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
            await _until(instance.is_ready, f"readiness of {instance.name}")
        with proxy({one.name: one.port for one in instances}, options.by) as before:
            traffic = Traffic(before.url, tenants=options.tenants, rate=options.rate, seed=options.seed)
            await traffic.prepare()
            own = Run(report, instances, before, traffic)
            await own.rounds()
            _note(report, traffic, before)
        await own.check()
        for instance in instances:
            report.faults += await asyncio.to_thread(instance.stop)
    return report


def missing() -> str | None:
    """Return why it cannot run here; None if it can."""
    if BINARY is None:
        return MISSING
    return None if BINARIES["valkey"] else "no Valkey or Redis server is installed"


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


async def _until(told: Callable[[], bool], what: str, patience_s: float = _PATIENCE_S) -> None:
    """Return once something is so that sends no event; it is asked beside the traffic.

    Raises:
        TimeoutError: it does not come to be so.
    """
    ends = time.monotonic() + patience_s
    while not await asyncio.to_thread(told):
        if time.monotonic() > ends:
            raise TimeoutError(f"after {patience_s:.0f} s there is still no {what}")
        await asyncio.sleep(_LOOK_S)


def _rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--cluster", action="store_true", help="on a cluster of three nodes; else on one server")
    parser.add_argument("--by", choices=get_args(By), default="request", help="what the proxy spreads")
    parser.add_argument("--seconds", type=float, default=90.0, help="in which rounds of restarts may begin")
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second: it is they that bring memories back")
    parser.add_argument("--tenants", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json, on_cluster = given.pop("json"), given.pop("cluster")
    if why := missing():
        print(json.dumps({"skipped": why}) if as_json else why)
        return 0
    report = asyncio.run(run(Options(on_cluster=on_cluster, **given)))
    if as_json:
        print(json.dumps({**report.json(), **stamp()}, indent=2))
    else:
        for name, value in report.json().items():
            if name != "faults":
                print(f"{name:>24} {value}")
        print("\n".join(report.faults) or "no call failed, and no write is lost")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
