"""What an image costs the whole service while more and more tenants take turns, all of whom the budget has room for.

`python -m tests.bench.bench_tenants [--encoder lite] [--tenants 1,100,1000] [--seconds 15] [--rounds 3] [--json]`

One `dmn serve` on all cores, saturated by 64 connections of `wrk`; each request is one JPEG of 227 x 227 pixels, for
the next tenant. With one tenant, images of a batch are read together, and its memory stays in the processor's cache;
with many, each is read alone, from memory. Cases take turns; figures are medians over the rounds. Asserts nothing.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.bench.bench_encoder import named
from tests.bench.fleet import Server, loaded, medians, missing, ours, photo_list, ratio, running
from tests.bench.null import CLASSES
from tests.bench.telling import tell

_SIDE = 227
_CONNECTIONS = 64
_BUDGET = 12 << 30
"""Bytes: far more than a thousand small memories take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="lite", help="as bench_encoder takes it")
    parser.add_argument("--tenants", default="1,100,1000", help="numbers of tenants, separated by commas")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    tell(parser, measure, table, absent=missing())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians for each number of tenants, and each over the first."""
    numbers = [int(one) for one in options.tenants.split(",")]
    cores = sorted(os.sched_getaffinity(0))
    every = ",".join(map(str, cores))
    with TemporaryDirectory() as folder, ExitStack() as stack:
        images = photo_list(Path(folder), max(*numbers, 1000), _SIDE)
        kind = ours(named(options.encoder, Path(folder)), DMN_HOT_MEMORY_BYTES=str(_BUDGET))
        server = stack.enter_context(running("dmn", kind, cores=every, threads=len(cores)))
        for at in range(max(numbers)):
            told = httpx.put(f"{server.url}/tenants/t{at}", json={"classes": CLASSES}, timeout=60.0)
            told.raise_for_status()
            _classify_once(server, f"t{at}", images)

        def turn(seconds: float) -> dict[str, dict[str, float]]:
            return {
                str(number): loaded(
                    server,
                    images,
                    cores=every,
                    connections=_CONNECTIONS,
                    seconds=seconds,
                    form="raw",
                    tenants=number,
                )
                for number in numbers
            }

        turn(options.seconds)  # memories fill
        rounds = [turn(options.seconds) for _ in range(options.rounds)]
    first = str(numbers[0])
    return {
        "encoder": options.encoder,
        "tenants": medians(rounds),
        "cost_over_first": {str(number): ratio(rounds, first, str(number), "per_second") for number in numbers},
    }


def _classify_once(server: Server, tenant: str, images: Path) -> None:
    """Have a tenant's memory loaded, which is not what is measured."""
    body = Path(images.read_text().split()[0]).read_bytes()
    headers = {"Content-Type": "image/jpeg", "X-Tenant": tenant}
    httpx.post(f"{server.url}/classify", content=body, headers=headers, timeout=60.0).raise_for_status()


def table(told: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = [f"{told['encoder']}: tenants  images/s   p50 ms   p99 ms  failed  cost of an image over the first"]
    lines += [
        f"{number:>{len(told['encoder']) + 9}}  {one['per_second']:8.1f} {one['p50_ms']:8.1f} {one['p99_ms']:8.1f}"
        f"  {one['failed']:6.0f}  {told['cost_over_first'][number]:.3f}"
        for number, one in told["tenants"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
