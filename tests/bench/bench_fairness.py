"""How long one tenant's single requests take while another floods the service, or has a large memory loaded.

`python -m tests.bench.bench_fairness [--encoder lite] [--seconds 20] [--clients 64] [--classes 300] [--json]`

A quiet tenant sends one image at a time, with a pause after each answer: with the service to itself, while another
tenant's clients ask again as soon as they are answered, and while tenants that were never seen before come with many
classes, whose texts have to be encoded first. Told is the median and the 99th percentile of the quiet tenant's answers,
what they came to wait longer by, and how long the encode batches of the flood took. Asserts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import httpx
import numpy as np

from service.bench.images import photo
from service.bench.load import Client
from tests.bench.fleet import Server, ours, running, settings_of
from tests.bench.telling import tell

_SIDE = 227
_PAUSE_S = 0.1
_OK = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="lite")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--clients", type=int, default=64, help="of the tenant that floods")
    parser.add_argument("--classes", type=int, default=300, help="of each tenant that is loaded")
    parser.add_argument("--set", action="append", default=[], metavar="DMN_X=Y", help="a setting of dmn serve")
    tell(parser, measure, table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the quiet tenant's latencies in each part, in milliseconds."""
    cores = sorted(os.sched_getaffinity(0))
    kind = ours(options.encoder, "memory", **settings_of(options.set))
    with running("dmn", kind, cores=",".join(map(str, cores)), threads=len(cores)) as server:
        for name in ("quiet", "flood"):
            _put(server, name, [f"class {n}" for n in range(7)])
        return asyncio.run(_parts(server, options))


async def _parts(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    images = [photo(seed, _SIDE) for seed in range(200)]
    told = {"alone": await _beside(server, images, options.seconds, None)}
    before = _encoded(server)
    told["beside a flood"] = await _beside(
        server, images, options.seconds, lambda: _flood(server, images, options.clients)
    )
    after = _encoded(server)
    told["beside cold loads"] = await _beside(server, images, options.seconds, lambda: _loads(server, images, options))
    batch = (after[0] - before[0]) / max(1.0, after[1] - before[1])
    extra = {part: told[part]["p99_ms"] - told["alone"]["p50_ms"] for part in told if part != "alone"}
    return {
        "encoder": options.encoder,
        "figures": told,
        "flood_batch_ms": 1000 * batch,
        "p99_over_median_alone_in_batches": {part: own / (1000 * batch) for part, own in extra.items()},
    }


async def _beside(
    server: Server, images: Sequence[bytes], seconds: float, others: Callable[[], Awaitable[None]] | None
) -> dict[str, float]:
    """Return the quiet tenant's latencies while others are at work."""
    work = asyncio.ensure_future(others()) if others is not None else None
    try:
        async with Client(server.url, "/classify", {"Content-Type": "image/jpeg", "X-Tenant": "quiet"}) as client:
            await client.post(images[0])
            await asyncio.sleep(1.0)  # until the others are at full work
            took, ends = [], time.perf_counter() + seconds
            for image in itertools.cycle(images):
                start = time.perf_counter()
                if start > ends:
                    break
                status = await client.post(image)
                took.append(time.perf_counter() - start if status == _OK else float("inf"))
                await asyncio.sleep(_PAUSE_S)
    finally:
        if work is not None:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
    answered = [1000 * one for one in took if one != float("inf")]
    return {
        "p50_ms": statistics.median(answered),
        "p99_ms": float(np.percentile(answered, 99)),
        "answers": len(answered),
        "refused": len(took) - len(answered),
    }


async def _flood(server: Server, images: Sequence[bytes], clients: int) -> None:
    async with Client(server.url, "/classify", {"Content-Type": "image/jpeg", "X-Tenant": "flood"}) as client:

        async def again(at: int) -> None:
            for image in itertools.cycle(images[at % len(images) :]):
                await client.post(image)

        await asyncio.gather(*(again(at) for at in range(clients)))


async def _loads(server: Server, images: Sequence[bytes], options: argparse.Namespace) -> None:
    """Come with one tenant after the other that has many classes, none of them known."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
        for number in itertools.count():
            names = [f"kind {number} {n}" for n in range(options.classes)]
            headers = {"X-Tenant": f"cold-{number}", "Content-Type": "image/jpeg"}
            await client.put(f"/tenants/cold-{number}", json={"classes": names})
            await client.post("/classify", content=images[0], headers=headers)


def table(told: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = [f"{told['encoder']:<20} p50 ms   p99 ms answers refused"]
    lines += [
        f"{part:<18} {one['p50_ms']:>8.1f} {one['p99_ms']:>8.1f} {one['answers']:>7} {one['refused']:>7}"
        for part, one in told["figures"].items()
    ]
    lines.append(f"an encode batch of the flood takes {told['flood_batch_ms']:.1f} ms")
    lines += [
        f"{part}: 99 of 100 answers wait at most {ratio:.2f} batches longer than the median alone"
        for part, ratio in told["p99_over_median_alone_in_batches"].items()
    ]
    return "\n".join(lines)


def _put(server: Server, tenant: str, classes: Sequence[str]) -> None:
    httpx.put(f"{server.url}/tenants/{tenant}", json={"classes": list(classes)}, timeout=120.0).raise_for_status()


def _encoded(server: Server) -> tuple[float, float]:
    """Return the images' seconds in encode batches so far, and how many images there were."""
    text = httpx.get(f"{server.url}/metrics", timeout=30.0).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    name = 'dmn_stage_duration_seconds_{}{{stage="encode"}}'
    return float(values[name.format("sum")]), float(values[name.format("count")])


if __name__ == "__main__":
    main()
