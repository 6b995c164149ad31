"""The two moments at which an embedded server is there and does not listen yet, and somebody dies or leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.process import PATIENCE_S, ROOT, kill_servers_of, parent_of, servers_of, until

_LOOK_S = 0.02


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
            servers = servers_of(self._folder)
            if len(servers) > 1:
                # One look takes a while, in which one server may end and another start: those that two looks see
                # were there at the same time.
                servers &= servers_of(self._folder)
            self.most = max(self.most, len(servers))
            self.looks += 1


def pair(folder: Path) -> list[str]:
    """Let two start the server of a folder, kill the one that does as soon as there is one; return what is broken.

    The other has to come to use the one server that there is, and to stop it when it leaves.
    """
    watch, faults = Watch(folder), []
    with cleared(folder), watch.watching(), ExitStack() as stack:
        both = [stack.enter_context(holder(folder)) for _ in range(2)]
        for one in both:
            _go(one)
        server = _appears(folder, ())
        starter = next((one for one in both if one.pid == parent_of(server)), None)
        if starter is None:
            return ["a server was started by neither"]
        starter.kill()
        (other,) = (one for one in both if one is not starter)
        held = int(_line(other))
        if servers_of(folder) != {held}:
            faults.append(f"one uses the server {held}, and there are {sorted(servers_of(folder))}")
        faults += _leave(other, folder)
    if watch.most > 1:
        faults.append(f"{watch.most} servers were on one folder after their starter was killed")
    return faults


def leave(folder: Path) -> list[str]:
    """Kill the server of the only one who uses it, who leaves as soon as there is another; return what is broken."""
    with cleared(folder), holder(folder) as one:
        _go(one)
        first = int(_line(one))
        os.kill(first, signal.SIGKILL)
        _appears(folder, (first,))
        return _leave(one, folder)


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that waits to be told to use the server, and end it."""
    command = (sys.executable, "-m", "tests.soak.holder", str(folder))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as one:
        try:
            assert _line(one) == "here"
            yield one
        finally:
            one.kill()


@contextmanager
def cleared(folder: Path) -> Iterator[None]:
    """Leave no server behind, whatever happens."""
    folder.mkdir()
    try:
        yield
    finally:
        kill_servers_of(folder)


def _leave(one: subprocess.Popen[str], folder: Path) -> list[str]:
    """Tell the last who uses a server to leave; return what is broken then."""
    assert one.stdin is not None
    one.stdin.close()
    try:
        status = one.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return [f"the last who used a server did not end within {PATIENCE_S:.0f} s"]
    left = servers_of(folder)
    wrong = [] if status == 0 else [f"the last who used a server ended with status {status}"]
    return [*wrong, f"the last who used a server left {sorted(left)}"] if left else wrong


def _go(one: subprocess.Popen[str]) -> None:
    assert one.stdin is not None
    one.stdin.write("\n")
    one.stdin.flush()


def _line(one: subprocess.Popen[str]) -> str:
    assert one.stdout is not None
    line = one.stdout.readline().strip()
    assert line, f"a user of the server ended with {one.wait(PATIENCE_S)}"
    return line


def _appears(folder: Path, known: tuple[int, ...]) -> int:
    """Return the server that is there and was not, at once: it does not listen yet."""
    found: set[int] = set()

    def there() -> bool:
        found.update(servers_of(folder) - set(known))
        return bool(found)

    until("there is a server", there, look_s=0.0)
    return min(found)
