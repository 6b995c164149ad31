"""The server around the rooms: it says where it is, and leaves in steps. `tests/e2e` tries it with real signals."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.server import single_process
from service.server.http_server import Address, Door, announce, kept
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.wiring import open_rooms
from tests.support.fakes import FakeEncoder

PATIENCE_S = 60.0


class Rooms:
    """What the door knows of the rooms behind it."""

    def __init__(self) -> None:
        self.leaving, self.metrics = False, Metrics(CollectorRegistry())


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


async def app(_: Request) -> Response:
    return Response("fine")


def server(
    rooms: Rooms,
    settings: Settings,
    console: Console | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Door:
    def opened(address: Address) -> None:
        announce(console or Console(file=io.StringIO()), settings, encoder="fake", address=address)

    return Door(Starlette(routes=[Route("/livez", app)]), settings, rooms, opened, sleep=sleep)


@asynccontextmanager
async def listening(own: Door) -> AsyncIterator[None]:
    """Open the door without the signal handlers, which belong to the whole process."""
    own.config.load()
    own.lifespan = own.config.lifespan_class(own.config)
    await own.startup()
    yield
    await own.shutdown()


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 on this machine")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=IPV6)])
async def test_it_says_on_which_url_it_answers(rooms: Rooms, host: str) -> None:
    console = Console(file=(file := io.StringIO()), width=40)
    own = server(rooms, Settings(store="memory", host=host, port=0, drain_delay_s=0), console)
    async with listening(own):
        (line,) = file.getvalue().splitlines()
        url = next(word for word in line.split() if word.startswith("http://"))
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as client:
            assert (await client.get("/livez")).status_code == 200
    assert "fake" in line
    assert "Memories are not kept" in line


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Settings(store="memory"), "not kept"),
        (Settings(store="embedded", data_dir=Path("/some/where")), "in /some/where."),
        (Settings(store="redis://:secret@host"), "in the store."),
    ],
)
def test_it_says_where_memories_are_kept_without_a_password(settings: Settings, told: str) -> None:
    said = kept(settings)
    assert told in said
    assert "secret" not in said


async def test_told_to_stop_it_turns_readiness_off_before_it_refuses_work(rooms: Rooms) -> None:
    own = server(rooms, Settings(drain_delay_s=1000))
    own.handle_exit(signal.SIGTERM, None)
    assert rooms.leaving
    assert not own.should_exit


async def test_after_the_delay_it_stops(rooms: Rooms) -> None:
    own = server(rooms, Settings(drain_delay_s=0))
    own.handle_exit(signal.SIGTERM, None)
    await _until(lambda: own.should_exit)
    assert not own.force_exit


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for sends no event
            await asyncio.sleep(0)


@pytest.mark.parametrize("late", [False, True])
async def test_who_was_there_before_the_door_closed_is_answered(rooms: Rooms, *, late: bool) -> None:
    said = asyncio.Event()

    async def until_heard(seconds: float) -> None:
        """Stand still for as long as the request takes to arrive."""
        assert seconds > 0
        await said.wait()
        await _until(lambda: any(getattr(caller, "cycle", None) for caller in own.server_state.connections))

    own = server(rooms, Settings(drain_delay_s=0, port=0), sleep=until_heard)
    own.config.load()
    own.lifespan = own.config.lifespan_class(own.config)
    await own.startup()
    address = own.servers[0].sockets[0].getsockname()
    request = b"GET /livez HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    with socket.create_connection(address) as caller:  # nobody has looked yet who is there
        if not late:
            caller.sendall(request)
        leaving = asyncio.create_task(own.shutdown())
        await _until(lambda: bool(own.server_state.connections))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        if late:
            caller.sendall(request)
        said.set()
        await leaving
        assert caller.recv(4096).startswith(b"HTTP/1.1 200 ")


async def test_told_twice_it_does_not_wait_for_the_delay(rooms: Rooms) -> None:
    own = server(rooms, Settings(drain_delay_s=1000))
    own.handle_exit(signal.SIGINT, None)
    own.handle_exit(signal.SIGINT, None)
    assert own.should_exit


@pytest.mark.parametrize(("seconds", "whole"), [(0.5, 1), (30.0, 30)])
async def test_the_time_for_work_in_flight_is_the_setting(
    monkeypatch: pytest.MonkeyPatch, seconds: float, whole: int
) -> None:
    """Half a second is not none."""
    seen: list[float | None] = []

    class Noted(Door):
        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            del sockets
            seen.append(self.config.timeout_graceful_shutdown)
            self.started = True

    monkeypatch.setattr(single_process, "Door", Noted)
    monkeypatch.setattr(single_process, "open_rooms", partial(open_rooms, encoder=FakeEncoder()))
    settings = Settings(port=0, drain_timeout_s=seconds)
    assert await single_process._serve(settings, Console(file=io.StringIO())) == 0
    assert seen == [whole]
