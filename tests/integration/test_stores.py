"""Memories that outlive the process: the service on real servers, its own embedded one above all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from redis.asyncio import Redis

from service.classify import ClassifyCall, classify
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import StoreDown
from service.inference.results import Reading
from service.services import Rooms
from service.settings import DEFAULT_TENANT, Settings
from service.stores.connection.pools import connect
from service.stores.embedded import files
from service.stores.embedded import server as server_module
from service.stores.embedded.binary import find_binary
from service.stores.embedded.server import EmbeddedServer, embedded_server
from service.stores.redis.store import RedisStore
from service.tenants import configuration
from service.wiring import open_rooms
from tests.support.fakes import FakeEncoder, picture
from tests.support.replicas import without_housekeeper

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")

PATIENCE_S = 60.0
COLOURS = ("red", "green", "blue")


def server_in(folder: Path) -> EmbeddedServer:
    return embedded_server(folder, "", fsync="everysec")


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[Rooms]:
    settings = Settings(store="embedded", data_dir=folder, sync_ms=0, store_timeout_ms=1000 * PATIENCE_S)
    async with AsyncExitStack() as stack:
        with without_housekeeper():  # nothing asks a server that was killed but what a test asks
            rooms = await stack.enter_async_context(open_rooms(settings, FakeEncoder()))
        yield rooms


async def name_classes(rooms: Rooms) -> None:
    classes = tuple(ClassSpec(name=colour) for colour in COLOURS)
    await configuration.put_tenant(rooms, DEFAULT_TENANT, TenantConfig(classes=classes))


async def ask(rooms: Rooms, image: bytes, *, learn: bool = True) -> Reading:
    deadline = rooms.clock() + PATIENCE_S
    call = ClassifyCall(tenant=DEFAULT_TENANT, images=[image], learn=learn, views=1, explain=True, deadline=deadline)
    (reading,) = await classify(rooms, call)
    assert isinstance(reading, Reading)
    return reading


def behind(reading: Reading) -> list[str]:
    """Return the slots behind an answer."""
    assert reading.explanation is not None
    return [trace.id for trace in reading.explanation.dynamic]


async def until_other(server: EmbeddedServer, old: int | None) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while server.pid in (old, None):  # noqa: ASYNC110 - the watch tells nobody
            await asyncio.sleep(0.01)


async def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    async with house(tmp_path) as rooms:
        await name_classes(rooms)
        for i, colour in enumerate(COLOURS):
            await ask(rooms, picture(colour, i))
        await rooms.archive.hand_in(DEFAULT_TENANT)
        asked = await ask(rooms, picture("red", 9), learn=False)
        before = await configuration.load(rooms, DEFAULT_TENANT)
    async with house(tmp_path) as rooms:
        assert await configuration.load(rooms, DEFAULT_TENANT) == before
        again = await ask(rooms, picture("red", 9), learn=False)
    assert again.probabilities.tolist() == asked.probabilities.tolist()
    assert sum(len(bank) for bank in before.slots.values()) == len(COLOURS)


async def test_an_image_learned_through_one_service_changes_the_answer_of_another(tmp_path: Path) -> None:
    async with house(tmp_path) as one, house(tmp_path) as other:
        await name_classes(one)
        before = await ask(other, picture("red", 1), learn=False)
        learned = (await ask(one, picture("red", 2))).learned
        after = await ask(other, picture("red", 1), learn=False)
    assert learned.outcome == "filled"
    assert [behind(reading) for reading in (before, after)] == [[], [learned.slot]]
    assert after.stamp.version > before.stamp.version


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a connection cut while it is made
async def test_a_look_at_the_server_ends_at_whatever_step_it_is_cancelled(tmp_path: Path) -> None:
    """A cancellation that is lost leaves the watch of a server that was told to stop running for ever."""
    server = server_in(tmp_path)
    async with server.running():
        for steps in range(30):
            look = asyncio.create_task(server._pid_behind_socket())
            for _ in range(steps):
                await asyncio.sleep(0)
            ended = look.done() or not look.cancel()
            await asyncio.wait([look])
            assert ended or look.cancelled(), steps


@pytest.mark.slow
async def test_nothing_that_was_told_as_learned_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    server = server_in(tmp_path)
    async with server.running(), house(tmp_path) as rooms:
        await name_classes(rooms)
        learned = [(await ask(rooms, picture("blue", i))).learned.slot for i in range(8)]
        old = server.pid
        assert old is not None
        os.kill(old, signal.SIGKILL)
        await until_other(server, old)
        stored = await configuration.load(rooms, DEFAULT_TENANT)
    assert {slot.id for bank in stored.slots.values() for slot in bank} == set(learned)


@pytest.mark.slow
async def test_while_the_server_is_away_a_call_is_refused_and_told_when_to_come_back(tmp_path: Path) -> None:
    server = server_in(tmp_path)
    async with server.running():
        store = RedisStore(
            connect(server.url, timeout_s=PATIENCE_S), clock=lambda: 0.0, remember_s=1.0, remember_bytes=1
        )
        await store.ping()
    with pytest.raises(StoreDown) as told:
        await store.ping()
    assert told.value.retry_after_s
    await store.aclose()


@pytest.mark.slow
async def test_the_last_who_leaves_stops_the_server(tmp_path: Path) -> None:
    first, second = server_in(tmp_path), server_in(tmp_path)
    async with first.running():
        async with second.running():
            assert second.pid == first.pid
        assert first.pid is not None
        os.kill(first.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(first.pid, 0)


@pytest.mark.slow
async def test_a_server_that_outlived_its_users_is_taken_over(tmp_path: Path) -> None:
    holder = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from service.stores.embedded.server import embedded_server\n"
        "async def main():\n"
        "    server = embedded_server(Path(sys.argv[1]), '', fsync='everysec')\n"
        "    async with server.running():\n"
        "        print(server.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen((sys.executable, "-c", holder, str(tmp_path)), stdout=subprocess.PIPE) as user:  # noqa: ASYNC220
        assert user.stdout is not None
        orphan = int(await asyncio.to_thread(user.stdout.readline))
        user.kill()
    server = server_in(tmp_path)
    async with server.running():
        assert server.pid == orphan
    async with asyncio.timeout(PATIENCE_S):
        while files.is_alive(orphan):  # noqa: ASYNC110 - it is no child of this process, which hears nothing of it
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_nobody_else_may_enter_the_data_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with server_in(folder).running():
        assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.slow
async def test_a_server_that_may_drop_what_it_holds_is_refused(tmp_path: Path) -> None:
    server = server_in(tmp_path)
    async with server.running():
        client = Redis.from_url(server.url)
        await client.config_set("maxmemory-policy", "allkeys-lru")
        await client.aclose()
        with pytest.raises(StoreDown, match="noeviction"):
            async with open_rooms(Settings(store=server.url, store_timeout_ms=1000 * PATIENCE_S), FakeEncoder()):
                pass


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "unix:///no/such/socket"])
async def test_a_store_that_cannot_be_reached_is_one_clear_line(url: str) -> None:
    with pytest.raises(StoreDown, match="store"):
        async with open_rooms(Settings(store=url), FakeEncoder()):
            pass


async def test_a_server_that_cannot_be_found_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StoreDown, match="DMN_EMBEDDED_BINARY"):
        embedded_server(tmp_path, "/no/such/server", fsync="everysec")


@pytest.mark.slow
async def test_a_server_that_hangs_is_not_joined_by_a_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = server_in(tmp_path)
    async with first.running():
        assert first.pid is not None
        os.kill(first.pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(server_module, "_START_S", 0.5)
            patch.setattr(server_module, "_ANSWER_S", 0.2)
            with pytest.raises(StoreDown, match="lives on the data folder"):
                async with server_in(tmp_path).running():
                    pass
        os.kill(first.pid, signal.SIGCONT)
        again = server_in(tmp_path)
        async with again.running():
            assert again.pid == first.pid


@pytest.mark.slow
async def test_leaving_a_server_that_hangs_takes_a_bounded_time_and_it_ends_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_in(tmp_path)
    async with asyncio.timeout(PATIENCE_S):
        async with server.running():
            monkeypatch.setattr(server_module, "_HUNG_S", 0.2)
            monkeypatch.setattr(server_module, "_ANSWER_S", 0.2)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
        os.kill(server.pid, signal.SIGCONT)
        while files.is_alive(server.pid):  # noqa: ASYNC110 - a process that ends tells nobody
            await asyncio.sleep(0.01)


def seen(folder: Path) -> tuple[dict[str, str], int]:
    """Return the files of a folder, and who may enter it."""
    return {file.name: file.read_text() for file in folder.iterdir()}, folder.stat().st_mode & 0o777


@pytest.mark.parametrize("name", ["dump.rdb", "notes.txt"])
async def test_a_folder_that_holds_something_else_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    before = seen(tmp_path)
    with pytest.raises(StoreDown, match="not this service's"):
        async with server_in(tmp_path).running():
            pass
    assert seen(tmp_path) == before


async def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreDown, match="cannot be used"):
        async with server_in(tmp_path / "file").running():
            pass


@pytest.mark.slow
@pytest.mark.parametrize(("fsync", "own"), [("everysec", "no"), ("always", "always")])
async def test_what_was_acknowledged_never_waits_for_the_disk_in_the_server_s_own_memory(
    tmp_path: Path, fsync: Literal["everysec", "always"], own: str
) -> None:
    server = embedded_server(tmp_path, "", fsync=fsync)
    async with server.running(), Redis.from_url(server.url) as client:
        assert (await client.config_get("appendfsync"))["appendfsync"] == own
        written = tmp_path / "appendonlydir"
        size = sum(file.stat().st_size for file in written.iterdir())
        await client.set("key", b"x" * 1000)
        assert sum(file.stat().st_size for file in written.iterdir()) > size + 1000


async def test_what_the_server_wrote_is_flushed_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "appendonlydir" / "a.incr.aof"
    file.parent.mkdir()
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    seen: dict[Path, float] = {}
    for number, count in ((1, 1), (1, 1), (2, 2)):
        file.write_bytes(b"x" * number)
        os.utime(file, (number, number))
        files.flush_changed(tmp_path, seen)
        assert len(flushed) == count
