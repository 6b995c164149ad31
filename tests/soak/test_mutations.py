"""The real command is sent calls that no client makes.

It runs with its embedded store and is sent the mutants of `tests/support/mutants.py` over sockets, a few at a time: to
an encoder without weights in the short run, to `lite` in the long one. Every answer has to be one, or a refusal that is
a problem of a known type; no status may be 5xx but 503. In the end the process has to be the same, and ready; images of
a tenant that no mutant is meant for have to be classified as before; and the service, its store included, has to become
about as large as it was after a tenth as many mutants (`service/server/malloc.py`). Limits are set low, so
that what mutants may leave behind is little.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools
import httpx
import pytest

from service.stores.embedded.binary import find_binary
from tests.soak.report import tell
from tests.support.fakes import picture
from tests.support.mutants import CLASSES, KINDS, TENANT, Mutant, fault, mutant
from tests.support.process import Service, resident_mb, until

pytestmark = [
    pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="nobody tells the resident size in this way but Linux"),
]

COUNT = {"short": 600, "long": 10_000}
ENCODER = {"short": "fake", "long": "lite"}
SEED = 0

MOST_GROWTH = 0.05
MOST_GROWN_MB = {"short": 128.0, "long": 64.0}
"""Whichever of the two is more. A service that is idle may keep 64 MB that were freed."""

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
    "DMN_DRAIN_DELAY_S": "0",
    "DMN_STORE_TIMEOUT_MS": "60000",
}

_CLIENTS = 4
_PATIENCE_S = 60.0
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


async def send_all(url: str, mutants: Iterable[tuple[str, Mutant]]) -> Found:
    """Send mutants, each with its name, a few at a time, and return what became of them."""
    left, found = iter(mutants), Found()

    async def work() -> None:
        for name, own in left:
            began = time.perf_counter()
            found.note(name, own, await send(url, own), time.perf_counter() - began)

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


# The run --------------------------------------------------------------------------------------------------------------


def test_no_mutant_is_a_fault_of_ours_ends_the_service_reaches_another_tenant_or_stays_in_memory(
    tmp_path: Path, scale: str
) -> None:
    number = COUNT[scale]
    folder = str(tmp_path / "data")
    with Service(ENCODER[scale], store="embedded", DMN_DATA_DIR=folder, **SETTINGS).running() as service:
        pid = service.command.process.pid
        prepare(service.client)
        known, start = seen(service.client), tree_mb(pid)
        warm = asyncio.run(send_all(service.url, drawn(SEED + 1, round(WARM_UP * number))))
        before = tree_mb(pid)
        most = before + max(MOST_GROWN_MB[scale], MOST_GROWTH * before)
        began = time.perf_counter()
        found = asyncio.run(send_all(service.url, drawn(SEED, number)))
        seconds = time.perf_counter() - began
        tell("mutations", told(found) | {"seconds": round(seconds, 1), "resident_mb": [start, before, tree_mb(pid)]})
        assert not warm.faults
        assert not found.faults
        assert service.is_ready(), "it is not the process that it was"
        assert seen(service.client) == known, "a tenant that no mutant was meant for is answered otherwise"
        # What is kept of memory that was freed is given back once nobody asks.
        until(f"it is {most:.0f} MB large at most", lambda: tree_mb(pid) <= most)
    for kind in KINDS:
        assert sum(found.statuses[kind].values()) >= number // len(KINDS)
    assert found.total[200] > number / 20, "hardly anything was taken"
    assert found.total[422] > number / 20, "hardly anything was refused"


def told(found: Found) -> dict[str, Any]:
    """Return the figures of mutants that were sent."""
    kinds = {kind: _counted(counts) for kind, counts in sorted(found.statuses.items())}
    return {"statuses": _counted(found.total), "by_kind": kinds, "slowest_s": round(found.slowest_s, 1)}


def _counted(counts: Counter[int]) -> dict[str, int]:
    return {str(status): counts[status] for status in sorted(counts)}
