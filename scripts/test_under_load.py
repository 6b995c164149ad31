"""Run the tests on a disturbed machine: `make test-hard`, or `python scripts/test_under_load.py STEP...`.

Steps, all by default, in this order:

- `quiet`: the default tier three times, the slow tier once;
- `busy`: the default tier twice and the slow tier once, beside one busy loop for every core;
- `stopped`: the default tier once, while all processes of the run are stopped twice a minute, each for 0.2 to 3 s.

Prints a row a run. Status 1 if a run fails. The log of a run is written to the folder `--logs`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
STOP_EVERY_S = 30.0
STOPPED_S = (0.2, 3.0)

Disturbance = Callable[[int], AbstractContextManager[None]]
"""Takes the process id of a run, and disturbs the run until the block ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Targets of the Makefile, and what disturbs each of them."""

    targets: tuple[str, ...]
    disturb: Disturbance


@contextmanager
def undisturbed(_pid: int) -> Iterator[None]:
    """Leave the run alone."""
    yield


@contextmanager
def busy_loops(_pid: int) -> Iterator[None]:
    """Run one busy loop for every core."""
    command = (sys.executable, "-S", "-c", "while True: pass")
    loops = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def stopped_at_random(pid: int) -> Iterator[None]:
    """Stop the run and all its descendants twice a minute, and continue each after a time of its own."""
    over = threading.Event()
    thread = threading.Thread(target=_stop_again_and_again, args=(pid, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _stop_again_and_again(pid: int, over: threading.Event) -> None:
    random = Random(0)
    while not over.wait(random.uniform(0.5, 1.5) * STOP_EVERY_S):
        processes = [process for process in (pid, *descendants(pid)) if not stopped(process)]
        for process in processes:
            _send(process, signal.SIGSTOP)
        began = time.monotonic()
        for delay, process in sorted((random.uniform(*STOPPED_S), process) for process in processes):
            time.sleep(max(0.0, began + delay - time.monotonic()))
            _send(process, signal.SIGCONT)


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def stopped(pid: int) -> bool:
    """Return whether a process is stopped already, as one is whose test stops it, or is gone."""
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    return True


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below one, parents before their children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    below, waiting = [], [pid]
    while waiting:
        below += (nearest := children.get(waiting.pop(), []))
        waiting += nearest
    return below


STEPS = {
    "quiet": Step(targets=("test", "test", "test", "test-slow"), disturb=undisturbed),
    "busy": Step(targets=("test", "test", "test-slow"), disturb=busy_loops),
    "stopped": Step(targets=("test",), disturb=stopped_at_random),
}


def run(target: str, disturb: Disturbance, log: Path) -> bool:
    """Run one target of the Makefile and print its row; return whether it passes."""
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(("make", target), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        with disturb(process.pid):
            status = process.wait()
    lines = log.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if " passed" in line or " failed" in line), "no closing line")
    verdict = "passes" if status == 0 else "FAILS"
    print(f"{target:>10} {verdict:>7} {time.monotonic() - began:6.0f} s  {last.strip('= ')}  {log}", flush=True)
    return status == 0


def main() -> int:
    """Run the steps that the command line names and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--logs", type=Path, help="folder of the logs; a new temporary one by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; the steps are {', '.join(STEPS)}")
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="dmn-tests-"))
    logs.mkdir(parents=True, exist_ok=True)
    passed = True
    for name in arguments.steps or STEPS:
        print(name, flush=True)
        for number, target in enumerate(STEPS[name].targets):
            passed &= run(target, STEPS[name].disturb, logs / f"{name}-{number}-{target}.log")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
