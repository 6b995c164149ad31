"""What a fleet needs: pods, shards, memory and network for so many devices and tenants, by measured costs.

Sums, and nothing that is measured now: `Costs` says where its figures come from. A tenant is met by some pods: by as
few as have to be where the ingress sends it home, else by as many as its images spread over within an exchange of
statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

_SYNC_S = 0.2
"""How often a pod asks for a tenant's version at most: DMN_SYNC_MS."""

_EXCHANGE_S = 5.0
"""How often a pod writes a tenant's statistics and reads others': `service.memory.statistics.EXCHANGE_S`."""

_GIB = 1 << 30
_MEGABIT = 1e6 / 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What things cost, in seconds of a processor core and in bytes.

    Measured on two shared cores (Intel Xeon, 2026-11-25) by `python -m tests.bench.bench_scale`, with `--method dmn` a
    call on its way through a pod, and a command on a node of the store and the bytes that it carries, and with `auto`
    what a byte more costs there. A slot's bytes in Valkey beside its feature are counted.
    """

    call_s: float = 2.6e-3
    command_s: float = 50e-6
    byte_s: float = 1.2e-9
    slot_bytes: int = 120
    command_bytes: int = 70


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """What is asked for.

    `rate` are images a second that a device encodes, `accepted` is the share of images that enters a dynamic memory,
    `shard_gib` and `shard_cores` are how much of a node of the store may be used, `hot_gib` is a pod's budget for hot
    memories, and `link_mbit` what a pod or a node may send or receive.
    """

    devices: int
    tenants: int
    classes: int
    slots: int
    shots: int
    dim: int
    rate: float
    accepted: float
    auto: bool
    home: bool
    shard_gib: float
    shard_cores: float
    hot_gib: float
    link_mbit: float


def measure(fleets: Sequence[Fleet], costs: Costs | None = None) -> dict[str, Any]:
    """Return what each fleet needs."""
    known = costs or Costs()
    return {"costs": asdict(known), "fleets": [{**asdict(one), **needs(one, known)} for one in fleets]}


def needs(fleet: Fleet, costs: Costs) -> dict[str, Any]:
    """Return pods, shards, bytes of memory and bytes a second of a fleet, and what is short first."""
    met = _pods_of_a_tenant(fleet)
    hot = fleet.tenants * met / fleet.devices
    statistics = _statistics_bytes(fleet) if fleet.auto else 0
    store_bytes = fleet.tenants * (_memory_bytes(fleet, costs) + statistics * (1 + met))
    up, down, commands = _traffic(fleet, costs, met, hot, statistics)
    store_cores = fleet.devices * (commands * costs.command_s + (up + down) * costs.byte_s)
    shards = {
        "the store's memory": store_bytes / (fleet.shard_gib * _GIB),
        "the store's cores": store_cores / fleet.shard_cores,
        "the store's network": fleet.devices * (up + down) / (fleet.link_mbit * _MEGABIT),
    }
    hot_bytes = hot * _hot_bytes(fleet)
    pod = {
        "a pod's hot memory": hot_bytes / (fleet.hot_gib * _GIB),
        "a pod's network": (up + down) / (fleet.link_mbit * _MEGABIT),
    }
    return {
        "pods": fleet.devices,
        "http_cores": fleet.rate * costs.call_s,
        "shards": max(1, math.ceil(max(shards.values()))),
        "store_gib": store_bytes / _GIB,
        "store_cores": store_cores,
        "hot_tenants": hot,
        "hot_gib_needed": hot_bytes / _GIB,
        "pod_mbit": (up + down) / _MEGABIT,
        "first": _first(shards, pod),
    }


def table(told: dict[str, Any]) -> Table:
    """Return a row for each fleet."""
    first = told["fleets"][0]
    title = (
        f"{first['classes']} classes x {first['slots']} slots x {first['dim']}, {first['rate']:g} images a second a "
        f"device, method {'auto' if first['auto'] else 'dmn'}, {'with' if first['home'] else 'without'} tenant affinity"
    )
    names = ("devices", "tenants", "pods", "HTTP cores a pod", "hot GiB a pod", "Mbit/s a pod", "store GiB")
    shown = Table(*names, "store cores", "shards", "short first", title=title, box=None, pad_edge=False)
    for one in told["fleets"]:
        shown.add_row(
            f"{one['devices']:,}",
            f"{one['tenants']:,}",
            f"{one['pods']:,}",
            f"{one['http_cores']:.1f}",
            f"{one['hot_gib_needed']:.2f}",
            f"{one['pod_mbit']:.1f}",
            f"{one['store_gib']:,.1f}",
            f"{one['store_cores']:,.2f}",
            f"{one['shards']:,}",
            one["first"],
        )
    return shown


def draw(told: dict[str, Any], axes: Any) -> None:
    """Draw shards against devices, a line for each number of tenants."""
    for tenants in sorted({one["tenants"] for one in told["fleets"]}):
        own = [one for one in told["fleets"] if one["tenants"] == tenants]
        axes.plot([one["devices"] for one in own], [one["shards"] for one in own], marker="o", label=f"{tenants:,}")
    axes.set(xlabel="devices", ylabel="shards of the store", xscale="log", yscale="log")
    axes.legend(title="tenants", frameon=False)


def _pods_of_a_tenant(fleet: Fleet) -> float:
    """Return how many pods meet a tenant within an exchange, if its images go anywhere, and all send as many."""
    if fleet.home:
        return max(1.0, fleet.devices / fleet.tenants)
    images = fleet.devices * fleet.rate * _EXCHANGE_S / fleet.tenants
    return max(1.0, fleet.devices * -math.expm1(-images / fleet.devices))


def _traffic(fleet: Fleet, costs: Costs, met: float, hot: float, statistics: float) -> tuple[float, float, float]:
    """Return bytes a second up to the store and down from it, and commands a second, of one pod."""
    slot = 2 * fleet.dim + costs.command_bytes
    checks, pushes = min(fleet.rate, hot / _SYNC_S), fleet.rate * fleet.accepted
    heard = pushes * (met - 1)  # each write is heard of by every other pod that has the tenant's memory
    exchanges = min(fleet.rate, hot / _EXCHANGE_S) if statistics else 0.0
    up = checks * costs.command_bytes + pushes * slot + exchanges * statistics
    down = checks * costs.command_bytes + heard * slot + exchanges * (met - 1) * statistics
    return up, down, checks + pushes + 2 * exchanges


def _memory_bytes(fleet: Fleet, costs: Costs) -> int:
    """Return the bytes of a tenant's slots and shots in the store, all of them filled."""
    return fleet.classes * (fleet.slots + fleet.shots) * (2 * fleet.dim + costs.slot_bytes)


def _statistics_bytes(fleet: Fleet) -> int:
    """Return the bytes of one pod's statistics of a tenant: D x D numbers, and a few for each class."""
    return 4 * (fleet.dim**2 + fleet.dim + fleet.classes * (fleet.dim + 1))


def _hot_bytes(fleet: Fleet) -> int:
    """Return the bytes of a hot memory: float32 shelves beside 16-bit features, and four times the statistics."""
    rows = fleet.classes * (1 + fleet.slots + fleet.shots)
    return 6 * rows * fleet.dim + 4 * fleet.classes * fleet.dim + (4 * _statistics_bytes(fleet) if fleet.auto else 0)


def _first(shards: dict[str, float], pod: dict[str, float]) -> str:
    """Return what is used up first: something of which there is too little, or else the devices."""
    name, share = max((*shards.items(), *pod.items()), key=lambda one: one[1])
    return name if share > 1 else "devices"
