"""Servers side by side, each held to some cores, and `wrk` that loads one of them from other cores."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from service.bench.images import photo
from tests.bench.null import CLASSES
from tests.support.process import ROOT, until
from tests.support.servers import HOST, free_ports

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
"""What the system counts processor time in, in seconds."""

_CORES = 2
_COMPARED = 50
_PATIENCE_S = 180.0
_SCRIPT = Path(__file__).with_name("post.lua")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A server that can be started: a module's arguments, the path that says that it is ready, and its settings."""

    module: str
    arguments: Sequence[str]
    ready: str
    settings: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server."""

    name: str
    process: subprocess.Popen[bytes]
    url: str


def ours(encoder: str, store: str = "embedded", **settings: str) -> Kind:
    """Return `dmn serve` as it is by default, with an encoder and a store."""
    own = {"DMN_LOG_LEVEL": "error", "DMN_DRAIN_DELAY_S": "0", **settings}
    return Kind(
        module="tests.bench.launch",
        arguments=("serve", "--encoder", encoder, "--store", store),
        ready="/readyz",
        settings=own,
    )


def peer(name: str, encoder: str, *arguments: str) -> Kind:
    """Return a peer, `plain` or `lit`."""
    return Kind(
        module=f"tests.bench.{name}", arguments=("--encoder", encoder, *arguments), ready="/health", settings={}
    )


@contextmanager
def running(name: str, kind: Kind, *, cores: str, threads: int) -> Iterator[Server]:
    """Run a server on some cores, as `taskset -c` names them, with so many threads for torch; ends with the block."""
    (port,) = free_ports(1)
    with TemporaryDirectory(prefix="dmn-bench-", ignore_cleanup_errors=True) as home:
        held = ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", cores]  # it ends with us, however we end
        command = [*held, sys.executable, "-m", kind.module, *kind.arguments, "--port", str(port)]
        own = {"OMP_NUM_THREADS": str(threads), "DMN_DATA_DIR": f"{home}/data"}
        log = Path(home, "log")
        with log.open("wb") as said:
            process = subprocess.Popen(
                command,
                stdout=said,
                stderr=said,
                cwd=home,
                env={**clean_environment(), **own, **kind.settings},
                start_new_session=True,
            )
        server = Server(name=name, process=process, url=f"http://{HOST}:{port}")
        try:
            _until_ready(server, kind.ready, log)
            if kind.module == "tests.bench.launch":
                told = httpx.put(f"{server.url}/tenants/default", json={"classes": CLASSES}, timeout=_PATIENCE_S)
                told.raise_for_status()
            yield server
        finally:
            _end(process)


@contextmanager
def only(server: Server | None, servers: Sequence[Server]) -> Iterator[None]:
    """Hold all other servers as they stand: one that polls while it is idle takes its share of a core from the rest."""
    held = [other for other in servers if other is not server]
    for other in held:
        os.killpg(other.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for other in held:
            os.killpg(other.process.pid, signal.SIGCONT)


def loaded(
    server: Server,
    images: Path,
    *,
    cores: str,
    connections: int,
    seconds: float,
    form: str,
    start: int = 0,
    tenants: int = 0,
) -> dict[str, float]:
    """Return what `wrk` says of a server that it posts a list of images to, from `start` on, for so many tenants."""
    command = ["taskset", "-c", cores, "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s"]
    command += ["-s", str(_SCRIPT), f"{server.url}/classify", "--", str(images), form, str(start), str(tenants)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(told.stdout.strip().splitlines()[-1])
    return {
        "per_second": figures["requests"] / figures["seconds"],
        "p50_ms": figures["p50_ms"],
        "p99_ms": figures["p99_ms"],
        "failed": figures["failed"],
        "requests": figures["requests"],
    }


def photo_list(folder: Path, count: int, size: int) -> Path:
    """Write photos into a folder, and return the file that lists them."""
    paths = [folder / f"{seed}.jpg" for seed in range(count)]
    for seed, path in enumerate(paths):
        path.write_bytes(photo(seed, size))
    listed = folder / "images.txt"
    listed.write_text("\n".join(map(str, paths)) + "\n")
    return listed


def medians(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the median over the rounds of each figure of each case."""
    return {
        case: {name: round(statistics.median(one[case][name] for one in rounds), 3) for name in figures}
        for case, figures in rounds[0].items()
    }


def ratio(rounds: Sequence[dict[str, dict[str, float]]], one: str, other: str, figure: str) -> float:
    """Return the median over the rounds of one case's figure over another's."""
    return round(statistics.median(told[one][figure] / told[other][figure] for told in rounds), 3)


def agreement(servers: Sequence[Server], images: Path) -> dict[str, float]:
    """Return for each server on how many of some images its text head names the class that the first one's names."""
    bodies = [Path(name).read_bytes() for name in images.read_text().split()[:_COMPARED]]
    told = {server.name: [_text_label(server, body) for body in bodies] for server in servers}
    first = told[servers[0].name]
    return {name: sum(a == b for a, b in zip(first, labels, strict=True)) / len(first) for name, labels in told.items()}


def _text_label(server: Server, body: bytes) -> str:
    told = httpx.post(
        f"{server.url}/classify", params={"learn": "false"}, content=body, headers={"Content-Type": "image/jpeg"}
    )
    return str(told.raise_for_status().json()["predictions"][0]["readouts"]["text"]["label"])


def settings_of(given: Sequence[str]) -> dict[str, str]:
    """Return `DMN_X=Y` of the command line as settings."""
    return dict(one.split("=", 1) for one in given)


def clean_environment() -> dict[str, str]:
    """Return the environment without settings of ours, and with the repository to import from."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DMN_", "OMP_"))}
    return {**clean, "PYTHONPATH": str(ROOT)}


def processor_s(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def missing() -> str | None:
    """Return why servers cannot be compared here; None if they can."""
    if shutil.which("wrk") is None:
        return "The load client wrk is not installed; it is a package of Debian and others: apt-get install wrk."
    if shutil.which("taskset") is None or shutil.which("setpriv") is None:
        return "Servers are held to their cores by taskset and setpriv, which are not installed (util-linux)."
    if len(os.sched_getaffinity(0)) < _CORES:
        return "Server and client each need a core of their own, and there is but one here."
    if find_spec("litserve") is None:
        return "LitServe is not installed; pip install 'dmn-clip-service[bench]'."
    return None


def _until_ready(server: Server, path: str, log: Path) -> None:
    def ready() -> bool:
        assert server.process.poll() is None, f"{server.name} ended: {log.read_text(errors='replace')[-3000:]}"
        return httpx.get(server.url + path, timeout=5).status_code == 200

    until(f"{server.name} serves", ready, _PATIENCE_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server, and what it started if that is still there."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)
