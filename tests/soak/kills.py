"""Killed and still there: `python tests/soak/kills.py [--rounds 20 --seed 0 --encoder fake --json]`.

Runs the real command with its embedded store on a data folder of its own, and sends pictures over HTTP from several
threads. At a random moment of that it kills, with SIGKILL, the service, or the server, or both, and starts again what
does not start by itself. Beside the rounds it kills services that are only starting, and presses Ctrl-C. After each:
nothing that an answer told to be in a slot is missing, unless surer ones took its place; what was learned before is as
it was; the service is ready within 10 s, not counting the time that others had the processors; there was never more
than one server. At last nothing is left running.

Then it meets the moments at which a server is there and does not listen yet, and its starter dies, or leaves.

With a compiler, some more rounds kill a server whose disk is slow: what was answered must not wait for the disk only
in the memory of a process that may die. Status 1 if a law is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx

from service.stores.embedded import find_binary
from tests.soak.load import LABELS, Banks, Ledger, Load, missing, send, undelivered
from tests.soak.running import Service, Watch, servers_of, until
from tests.soak.starts import leave, pair
from tests.support.fakes import picture

KINDS = ("service", "server", "both")
"""What is killed, round after round."""

READY_S = 10.0
SLOTS = 20
_SHOWN = 5
"""Faults of a round that are told one by one."""

FEWEST, MOST = 10, 400
"""Answered pictures before a kill."""

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

    def json(self) -> dict[str, Any]:
        times = {f"ready_after_{kind}_s": own for kind, own in sorted(self.ready_s.items())}
        times |= {"starts_had_a_processor_s": self.had_s, "starts_waited_for_one_s": self.waited_s}
        waits = [
            (name, {"median": round(statistics.median(own), 2), "max": round(max(own), 2)})
            for name, own in times.items()
            if own
        ]
        return {
            **{f"rounds_{kind}": count for kind, count in self.kinds.items()},
            "pictures": self.sent,
            **{f"outcome_{name}": count for name, count in sorted(self.outcomes.items())},
            "told_to_be_held": self.held,
            "refused_with_503": self.refused,
            "calls_cut_off": self.cut,
            "answered_while_store_away": self.stale,
            "not_settled_at_first": self.unsettled,
            **dict(waits),
            "most_servers_at_once": self.most_servers,
            "looks_at_servers": self.looks,
            "rounds_with_losses": self.broken,
            "slow_disk": self.slow_disk,
            "seconds": round(self.seconds, 1),
            "faults": self.faults,
        }


class Run:
    """Rounds on one data folder. Every round has a tenant of its own; those of earlier rounds must stay as they are."""

    def __init__(
        self,
        home: Path,
        report: Report,
        seed: int,
        *,
        ready_s: float,
        most: int = MOST,
        encoder: str = "fake",
        binary: str = "",
    ) -> None:
        self._service, self._ready_s = Service(home, encoder, binary), ready_s
        self._report, self._random, self._most = report, Random(seed), most
        self._watch = Watch(self._service.folder)
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
        except (TimeoutError, AssertionError, subprocess.TimeoutExpired) as error:
            told = f"{self._service.said()[-3000:]}\n{self._service.server_log()[-3000:]}"
            self._report.faults.append(f"{error!r}; the service and its server said last:\n{told}")
        finally:
            self._service.clear()
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
            until(lambda: ledger.settled >= moment, "answers")
            {
                "service": self._kill_service,
                "server": self._kill_server,
                "both": self._kill_both,
                "starting": self._kill_starting,
                "stop": self._stop_under_load,
            }[kind](ledger)
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
        self._kill_servers()
        self._read(ledger.tenant, "/memory")
        until(self._service.says_ready, "readiness after the server was killed")
        self._note_ready("server", time.monotonic() - killed)
        back = time.monotonic()
        until(lambda: ledger.held_since(back), "write after the server was killed")

    def _kill_both(self, ledger: Ledger) -> None:
        ledger.may_be_cut = True
        first, second = self._random.sample((self._service.kill, self._kill_servers), 2)
        first()
        second()

    def _kill_starting(self, ledger: Ledger) -> None:
        """Kill the service, and the next one while it starts, once with the server that it may have started."""
        self._kill_service(ledger)
        if self._random.random() < 0.5:
            self._kill_servers()
        for _ in range(2):
            self._service.start()
            moment = self._random.uniform(0.0, statistics.median(self._report.ready_s["start"]))
            if self._service.ended_within(moment):
                self._report.faults.append(f"the service ended while it started: {self._service.said()[-500:]}")
            self._service.kill()
        if self._random.random() < 0.5:
            self._kill_servers()

    def _stop_under_load(self, ledger: Ledger) -> None:
        ledger.may_be_cut = True
        self._stop("stop")

    def _stop(self, when: str) -> None:
        """Press Ctrl-C, and see that everything ends in order: status 0, the server saved, nothing is left."""
        before = len(self._service.server_log())
        status, faults = self._service.interrupt(), self._report.faults
        if status != 0:
            faults.append(f"{when}: Ctrl-C ended the service with {status}: {self._service.said()[-2000:]}")
        if left := servers_of(self._service.folder):
            faults.append(f"{when}: Ctrl-C left the servers {sorted(left)}")
        if "bye bye" not in self._service.server_log()[before:]:
            faults.append(f"{when}: the server did not end in order")
        if "Traceback" in self._service.said():
            faults.append(f"{when}: a traceback: {self._service.said()[-2000:]}")

    def _kill_servers(self) -> None:
        for pid in servers_of(self._service.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _restart(self, kind: str) -> None:
        self._service.start()
        seconds = self._service.ready()
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

        until(made, "tenant")
        return Ledger(name, SLOTS)

    def _check(self, kind: str, ledger: Ledger) -> None:
        """Hold what is there against what was told: as it is, and once what had no answer was sent again."""
        faults = [*self._lost_pending(kind, ledger), *ledger.faults, *missing(ledger, self._banks(ledger.tenant))]
        self._count(ledger)
        until(lambda: self._again(ledger), "answer to retries")
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
        with contextlib.suppress(TimeoutError):
            until(lambda: not undelivered(ledger, self._banks(ledger.tenant)), "delivery", self._ready_s)
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

    def _stale_copy(self, tenant: str) -> Sequence[str]:
        """Return a fault if answers are not read from what the store holds."""
        held = self._read(tenant, "/memory")
        files, told = {"images": ("a.png", picture("red", 0), "image/png")}, {"X-Tenant": tenant}
        answer = self._service.client.post("/classify", params={"learn": "false"}, files=files, headers=told)
        read = answer.raise_for_status().json()["memory"]
        due = {"version": held["version"], "epoch": held["epoch"], "state": "fresh"}
        return [] if read == due else [f"an answer was read from {read}; the store is at {due}"]

    def _read(self, tenant: str, path: str) -> Any:
        """Return what the service answers, once it does; a refusal is counted, and must say when to come back."""
        answers: list[httpx.Response] = []

        def answered() -> bool:
            answers.append(self._service.client.get(path, headers={"X-Tenant": tenant}))
            self._note_refusal(path, answers[-1])
            assert answers[-1].status_code in (200, 503), f"{path} of {tenant}: {answers[-1].text}"
            return answers[-1].status_code == 200

        until(answered, f"answer to {path}")
        return answers[-1].json()

    def _note_refusal(self, what: str, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            return
        self._report.refused += 1
        if answer.status_code != 503 or "retry-after" not in answer.headers:
            self._report.faults.append(f"{what} was refused with {answer.status_code}: {answer.text[:300]}")


def run(
    rounds: int,
    seed: int,
    *,
    encoder: str = "fake",
    ready_s: float = READY_S,
    most: int = MOST,
    extras: bool = True,
    starts: int = 0,
    slow_rounds: int = 0,
) -> Report:
    """Run rounds on a folder of their own, meet the moments of a start, run some more on a slow disk, and report."""
    report, start = Report(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dmn-kills-") as name:
        home = Path(name).resolve()
        own = Run(_folder(home / "fast"), report, seed, ready_s=ready_s, most=most, encoder=encoder)
        with own.opened():
            for number in range(rounds):
                own.round(KINDS[number % len(KINDS)])
                if extras and number % _EXTRAS_EVERY == _EXTRAS_EVERY - 1:
                    own.round("starting")
                    own.round("stop")
        for number in range(starts):
            _start(home, report, number)
        if slow_rounds:
            _slow(home, report, seed, slow_rounds, encoder=encoder, ready_s=ready_s)
    report.seconds = time.monotonic() - start
    return report


def _start(home: Path, report: Report, number: int) -> None:
    for kind, meet in {"pair": pair, "leave": leave}.items():
        report.kinds[kind] += 1
        report.faults += [f"{kind}: {fault}" for fault in meet(home / f"{kind}-{number}")]


def _slow(home: Path, report: Report, seed: int, rounds: int, *, encoder: str, ready_s: float) -> None:
    binary = _slow_binary(home)
    if binary is None:
        report.slow_disk = "not tried: there is no C compiler"
        return
    before = len(report.faults)
    own = Run(_folder(home / "slow"), report, seed + 1, ready_s=ready_s, encoder=encoder, binary=str(binary))
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


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--starts", type=int, default=10, help="times that each moment of a start is met")
    parser.add_argument("--slow-rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", default="fake", help="`fake` sees colours; or any that `dmn serve` takes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    own = {"encoder": given.encoder, "starts": given.starts, "slow_rounds": given.slow_rounds}
    report = run(given.rounds, given.seed, **own)
    if given.json:
        print(json.dumps(report.json()))
    else:
        for name, value in report.json().items():
            if name != "faults":
                print(f"{name:>24} {value}")
        print("\n".join(report.faults) or "no law was broken")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
