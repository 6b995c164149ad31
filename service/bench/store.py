"""What the embedded store costs: a cold load, an accepted write, and hearing of another service's writes."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from rich.table import Table

from core.numerics import unit
from service.concurrency.worker_thread import Worker
from service.domain.memory import StoredBank, StoredSlot
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import StoreDown
from service.memory.cache import Archive
from service.memory.text_features import TextFeatures
from service.stores.connection.pools import connect
from service.stores.embedded.server import embedded_server
from service.stores.protocol import PushCandidate
from service.stores.redis.store import RedisStore
from service.telemetry.metrics import Metrics

from .output import Absent

GROUPS = (1, 32)
"""Images pushed together."""

_TENANT = "bench"
_PUSHED_CLASSES = 40
_PUSHED = 1024
_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Sizes of a full memory."""

    classes: int
    slots: int
    dim: int


def measure(problem: Problem, *, repeats: int) -> dict[str, Any]:
    """Return what a cold load of a full memory takes, beside its floors, and what writes take and send up.

    Raises:
        Absent: there is no server to embed.
    """
    return asyncio.run(_measured(problem, repeats))


def table(told: dict[str, Any]) -> Table:
    """Return a row for each figure."""
    title = f"{told['classes']} classes x {told['slots']} slots x {told['dim']}, {told['megabytes']:.1f} MB"
    shown = Table("what", "takes", title=title, box=None, pad_edge=False)
    for what, name in (
        ("a cold load, until it can be read", "load_ms"),
        ("of that, out of the store", "store_ms"),
        ("the same bytes through the socket in one piece", "socket_ms"),
        ("the same bytes copied in memory", "copy_ms"),
    ):
        shown.add_row(what, f"{told[name]:.1f} ms")
    for one in told["pushes"]:
        shown.add_row(f"a push of {one['images']}", f"{one['push_ms']:.2f} ms")
        shown.add_row(f"hearing of it elsewhere ({one['images']} writes)", f"{one['sync_ms']:.2f} ms")
        shown.add_row(f"bytes up an accepted write, {one['images']} pushed together", f"{one['bytes_up']:.0f}")
    return shown


def draw(told: dict[str, Any], axes: Any) -> None:
    """Draw a cold load and what it is made of."""
    names = {"load_ms": "cold load", "store_ms": "out of the store", "socket_ms": "socket", "copy_ms": "copy"}
    bars = axes.barh(list(names.values()), [told[name] for name in names])
    axes.bar_label(bars, [f" {told[name]:.1f} ms" for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="ms")


async def _measured(problem: Problem, repeats: int) -> dict[str, Any]:
    async with _store() as (store, client):
        found = await _loads(problem, store, client, repeats)
        pushes = [await _pushes(problem.dim, store, client, images) for images in GROUPS]
        await store.aclose()
    return {**asdict(problem), **found, "pushes": pushes}


@asynccontextmanager
async def _store() -> AsyncIterator[tuple[RedisStore, Redis]]:
    """Run an embedded store in a folder that goes with it."""
    with TemporaryDirectory(prefix="dmn-bench-", ignore_cleanup_errors=True) as folder:
        try:
            server = embedded_server(Path(folder, "data"), "", fsync="everysec")
        except StoreDown as down:
            raise Absent(str(down)) from down
        async with server.running():
            client: Redis = connect(server.url, timeout_s=_TIMEOUT_S)
            yield RedisStore(client, clock=time.time, remember_s=1.0, remember_bytes=1), client


async def _loads(problem: Problem, store: RedisStore, client: Redis, repeats: int) -> dict[str, float]:
    config = TenantConfig(classes=_classes(problem.classes), slots=problem.slots)
    banks = _banks(problem, config)
    await store.replace(_TENANT, config, "bench", expected=None, labelling=config.labelling, origin={}, slots=banks)
    archive, worker = _archive(problem.dim, store)

    async def cold() -> None:
        archive.drop(_TENANT)
        async with archive.open(_TENANT):
            pass

    blob = b"".join(bank.features for bank in banks.values())
    await client.set("blob", blob)
    seconds = await _medians(
        {
            "load_ms": cold,
            "store_ms": lambda: store.load(_TENANT),
            "socket_ms": lambda: client.get("blob"),
            "copy_ms": lambda: asyncio.to_thread(bytearray, blob),
        },
        repeats,
    )
    worker.close()
    await store.delete(_TENANT)
    return {"megabytes": len(blob) / 1e6, **{name: 1e3 * each for name, each in seconds.items()}}


async def _pushes(dim: int, store: RedisStore, client: Redis, images: int) -> dict[str, float]:
    """Return what pushes of so many images take and send up, and what another service takes to hear of each."""
    config = TenantConfig(classes=_classes(_PUSHED_CLASSES))
    pushed = await store.replace(_TENANT, config, "bench", expected=None, labelling=config.labelling, origin={})
    following = pushed
    rng = np.random.default_rng(0)
    taken, asking = _Taken(), -await _received(client) + await _received(client)
    for number in range(0, _PUSHED, images):
        candidates = [_candidate(rng, config, dim, number + i) for i in range(images)]
        sent = await _received(client)
        start = time.perf_counter()
        told = await store.push(_TENANT, pushed, candidates)
        middle = time.perf_counter()
        taken.bytes_up += await _received(client) - sent - asking
        elsewhere = time.perf_counter()
        synced = await store.sync(_TENANT, following)
        taken.syncs.append(time.perf_counter() - elsewhere)
        taken.pushes.append(middle - start)
        taken.accepted += sum(str(verdict.outcome) in ("filled", "replaced") for verdict in told.verdicts)
        pushed, following = told.synced.stamp, synced.stamp
    await store.delete(_TENANT)
    return {
        "images": images,
        "push_ms": 1e3 * statistics.median(taken.pushes),
        "sync_ms": 1e3 * statistics.median(taken.syncs),
        "bytes_up": taken.bytes_up / taken.accepted,
    }


@dataclass(slots=True)
class _Taken:
    """What pushes took so far."""

    pushes: list[float] = field(default_factory=list)
    syncs: list[float] = field(default_factory=list)
    bytes_up: int = 0
    accepted: int = 0


async def _medians(calls: dict[str, Callable[[], Awaitable[object]]], repeats: int) -> dict[str, float]:
    """Return the median seconds of calls that take turns, after one of each that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            await call()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _archive(dim: int, store: RedisStore) -> tuple[Archive, Worker]:
    """Return an archive over an encoder of which only the size of its features matters."""

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return unit(torch.randn(len(texts), dim, generator=torch.Generator().manual_seed(0)))

    encoder: Any = SimpleNamespace(name="bench", fingerprint="bench", origin={}, dim=dim, logit_scale=100.0)
    worker, metrics = Worker(), Metrics(CollectorRegistry())
    texts = TextFeatures(worker, encode, max_bytes=1 << 30)
    archive = Archive(store, encoder, texts, worker, metrics, time.monotonic, max_bytes=1 << 40, sync_s=3600.0)
    return archive, worker


def _classes(number: int) -> tuple[ClassSpec, ...]:
    return tuple(ClassSpec(name=f"class {at}") for at in range(number))


def _banks(problem: Problem, config: TenantConfig) -> dict[str, StoredBank]:
    rng, full = np.random.default_rng(0), {}
    for at, spec in enumerate(config.classes):
        features = rng.standard_normal((problem.slots, problem.dim)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        full[spec.id] = StoredBank(
            ids=tuple(f"{at:08x}{slot:012x}" for slot in range(problem.slots)),
            entropies=tuple(np.sort(rng.random(problem.slots)).tolist()),
            features=features.astype("<f2").tobytes(),
        )
    return full


def _candidate(rng: np.random.Generator, config: TenantConfig, dim: int, number: int) -> PushCandidate:
    feature = rng.standard_normal(dim).astype("<f2").tobytes()
    slot = StoredSlot(id=f"{number:020x}", entropy=float(rng.random()), feature=feature)
    return PushCandidate(class_id=config.classes[int(rng.integers(len(config.classes)))].id, slot=slot)


async def _received(client: Redis) -> int:
    return int((await client.info("stats"))["total_net_input_bytes"])
