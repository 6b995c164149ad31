"""The steward: starts the processes of a service that runs in several, watches over them, and ends them in order.

                     ┌─> front (HTTP) ─┐
callers ── address ──┤                 ├── hatch ──> back (rooms around one device) ──> store
                     └─> front (HTTP) ─┘

It works on no call itself. A process that ends is started anew; told to stop, the fronts close their doors and answer
what they have, then the backs write what they hold. Each process has a lifeline: if the steward itself is killed, they
end by themselves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead
from rich.console import Console

from service.server.http_server import Address, announce
from service.settings import Settings
from service.stores.embedded.binary import resolve_store
from service.stores.embedded.server import embedded_server
from service.telemetry import logs

from .control import Plan

COMMAND = "room"
"""The command that a process of the service runs."""

_METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder in which each process keeps its metrics; it has to be said before their library is imported."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LONGEST_PATH = 80
"""Bytes of the folder's path; those of a socket in it may have little more than 100."""

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0
"""A process that lived so long has not failed at starting; the next pause is short again."""

_MARGIN_S = 30.0
"""What a process may take to end beyond the time for what is in flight: the store may be slow to take in writes."""


def keep(settings: Settings, console: Console) -> int:
    """Run the service until told to stop, and return the exit status.

    Raises:
        ValueError: the settings do not fit several processes.
        StoreDown: the embedded store does not start.
        OSError: the address cannot be listened on, or a process cannot start; says why.
    """
    settings = resolve_store(settings)
    devices = settings.devices or (settings.device,)
    if settings.store == "memory" and len(devices) > 1:
        raise ValueError(
            f"DMN_STORE=memory keeps memories in one process, and {len(devices)} devices have a worker process each. "
            "Use DMN_STORE=embedded, or the URL of a store that all of them share."
        )
    with _reserved(settings.host, settings.port) as address, _folder() as folder:
        return asyncio.run(_keep(Steward(settings, devices, folder, address), console))


async def _keep(steward: Steward, console: Console) -> int:
    told: asyncio.Queue[int] = asyncio.Queue()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, told.put_nowait, number)
    async with _store_held(steward.settings):
        stop = asyncio.create_task(told.get())
        try:
            with console.status(f"Loading the encoder {steward.settings.encoder} …"):
                opening = asyncio.create_task(steward.open())
                await asyncio.wait((opening, stop), return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                opening.cancel()
                return 128 + stop.result()
            announce(console, steward.settings, encoder=opening.result(), address=steward.address)
            await stop
        finally:
            stop.cancel()
            hurry = asyncio.create_task(_hurry(steward, told))
            await steward.close()
            hurry.cancel()
    return steward.status


@asynccontextmanager
async def _store_held(settings: Settings) -> AsyncIterator[None]:
    """Hold the embedded store in use, if that is the store: it must not outlive worker processes that were killed.

    Raises:
        StoreDown: it does not start.
    """
    if settings.store != "embedded":
        yield
        return
    server = embedded_server(settings.data_dir, settings.embedded_binary, fsync=settings.embedded_fsync)
    async with server.running():
        yield


async def _hurry(steward: Steward, told: asyncio.Queue[int]) -> None:
    """Who says it twice does not want to wait."""
    while True:
        await told.get()
        steward.hurry()


class _Child:
    """A process that there should be, and is, as long as nothing happens to it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.process: asyncio.subprocess.Process | None = None
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.why = ""

    def signal(self, number: int) -> None:
        """Send a signal to the process if there is one."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
        elif self.task is not None:
            self.task.cancel()  # it waits to be started again


class Steward:
    """The processes of one service. `status` is what the command ends with."""

    def __init__(self, settings: Settings, devices: Sequence[str], folder: Path, door: socket.socket) -> None:
        self.settings, self._devices, self._folder, self._door = settings, devices, folder, door
        self.address: Address = door.getsockname()[:2]
        self.status = 0
        self._opened = self._leaving = False
        self._fronts: list[_Child] = []
        self._backs: list[_Child] = []

    async def open(self) -> str:
        """Start everything, and return the encoder's name once all of it serves.

        Raises:
            ChildProcessError: a process cannot start; says why.
        """
        hatches = tuple(str(self._folder / f"back-{i}.sock") for i in range(len(self._devices)))
        (self._folder / "metrics").mkdir()
        self._backs = [
            _Child(
                Plan(
                    role="back",
                    index=i,
                    settings=self.settings.model_copy(update={"device": device}),
                    hatches=hatches,
                )
            )
            for i, device in enumerate(self._devices)
        ]
        self._fronts = [
            _Child(Plan(role="front", index=i, settings=self.settings, hatches=hatches))
            for i in range(self.settings.http_workers)
        ]
        children = (*self._backs, *self._fronts)
        for child in children:
            child.task = asyncio.create_task(self._mind(child), name=f"dmn-{child.plan.name}")
        told = await asyncio.gather(*(child.ready for child in children))
        self._opened = True
        return str(told[0]["encoder"])

    async def close(self) -> None:
        """End the fronts, which answer what they have, and then the backs, which write what they hold."""
        self._leaving = True
        settings = self.settings
        await self._end(
            self._fronts,
            signal.SIGTERM if self._opened else signal.SIGKILL,  # nobody has been told where they are
            settings.drain_delay_s + settings.drain_timeout_s + _MARGIN_S,
        )
        await self._end(self._backs, signal.SIGTERM, settings.drain_timeout_s + _MARGIN_S)

    def hurry(self) -> None:
        """Wait for no delay: the fronts are told a second time."""
        for child in self._fronts:
            child.signal(signal.SIGTERM)

    async def _end(self, children: Sequence[_Child], number: int, seconds: float) -> None:
        for child in children:
            child.signal(number)
        tasks = [child.task for child in children if child.task is not None]
        late = (await asyncio.wait(tasks, timeout=seconds))[1] if tasks else ()
        for child in children:
            if child.task in late:
                self.status = 1
                logs.event(logs.PROCESS_STAYED, level=logging.ERROR, process=child.plan.name)
                child.signal(signal.SIGKILL)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _mind(self, child: _Child) -> None:
        """Keep a process running: one that ends is started again, the sooner the longer it lived."""
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            status = await self._live(child)
            if self._leaving:
                return
            if not child.ready.done():
                child.ready.set_exception(ChildProcessError(child.why or _silent(child.plan, status)))
                return
            if time.monotonic() - began > _STEADY_S:
                pause_s = _FIRST_PAUSE_S
            logs.event(
                logs.PROCESS_ENDED,
                level=logging.ERROR,
                process=child.plan.name,
                status=status,
                why=child.why,
                again_s=pause_s,
            )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _live(self, child: _Child) -> int | None:
        """Start a process, hear what it says, and return its exit status when it ends; None if it cannot be started."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            with theirs, self._another_door() as door:
                child.process = await self._started(theirs.fileno(), door.fileno())
                writer.write(replace(child.plan, door=door.fileno()).line())
            if self._leaving:
                child.signal(signal.SIGTERM)
            self._hear(child, await reader.readline())
            status = await child.process.wait()
            mark_process_dead(child.process.pid, str(self._folder / "metrics"))
        except OSError as error:
            child.why = str(error)
            return None
        else:
            return status
        finally:
            writer.close()

    async def _started(self, *files: int) -> asyncio.subprocess.Process:
        """Start a process; the first of the files that it is handed is its lifeline."""
        return await asyncio.create_subprocess_exec(
            *_this_command(),
            COMMAND,
            str(files[0]),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=files,
            start_new_session=True,  # Ctrl-C is for the steward alone, who tells the others in order
            env=self._environment(),
        )

    def _hear(self, child: _Child, line: bytes) -> None:
        """Note what a process says of itself, nothing if it ended before."""
        told = json.loads(line) if line else {}
        child.why = told.get("failed", "")
        if "ready" in told:
            logs.event(logs.PROCESS_STARTED, process=child.plan.name, pid=child.process.pid if child.process else None)
            if not child.ready.done():
                child.ready.set_result(told["ready"])

    def _another_door(self) -> socket.socket:
        """Return a socket of the same address: the system shares callers out between those that listen."""
        door = socket.socket(self._door.family)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        door.bind(self._door.getsockname())
        return door

    def _environment(self) -> dict[str, str]:
        """Return what a process is started with: its settings are in its plan, whatever a file says by now."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("DMN_")}
        return own | {_METRICS: str(self._folder / "metrics")}


def _silent(plan: Plan, status: int | None) -> str:
    return f"The process {plan.name} ended with status {status} before it served. What it said stands above."


def _this_command() -> list[str]:
    """Return how this very program was started, without its arguments."""
    return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]


@contextmanager
def _reserved(host: str, port: int) -> Iterator[socket.socket]:
    """Hold an address that nobody listens on, for sockets of ours that will.

    Raises:
        OSError: somebody does, or it is none of this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if held.family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            raise OSError(f"Nobody can listen on {host}, port {port}: {error.strerror}. Choose another.") from error
        # Only now, or it would have shared the address with whoever listens there.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield held


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder for sockets and metrics that nobody else may enter."""
    usual = tempfile.gettempdir()
    place = usual if len(os.fsencode(usual)) < _LONGEST_PATH else "/tmp"  # noqa: S108 - its folder is private
    with tempfile.TemporaryDirectory(prefix="dmn-", dir=place, ignore_cleanup_errors=True) as name:
        yield Path(name)
