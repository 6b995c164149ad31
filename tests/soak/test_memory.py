"""A service whose memories come and go stays as large as its budget.

The real command, with its embedded store and an encoder without weights, is posted pictures for many tenants while the
hot memories of only some of them may be kept. A tenant is drawn at random and asks a few times: nearly each such visit
loads a memory and drops another, and by the end of the long run every tenant's memory is full. The resident size of the
service is looked at all along: in the long run, that at the end must be within 5 % of that after a fifth of the calls.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.bench.images import photo
from service.bench.load import Client
from service.classify import ClassifyCall, classify
from service.domain.tenant import ClassSpec, TenantConfig
from service.settings import DEFAULT_TENANT, Settings
from service.stores.embedded.binary import find_binary
from service.tenants.configuration import put_tenant
from service.wiring import open_rooms
from tests.bench.null import CLASSES, NullEncoder
from tests.soak.report import tell
from tests.support.process import Service, resident_mb, with_encoder

pytestmark = [
    pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="nobody tells the resident size in this way but Linux"),
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size of a run: the budget is for `hot` tenants; a client makes `visit` calls for each tenant that it draws."""

    requests: int
    tenants: int
    hot: int
    images: int
    visit: int


OPTIONS = {
    "short": Options(requests=200, tenants=24, hot=4, images=60, visit=1),
    "long": Options(requests=100_000, tenants=200, hot=20, images=2000, visit=10),
}

MOST_GROWTH = 0.05
MOST_LEFT = 1 / 10
"""Share of the memories that came and went, by which a short run may grow: all of them would stay if they leaked."""

BEGINS = 0.2
"""Share of the calls after which the size is the one to keep."""

_CLIENTS = 4
_LOOKS = 100
_NEIGHBOURS = 5
"""Looks whose median is a size: one alone may fall into a garbage collection."""


def test_the_resident_size_does_not_grow_with_memories_that_come_and_go(tmp_path: Path, scale: str) -> None:
    options = OPTIONS[scale]
    photos = [photo(one, NullEncoder.preprocess.size) for one in range(options.images)]
    each = asyncio.run(memory_bytes(photos))
    settings = {
        "DMN_DATA_DIR": str(tmp_path / "data"),
        "DMN_HOT_MEMORY_BYTES": str(options.hot * each),
        "DMN_DRAIN_DELAY_S": "0",
        "DMN_STORE_TIMEOUT_MS": "60000",
        "OMP_NUM_THREADS": "1",
    }
    names = [f"tenant-{n}" for n in range(options.tenants)]
    script = with_encoder("tests.bench.null", "NullEncoder")
    with Service("fake", store="embedded", script=script, **settings).running() as service:
        for name in names:
            service.client.put(f"/tenants/{name}", json={"classes": CLASSES}).raise_for_status()
        curve, failed = asyncio.run(_asked(service, names, photos, options))
        metrics = text_string_to_metric_families(service.client.get("/metrics").raise_for_status().text)
        counted = {one.name: one.value for family in metrics for one in family.samples}
    before, after = _size(curve, BEGINS), _size(curve, 1.0)
    evictions, each_mb = counted["dmn_hot_evictions_total"], each / 2**20
    figures = {
        "budget_mb": round(options.hot * each_mb, 1),
        "memory_mb": round(each_mb, 2),
        "evictions": round(evictions),
        "hot_mb": round(counted["dmn_hot_bytes"] / 2**20, 1),
        "resident_mb": {str(done): mb for done, mb in curve},
        "growth": round(after / before - 1, 4),
    }
    tell("memory", vars(options) | figures)
    assert not failed
    if scale == "long":
        assert after <= (1 + MOST_GROWTH) * before
    else:
        assert after - before < MOST_LEFT * evictions * each_mb


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
    service: Service, names: Sequence[str], photos: Sequence[bytes], options: Options
) -> tuple[list[tuple[int, float]], int]:
    """Post so many photos, and return the size after each hundredth of them, and how many failed."""
    left, failed, random = iter(range(1, options.requests + 1)), 0, Random(0)
    curve: list[tuple[int, float]] = []

    async def ask(client: Client) -> None:
        nonlocal failed
        tenant = names[0]
        for call, number in enumerate(left):
            tenant = tenant if call % options.visit else random.choice(names)
            failed += await client.post(random.choice(photos), X_Tenant=tenant) != 200
            if number % max(1, options.requests // _LOOKS) == 0:
                curve.append((number, resident_mb(service.command.process.pid)))

    async with Client(service.url, "/classify", {"Content-Type": "image/jpeg"}) as client:
        await asyncio.gather(*(ask(client) for _ in range(_CLIENTS)))
    return sorted(curve), failed


def _size(curve: Sequence[tuple[int, float]], share: float) -> float:
    """Return the size after a share of the calls: the median of the last looks until then."""
    looks = [mb for _, mb in curve[: max(_NEIGHBOURS, round(share * len(curve)))]]
    return statistics.median(looks[-_NEIGHBOURS:])
