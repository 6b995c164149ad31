"""As large as its budget: `python -m tests.soak.memory [--requests 100000 --tenants 200 --hot 20 --json]`.

Runs the real command with its embedded store and an encoder without weights, and posts pictures for many tenants while
the hot memories of only some of them may be kept. A tenant is drawn at random and asks a few times: nearly each such
visit loads a memory and drops another, and by the end every tenant's memory is full. The resident size of the service
is looked at all along: that at the end must be within 5 % of that after a fifth of the calls. Status 1 if it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.adapt import put_tenant
from service.app import open_rooms
from service.bench.load import Client
from service.bench.photos import photo
from service.bench.telling import stamp
from service.classify import ClassifyCall, classify
from service.settings import DEFAULT_TENANT, Settings
from service.tenants import ClassSpec, TenantConfig
from tests.bench.fleet import Server, ours, running
from tests.bench.null import CLASSES, NullEncoder

MOST_GROWTH = 0.05
BEGINS = 0.2
"""Share of the calls after which the size is the one to keep."""

_CLIENTS = 4
_VISIT = 10
"""Calls that a client makes for a tenant before it draws another."""

_LOOKS = 100
_NEIGHBOURS = 5
"""Looks whose median is a size: one alone may fall into a garbage collection."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--hot", type=int, default=20, help="tenants that the budget of hot memories is for")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    told = soak(
        requests=options.requests,
        tenants=options.tenants,
        hot=options.hot,
        images=options.images,
        seed=options.seed,
        heard=lambda done, mb: print(f"{done:>8} requests  {mb:8.1f} MB resident", file=sys.stderr),
    )
    told |= stamp()
    print(
        json.dumps(told, indent=2) if options.json else f"grown by {told['growth']:.1%}; {told['evictions']} evictions"
    )
    sys.exit(told["growth"] > MOST_GROWTH)


def soak(
    *,
    requests: int,
    tenants: int,
    hot: int,
    images: int,
    seed: int,
    heard: Callable[[int, float], object],
    visit: int = _VISIT,
) -> dict[str, Any]:
    """Return the curve of the resident size, how much it grew, and how many bytes were loaded and dropped meanwhile."""
    photos = [photo(one, NullEncoder.preprocess.size) for one in range(images)]
    each = asyncio.run(memory_bytes(photos))
    kind = ours("null", DMN_HOT_MEMORY_BYTES=str(hot * each))
    every = sorted(os.sched_getaffinity(0))
    with running("dmn", kind, cores=",".join(map(str, every)), threads=1) as server:
        names = [f"tenant-{n}" for n in range(tenants)]
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for name in names:
                client.put(f"/tenants/{name}", json={"classes": CLASSES}).raise_for_status()
        curve, failed = asyncio.run(_asked(server, names, photos, requests, Random(seed), visit, heard))
        counted = _metrics(server)
    settled = _size(curve, BEGINS)
    return {
        "requests": requests,
        "failed": failed,
        "tenants": tenants,
        "budget_mb": round(hot * each / 2**20, 1),
        "memory_mb": round(each / 2**20, 2),
        "evictions": round(counted["dmn_hot_evictions_total"]),
        "hot_mb": round(counted["dmn_hot_bytes"] / 2**20, 1),
        "resident_mb": {str(done): mb for done, mb in curve},
        "growth": round(_size(curve, 1.0) / settled - 1, 4),
    }


async def memory_bytes(photos: Sequence[bytes]) -> int:
    """Return what one tenant's memory takes while it is hot, once all the photos were learned."""
    async with open_rooms(Settings(store="memory"), NullEncoder()) as rooms:
        config = TenantConfig(classes=tuple(ClassSpec(name=name) for name in CLASSES))
        await put_tenant(rooms, DEFAULT_TENANT, config)
        for start in range(0, len(photos), rooms.settings.max_images):
            part = list(photos[start : start + rooms.settings.max_images])
            forever = float("inf")
            call = ClassifyCall(
                tenant=DEFAULT_TENANT, images=part, learn=True, views=1, explain=False, deadline=forever
            )
            await classify(rooms, call)
        return int(rooms.metrics.hot_bytes._value.get())


async def _asked(
    server: Server,
    names: Sequence[str],
    photos: Sequence[bytes],
    requests: int,
    random: Random,
    visit: int,
    heard: Callable[[int, float], object],
) -> tuple[list[tuple[int, float]], int]:
    """Post so many photos, and return the size after each hundredth of them, and how many failed."""
    left, failed = iter(range(1, requests + 1)), 0
    curve: list[tuple[int, float]] = []

    async def ask(client: Client) -> None:
        nonlocal failed
        tenant = names[0]
        for call, number in enumerate(left):
            tenant = tenant if call % visit else random.choice(names)
            failed += await client.post(random.choice(photos), X_Tenant=tenant) != 200
            if number % max(1, requests // _LOOKS) == 0:
                curve.append((number, resident_mb(server.process.pid)))
                heard(*curve[-1])

    async with Client(server.url, "/classify", {"Content-Type": "image/jpeg"}) as client:
        await asyncio.gather(*(ask(client) for _ in range(_CLIENTS)))
    return sorted(curve), failed


def resident_mb(pid: int) -> float:
    """Return the resident size of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return round(int(found[1]) / 1024, 1)


def _size(curve: Sequence[tuple[int, float]], share: float) -> float:
    """Return the size after a share of the calls: the median of the last looks until then."""
    looks = [mb for _, mb in curve[: max(_NEIGHBOURS, round(share * len(curve)))]]
    return statistics.median(looks[-_NEIGHBOURS:])


def _metrics(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").raise_for_status().text
    return {one.name: one.value for family in text_string_to_metric_families(text) for one in family.samples}


if __name__ == "__main__":
    main()
