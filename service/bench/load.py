"""Load on a service from this process: as many clients as wait in turn, or calls at times that do not wait for answers.

Only the second tells how long callers wait: clients that wait for their answer before they ask again ask less of a slow
server, and hide that others would have queued.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import numpy as np

_PATIENCE_S = 120.0
_MOST_WAITING = 2000
"""Calls that may be on their way at once; one more is not made, and counted as `unsent`."""

_OK = 200
_REFUSALS = (429, 503)
_NO_ANSWER = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call: when it was due and when its answer was there, in seconds since the load began; 0 for no answer."""

    due: float
    done: float
    status: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Offered:
    """What became of calls that were offered at a rate; `late_s` is how late the client itself was at most."""

    calls: Sequence[Call]
    unsent: int
    late_s: float

    @property
    def latencies(self) -> list[float]:
        """Seconds from when each answered call was due until its answer."""
        return [call.done - call.due for call in self.calls if call.status == _OK]

    @property
    def refused(self) -> int:
        """Calls that the service refused because it was full."""
        return sum(call.status in _REFUSALS for call in self.calls)

    @property
    def failed(self) -> int:
        """Calls with another error, or no answer."""
        return sum(call.status != _OK and call.status not in _REFUSALS for call in self.calls)

    def achieved(self, seconds: float) -> float:
        """Return the answers a second, over the time that was offered for or until the last one came."""
        answered = [call.done for call in self.calls if call.status == _OK]
        return len(answered) / max(seconds, *answered) if answered else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a call was answered: its status, 0 for no answer, its headers by their names in lower case, and its body."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


class Client:
    """Posts images over connections that are kept open: a few lines of HTTP/1.1, so that the client costs little."""

    def __init__(self, url: str, path: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._host, self._tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        lines = [f"POST {path} HTTP/1.1", f"Host: {parts.netloc}", *(f"{name}: {headers[name]}" for name in headers)]
        self._head = "\r\n".join(lines).encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for _reader, writer in self._idle:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _reader, writer in self._idle), return_exceptions=True)

    async def post(self, body: bytes, **headers: str) -> int:
        """Return the status that the service answers, once its answer is read; 0 for none. See `ask`."""
        return (await self.ask(body, **headers)).status

    async def ask(self, body: bytes, **headers: str) -> Answer:
        """Return what the service answers; headers of this call alone are named with underscores."""
        more = b"".join(f"{name.replace('_', '-')}: {value}\r\n".encode() for name, value in headers.items())
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await self._ask(body, more)
        except (OSError, EOFError, TimeoutError):
            return Answer(status=_NO_ANSWER, headers={}, body=b"")

    async def _ask(self, body: bytes, more: bytes) -> Answer:
        reader, writer = await self._connection()
        try:
            writer.write(b"%b\r\n%bContent-Length: %d\r\n\r\n%b" % (self._head, more, len(body), body))
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(_fields(head))
            told = await reader.readexactly(int(fields.get(b"content-length", 0)))
        except BaseException:
            writer.close()
            raise
        if fields.get(b"connection", b"").lower() == b"close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return Answer(status=int(head.split(b" ", 2)[1]), headers=fields, body=told)

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a connection that is kept open, or a new one; servers close those that are idle for long."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port, ssl=self._tls or None)


def _fields(head: bytes) -> Iterator[tuple[bytes, bytes]]:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        yield name.strip().lower(), value.strip()


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return when calls arrive that know nothing of each other: a Poisson process, given that so many come in all."""
    drawn = np.random.default_rng(seed).uniform(0, seconds, max(1, round(rate * seconds)))
    return [float(at) for at in np.sort(drawn)]


async def offer(
    client: Client, images: Sequence[bytes], due: Sequence[float], advance: Callable[[], object] = lambda: None
) -> Offered:
    """Make calls when they are due, whatever became of those before, and return what became of all."""
    start, late, unsent = time.perf_counter(), 0.0, 0
    calls: list[Call] = []
    waiting: set[asyncio.Task[None]] = set()

    async def one(at: float, image: bytes) -> None:
        status = await client.post(image)
        calls.append(Call(due=at, done=time.perf_counter() - start, status=status))

    for at, image in zip(due, itertools.cycle(images), strict=False):
        if (left := at - (time.perf_counter() - start)) > 0:
            await asyncio.sleep(left)
        late = max(late, time.perf_counter() - start - at)
        advance()
        if len(waiting) >= _MOST_WAITING:
            unsent += 1
            continue
        task = asyncio.create_task(one(at, image))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    await asyncio.gather(*waiting)
    return Offered(calls=calls, unsent=unsent, late_s=late)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saturated:
    """What clients made of a service that ask again at once: answers a second, their latencies, and what failed."""

    per_second: float
    latencies: Sequence[float]
    failed: int


async def saturate(client: Client, images: Sequence[bytes], *, clients: int, seconds: float) -> Saturated:
    """Let clients ask again as soon as they are answered, for some seconds.

    The rate is taken between two answers, the first ones left out: a server that answers in batches would else be
    charged with the batch that it has begun.
    """
    start, source = time.perf_counter(), itertools.cycle(images)
    calls: list[Call] = []

    async def one() -> None:
        while (began := time.perf_counter() - start) < seconds:
            status = await client.post(next(source))
            calls.append(Call(due=began, done=time.perf_counter() - start, status=status))

    await asyncio.gather(*(one() for _ in range(clients)))
    done = [call.done for call in calls if call.status == _OK and call.done <= seconds]
    latencies = [call.done - call.due for call in calls if call.status == _OK]
    counted = done[clients - 1 :]
    rate = (len(counted) - 1) / (counted[-1] - counted[0]) if len(counted) > 1 else len(done) / seconds
    return Saturated(
        per_second=rate, latencies=latencies[clients:] or latencies, failed=sum(call.status != _OK for call in calls)
    )
