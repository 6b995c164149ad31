"""Callers who never come to the point, or never end: each has its time, its bytes and its place, and no more."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from starlette.types import Receive, Scope, Send

from service.server.http_server import Door
from service.settings import Settings
from tests.support.fakes import picture
from tests.support.house import PATIENCE_S, UNHURRIED, House, opened, until
from tests.support.house import SoftEncoder as Encoder

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A house with a door on a port."""

    house: House
    door: Door
    port: int
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def call(self) -> Line:
        """Connect."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return Line(reader=reader, writer=writer)

    def pass_time(self, seconds: float) -> None:
        """Look at the doorstep as if at least so much time had passed."""
        self.door._step.sweep(asyncio.get_running_loop().time() + seconds)

    def pass_time_until(self, before_s: float) -> None:
        """Look at the doorstep as if it were so many seconds before the only caller's time is up."""
        (one,) = self.door._step.callers
        self.door._step.sweep(one.due - before_s)

    async def stand(self, callers: int) -> None:
        """Wait until so many are at the door."""
        await until(lambda: len(self.door._step.callers) == callers)

    async def rejected(self, reason: str) -> float:
        return (await self.house.metrics()).get(f'dmn_rejected_total{{reason="{reason}"}}', 0.0)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A connection as it is, without a client library."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the next answer."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
            return int(head[0].split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def status(self) -> int:
        return (await self.answer())[0]

    async def over(self) -> bytes:
        """Return what still comes before the other end hangs up."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


async def _no_last_words(_: float) -> None:
    """Close the door at once: nobody is about to say anything."""


@asynccontextmanager
async def at_door(app: Callable[..., Any] | None = None, **settings: Any) -> AsyncIterator[Visit]:
    async with AsyncExitStack() as stack:
        house = await stack.enter_async_context(opened(Encoder(), **settings))
        await house.put()
        whole = Settings(**({"port": 0, "store": "memory"} | UNHURRIED | settings))
        door = Door(app or house.app, whole, house.rooms.batcher, lambda _: None, sleep=_no_last_words)
        door.config.load()
        door.lifespan = door.config.lifespan_class(door.config)
        await door.startup()
        visit = Visit(house=house, door=door, port=door.servers[0].sockets[0].getsockname()[1])
        try:
            yield visit
        finally:
            for writer in visit.writers:
                writer.close()
            await door.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared() -> AsyncIterator[Visit]:
    """Give a door for tests that leave nothing behind."""
    async with at_door() as visit:
        yield visit


def _post(path: str, body: bytes, *more: str, length: int | None = None) -> bytes:
    told = len(body) if length is None else length
    head = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {told}", *more)
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


# Time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "half", [b"G", b"GET /livez HTTP/1.1\r\n", GET[:-2], b"POST /classify HTTP/1.1\r\nX: " + b"a" * 99]
)
async def test_a_head_that_does_not_end_is_given_up_and_the_caller_is_told(half: bytes) -> None:
    async with at_door() as visit:
        line = await visit.call()
        await line.say(half)
        await until(lambda: any(one._beside for one in visit.door._step.callers))
        visit.pass_time_until(1.0)
        visit.pass_time(11.0)
        status, headers, body = await line.answer()
        assert (status, headers["connection"], json.loads(body)["status"]) == (408, "close", 408)
        assert await line.over() == b""
        line.writer.close()
        await visit.stand(0)
        assert await visit.rejected("deadline-exceeded") == 1


async def test_a_head_has_its_time_as_a_whole_however_it_trickles() -> None:
    async with at_door() as visit:
        line = await visit.call()
        await line.say(b"GET /livez HTTP/1.1\r\n")
        await until(lambda: any(one._beside for one in visit.door._step.callers))
        (one,) = visit.door._step.callers
        due = one.due
        for _ in range(5):
            seen = one._beside
            await line.say(b"X: y\r\n")
            await until(lambda seen=seen: one._beside > seen)  # type: ignore[misc]
            assert one.due == due


async def test_a_caller_that_says_nothing_is_parted_with() -> None:
    async with at_door() as visit:
        line = await visit.call()
        await visit.stand(1)
        visit.pass_time_until(1.0)
        assert len(visit.door._step.callers) == 1
        visit.pass_time(11.0)
        assert await line.over() == b""


async def test_the_second_head_on_a_connection_has_its_time_too() -> None:
    async with at_door() as visit:
        line = await visit.call()
        await line.say(GET)
        assert await line.status() == 200
        visit.pass_time(60.0)
        await line.say(GET[:20])
        await until(lambda: any(one._beside for one in visit.door._step.callers))
        visit.pass_time(11.0)
        assert await line.status() == 408


async def test_an_idle_connection_is_kept_for_as_long_as_the_setting_says() -> None:
    async with at_door(keep_alive_s=7) as visit:
        line = await visit.call()
        await line.say(GET)
        assert await line.status() == 200
        visit.pass_time(1000.0)
        (one,) = visit.door._step.callers
        assert one.timeout_keep_alive == 7
        one.timeout_keep_alive_handler()
        assert await line.over() == b""


async def test_the_rest_of_a_body_that_was_refused_is_not_waited_for_long() -> None:
    async with at_door(max_body_bytes=1000) as visit:
        line = await visit.call()
        await line.say(_post("/classify", b"x", length=10**9))
        assert await line.status() == 413
        await line.say(b"y")
        visit.pass_time(11.0)
        assert await line.over() == b""


async def test_a_connection_goes_on_after_a_refused_body_that_was_sent_whole() -> None:
    async with at_door(max_body_bytes=1000) as visit:
        line = await visit.call()
        await line.say(_post("/classify", b"x" * 2000))
        assert await line.status() == 413
        await line.say(GET)
        assert await line.status() == 200
        visit.pass_time(11.0)
        await line.say(GET)
        assert await line.status() == 200


async def _endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with more than any buffer takes."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000):
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
    await send({"type": "http.response.body"})


async def test_an_answer_that_nobody_takes_is_not_held_forever() -> None:
    async with at_door(_endless) as visit:
        line = await visit.call()
        await line.say(GET)
        await until(lambda: any(one.flow is not None and one.flow.write_paused for one in visit.door._step.callers))
        visit.pass_time_until(1.0)
        assert len(visit.door._step.callers) == 1
        visit.pass_time(UNHURRIED["deadline_ms"] / 1000 + 1.0)
        await until(lambda: not visit.door.server_state.connections)


async def test_who_waits_for_a_slow_answer_is_left_alone() -> None:
    holding = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _endless(scope, receive, send)
            return
        await holding.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with at_door(slow) as visit:
        line = await visit.call()
        await line.say(GET + GET[:9])
        await until(lambda: any(one.cycle is not None for one in visit.door._step.callers))
        visit.pass_time(1000.0)
        holding.set()
        assert await line.status() == 200


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /livez?" + b"a=b&" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /livez HTTP/1.1\r\nX: " + b"a" * 2_000_000,
        b"GET /" + b"a" * 2_000_000,
    ],
    ids=["path", "query", "header", "headers", "header without end", "path without end"],
)
async def test_a_head_of_too_many_bytes_is_refused(head: bytes) -> None:
    async with at_door() as visit:
        line = await visit.call()
        line.writer.write(head)
        status, _, body = await line.answer()
        assert (status, json.loads(body)["title"]) == (431, "Request Header Fields Too Large")
        assert await visit.rejected("invalid-request") == 1


@pytest.mark.parametrize("rest", [b"0\r\n" + b"X: y\r\n" * 20_000, b"1;" + b"x" * 200_000, b"1;x=y\r\na\r\n" * 100_000])
async def test_what_stands_beside_a_chunked_body_is_bounded_too(rest: bytes) -> None:
    async with at_door() as visit:
        line = await visit.call()
        line.writer.write(b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + rest)
        assert b"HTTP/1.1 2" not in await line.over()
        await until(lambda: not visit.house.rooms.batcher.taken)


async def test_a_body_of_tiny_chunks_is_taken() -> None:
    image = picture("red")
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in image) + b"0\r\n\r\n"
    async with at_door(max_header_bytes=500) as visit:
        line = await visit.call()
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        await line.say(head + body)
        assert await line.status() == 200


async def test_a_trailer_is_no_header() -> None:
    image = picture("red")
    async with at_door() as visit:
        line = await visit.call()
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        trailers = b"0\r\nX-Tenant: nobody\r\nX-Request-ID: mine\r\n\r\n"
        await line.say(head + b"%x\r\n" % len(image) + image + b"\r\n" + trailers)
        status, headers, body = await line.answer()
        assert (status, json.loads(body)["tenant"]) == (200, "default")
        assert headers["x-request-id"] != "mine"


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"GET /l\xffivez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX : y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n: y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX: \x00\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX: y\r\n folded\r\n\r\n",
        b"NONSENSE /livez HTTP/1.1\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /classify HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
        b"POST /classify HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\na",
        b"POST /classify HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /classify HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n",
    ],
    ids=range(23),
)
async def test_what_is_no_proper_request_is_refused_as_a_problem_and_hung_up_on(shared: Visit, said: bytes) -> None:
    """Whatever two servers in a row could read differently is read by none of them."""
    line = await shared.call()
    await line.say(said + GET)
    status, headers, body = await line.answer()
    assert (status, headers["content-type"]) == (400, "application/problem+json")
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
    assert json.loads(body) == {"type": "about:blank", "title": "Bad Request", "status": 400} | {
        "detail": json.loads(body)["detail"]
    }
    assert await line.over() == b""


@pytest.mark.parametrize(
    "chunk", [b"g\r\n", b"-1\r\n", b"0x1\r\na\r\n", b"fffffffffffffffff\r\n", b"1\r\nab\r\n", b"1\na\n"]
)
async def test_chunks_that_make_no_sense_end_their_call_and_nothing_is_learned(shared: Visit, chunk: bytes) -> None:
    before = await shared.house.memory()
    line = await shared.call()
    await line.say(b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
    assert b"HTTP/1.1 2" not in await line.over()
    assert await shared.house.memory() == before


async def test_garbage_behind_a_request_does_not_reach_into_its_answer() -> None:
    async with at_door() as visit:
        line = await visit.call()
        await line.say(_post("/classify", picture("red")) + b"\0\0\0\r\n\r\n")
        told = await line.over()
        assert told.count(b"HTTP/1.1") <= 1
        assert b"HTTP/1.1 400" not in told


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "TLS/1.0"])
async def test_an_upgrade_that_is_not_offered_is_ignored(
    shared: Visit, upgrade: str, caplog: pytest.LogCaptureFixture
) -> None:
    line = await shared.call()
    more = f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n"
    await line.say(GET[:-2] + more.encode())
    assert await line.status() == 200
    assert not caplog.records


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "head and body apart"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_the_body_of_a_request_that_asks_for_an_upgrade_is_its_body_and_no_request(
    *, apart: bool, chunked: bool
) -> None:
    """A caller behind a balancer would else have a second request answered, in somebody else's name."""
    asking, inner = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n", GET
    for body in (picture("red"), inner):
        told = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n{asking}{framing}\r\n\r\n".encode()
        async with at_door() as visit:
            line = await visit.call()
            if apart:
                await line.say(head)
                await visit.stand(1)
                await until(lambda door=visit.door: not door._step.waiting)  # type: ignore[misc]
                await line.say(told + GET.replace(b"livez", b"version"))
            else:
                await line.say(head + told + GET.replace(b"livez", b"version"))
            assert await line.status() == (422 if body is inner else 200)
            assert b"fingerprint" in (await line.answer())[2]


async def test_any_number_of_requests_that_ask_for_an_upgrade_are_answered_one_by_one() -> None:
    many = 300
    async with at_door() as visit:
        line = await visit.call()
        await line.say((GET[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n") * many)
        assert [await line.status() for _ in range(many)] == [200] * many


# Places ---------------------------------------------------------------------------------------------------------------


async def test_who_has_waited_longest_makes_room_for_a_newcomer() -> None:
    async with at_door(max_connections=3) as visit:
        lines = []
        for at in range(3):
            lines.append(await visit.call())
            await visit.stand(at + 1)
        await lines[0].say(GET)
        assert await lines[0].status() == 200
        newcomer = await visit.call()
        await newcomer.say(GET)
        assert await newcomer.status() == 200
        assert await lines[1].over() == b""
        for line in (lines[0], lines[2]):
            await line.say(GET)
            assert await line.status() == 200
        assert await visit.rejected("queue-full") == 0


async def test_where_everybody_is_being_answered_a_newcomer_is_told_when_to_come_back() -> None:
    async with at_door(max_connections=2) as visit:
        busy = [await visit.call() for _ in range(2)]
        for line in busy:
            await line.say(_post("/classify", b"x", length=100))
        await until(lambda: len(visit.door._step.callers) == 2 and not visit.door._step.waiting)
        newcomer = await visit.call()
        status, headers, body = await newcomer.answer()
        assert (status, headers["retry-after"], json.loads(body)["type"]) == (503, "1", "/problems/queue-full")
        assert await newcomer.over() == b""
        newcomer.writer.close()
        await visit.stand(2)
        busy[0].writer.close()
        await visit.stand(1)
        again = await visit.call()
        await again.say(GET)
        assert await again.status() == 200
        assert await visit.rejected("queue-full") == 1


async def test_there_is_an_end_to_those_who_are_told_to_come_back() -> None:
    async with at_door(max_connections=1) as visit:
        busy = await visit.call()
        await busy.say(_post("/classify", b"x", length=100))
        await until(lambda: len(visit.door._step.callers) == 1 and not visit.door._step.waiting)
        told = await visit.call()
        await visit.stand(2)
        cut = await visit.call()
        assert await cut.over() == b""
        visit.pass_time(2.0)
        await visit.stand(1)
        assert (await told.over()).startswith(b"HTTP/1.1 503")


async def test_a_flood_of_silent_callers_does_not_keep_anybody_out() -> None:
    async with at_door(max_connections=20) as visit, AsyncExitStack() as stack:
        for _ in range(60):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", visit.port)))
            silent.sendall(b"GET /")
            await asyncio.sleep(0)
        line = await visit.call()
        await line.say(GET)
        assert await line.status() == 200
        assert len(visit.door._step.callers) <= 20
