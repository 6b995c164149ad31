"""The real command is killed under load, and what an answer said is learned is there afterwards.

The service runs with its embedded store on a data folder of its own, and is sent pictures over HTTP from several
threads. At a random moment of that the service, or the server, or both are killed with SIGKILL, and started again where
they do not start by themselves. Beside these rounds, the long run kills services that are only starting, and presses
Ctrl-C. After each: nothing that an answer told to be in a slot is missing, unless surer ones took its place; what was
learned before is as it was; there was never more than one server; in the long run, the service is ready within 10 s,
not counting the time that others had the processors. At last nothing is left running.

With a compiler, the long run also kills a server whose disk is slow: what was answered must not wait for the disk only
in the memory of a process that may die.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from service.stores.embedded.binary import find_binary
from tests.soak.load import LABELS, Banks, Ledger, Load, missing, send, undelivered
from tests.soak.report import tell
from tests.soak.starts import Watch, leave, pair
from tests.support.fakes import picture
from tests.support.process import Service, kill_servers_of, servers_of, until

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")

KINDS = ("service", "server", "both")
"""What is killed, round after round."""

SLOTS = 20
_SHOWN = 5
"""Faults of a round that are told one by one."""

FEWEST = 10
"""Answered pictures before a kill, at least."""

_EXTRAS_EVERY = 5
_TOGETHER = 16
"""Pictures a call when they are sent again."""

_SLOW_FSYNC = """
#include <unistd.h>
#include <sys/syscall.h>
int fdatasync(int file) { usleep(DELAY_US); return syscall(SYS_fdatasync, file); }
int fsync(int file) { usleep(DELAY_US); return syscall(SYS_fsync, file); }
"""
_DELAY_MS = 700


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size of a run: `most` pictures are answered before a kill, and a start takes `ready_s` at most."""

    rounds: int
    seed: int
    most: int
    ready_s: float
    slow_rounds: int


OPTIONS = {
    "short": Options(rounds=len(KINDS), seed=1, most=150, ready_s=inf, slow_rounds=0),
    "long": Options(rounds=20, seed=0, most=400, ready_s=10.0, slow_rounds=6),
}
STARTS = {"short": 1, "long": 10}


@dataclass(kw_only=True)
class Report:
    """What a run did, and what it found to be broken; `faults` are sentences."""

    kinds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    ready_s: dict[str, list[float]] = field(default_factory=dict)
    had_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    sent: int = 0
    held: int = 0
    refused: int = 0
    cut: int = 0
    stale: int = 0
    broken: int = 0
    unsettled: int = 0
    most_servers: int = 0
    looks: int = 0
    seconds: float = 0.0
    slow_disk: str = "not tried"
    faults: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return what is told of it; of times, the median and the most."""
        times = {f"ready_after_{kind}_s": own for kind, own in sorted(self.ready_s.items())}
        times |= {"starts_had_a_processor_s": self.had_s, "starts_waited_for_one_s": self.waited_s}
        most = {name: [round(at(own), 2) for at in (statistics.median, max)] for name, own in times.items() if own}
        hidden = ("ready_s", "had_s", "waited_s")
        return {name: value for name, value in vars(self).items() if name not in hidden} | most


class Run:
    """Rounds on one data folder. Every round has a tenant of its own; those of earlier rounds must stay as they are."""

    def __init__(self, home: Path, report: Report, seed: int, *, ready_s: float, most: int, binary: str = "") -> None:
        home.mkdir()
        self._folder, self._ready_s = home / "data", ready_s
        settings = {"DMN_DATA_DIR": str(self._folder), "DMN_DRAIN_DELAY_S": "0.2"}
        settings |= {"DMN_EMBEDDED_BINARY": binary} if binary else {}
        self._service = Service("fake", store="embedded", **settings)
        self._report, self._random, self._most = report, Random(seed), most
        self._watch = Watch(self._folder)
        self._left: dict[str, Banks] = {}
        self._name = home.name

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Start the service; at last stop it in order and see that nothing is left. What hangs is a fault too."""
        try:
            with self._watch.watching():
                self._restart("start")
                yield
                self._stop("end")
        except (AssertionError, subprocess.TimeoutExpired) as error:
            told = f"{self._service.said()[-3000:]}\n{self._server_log()[-3000:]}"
            self._report.faults.append(f"{error!r}; the service and its server said last:\n{told}")
        finally:
            self._service.close()
            kill_servers_of(self._folder)
            self._report.most_servers = max(self._report.most_servers, self._watch.most)
            self._report.looks += self._watch.looks
            if self._watch.most > 1:
                self._report.faults.append(f"{self._watch.most} servers were on one folder")

    def round(self, kind: str) -> None:
        """Load a new tenant, kill at a random moment, and check what is left."""
        self._report.kinds[kind] += 1
        ledger = self._new_tenant(f"{self._name}-{sum(self._report.kinds.values())}-{kind}")
        moment = self._random.randint(FEWEST, self._most)
        with Load(self._service.url, ledger, ledger.tenant).running():
            until("pictures are learned", lambda: ledger.settled >= moment)
            {
                "service": self._kill_service,
                "server": self._kill_server,
                "both": self._kill_both,
                "starting": self._kill_starting,
                "stop": self._stop_under_load,
            }[kind](ledger)
            if kind != "server":
                until("a call is cut off", lambda: ledger.cut > 0)
        if kind != "server":
            self._restart(kind)
        self._check(kind, ledger)

    # What is done to them ---------------------------------------------------------------------------------------------

    def _kill_service(self, ledger: Ledger) -> None:
        ledger.may_be_cut = True
        self._service.kill()

    def _kill_server(self, ledger: Ledger) -> None:
        """Kill the server alone: the service goes on, and learns again as soon as there is another."""
        killed = time.monotonic()
        kill_servers_of(self._folder)
        self._read(ledger.tenant, "/memory")
        self._service.ready()
        self._note_ready("server", time.monotonic() - killed)
        back = time.monotonic()
        until("a picture is learned after the server was killed", lambda: ledger.held_since(back))

    def _kill_both(self, ledger: Ledger) -> None:
        ledger.may_be_cut = True
        first, second = self._random.sample((self._service.kill, lambda: kill_servers_of(self._folder)), 2)
        first()
        second()

    def _kill_starting(self, ledger: Ledger) -> None:
        """Kill the service, and the next one while it starts, once with the server that it may have started."""
        self._kill_service(ledger)
        if self._random.random() < 0.5:
            kill_servers_of(self._folder)
        for _ in range(2):
            self._service.start()
            moment = self._random.uniform(0.0, statistics.median(self._report.ready_s["start"]))
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._service.command.process.wait(moment)
                self._report.faults.append(f"the service ended while it started: {self._service.said()[-500:]}")
            self._service.kill()
        if self._random.random() < 0.5:
            kill_servers_of(self._folder)

    def _stop_under_load(self, ledger: Ledger) -> None:
        ledger.may_be_cut = True
        self._stop("stop")

    def _stop(self, when: str) -> None:
        """Press Ctrl-C, and see that everything ends in order: status 0, the server saved, nothing is left."""
        before = len(self._server_log())
        self._service.command.interrupt()
        status, faults = self._service.command.ended(), self._report.faults
        if status != 0:
            faults.append(f"{when}: Ctrl-C ended the service with {status}: {self._service.said()[-2000:]}")
        if left := servers_of(self._folder):
            faults.append(f"{when}: Ctrl-C left the servers {sorted(left)}")
        if "bye bye" not in self._server_log()[before:]:
            faults.append(f"{when}: the server did not end in order")
        if "Traceback" in self._service.said():
            faults.append(f"{when}: a traceback: {self._service.said()[-2000:]}")

    def _server_log(self) -> str:
        log = self._folder / "server.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def _restart(self, kind: str) -> None:
        started = time.monotonic()
        self._service.start()
        self._service.ready()
        seconds = time.monotonic() - started
        had, waited = self._service.processor_s()
        self._report.had_s.append(had)
        self._report.waited_s.append(waited)
        self._note_ready(kind, seconds, waited)

    def _note_ready(self, kind: str, seconds: float, waited: float = 0.0) -> None:
        """Note how long it took, which is too long if it is without what other processes kept it waiting."""
        self._report.ready_s.setdefault(kind, []).append(seconds)
        if seconds - waited > self._ready_s:
            told = f"ready {seconds:.1f} s after {kind}, {waited:.1f} s of them for want of a processor"
            self._report.faults.append(f"{told}; at most {self._ready_s:.0f} s are allowed")

    # What is checked --------------------------------------------------------------------------------------------------

    def _new_tenant(self, name: str) -> Ledger:
        def made() -> bool:
            answer = self._service.client.put(f"/tenants/{name}", json={"classes": list(LABELS), "slots": SLOTS})
            if not answer.is_success:
                self._note_refusal("PUT", answer)
            return answer.is_success

        until("the tenant is made", made)
        return Ledger(name, SLOTS)

    def _check(self, kind: str, ledger: Ledger) -> None:
        """Hold what is there against what was told: as it is, and once what had no answer was sent again."""
        faults = [*self._lost_pending(kind, ledger), *ledger.faults, *missing(ledger, self._banks(ledger.tenant))]
        self._count(ledger)
        until("what is sent again is answered", lambda: self._again(ledger))
        final = self._banks(ledger.tenant)
        faults += [*ledger.faults, *missing(ledger, final)]
        faults += self._stale_copy(ledger.tenant)
        faults += [f"{tenant} changed" for tenant, banks in self._left.items() if self._banks(tenant) != banks]
        self._left[ledger.tenant] = final
        once = list(dict.fromkeys(faults))
        self._report.broken += bool(once)
        self._report.faults += [f"{kind}, {ledger.tenant}: {fault}" for fault in once[:_SHOWN]]
        if len(once) > _SHOWN:
            self._report.faults.append(f"{kind}, {ledger.tenant}: {len(once) - _SHOWN} more")

    def _lost_pending(self, kind: str, ledger: Ledger) -> list[str]:
        """Return a fault if writes that waited for the store do not come through a service that lives."""
        if kind != "server":
            return []
        with contextlib.suppress(AssertionError):
            until("pending writes are there", lambda: not undelivered(ledger, self._banks(ledger.tenant)))
        left = undelivered(ledger, self._banks(ledger.tenant))
        return [f"{len(left)} writes were pending and never came"] if left else []

    def _again(self, ledger: Ledger) -> bool:
        """Send what was not answered once more; return whether all of it is now."""
        left = ledger.unsettled()
        for start in range(0, len(left), _TOGETHER):
            send(self._service.client, ledger, left[start : start + _TOGETHER])
        return not ledger.unsettled()

    def _count(self, ledger: Ledger) -> None:
        report = self._report
        report.outcomes += ledger.outcomes
        report.sent += len(ledger.sent)
        report.held += sum(one.settled is not None and one.settled.slot is not None for one in ledger.sent)
        report.refused += ledger.refused
        report.cut += ledger.cut
        report.stale += ledger.stale
        report.unsettled += len(ledger.unsettled())

    def _banks(self, tenant: str) -> Banks:
        """Return the slots that the store holds, by class."""
        told = {label: self._read(tenant, f"/memory/dynamic/{label}?limit=1000") for label in LABELS}
        return {label: {slot["slot"]: slot["entropy"] for slot in page["items"]} for label, page in told.items()}

    def _stale_copy(self, tenant: str) -> list[str]:
        """Return a fault if answers are not read from what the store holds, once it is reached."""
        held = self._read(tenant, "/memory")
        files, told = {"images": ("a.png", picture("red", 0), "image/png")}, {"X-Tenant": tenant}
        reads: list[Any] = []

        def answered() -> bool:
            answer = self._service.client.post("/classify", params={"learn": "false"}, files=files, headers=told)
            self._note_refusal("/classify", answer)
            reads.extend([answer.json()["memory"]] if answer.status_code == 200 else [])
            return bool(reads) and reads[-1]["state"] == "fresh"

        until("an answer is read from the store", answered)
        due = {"version": held["version"], "epoch": held["epoch"], "state": "fresh"}
        return [] if reads[-1] == due else [f"an answer was read from {reads[-1]}; the store is at {due}"]

    def _read(self, tenant: str, path: str) -> Any:
        """Return what the service answers, once it does; a refusal is counted, and must say when to come back."""
        answers: list[httpx.Response] = []

        def answered() -> bool:
            answers.append(self._service.client.get(path, headers={"X-Tenant": tenant}))
            self._note_refusal(path, answers[-1])
            assert answers[-1].status_code in (200, 503), f"{path} of {tenant}: {answers[-1].text}"
            return answers[-1].status_code == 200

        until(f"{path} of {tenant} is answered", answered)
        return answers[-1].json()

    def _note_refusal(self, what: str, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            return
        self._report.refused += 1
        if answer.status_code != 503 or "retry-after" not in answer.headers:
            self._report.faults.append(f"{what} was refused with {answer.status_code}: {answer.text[:300]}")


def run(home: Path, options: Options) -> Report:
    """Run rounds on a folder of their own, some more on a slow disk, and report."""
    report, start = Report(), time.monotonic()
    own = Run(home / "fast", report, options.seed, ready_s=options.ready_s, most=options.most)
    with own.opened():
        for number in range(options.rounds):
            own.round(KINDS[number % len(KINDS)])
            if number % _EXTRAS_EVERY == _EXTRAS_EVERY - 1:
                own.round("starting")
                own.round("stop")
    if options.slow_rounds:
        _slow(home, report, options)
    report.seconds = round(time.monotonic() - start, 1)
    return report


def _slow(home: Path, report: Report, options: Options) -> None:
    binary = _slow_binary(home)
    if binary is None:
        report.slow_disk = "not tried: there is no C compiler"
        return
    before, rounds = len(report.faults), options.slow_rounds
    own = Run(home / "slow", report, options.seed + 1, ready_s=options.ready_s, most=options.most, binary=str(binary))
    with own.opened():
        for number in range(rounds):
            own.round(KINDS[1 + number % 2])
    report.slow_disk = f"{rounds} rounds, every fsync {_DELAY_MS} ms, {len(report.faults) - before} faults"


def _slow_binary(home: Path) -> Path | None:
    """Return a server to whom every fsync takes its time; None without a compiler."""
    compiler, server = shutil.which("cc"), find_binary()
    if compiler is None or server is None:
        return None
    source, library, script = home / "slow.c", home / "slow.so", home / "slow-valkey-server"
    source.write_text(_SLOW_FSYNC)
    delay = f"-DDELAY_US={1000 * _DELAY_MS}"
    subprocess.run((compiler, "-shared", "-fPIC", delay, "-o", str(library), str(source)), check=True)
    script.write_text(f'#!/bin/sh\nLD_PRELOAD="{library}" exec "{server}" "$@"\n')
    script.chmod(0o700)
    return script


def test_service_server_or_both_may_be_killed_and_nothing_that_was_told_as_learned_is_missing(
    tmp_path: Path, scale: str
) -> None:
    options = OPTIONS[scale]
    report = run(tmp_path, options)
    tell("kills", report.figures())
    assert not report.faults, "\n".join(report.faults)
    assert report.kinds.keys() >= set(KINDS)
    assert report.held >= options.rounds * FEWEST
    assert report.cut
    assert report.most_servers == 1
    assert report.looks


def test_a_folder_has_one_server_even_if_who_starts_it_is_killed_before_it_listens(tmp_path: Path, scale: str) -> None:
    for number in range(STARTS[scale]):
        assert not pair(tmp_path / f"data-{number}")


def test_who_leaves_while_the_server_starts_again_leaves_none_behind(tmp_path: Path, scale: str) -> None:
    for number in range(STARTS[scale]):
        assert not leave(tmp_path / f"data-{number}")
