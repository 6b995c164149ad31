"""The client of `dmn bench serve`: calls go out when they are due, and all that becomes of them is counted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from io import BytesIO
from types import SimpleNamespace

import pytest
from PIL import Image

from service.bench import load
from service.bench.images import photo
from service.bench.load import Call, Client, Offered, arrivals, offer, saturate
from tests.support.clock import Clock

Answer = Callable[[], Awaitable[tuple[int, str]]]


@asynccontextmanager
async def stub(answer: Answer) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve on a free port; yields the address and the bodies that came."""
    bodies: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
                status, connection = await answer()
                writer.write(
                    f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\nConnection: {connection}\r\n\r\n{{}}".encode()
                )
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", bodies


def always(status: int, connection: str = "keep-alive") -> Answer:
    async def answer() -> tuple[int, str]:
        return status, connection

    return answer


async def test_calls_go_out_when_they_are_due_whatever_became_of_those_before() -> None:
    here, all_here = 0, asyncio.Event()

    async def answer() -> tuple[int, str]:
        nonlocal here
        here += 1
        if here == 5:
            all_here.set()
        await all_here.wait()
        return 200, "keep-alive"

    async with stub(answer) as (url, bodies), Client(url, "/classify", {}) as client:
        offered = await offer(client, [b"a", b"b"], [0.0] * 5)
    assert len(offered.latencies) == 5
    assert sorted(bodies) == [b"a", b"a", b"a", b"b", b"b"]


@pytest.mark.parametrize(("status", "refused", "failed"), [(429, 2, 0), (503, 2, 0), (500, 0, 2), (200, 0, 0)])
async def test_refusals_are_told_from_failures(status: int, refused: int, failed: int) -> None:
    async with stub(always(status)) as (url, _), Client(url, "/classify", {}) as client:
        offered = await offer(client, [b"a"], [0.0, 0.0])
    assert (offered.refused, offered.failed) == (refused, failed)


async def test_a_service_that_is_not_there_answers_nothing() -> None:
    with closing(socket.socket()) as held:  # bound and not listening: nobody else gets the port
        held.bind(("127.0.0.1", 0))
        async with Client(f"http://127.0.0.1:{held.getsockname()[1]}", "/classify", {}) as client:
            assert await client.post(b"a") == 0


async def test_a_connection_that_the_service_closes_is_replaced() -> None:
    async with stub(always(200, "close")) as (url, bodies), Client(url, "/classify", {}) as client:
        assert [await client.post(b"a"), await client.post(b"b")] == [200, 200]
    assert bodies == [b"a", b"b"]


async def test_clients_that_ask_again_at_once_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=clock))

    async def answer() -> tuple[int, str]:
        clock.advance(0.1)
        return 200, "keep-alive"

    async with stub(answer) as (url, bodies), Client(url, "/classify", {}) as client:
        told = await saturate(client, [b"a"], clients=2, seconds=1.0)
    assert told.failed == 0
    assert len(told.latencies) == len(bodies) - 2 >= 8


def test_latency_counts_from_when_a_call_was_due_and_only_of_answers() -> None:
    calls = [Call(due=1.0, done=3.0, status=200), Call(due=2.0, done=2.1, status=503)]
    offered = Offered(calls=calls, unsent=0, late_s=0.0)
    assert offered.latencies == [2.0]
    assert offered.achieved(2.0) == pytest.approx(1 / 3)


def test_so_many_calls_arrive_as_the_rate_says_and_the_same_for_a_seed() -> None:
    times = arrivals(20.0, 5.0, seed=1)
    assert len(times) == 100
    assert times == sorted(times) == arrivals(20.0, 5.0, seed=1)
    assert 0 <= times[0] < times[-1] <= 5.0


def test_made_photos_are_jpegs_that_differ_by_their_seed_alone() -> None:
    assert photo(1, 96) == photo(1, 96) != photo(2, 96)
    with Image.open(BytesIO(photo(1, 96))) as image:
        assert (image.format, image.size) == ("JPEG", (96, 96))
