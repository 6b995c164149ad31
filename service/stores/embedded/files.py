"""Files, locks and the process of the embedded store."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO

from service.errors import StoreDown

_LONGEST_SOCKET = 100
"""Bytes of a socket's path; systems allow a few more than 100."""

USERS_LOCK = "users.lock"
"""Lock of all who use the server; a folder that has it is this service's."""
_INHERITED = 3
"""File by which the server holds its lock."""
_WRITTEN = ("appendonlydir/*", "appendonly.aof")
"""Files that the server writes to, as its seventh version and those before it name them."""


def make_private_folder(folder: Path) -> None:
    """Make a folder for the data that nobody else may enter.

    Raises:
        StoreDown: it cannot be made, or it is there and holds something else, which a server would overwrite.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / USERS_LOCK).exists():
            raise StoreDown(
                f"The data folder {folder} holds files that are not this service's, and nothing was changed in it. "
                "Name an empty or a new one by DMN_DATA_DIR."
            )
        folder.chmod(0o700)
    except OSError as error:
        raise StoreDown(
            f"The data folder {folder} cannot be used: {error.strerror}. Name another by DMN_DATA_DIR."
        ) from error


def flush_changed(folder: Path, seen: dict[Path, float]) -> None:
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


def try_lock(lock: IO[bytes]) -> bool:
    """Return whether a lock could be taken."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def spawn(command: list[str], log: Path, lock: IO[bytes]) -> int:
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


def last_line(file: Path) -> str:
    """Return the last line of a log, or an empty text."""
    return " ".join(file.read_text(errors="replace").strip().splitlines()[-1:])


@contextmanager
def open_lock(path: Path) -> Iterator[IO[bytes]]:
    """Open a lock file, made if it is absent."""
    with path.open("ab") as file:
        yield file


def socket_path(folder: Path) -> Path:
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


def is_alive(pid: int | None) -> bool:
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
