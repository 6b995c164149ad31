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
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from service.bench.telling import stamp
from tests.bench.fleet import Kind, Server, loaded, medians, missing, ours, peer, photo_list, running, settings_of

OURS = "dmn"
_WARM = 8
"""Connections of the first load, which nobody measures: memories fill, and what is set up lazily is set up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", default="1,8,64")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--body", choices=("raw", "multipart"), default="raw")
    parser.add_argument(
        "--servers", default="", help="some of them, separated by commas: dmn, dmn-memory, litserve, fastapi"
    )
    parser.add_argument("--set", action="append", default=[], metavar="DMN_X=Y", help="a setting of dmn serve")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    why = missing()
    told = {**({"skipped": why} if why else measure(options)), **stamp()}
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print(told["skipped"] if why else table(told))


def kinds(settings: dict[str, str]) -> dict[str, Kind]:
    """Return the servers; `settings` are those of ours that differ from the default."""
    return {
        OURS: ours("null", **settings),
        "dmn-memory": ours("null", "memory", **settings),
        "litserve": peer("lit", "null"),
        "fastapi": peer("plain", "null"),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of every server at every number of connections, and what ours makes of the others'."""
    every = kinds(settings_of(options.set))
    chosen = {name: every[name] for name in options.servers.split(",")} if options.servers else every
    with TemporaryDirectory() as folder, ExitStack() as stack:
        images = photo_list(Path(folder), options.images, 96)
        servers = [stack.enter_context(running(name, kind, cores="0", threads=1)) for name, kind in chosen.items()]

        def load(server: Server, connections: int) -> dict[str, float]:
            return loaded(
                server, images, cores="1", connections=connections, seconds=options.seconds, form=options.body
            )

        for server in servers:
            load(server, _WARM)
        runs = {
            count: [{server.name: load(server, int(count)) for server in servers} for _ in range(options.rounds)]
            for count in options.connections.split(",")
        }
    figures = {count: medians(rounds) for count, rounds in runs.items()}
    return {"body": options.body, "connections": figures, "ratios": _ratios(figures)}


def _ratios(figures: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return the requests a second of ours over each other server's."""
    return {
        count: {
            name: round(servers[OURS]["per_second"] / one["per_second"], 3)
            for name, one in servers.items()
            if name != OURS and OURS in servers
        }
        for count, servers in figures.items()
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
