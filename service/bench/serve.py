"""How long callers wait for a service that is asked at a rate: an open loop, from a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.client import check, connected
from service.evaluation.datasets import pictures_under

from .images import photo
from .load import Client, Offered, arrivals, offer, saturate
from .output import Absent

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
"""Rates that are offered where none are named, as shares of the measured capacity."""

_SIDE = 227
_MADE = 256
_CLIENTS = 32
_MOST_READ = 2000
_PATIENCE_S = 300.0
_LEAVE_S = 60.0
_LOOK_S = 0.1
_URL = re.compile(r"http://\S+?:\d+")
_PERCENTILES = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is offered: calls of one image each, so many a second (none: shares of what it can do), each for so long."""

    rates: Sequence[float]
    seconds: float
    learn: bool
    seed: int


def measure(
    plan: Plan, url: str | None, serving: Sequence[str], images: Path | None, console: Console
) -> dict[str, Any]:
    """Return latencies, counted from when calls were due, and what was answered and refused, at each offered rate.

    The service is the one at `url`, or `dmn serve` with the options `serving`, which is started and stopped again. Its
    tenant is made for the purpose, and deleted.

    Raises:
        Absent: `dmn serve` does not start.
        ConnectionError: the service does not answer.
        InvalidRequest: the folder of images holds none.
    """
    bodies = [photo(seed, _SIDE) for seed in range(_MADE)] if images is None else _read(images)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        starting = progress.add_task("Starting the service", total=None)
        with _served(url, serving) as address, _tenant(address) as tenant:
            progress.remove_task(starting)
            return asyncio.run(_measured(plan, address, tenant, bodies, progress))


def table(told: dict[str, Any]) -> Table:
    """Return a row for each offered rate."""
    title = f"{_CLIENTS} clients that ask again at once: {told['capacity']:.1f} answers/s"
    figures = ("offered/s", "achieved/s", "answered", "refused", "failed", "p50 ms", "p95 ms", "p99 ms")
    shown = Table(*figures, title=title, box=None, pad_edge=False)
    for one in told["rates"]:
        counts = (str(one[name]) for name in ("answered", "refused", "failed"))
        times = ("-" if one[name] is None else f"{one[name]:.1f}" for name in _PERCENTILES)
        shown.add_row(f"{one['offered']:.1f}", f"{one['achieved']:.1f}", *counts, *times)
    return shown


def draw(told: dict[str, Any], axes: Any) -> None:
    """Draw latency against the offered rate."""
    offered = [one["offered"] for one in told["rates"]]
    for name in _PERCENTILES:
        axes.plot(offered, [one[name] for one in told["rates"]], marker="o", label=name.removesuffix("_ms"))
    axes.axvline(told["capacity"], color="#8a8a8a", linestyle=":", label=f"{_CLIENTS} clients that ask again at once")
    axes.set(xlabel="calls offered a second", ylabel="latency, ms", yscale="log")
    axes.legend(loc="best", frameon=False)


async def _measured(
    plan: Plan, address: str, tenant: str, bodies: Sequence[bytes], progress: Progress
) -> dict[str, Any]:
    headers = {"X-Tenant": tenant, "Content-Type": "image/jpeg"}  # whatever they are: the service looks for itself
    async with Client(address, f"/classify?learn={str(plan.learn).lower()}", headers) as client:
        warming = progress.add_task("Asking as fast as it answers", total=None)
        capacity = await _capacity(client, bodies, plan.seconds)
        progress.remove_task(warming)
        rates = plan.rates or [share * capacity for share in SHARES]
        task = progress.add_task("Asking at fixed rates", total=sum(rates) * plan.seconds)
        told = [await _at(rate, plan, client, bodies, lambda: progress.advance(task)) for rate in rates]
    return {"images": len(bodies), "learn": plan.learn, "seconds": plan.seconds, "capacity": capacity, "rates": told}


async def _capacity(client: Client, bodies: Sequence[bytes], seconds: float) -> float:
    """Return the answers a second that the service gives when it is never idle; warms it, too.

    Raises:
        ConnectionError: it answers nothing.
    """
    most = await saturate(client, bodies, clients=_CLIENTS, seconds=seconds)
    if not most.per_second:
        raise ConnectionError(f"The service answered no call in {seconds:g} s; take longer.")
    return round(most.per_second, 2)


async def _at(
    rate: float, plan: Plan, client: Client, bodies: Sequence[bytes], advance: Callable[[], object]
) -> dict[str, Any]:
    offered = await offer(client, bodies, arrivals(rate, plan.seconds, plan.seed), advance)
    return {
        "offered": round(rate, 2),
        "achieved": round(offered.achieved(plan.seconds), 2),
        "answered": len(offered.latencies),
        "refused": offered.refused,
        "failed": offered.failed,
        "unsent": offered.unsent,
        "client_late_ms": round(1000 * offered.late_s, 2),
        **_percentiles(offered),
    }


def _percentiles(offered: Offered) -> dict[str, float | None]:
    if not offered.latencies:
        return dict.fromkeys(_PERCENTILES)
    return {
        name: round(1000 * float(np.percentile(offered.latencies, percent)), 2)
        for name, percent in _PERCENTILES.items()
    }


def _read(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in pictures_under(directory)[:_MOST_READ]]


@contextmanager
def _tenant(address: str) -> Iterator[str]:
    """Make a tenant that is there as long as it is needed."""
    name = f"bench-{secrets.token_hex(4)}"
    with connected(address, name) as client:
        check(client.put(f"/tenants/{name}", json={"classes": CLASSES}))
        try:
            yield name
        finally:
            check(client.delete(f"/tenants/{name}"))


@contextmanager
def _served(url: str | None, serving: Sequence[str]) -> Iterator[str]:
    """Run a service of our own where none is named, with a data folder that goes with it.

    Raises:
        Absent: it does not start; says why.
    """
    if url is not None:
        yield url
        return
    with TemporaryDirectory(prefix="dmn-bench-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "log")
        command = [sys.executable, "-c", "from service.cli.main import main; main()", "serve", "--port", "0", *serving]
        settings = {"DMN_LOG_LEVEL": "error", "DMN_DRAIN_DELAY_S": "0", "DMN_DATA_DIR": str(Path(folder, "data"))}
        with log.open("wb") as said:
            service = subprocess.Popen(  # noqa: S603 - ourselves
                command, stdout=said, stderr=said, env={**os.environ, **settings}
            )
        try:
            yield _address(service, log)
        finally:
            service.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.wait(_LEAVE_S)
            service.kill()
            service.wait()


def _address(service: subprocess.Popen[bytes], log: Path) -> str:
    """Return where a service listens that was just started, once it does.

    Raises:
        Absent: it ended instead, or takes too long; says what it said.
    """
    ends = time.monotonic() + _PATIENCE_S
    while (found := _URL.search(log.read_text(errors="replace"))) is None:
        if service.poll() is not None or time.monotonic() > ends:
            raise Absent(f"dmn serve did not start. {log.read_text(errors='replace').strip()[-1000:]}")
        time.sleep(_LOOK_S)
    return found[0]
