"""What HTTP processes take off a worker process: processor time a request, of each kind of process.

`python -m tests.bench.bench_processes [--seconds 3] [--rounds 5] [--connections 32] [--size 96] [--json]`

Each request is one JPEG; the encoder costs nothing. `dmn serve` in one process and with `--http-workers 2` run at once
and are loaded in turns; what each process used of the processors is read before and after. A device is kept full as
long as its own process keeps up, so the figure that counts is that of the worker process beside that of the one
process which does all. Asserts nothing.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.bench.fleet import loaded, medians, missing, ours, photo_list, processor_s, running
from tests.bench.telling import tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--size", type=int, default=96, help="side of a picture, in pixels")
    parser.add_argument("--body", choices=("raw", "multipart"), default="multipart")
    tell(parser, measure, table, absent=missing())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of both, and how much less the worker process does than the one process."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    kinds = {"one process": ours("null"), "two before one": ours("null", DMN_HTTP_WORKERS="2")}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        images = photo_list(folder, options.images, options.size)
        servers = {
            name: stack.enter_context(running(name, kind, cores=cores, threads=1)) for name, kind in kinds.items()
        }
        rounds = []
        for at in range(options.rounds + 1):
            seen = {}
            for name, server in servers.items():
                before = used_s(server.process.pid)
                load = loaded(
                    server,
                    images,
                    cores=cores,
                    connections=options.connections,
                    seconds=options.seconds,
                    form=options.body,
                )
                spent = {role: seconds - before[role] for role, seconds in used_s(server.process.pid).items()}
                requests = load["per_second"] * options.seconds
                seen[name] = {
                    "worker_ms": 1000 * spent["worker"] / requests,
                    "http_ms": 1000 * spent["http"] / requests,
                    **load,
                }
            if at:  # the first warms up
                rounds.append(seen)
    cases = medians(rounds)
    ratio = cases["one process"]["worker_ms"] / cases["two before one"]["worker_ms"]
    return {"cases": cases, "less": round(ratio, 2), "connections": options.connections, "size": options.size}


def used_s(steward: int) -> dict[str, float]:
    """Return the seconds of processor time that a service has used, by kind of process."""
    children = Path(f"/proc/{steward}/task/{steward}/children").read_text().split()
    rooms = sorted(int(pid) for pid in children if " room " in _command(int(pid)))
    if not rooms:
        return {"worker": processor_s(steward), "http": 0.0}
    worker, *fronts = rooms  # in the order in which they were started
    return {"worker": processor_s(worker), "http": sum(map(processor_s, fronts))}


def table(told: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = [
        f"{name:15} worker {case['worker_ms']:6.3f} ms   HTTP {case['http_ms']:6.3f} ms a request   "
        f"{case['per_second']:7.0f} requests/s   failed {case['failed']:.0f}"
        for name, case in told["cases"].items()
    ]
    return "\n".join([*lines, f"the worker process does {told['less']} times less a request than the one process"])


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


if __name__ == "__main__":
    main()
