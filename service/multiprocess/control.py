"""What ties a process of the service to the one that started it: a socket that only the two of them hold.

steward ──Plan──> process     what it is to be
process ──ready──> steward    it serves, and what of
process ──failed──> steward   it cannot, in one line for people
either end ──end──> other     it is gone, however that came about: nothing is told by a process that is killed
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from service.settings import Settings

Role = Literal["front", "back"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a process is to be: the `index`-th HTTP process (`front`) or worker process (`back`).

    `hatches` are the paths of the worker processes' sockets; `door`, for a front, is the file that it listens on.
    """

    role: Role
    index: int
    settings: Settings
    hatches: tuple[str, ...]
    door: int = -1

    @property
    def name(self) -> str:
        """What it is called in events."""
        return f"{self.role}-{self.index}"

    def line(self) -> bytes:
        """Return it as it is sent. Arguments of a command can be seen by others, and a store's URL has a password."""
        told = {
            "role": self.role,
            "index": self.index,
            "settings": self.settings.model_dump(mode="json"),
            "hatches": self.hatches,
            "door": self.door,
        }
        return json.dumps(told).encode() + b"\n"


def plan_of(line: bytes) -> Plan:
    """Return a plan as it was sent."""
    told = json.loads(line)
    return Plan(**{**told, "settings": Settings(**told["settings"]), "hatches": tuple(told["hatches"])})


class Lifeline:
    """The started process's end; `told` says whether it has said that it serves, `alone` that nobody is left."""

    def __init__(self, file: int) -> None:
        os.set_inheritable(file, False)  # noqa: FBT003 - its only one; what this process starts must not hold the line
        self._socket = socket.socket(fileno=file)
        self.told = self.alone = False

    def plan(self) -> Plan:
        """Return what this process is to be.

        Raises:
            ValueError: nobody says.
        """
        with self._socket.makefile("rb", buffering=0) as told:
            line = told.readline()
        if not line:
            raise ValueError("This command is for `dmn serve` alone, which starts its own processes.")
        return plan_of(line)

    def ready(self, about: Mapping[str, Any]) -> None:
        """Say that this process serves."""
        self.told = True
        self._tell({"ready": dict(about)})

    def failed(self, why: str) -> None:
        """Say that it cannot."""
        self._tell({"failed": why})

    async def cut(self, stop: Callable[[], None]) -> None:
        """Call `stop` when whoever started this process is gone, killed or not."""
        self._socket.setblocking(False)  # noqa: FBT003 - its only argument
        with suppress(OSError):
            await asyncio.get_running_loop().sock_recv(self._socket, 1)
        self.alone = True
        stop()

    def _tell(self, what: Mapping[str, Any]) -> None:
        with suppress(OSError):  # nobody is left to hear it
            self._socket.sendall(json.dumps(what).encode() + b"\n")
