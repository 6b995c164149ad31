"""The hatch between HTTP processes and worker processes: frames over a Unix socket, pixels as they lie in memory.

A frame is a head, a small JSON object, and a body of bytes. Plain asyncio, and no message queue: where one would keep
what was sent for a process that is gone, and connect anew by itself, the end of a socket tells at once that nobody will
answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

_SIZES = struct.Struct("!IQ")
"""Bytes of head and body, before both."""

_SCRATCH = 16 * 1024
"""Bytes read at once where it is not known what comes; the rest of a larger frame is read to where it stays."""

_TOGETHER = 16 * 1024
"""A body up to here is copied behind its head, which costs less than a second call of the system."""

_SOCKET_BYTES = 1 << 20
_WAITING_FRAMES = 64
"""Frames that wait to be taken before no more is read: a sender that is faster has to wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What came through: its head, and its body, which is the receiver's own and may be written to."""

    head: dict[str, Any]
    body: memoryview


class Line(asyncio.BufferedProtocol):
    """One end of a connection; `made` is called once it stands."""

    def __init__(self, made: Callable[[Line], None] | None = None) -> None:
        self._made = made
        self._transport: asyncio.Transport | None = None
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._filled = 0
        self._large: memoryview | None = None
        self._head_bytes = self._at = 0
        self._frames: deque[Frame] = deque()
        self._taker: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._paused = False
        self.gone = False
        """Whether the other end is."""

    def send(self, head: Mapping[str, Any], body: bytes | memoryview = b"") -> None:
        """Send a frame at once, or as soon as what was sent before is through; to nobody if the other end is gone."""
        if self.gone or self._transport is None:
            return
        told = json.dumps(head, separators=(",", ":")).encode()
        start = _SIZES.pack(len(told), len(body)) + told
        if len(body) <= _TOGETHER:
            self._transport.write(start + bytes(body))
        else:
            self._transport.writelines((start, body))

    async def flush(self) -> None:
        """Return once the other end takes more, or is gone: whoever sends much waits here before each frame."""
        await self._writable.wait()

    async def receive(self) -> Frame | None:
        """Return the next frame, or None when the other end is gone. For one caller at a time."""
        while not self._frames:
            if self.gone:
                return None
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        frame = self._frames.popleft()
        if self._paused and not self._frames and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return frame

    def close(self) -> None:
        """Hang up, once what was sent is through."""
        if self._transport is not None:
            self._transport.close()

    # What asyncio tells ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note how to send."""
        self._transport = cast("asyncio.Transport", transport)
        own = transport.get_extra_info("socket")
        if own is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        if self._made is not None:
            self._made(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - however it ended
        """Wake whoever waits."""
        self.gone = True
        self._writable.set()
        self._wake()

    def pause_writing(self) -> None:
        """Let senders wait."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let senders go on."""
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - as much as there is room for
        """Return where the next bytes go: into the frame that they belong to, where that is known."""
        return self._scratch[self._filled :] if self._large is None else self._large[self._at :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take out what is complete."""
        if self._large is None:
            self._filled += nbytes
            self._take_out()
        else:
            self._at += nbytes
            if self._at == len(self._large):
                whole, self._large = self._large, None
                self._deliver(whole, self._head_bytes)

    def _take_out(self) -> None:
        start = 0
        while self._filled - start >= _SIZES.size:
            head, body = _SIZES.unpack_from(self._scratch, start)
            first = start + _SIZES.size
            frame = memoryview(bytearray(head + body))
            there = min(len(frame), self._filled - first)
            frame[:there] = self._scratch[first : first + there]
            start = first + there
            if there < len(frame):
                self._large, self._head_bytes, self._at = frame, head, there
                break
            self._deliver(frame, head)
        left = self._filled - start
        self._scratch[:left] = bytes(self._scratch[start : self._filled])
        self._filled = left

    def _deliver(self, frame: memoryview, head_bytes: int) -> None:
        self._frames.append(Frame(head=json.loads(bytes(frame[:head_bytes])), body=frame[head_bytes:]))
        if len(self._frames) >= _WAITING_FRAMES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def _wake(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)


async def connect(path: str) -> Line:
    """Return the end of a new connection to a worker process.

    Raises:
        OSError: it is not there.
    """
    _, line = await asyncio.get_running_loop().create_unix_connection(Line, path)
    return line
