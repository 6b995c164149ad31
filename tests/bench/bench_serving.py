"""Requests a second with an encoder that costs nothing: `dmn serve`, LitServe, and a plain FastAPI handler.

`python -m tests.bench.bench_serving [--seconds 3] [--rounds 3] [--connections 1,8,64] [--body raw|multipart] [--json]`

Each request is one JPEG of 96 x 96 pixels, no two alike in a round of the list. Each server is held to one core, with
one thread for torch; `wrk` posts from another core. All servers run at once and are loaded in turns, so that what
slows the machine slows all; the figures are medians over the rounds. `dmn serve` runs as by default, with its store
beside it on the same core, and learns from what it is sent. Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from service.bench.telling import stamp
from tests.bench.fleet import Kind, Server, loaded, missing, ours, peer, running
from tests.bench.photos import photo_list

OURS = "dmn"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", default="1,8,64")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--body", choices=("raw", "multipart"), default="raw")
    parser.add_argument("--servers", default="", help="some of them, by name, separated by commas")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    why = missing()
    told = {**({"skipped": why} if why else measure(options)), **stamp()}
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print(told["skipped"] if why else table(told))


def kinds() -> dict[str, Kind]:
    """Return the servers."""
    return {
        OURS: ours("null"),
        "dmn, memory": ours("null", "memory"),
        "litserve": peer("lit", "null"),
        "fastapi": peer("plain", "null"),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of every server at every number of connections, and what ours makes of the others'."""
    chosen = {name: kind for name, kind in kinds().items() if not options.servers or name in options.servers.split(",")}
    counts = [int(one) for one in options.connections.split(",")]
    with TemporaryDirectory() as folder, ExitStack() as stack:
        images = photo_list(Path(folder), options.images, 96)
        servers = [stack.enter_context(running(name, kind, cores="0", threads=1)) for name, kind in chosen.items()]
        for server in servers:
            _load(server, images, options, 8)  # memories fill, caches warm
        rounds = [
            {count: {server.name: _load(server, images, options, count) for server in servers} for count in counts}
            for _ in range(options.rounds)
        ]
    medians = {str(count): {name: _median([one[count][name] for one in rounds]) for name in chosen} for count in counts}
    return {"body": options.body, "connections": medians, "ratios": _ratios(medians)}


def _load(server: Server, images: Path, options: argparse.Namespace, connections: int) -> dict[str, float]:
    return loaded(server, images, cores="1", connections=connections, seconds=options.seconds, form=options.body)


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def _ratios(medians: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return the requests a second of ours over each other server's."""
    return {
        count: {
            name: round(servers[OURS]["per_second"] / one["per_second"], 3)
            for name, one in servers.items()
            if name != OURS and OURS in servers
        }
        for count, servers in medians.items()
    }


def table(told: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = ["connections server         requests/s   p50 ms   p99 ms failed dmn over it"]
    for count, servers in told["connections"].items():
        for name, one in servers.items():
            ratio = told["ratios"][count].get(name, "")
            lines.append(
                f"{count:>11} {name:<14} {one['per_second']:>10.1f} {one['p50_ms']:>8.2f} {one['p99_ms']:>8.2f} "
                f"{one['failed']:>6.0f} {ratio:>11}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
