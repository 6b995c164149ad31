"""Requests a second with an encoder that costs nothing: `dmn serve`, LitServe, and a plain FastAPI handler.

`python -m tests.bench.bench_serving [--seconds 3] [--rounds 3] [--connections 1,8,64] [--body raw|multipart] [--json]`

Each request is one JPEG of 96 x 96 pixels, another one than the last some thousand. Each server is held to one core,
with one thread for torch; `wrk` posts from another core. The servers are loaded in turns, while the others are stopped,
so that what slows the machine slows all alike; figures and ratios are medians over the rounds. `dmn serve` runs as by
default, with its store beside it on the same core, and learns from what it is sent. Asserts nothing.

infinity is no peer here: infinity-emb 0.0.78 wants NumPy 1, and older torch, typer, rich and uvicorn than ours.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.bench.fleet import (
    Kind,
    Server,
    agreement,
    loaded,
    medians,
    missing,
    only,
    ours,
    peer,
    photo_list,
    ratio,
    running,
    settings_of,
)
from tests.bench.telling import tell

OURS = "dmn"
_WARM = 8
"""Connections of the first load, which nobody measures: memories fill, and what is set up lazily is set up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", default="1,8,64")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--body", choices=("raw", "multipart"), default="raw")
    parser.add_argument(
        "--servers", default="", help="some of them, separated by commas: dmn, dmn-memory, litserve, fastapi"
    )
    parser.add_argument("--set", action="append", default=[], metavar="DMN_X=Y", help="a setting of dmn serve")
    tell(parser, measure, table, absent=missing())


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
    counts = options.connections.split(",")
    with TemporaryDirectory() as folder, ExitStack() as stack:
        images = photo_list(Path(folder), options.images, 96)
        servers = [stack.enter_context(running(name, kind, cores="0", threads=1)) for name, kind in chosen.items()]
        agreed = agreement(servers, images)
        posted: Counter[str] = Counter()

        def load(server: Server, connections: int) -> dict[str, float]:
            with only(server, servers):
                told = loaded(
                    server,
                    images,
                    cores="1",
                    connections=connections,
                    seconds=options.seconds,
                    form=options.body,
                    start=posted[server.name],
                )
            posted[server.name] += round(told["requests"])
            return told

        for server in servers:
            load(server, _WARM)
        rounds = [
            {count: {server.name: load(server, int(count)) for server in servers} for count in counts}
            for _ in range(options.rounds)
        ]
    by_count = {count: [one[count] for one in rounds] for count in counts}
    return {
        "body": options.body,
        "agreement": agreed,
        "connections": {count: medians(runs) for count, runs in by_count.items()},
        "ratios": {
            count: {name: _ratios(runs, name) for name in chosen if OURS in chosen and name != OURS}
            for count, runs in by_count.items()
        },
    }


def _ratios(runs: Sequence[dict[str, dict[str, float]]], name: str) -> dict[str, float]:
    """Return what ours makes of another server's."""
    return {figure: ratio(runs, OURS, name, figure) for figure in ("per_second", "p99_ms")}


def table(told: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = ["connections server         requests/s   p50 ms   p99 ms failed  dmn over it: requests/s  p99"]
    for count, servers in told["connections"].items():
        for name, one in servers.items():
            over = told["ratios"][count].get(name)
            lines.append(
                f"{count:>11} {name:<14} {one['per_second']:>10.1f} {one['p50_ms']:>8.2f} {one['p99_ms']:>8.2f} "
                f"{one['failed']:>6.0f}" + (f" {over['per_second']:>24.3f} {over['p99_ms']:>5.3f}" if over else "")
            )
    agreed = ", ".join(f"{name} {share:.1%}" for name, share in told["agreement"].items())
    return "\n".join([*lines, f"same label from the text head as {OURS}: {agreed}"])


if __name__ == "__main__":
    main()
