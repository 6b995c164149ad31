"""How a fleet grows: several `dmn serve` on one three-node cluster, each with a device of its own.

`python -m tests.bench.bench_scale [--processes 1,2,3] [--tenants 30] [--device-ms 80] [--seconds 5] [--json]`

The encoder costs no processor time, but its device takes `--device-ms` for each batch, as a GPU would: so processes can
be added before the cores of this machine are used up, which they share with the store and the clients. Each process is
posted JPEGs of 96 x 96 pixels by a `wrk` of its own, for all tenants in turn: no tenant has a home, which is the worst
case for what processes have to tell each other. What each process and each node used of the processors, and what went
over the nodes' sockets, is read before and after. Figures are medians over the rounds. Asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.bench.fleet import TICK_S, Server, loaded, missing, ours, photo_list, processor_s, running
from tests.bench.null import CLASSES
from tests.bench.telling import tell
from tests.support.servers import BINARIES, Cluster, cluster

_IMAGES = 500
_SIDE = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,3", help="numbers of processes, separated by commas")
    parser.add_argument("--tenants", type=int, default=30)
    parser.add_argument("--method", choices=("auto", "dmn"), default="auto", help="of all tenants")
    parser.add_argument("--connections", type=int, default=32, help="to each process")
    parser.add_argument("--device-ms", type=float, default=80.0, help="what a batch of 8 takes on the device")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    absent = missing() or (None if BINARIES["valkey"] else "There is no Valkey or Redis server to make a cluster of.")
    tell(parser, measure, table, absent=absent)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures for each number of processes, and how they compare with one process."""
    numbers = [int(one) for one in options.processes.split(",")]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    binary = BINARIES["valkey"]
    assert binary is not None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        images = photo_list(folder, _IMAGES, _SIDE)
        whole = stack.enter_context(cluster(str(binary)))
        kind = ours(f"null:{options.device_ms:g}", store=whole.urls, DMN_BATCH_IMAGES="8")
        servers = [
            stack.enter_context(running(f"process {at}", kind, cores=cores, threads=1)) for at in range(max(numbers))
        ]
        _make_tenants(servers[0], options)
        rounds: list[dict[int, dict[str, float]]] = []
        for at in range(options.rounds + 1):
            seen = {number: _load(servers[:number], whole, images, cores, options) for number in numbers}
            if at:  # the first warms up, and fills memories
                rounds.append(seen)
    cases = [
        {"processes": number, **{name: statistics.median(one[number][name] for one in rounds) for name in figures}}
        for number, figures in rounds[0].items()
    ]
    for case in cases:
        case["of_linear"] = case["per_second"] / (cases[0]["per_second"] / cases[0]["processes"] * case["processes"])
    return {"cases": cases, "tenants": options.tenants, "device_ms": options.device_ms, "method": options.method}


def table(told: dict[str, Any]) -> str:
    """Return the figures for people."""
    names = "processes  requests/s  of linear  cores used  p99 ms  failed  service ms  store ms  commands  B in  B out"
    lines = [f"{names}   (the last five for each request)"]
    lines += [
        f"{one['processes']:9}  {one['per_second']:10.0f}  {one['of_linear']:9.2f}  {one['cores']:10.2f}"
        f"  {one['p99_ms']:6.0f}  {one['failed']:6.0f}  {one['service_ms']:10.3f}  {one['store_ms']:8.4f}"
        f"  {one['commands']:8.2f}  {one['bytes_in']:4.0f}  {one['bytes_out']:5.0f}"
        for one in told["cases"]
    ]
    return "\n".join(lines)


def _make_tenants(server: Server, options: argparse.Namespace) -> None:
    for at in range(options.tenants):
        config = {"classes": CLASSES, "method": options.method}
        told = httpx.put(f"{server.url}/tenants/t{at}", json=config, timeout=60.0)
        told.raise_for_status()


def _load(
    servers: Sequence[Server], whole: Cluster, images: Path, cores: str, options: argparse.Namespace
) -> dict[str, float]:
    """Load all servers at once, and return what came of it."""
    pids = {server.process.pid for server in servers}
    nodes = {node.process.pid for node in whole.nodes if node.process is not None}
    used = {pid: processor_s(pid) for pid in pids | nodes}
    said, everyone = _said(whole), _all_used_s()
    heard: list[dict[str, float]] = []

    def post(at: int) -> None:
        told = loaded(
            servers[at],
            images,
            cores=cores,
            connections=options.connections,
            seconds=options.seconds,
            form="raw",
            start=at * _IMAGES // len(servers),
            tenants=options.tenants,
        )
        heard.append(told)

    clients = [threading.Thread(target=post, args=(at,)) for at in range(len(servers))]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    requests = sum(one["requests"] for one in heard)
    return {
        "per_second": sum(one["per_second"] for one in heard),
        "p99_ms": max(one["p99_ms"] for one in heard),
        "failed": sum(one["failed"] for one in heard),
        "cores": (_all_used_s() - everyone) / options.seconds,
        "service_ms": 1e3 * sum(processor_s(pid) - used[pid] for pid in pids) / requests,
        "store_ms": 1e3 * sum(processor_s(pid) - used[pid] for pid in nodes) / requests,
        **{name: (now - said[name]) / requests for name, now in _said(whole).items()},
    }


def _said(whole: Cluster) -> dict[str, int]:
    """Return the commands that all nodes were given, and the bytes that went in and out."""
    stats = [node.info("stats") for node in whole.nodes]
    names = {
        "commands": "total_commands_processed",
        "bytes_in": "total_net_input_bytes",
        "bytes_out": "total_net_output_bytes",
    }
    return {name: sum(int(one[field]) for one in stats) for name, field in names.items()}


def _all_used_s() -> float:
    """Return the seconds of processor time that everybody on this machine has used."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    busy = (int(value) for at, value in enumerate(fields[:8]) if at not in (3, 4))  # idle, and idle for a disk
    return sum(busy) * TICK_S


if __name__ == "__main__":
    main()
