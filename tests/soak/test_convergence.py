"""Workers converge: store and copies hold the surest of all that was learned.

Several processes, each with the service's own rooms, learn one tenant's images over one server: entropies that tie,
images delivered twice (at once, later, by another worker, with other last bits), resets of some classes and of all
while the others go on. At the end of each phase the memory must be the top-L of all that was answered in its epochs,
written out in plain Python, to the bit: in the store and in every worker's hot copy.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from redis import Redis

from core.memory.codec import encode_feature
from service.stores.embedded.binary import find_binary
from tests.soak.plan import Image, Options, class_specs, feature, images, steps
from tests.soak.report import tell
from tests.support.process import PATIENCE_S, ROOT
from tests.support.servers import server

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")

OPTIONS = {
    "short": Options(candidates=2000, workers=3, classes=12, phases=3),
    "long": Options(candidates=20_000, workers=4, classes=40, phases=4),
}

PHASE_S = 600.0
"""How long a phase may take; a run that hangs ends by it."""

_LINE = 1 << 28

Banks = Mapping[str, Sequence[Sequence[Any]]]


@dataclass(kw_only=True)
class Report:
    """What a run did, and what it found to be broken; `faults` are sentences."""

    options: Options
    faults: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    deliveries: int = 0
    twice: int = 0
    ties: int = 0
    resets: int = 0
    again: int = 0
    pushes: int = 0
    repairs: float = 0.0
    seconds: float = 0.0
    settled_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return what is told of it."""
        told = vars(self.options) | vars(self) | {"settled_s": round(max(self.settled_s), 3)}
        return {name: value for name, value in told.items() if name != "options"}


class Worker:
    """A process that is told what to do."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def do(self, what: str, **values: Any) -> Any:
        """Return its answer to one line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **values}).encode() + b"\n")
        await self._process.stdin.drain()
        async with asyncio.timeout(PHASE_S):
            line = await self._process.stdout.readline()
        assert line, f"a worker ended with status {await self._process.wait()}"
        return json.loads(line)


@asynccontextmanager
async def hired(url: str, options: Options) -> AsyncIterator[Worker]:
    """Start a worker, and end it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.soak.worker", url, json.dumps(asdict(options))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE,
        cwd=ROOT,
        env=_environment(),
    )
    try:
        yield Worker(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DMN_")}
    return {**clean, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "error,ignore::DeprecationWarning"}


async def run(options: Options) -> Report:
    """Let workers learn over a server of their own, compare at the end of each phase, and report."""
    binary = find_binary()
    assert binary
    report = Report(options=options)
    async with AsyncExitStack() as stack:
        running = stack.enter_context(server(str(binary)))
        workers = [await stack.enter_async_context(hired(running.url, options)) for _ in range(options.workers)]
        await workers[0].do("configure")
        reference = Reference(options)
        start = time.perf_counter()
        for phase in range(options.phases):
            told = await asyncio.gather(*(own.do("work", phase=phase, worker=i) for i, own in enumerate(workers)))
            _note(report, reference, phase, told)
            await _compare(report, reference, phase, workers)
            report.ties += reference.ties()
        report.seconds = time.perf_counter() - start
        report.repairs = sum([await own.do("counted", name="dmn_memory_repairs_total") for own in workers])
        report.pushes = _script_calls(running.url)
    return report


class Reference:
    """What the memory has to be: the top-L of everything that was answered since a class was last emptied."""

    def __init__(self, options: Options) -> None:
        self._options, self._images = options, images(options)
        self._ids = [spec.id for spec in class_specs(options)]
        self._offered: list[tuple[int, str, tuple[float, bytes, str]]] = []
        self._emptied = dict.fromkeys(self._ids, 0)

    def offer(self, epoch: int, image: Image, bits: int, entropy: float) -> None:
        """Take note of one delivery that was answered in an epoch."""
        data = encode_feature(feature(image, bits, self._options))
        self._offered.append((epoch, self._ids[image.label], (entropy, data, image.id)))

    def empty(self, epoch: int, classes: Sequence[int] | None) -> None:
        """Take note of a reset that began an epoch."""
        for c in range(self._options.classes) if classes is None else classes:
            own = self._ids[c]
            self._emptied[own] = max(self._emptied[own], epoch)

    def banks(self) -> dict[str, list[list[Any]]]:
        """Return the slots of every class; of an id that came twice, the lower (entropy, feature)."""
        return {own: [[id_, nats, data.hex()] for nats, id_, data in best] for own, best in self._ranked().items()}

    def ties(self) -> int:
        """Return the classes whose last slot was decided by the id alone."""
        held = self._options.slots
        every = self._ranked(held + 1).values()
        return sum(len(own) > held and own[held - 1][0] == own[held][0] for own in every)

    def _ranked(self, first: int | None = None) -> dict[str, list[tuple[float, str, bytes]]]:
        least: dict[str, dict[str, tuple[float, bytes]]] = {own: {} for own in self._ids}
        for epoch, own, (entropy, data, id_) in self._offered:
            if epoch >= self._emptied[own]:
                known = least[own].get(id_, (entropy, data))
                least[own][id_] = min(known, (entropy, data))
        kept = self._options.slots if first is None else first
        return {
            own: sorted((entropy, id_, data) for id_, (entropy, data) in held.items())[:kept]
            for own, held in least.items()
        }


def _note(report: Report, reference: Reference, phase: int, told: Sequence[Any]) -> None:
    """Take the workers' notes of a phase, and check that every step was answered as planned."""
    options, planned = report.options, images(report.options)
    specs = class_specs(options)
    for worker, own in enumerate(told):
        due = sum(hasattr(step, "number") for step in steps(options, phase, worker))
        if due != len(own["deliveries"]):
            report.faults.append(f"phase {phase}: worker {worker} was answered {len(own['deliveries'])} of {due} calls")
        for number, bits, label, entropy, outcome, epoch in own["deliveries"]:
            image = planned[number]
            reference.offer(epoch, image, bits, entropy)
            report.outcomes[outcome] += 1
            if label != specs[image.label].name or outcome not in ("filled", "replaced", "rejected", "duplicate"):
                report.faults.append(f"phase {phase}: image {number} was {outcome} as {label!r}")
        for epoch, classes in own["resets"]:
            reference.empty(epoch, classes)
        report.resets += len(own["resets"])
        report.again += own["again"]
        report.deliveries += len(own["deliveries"])
    numbers = Counter(one[0] for own in told for one in own["deliveries"])
    report.twice += sum(count > 1 for count in numbers.values())


async def _compare(report: Report, reference: Reference, phase: int, workers: Sequence[Worker]) -> None:
    """Hold the store, and every worker's copy, against the reference."""
    due = reference.banks()
    copies = await asyncio.gather(*(own.do("settle") for own in workers))
    stored = await workers[0].do("load")
    report.faults += differences(f"phase {phase}: the store", due, stored["banks"])
    for worker, copy in enumerate(copies):
        report.faults += differences(f"phase {phase}: worker {worker}", due, copy["banks"])
        if copy["stamp"] != stored["stamp"]:
            report.faults.append(f"phase {phase}: worker {worker} is at {copy['stamp']}, the store {stored['stamp']}")
        report.settled_s.append(copy["seconds"])


def differences(who: str, due: Banks, found: Banks) -> list[str]:
    """Return a sentence for each class that is not as it has to be."""
    out = []
    for own in sorted(due.keys() | found.keys()):
        wanted, held = [list(slot) for slot in due.get(own, ())], [list(slot) for slot in found.get(own, ())]
        if wanted != held:
            lacks = [slot[:2] for slot in wanted if slot not in held]
            more = [slot[:2] for slot in held if slot not in wanted]
            out.append(f"{who}, class {own}: lacks {lacks}, holds instead {more}")
    return out


def _script_calls(url: str) -> int:
    with Redis.from_url(url) as client:
        told: Any = client.info("commandstats")
    return sum(int(told.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("evalsha", "eval"))


async def test_store_and_copies_hold_the_surest_of_all_that_was_learned_whatever_ties_comes_twice_or_is_reset(
    scale: str,
) -> None:
    report = await run(OPTIONS[scale])
    tell("convergence", report.figures())
    assert not report.faults, "\n".join(report.faults)
    assert report.ties, "no class was decided by an id"
    assert report.twice
    assert report.resets == 4 * (report.options.phases - 1)
    assert report.outcomes.keys() == {"filled", "replaced", "rejected", "duplicate"}
    assert report.repairs == 0
