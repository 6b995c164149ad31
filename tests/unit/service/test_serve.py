"""The server around the rooms: it says where it is, and leaves in steps. `tests/e2e` tries it with real signals."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from service.app import create_app, open_rooms
from service.door import Address, Door, announce, kept
from service.rooms import Rooms
from service.settings import Settings
from tests.support.fakes import FakeEncoder


@pytest.fixture
async def rooms() -> AsyncIterator[Rooms]:
    async with open_rooms(Settings(drain_delay_s=0, port=0), FakeEncoder()) as rooms:
        yield rooms


def server(rooms: Rooms, settings: Settings, console: Console | None = None) -> Door:
    def opened(address: Address) -> None:
        announce(console or Console(file=io.StringIO()), rooms.settings, encoder=rooms.encoder.name, address=address)

    return Door(create_app(settings, rooms), settings, rooms.batcher, opened)


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
    own = server(rooms, Settings(host=host, port=0, drain_delay_s=0), console)
    async with listening(own):
        (line,) = file.getvalue().splitlines()
        url = next(word for word in line.split() if word.startswith("http://"))
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
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
    assert rooms.batcher.leaving
    assert not rooms.batcher.draining
    assert not own.should_exit
    with rooms.batcher.admit(1, tenant="a"):
        pass
    rooms.batcher.leaving = False


async def test_after_the_delay_it_stops_and_still_takes_the_work_of_who_is_inside(rooms: Rooms) -> None:
    own = server(rooms, Settings(drain_delay_s=0))
    own.handle_exit(signal.SIGTERM, None)
    for _ in range(10):
        await asyncio.sleep(0)
    assert own.should_exit
    with rooms.batcher.admit(1, tenant="a"):
        pass


@pytest.mark.parametrize("late", [False, True])
async def test_who_was_there_before_the_door_closed_is_answered(rooms: Rooms, *, late: bool) -> None:
    own = server(rooms, Settings(drain_delay_s=0, port=0))
    own.config.load()
    own.lifespan = own.config.lifespan_class(own.config)
    await own.startup()
    address = own.servers[0].sockets[0].getsockname()
    request = b"GET /livez HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    with socket.create_connection(address) as caller:  # nobody has looked yet who is there
        if not late:
            caller.sendall(request)
        leaving = asyncio.create_task(own.shutdown())
        for _ in range(20):
            await asyncio.sleep(0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        if late:
            caller.sendall(request)
        await leaving
        assert caller.recv(4096).startswith(b"HTTP/1.1 200 ")


async def test_told_twice_it_does_not_wait_for_the_delay(rooms: Rooms) -> None:
    own = server(rooms, Settings(drain_delay_s=1000))
    own.handle_exit(signal.SIGINT, None)
    own.handle_exit(signal.SIGINT, None)
    assert own.should_exit


@pytest.mark.parametrize("seconds", [0.5, 30.0])
async def test_the_time_for_work_in_flight_is_the_setting(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Half a second is not none."""
    from service import serve  # noqa: PLC0415 - patched here alone

    seen: list[float | None] = []

    class Noted(Door):
        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            del sockets
            seen.append(self.config.timeout_graceful_shutdown)
            self.started = True

    @asynccontextmanager
    async def furnished(settings: Settings) -> AsyncIterator[Rooms]:
        async with open_rooms(settings, FakeEncoder()) as rooms:
            yield rooms

    monkeypatch.setattr(serve, "Door", Noted)
    monkeypatch.setattr(serve, "open_rooms", furnished)
    settings = Settings(port=0, drain_timeout_s=seconds)
    assert await serve._serve(settings, Console(file=io.StringIO())) == 0
    assert seen[0] is not None
    assert seen[0] >= seconds
