"""HAProxy before several instances: it asks each whether it is ready, and sends callers to those that are.

It never sends a request twice. Only where an instance refuses the connection, so that no byte was sent, does it try
another, and counts that.
"""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from tests.support.process import PATIENCE_S, until

HOST = "127.0.0.1"
BINARY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin")
"""Debian puts it where only root looks."""

MISSING = "HAProxy is not installed; it is a package of Debian and others: apt-get install haproxy."
LOOK_MS = 100
"""How often it asks whether an instance is ready."""

By = Literal["request", "connection"]
"""What is spread: each request, as a balancer does that speaks HTTP; or connections, as one does that does not."""

_CONFIG = """\
global
  stats socket {folder}/stats.sock mode 600 level user
defaults
  mode {mode}
  timeout connect 30s
  timeout check 30s
  timeout client 60s
  timeout server 60s
  retries 3
  option redispatch 1
listen instances
  bind fd@{fd}
  balance {balance}
  option httpchk GET /readyz
  http-check expect status 200
  default-server check inter {look_ms}ms fall 1 rise 1
"""
_MODES: Mapping[By, tuple[str, str]] = {"request": ("http", "roundrobin"), "connection": ("tcp", "leastconn")}


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A running proxy."""

    url: str
    stats: Path

    def is_up(self, name: str) -> bool:
        """Return whether it sends callers to an instance."""
        return self._rows()[name]["status"] == "UP"

    def redispatched(self) -> int:
        """Return how often an instance refused a connection, and another was tried."""
        return int(self._rows()["BACKEND"]["wredis"])

    def taken(self) -> dict[str, int]:
        """Return how many requests, or connections, each instance was sent."""
        rows = self._rows()
        return {name: int(rows[name]["stot"]) for name in rows if name not in ("FRONTEND", "BACKEND")}

    def _rows(self) -> dict[str, dict[str, str]]:
        """Return what it counts, by instance, and of all together."""
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(PATIENCE_S)
            asked.connect(str(self.stats))
            asked.sendall(b"show stat\n")
            with asked.makefile(encoding="ascii") as told:
                return {row["svname"]: row for row in csv.DictReader(told) if row["svname"]}


@contextmanager
def proxy(instances: Mapping[str, int], by: By = "request") -> Iterator[Proxy]:
    """Run a proxy before instances, ports by name, until the block ends.

    Raises:
        AssertionError: it is not installed, or does not start.
    """
    assert BINARY, MISSING
    mode, balance = _MODES[by]
    with TemporaryDirectory(prefix="dmn-proxy-") as name, socket.socket() as door:
        folder = Path(name)
        door.bind((HOST, 0))
        door.listen()
        config = _CONFIG.format(folder=folder, fd=door.fileno(), mode=mode, balance=balance, look_ms=LOOK_MS)
        servers = "".join(f"  server {one} {HOST}:{port}\n" for one, port in instances.items())
        (folder / "haproxy.cfg").write_text(config + servers)
        command = (BINARY, "-db", "-f", str(folder / "haproxy.cfg"))
        own = Proxy(url=f"http://{HOST}:{door.getsockname()[1]}", stats=folder / "stats.sock")
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, pass_fds=(door.fileno(),)) as process,
        ):
            try:
                until("the proxy tells how it is", lambda: _tells(own, process, folder / "log"))
                yield own
            finally:
                process.kill()


def _tells(own: Proxy, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, f"the proxy ended with status {process.returncode}: {log.read_text()}"
    return own.redispatched() >= 0
