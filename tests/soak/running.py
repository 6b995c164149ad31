"""The real command as a process: started, killed, told to stop; and the servers that a data folder has."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

PATIENCE_S = 60.0
"""How long anything may take that is no fault; whatever hangs ends the run by it."""

ROOT = Path(__file__).parents[2]
_URL = re.compile(r"http://\S+?:\d+")
_LOOK_S = 0.02
_SERVERS = ("valkey-server", "redis-server")


def until(told: Callable[[], bool], what: str, patience_s: float = PATIENCE_S, look_s: float = _LOOK_S) -> None:
    """Return once something is so that sends no event.

    Raises:
        TimeoutError: it does not come to be so.
    """
    ends = time.monotonic() + patience_s
    while not told():
        if time.monotonic() > ends:
            raise TimeoutError(f"after {patience_s} s there is still no {what}")
        time.sleep(look_s)


class Service:
    """`dmn serve` on an embedded store in a folder, one process after the other."""

    def __init__(self, home: Path, encoder: str, binary: str = "") -> None:
        self.folder = home / "data"
        self._encoder, self._binary, self._log = encoder, binary, home / "service.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._since, self._started = 0, 0.0
        self.client = httpx.Client()
        """Asks the process that was started last, once it listens."""

    @property
    def url(self) -> str:
        """Where it listens; nothing as long as it does not."""
        return str(self.client.base_url).rstrip("/")

    def start(self) -> None:
        """Start it, in a process group of its own as a terminal gives one; return at once."""
        fake = [sys.executable, "-m", "tests.soak.launch"]
        command = fake if self._encoder == "fake" else [str(Path(sys.executable).with_name("dmn"))]
        self.client.close()
        self.client = httpx.Client()
        self._since = self._log.stat().st_size if self._log.exists() else 0
        # A shell that started us in the background may have told its children to ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with self._log.open("ab") as log:
                self._started = time.monotonic()
                self._process = subprocess.Popen(
                    [*command, "serve", "--store", "embedded", "--port", "0"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    cwd=ROOT,
                    env=self._environment(),
                    start_new_session=True,
                )
        finally:
            signal.signal(signal.SIGINT, before)

    def ready(self) -> float:
        """Wait until it says that it is ready, and return the seconds since it was started."""
        until(self._is_ready, f"readiness: {self.said()[-2000:]}")
        return time.monotonic() - self._started

    def processor_s(self) -> tuple[float, float]:
        """Return the seconds that its first thread had a processor, and waited for one; 0 where nobody counts them."""
        counted = Path(f"/proc/{self._own.pid}/schedstat")
        had, waited = counted.read_text().split()[:2] if counted.exists() else ("0", "0")
        return int(had) / 1e9, int(waited) / 1e9

    def says_ready(self) -> bool:
        """Return whether it says now that it is ready."""
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/readyz").status_code == 200
        return False

    def kill(self) -> None:
        """End it as nobody should."""
        self._own.kill()
        self._own.wait(PATIENCE_S)

    def interrupt(self) -> int:
        """Press Ctrl-C, which reaches the whole process group, and return the exit status."""
        os.killpg(self._own.pid, signal.SIGINT)
        return self._own.wait(PATIENCE_S)

    def ended_within(self, seconds: float) -> bool:
        """Return whether it ends by itself within some seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._own.wait(seconds)
        return self._own.poll() is not None

    def said(self) -> str:
        """Return what it wrote since it was started."""
        with self._log.open("rb") as log:
            log.seek(self._since)
            return log.read().decode(errors="replace")

    def server_log(self) -> str:
        """Return what the servers of the folder wrote."""
        log = self.folder / "server.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def clear(self) -> None:
        """Leave no process behind, whatever happened."""
        self.client.close()
        if self._process is not None and self._process.poll() is None:
            self.kill()
        for pid in servers_of(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def _own(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _is_ready(self) -> bool:
        if self._own.poll() is not None:
            raise AssertionError(f"the service ended with status {self._own.returncode}: {self.said()[-2000:]}")
        if not self.url and (found := _URL.search(self.said())):
            self.client = client(found[0])
        return bool(self.url) and self.says_ready()

    def _environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DMN_")}
        own = {"DMN_ENCODER": self._encoder, "DMN_DATA_DIR": str(self.folder), "DMN_DRAIN_DELAY_S": "0.2"}
        named = {"DMN_EMBEDDED_BINARY": self._binary} if self._binary else {}
        return {**clean, **own, **named}


def client(url: str) -> httpx.Client:
    """Return a client that waits as long as anything may take."""
    return httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False)


def servers_of(folder: Path) -> set[int]:
    """Return the processes that are servers of a data folder; one that saves in a child counts once."""
    found = {pid: parent for pid, parent in _processes() if _serves(pid, folder)}
    return {pid for pid, parent in found.items() if parent not in found}


def parent_of(pid: int) -> int | None:
    """Return the process that started another; None if that is gone."""
    return next((parent for own, parent in _processes() if own == pid), None)


def _processes() -> Iterator[tuple[int, int]]:
    """Yield every process that runs and is no longer or not yet dead, and its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    yield int(entry.name), int(parent)


def _serves(pid: int, folder: Path) -> bool:
    process = Path("/proc") / str(pid)
    with contextlib.suppress(OSError):
        words = (process / "cmdline").read_bytes().split(b"\0")
        if not any(name.encode() in words[0] for name in _SERVERS):
            return False
        return str(folder).encode() in b" ".join(words) or (process / "cwd").readlink() == folder
    return False


class Watch:
    """Looks all the time how many servers a folder has; `most` is the most that there were at once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._over = folder, threading.Event()
        self.most, self.looks = 0, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look until the block ends."""
        thread = threading.Thread(target=self._look, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(PATIENCE_S)

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            self.most = max(self.most, len(servers_of(self._folder)))
            self.looks += 1
