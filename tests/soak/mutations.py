"""Ten thousand calls that nobody should make: `python -m tests.soak.mutations [--count 10000 --seed 0 --json]`.

Runs the real command with its embedded store and sends it the mutants of `tests/support/mutants.py` over sockets, a few
at a time. Every answer has to be one, or a refusal that is a problem of a known type; no status may be 5xx but 503. In the
end the process has to be the same, and ready; images of a tenant that no mutant is meant for have to be classified as
before; and the service, its store included, has to be about as large as it was after a tenth as many mutants, once it
has been left alone for a while (`service/heap.py`). Limits are set low, so that what mutants may leave behind is
little. Status 1, and sentences, if it is not so. The short form is `tests/e2e/test_mutations.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools
import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.bench.telling import stamp
from service.heap import LOOK_S
from tests.soak.memory import resident_mb
from tests.soak.overload import Service, served
from tests.support.fakes import picture
from tests.support.mutants import CLASSES, TENANT, Mutant, fault, mutant

MOST_GROWTH = 0.05
MOST_GROWN_MB = 64.0
"""Whichever of the two is more."""

WARM_UP = 0.1
"""Share of the mutants, others than those that count, after which the size is the one to keep."""

BYSTANDER = "bystander"
SETTINGS = {
    "DMN_MAX_TENANTS": "20",
    "DMN_MAX_CLASSES": "50",
    "DMN_MAX_SHOTS": "20",
    "DMN_MAX_SNAPSHOTS": "5",
    "DMN_TENANT_MAX_BYTES": str(16 * 2**20),
    "DMN_TEXT_CACHE_BYTES": str(2**20),
    "DMN_IDEMPOTENCY_MAX_BYTES": str(2**20),
    "DMN_SNAPSHOT_EVERY_S": "0",
}

_CLIENTS = 4
_PATIENCE_S = 60.0
_LOOK_S = 0.5
_LOOKS = round(2.5 * LOOK_S / _LOOK_S)
"""It looks after its heap every so often, and gives much of it back when it has found that nobody asks."""

_CALM_MB = 1.0
_TOLD = 10
"""Mutants that are named in full, of those that found something."""

_PNG = {"Content-Type": "image/png", "X-Tenant": BYSTANDER}
_CONTINUE = 200


@dataclass(kw_only=True)
class Found:
    """What became of mutants: statuses by kind (0 for callers that left unanswered), and what was wrong, one by one."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def note(self, name: str, own: Mutant, replies: Sequence[Reply], seconds: float) -> None:
        """Take in what a mutant was answered."""
        self.slowest_s = max(self.slowest_s, seconds)
        counts = self.statuses.setdefault(own.kind, Counter())
        counts.update(reply.status for reply in replies or (Reply(),))
        wrong = {fault(one.status, one.content_type, bytes(one.body)) for one in replies} - {""}
        if not replies and not own.leaves:
            wrong.add("not answered")
        self.faults.extend(f"{name}, {own.kind}: {one}: {own.wire()[:200]!r}" for one in wrong)

    @property
    def total(self) -> Counter[int]:
        """Statuses of all kinds."""
        return sum(self.statuses.values(), Counter())


# One call -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Reply:
    """One answer, as the parser tells it."""

    status: int = 0
    content_type: str = ""
    body: bytearray = field(default_factory=bytearray)


class _Reader:
    """Hears the parser of HTTP out; `replies` are the whole answers, without those that only say to go on."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self._parser = httptools.HttpResponseParser(self)
        self._own = Reply()

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._own = Reply()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._own.content_type = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._own.status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        self._own.body += part

    def on_message_complete(self) -> None:
        if self._own.status >= _CONTINUE:
            self.replies.append(self._own)


async def send(url: str, own: Mutant) -> list[Reply]:
    """Send a mutant over a connection of its own, and return what is answered until that ends."""
    parts, hears = urlsplit(url), _Reader()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            writer.write(own.wire())
            if own.leaves:
                writer.write_eof()
            while data := await reader.read(2**16):
                hears.feed(data)
    except (ConnectionError, TimeoutError):
        pass  # whoever is turned away early may not get to say it all; what was heard until then counts
    finally:
        writer.close()
    return hears.replies


async def send_all(url: str, mutants: Iterable[tuple[str, Mutant]], advance: Callable[[], object]) -> Found:
    """Send mutants, each with its name, a few at a time, and return what became of them."""
    left, found = iter(mutants), Found()

    async def work() -> None:
        for name, own in left:
            began = time.perf_counter()
            found.note(name, own, await send(url, own), time.perf_counter() - began)
            advance()

    await asyncio.gather(*(work() for _ in range(_CLIENTS)))
    return found


def drawn(seed: int, count: int) -> Iterator[tuple[str, Mutant]]:
    """Yield so many mutants of a seed, named by what makes them again."""
    return ((f"mutant({seed}, {number})", mutant(seed, number)) for number in range(count))


# What has to stay -----------------------------------------------------------------------------------------------------


def tree_mb(pid: int) -> float:
    """Return the resident size of a process and of all that it started."""
    children = [int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]
    return round(resident_mb(pid) + sum(map(tree_mb, children)), 1)


def settled_mb(pid: int) -> float:
    """Return the size once it stays as it is for a few looks, or after a minute whatever it is."""
    ends, sizes = time.monotonic() + _PATIENCE_S, [tree_mb(pid)]
    while time.monotonic() < ends:
        latest = sizes[-_LOOKS:]
        if len(latest) == _LOOKS and max(latest) - min(latest) <= _CALM_MB:
            break
        time.sleep(_LOOK_S)  # nobody tells when memory was given back; bounded above
        sizes.append(tree_mb(pid))
    return sizes[-1]


def most_mb(before: float) -> float:
    """Return how large a service of that size may become."""
    return before + max(MOST_GROWN_MB, MOST_GROWTH * before)


def prepare(client: httpx.Client) -> None:
    """Make the tenant that mutants are after, and one that they are not."""
    client.put(f"/tenants/{TENANT}", json={"classes": list(CLASSES)}).raise_for_status()
    # By a method that counts nothing: counts are put together later, and would change its answers by themselves.
    client.put(f"/tenants/{BYSTANDER}", json={"classes": list(CLASSES), "method": "dmn"}).raise_for_status()
    for colour in CLASSES:
        client.post("/classify", content=picture(colour, 5), headers=_PNG).raise_for_status()


def seen(client: httpx.Client) -> list[Any]:
    """Return what the bystander is told of each colour, and what its memory holds."""
    asked = [
        client.post("/classify", content=picture(colour, 6), headers=_PNG, params={"learn": "false"})
        for colour in CLASSES
    ]
    told: list[Any] = [
        [(one["label"], round(one["score"], 3)) for one in answer.raise_for_status().json()["predictions"][0]["top"]]
        for answer in asked
    ]
    return [*told, client.get("/memory", headers=_PNG).raise_for_status().json()["dynamic"]]


# The whole ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """Mutants sent to a service, and all that is to be known of it before and after."""

    found: Found
    seconds: float
    start_mb: float
    before_mb: float
    after_mb: float
    broken: Sequence[str]


def run(service: Service, *, count: int, seed: int, advance: Callable[[], object] = lambda: None) -> Run:
    """Send mutants to a service, a tenth as many others before, and return what became of them and of it."""
    process = service.command.process
    with httpx.Client(base_url=service.url, timeout=_PATIENCE_S, trust_env=False) as client:
        prepare(client)
        known, start = seen(client), tree_mb(process.pid)
        warm = asyncio.run(send_all(service.url, drawn(seed + 1, round(WARM_UP * count)), lambda: None))
        before = settled_mb(process.pid)
        began = time.perf_counter()
        found = asyncio.run(send_all(service.url, drawn(seed, count), advance))
        seconds = time.perf_counter() - began
        alive = process.poll() is None
        after = settled_mb(process.pid) if alive else 0.0
        holds = {
            "every answer is one, or a proper refusal": not (found.faults or warm.faults),
            "the process is the same as before": alive,
            "it is ready": alive and client.get("/readyz").status_code == httpx.codes.OK,
            "a tenant that no mutant was meant for is answered as before": alive and seen(client) == known,
            f"it is {most_mb(before):.0f} MB large at most once all is answered": 0 < after <= most_mb(before),
        }
    found.faults[:0] = warm.faults
    broken = [law for law, kept in holds.items() if not kept]
    return Run(found=found, seconds=seconds, start_mb=start, before_mb=before, after_mb=after, broken=broken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--encoder", default="lite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    columns = (TextColumn("mutants"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), disable=options.json) as progress,
        served(options.encoder, [], CLASSES, **SETTINGS) as service,
    ):
        task = progress.add_task("", total=options.count)
        ran = run(service, count=options.count, seed=options.seed, advance=lambda: progress.advance(task))
    told = _told(ran, options) | stamp()
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(f"{name:>18} {value}" for name, value in told.items()))
        print("\n".join((*(f"Not so: {law}." for law in ran.broken), *ran.found.faults[:_TOLD])))
    return 1 if ran.broken else 0


def _told(ran: Run, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "encoder": options.encoder,
        "seed": options.seed,
        "mutants": options.count,
        "seconds": round(ran.seconds, 1),
        "statuses": _counted(ran.found.total),
        "by_kind": {kind: _counted(counts) for kind, counts in sorted(ran.found.statuses.items())},
        "slowest_s": round(ran.found.slowest_s, 1),
        "resident_start_mb": ran.start_mb,
        "resident_before_mb": ran.before_mb,
        "resident_after_mb": ran.after_mb,
        "faults": len(ran.found.faults),
        "broken": list(ran.broken),
    }


def _counted(counts: Counter[int]) -> dict[str, int]:
    return {str(status): counts[status] for status in sorted(counts)}


if __name__ == "__main__":
    sys.exit(main())
