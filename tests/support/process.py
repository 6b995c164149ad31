"""The real command, run as a user would, for tests; and the servers that a data folder has."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from redis.exceptions import RedisError

PATIENCE_S = 60.0
"""How long anything may take that is no fault; a command that hangs fails its test by it."""

ROOT = Path(__file__).parents[2]
DMN = Path(sys.executable).with_name("dmn")
URL = re.compile(r"http://\S+?:\d+")
_SERVERS = (b"valkey-server", b"redis-server")


def with_encoder(module: str, name: str) -> str:
    """Return a script: the command as it is, but that any encoder is a new object of that class.

    `core.encoders.openclip` is not imported, as it takes seconds. With `--http-workers` the command itself loads no
    encoder, and the processes that do load the real one.
    """
    return f"""
import sys
from types import ModuleType
if "--http-workers" not in sys.argv:
    from {module} import {name}
    light = ModuleType("core.encoders.openclip")
    light.load = lambda *_, **__: {name}()
    sys.modules["core.encoders.openclip"] = light
from service.cli.main import main
sys.argv[0] = "dmn"
main()
"""


WITH_FAKE = with_encoder("tests.support.fakes", "FakeEncoder")


def until(what: str, probe: Callable[[], bool], seconds: float = PATIENCE_S, *, look_s: float = 0.02) -> None:
    """Return once something holds of other processes, which send no event; one that does not answer does not hold.

    Raises:
        AssertionError: it does not come to hold.
    """
    ends = time.monotonic() + seconds
    while True:
        with contextlib.suppress(RedisError, httpx.TransportError, OSError, LookupError):
            if probe():
                return
        assert time.monotonic() < ends, f"waited {seconds:g} s in vain until {what}"
        time.sleep(look_s)  # bounded above


def client(url: str) -> httpx.Client:
    """Return a client that waits as long as anything may take."""
    return httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False)


class Command:
    """A running `dmn`; leaving the context kills it if it still runs.

    With `session` it has a process group of its own, as a terminal gives one: `interrupt` presses Ctrl-C.
    """

    def __init__(
        self,
        encoder: str,
        *arguments: str,
        store: str | None = "memory",
        script: str = WITH_FAKE,
        session: bool = False,
        **environment: str,
    ) -> None:
        start = [sys.executable, "-c", script] if encoder == "fake" else [str(DMN)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DMN_")}
        kept = {} if store is None else {"DMN_STORE": store}
        # A shell that started the tests in the background may have told its children to ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                [*start, *arguments],
                cwd=ROOT,
                env={**clean, **kept, "DMN_ENCODER": encoder, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=session,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.err: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ended()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.err.append(line)
            self.lines.put(line)
        self.lines.put(None)

    def line(self, wanted: Callable[[str], bool]) -> str:
        """Wait for a line on stderr and return it."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            line = self.lines.get(timeout=max(0.0, ends - time.monotonic()))
            assert line is not None, f"ended without the line: {''.join(self.err)}"
            if wanted(line):
                return line

    def url(self) -> str:
        """Wait until the server says where it is."""
        found = URL.search(self.line(lambda line: URL.search(line) is not None))
        assert found
        return found[0]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def interrupt(self) -> None:
        """Press Ctrl-C, which reaches the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ended(self) -> int:
        """Wait for the end and return the exit status."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    @property
    def out(self) -> str:
        """What stood on stdout; after the end."""
        assert self.process.stdout is not None
        return self.process.stdout.read()


class Service:
    """`dmn serve` with the same settings, one process after the other."""

    def __init__(self, encoder: str, *, store: str, port: int = 0, script: str = WITH_FAKE, **settings: str) -> None:
        self.port, self._encoder, self._store, self._script, self._settings = port, encoder, store, script, settings
        self._command: Command | None = None
        self.client = httpx.Client()
        """Asks the process that was started last, once it is known where that listens."""

    @property
    def command(self) -> Command:
        """The process that was started last."""
        assert self._command is not None
        return self._command

    @property
    def url(self) -> str:
        """Where it listens; nothing as long as that is not known."""
        return str(self.client.base_url).rstrip("/")

    def start(self) -> None:
        """Start it, after the one before has ended; return at once."""
        self.close()
        self.client = client(f"http://127.0.0.1:{self.port}") if self.port else httpx.Client()
        told = ("serve", "--port", str(self.port))
        self._command = Command(
            self._encoder, *told, store=self._store, script=self._script, session=True, **self._settings
        )

    def is_ready(self) -> bool:
        """Return whether it says that it is ready.

        Raises:
            AssertionError: it has ended.
        """
        status = self.command.process.poll()
        assert status is None, f"the service ended with status {status}: {self.said()[-2000:]}"
        if not self.url and (match := URL.search(self.said())):
            self.client = client(match[0])
        with contextlib.suppress(httpx.TransportError):
            return bool(self.url) and self.client.get("/readyz").status_code == 200
        return False

    def ready(self) -> None:
        """Wait until it says that it is ready."""
        until("the service is ready", self.is_ready)

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Start it unless it was, and wait until it is ready; stop it in order after the block."""
        if self._command is None:
            self.start()
        try:
            self.ready()
            yield self
        finally:
            self.command.signal(signal.SIGTERM)
            self.command.ended()
            self.close()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.command.process.kill()
        self.command.ended()

    def close(self) -> None:
        """End it, however it stands."""
        self.client.close()
        if self._command is not None:
            self._command.__exit__(None, None, None)

    def said(self) -> str:
        """Return what it wrote since it was started."""
        return "".join(self.command.err)

    def processor_s(self) -> tuple[float, float]:
        """Return the seconds that its first thread had a processor, and waited for one; 0 where nobody counts them."""
        counted = Path(f"/proc/{self.command.process.pid}/schedstat")
        had, waited = counted.read_text().split()[:2] if counted.exists() else ("0", "0")
        return int(had) / 1e9, int(waited) / 1e9


def resident_mb(pid: int) -> float:
    """Return the resident size of a process."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return round(int(match[1]) / 1024, 1)


def servers_of(folder: Path) -> set[int]:
    """Return the processes that are servers of a data folder; one that saves in a child counts once."""
    found = {pid: parent for pid, parent in _processes() if _serves(pid, folder)}
    return {pid for pid, parent in found.items() if parent not in found}


def kill_servers_of(folder: Path) -> None:
    """End the servers of a data folder with SIGKILL."""
    for pid in servers_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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
        if not any(name in words[0] for name in _SERVERS):
            return False
        return str(folder).encode() in b" ".join(words) or (process / "cwd").readlink() == folder
    return False
