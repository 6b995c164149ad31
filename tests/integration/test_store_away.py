"""The service while its store is away: a real server that hangs, or is killed and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.stores.instrumented import PAUSE_S
from tests.support.clock import Clock
from tests.support.fakes import picture
from tests.support.house import Build, House, problem, until
from tests.support.servers import BINARIES, PATIENCE_S, wait_until_listening

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed"),
]

MOMENT_S = 0.2
"""How long a server that hangs is waited for."""

REDS = [picture("red", seed) for seed in range(12)]


class Server:
    """A server that writes what it holds to a folder, can hang, die, and come back."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "s.sock"
        files = ("--unixsocket", str(self.socket), "--dir", str(folder), "--appendonly", "yes", "--save", "")
        self._command = (str(BINARIES["valkey"]), "--port", "0", *files)
        self.start()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until_listening(self.process, self.socket)

    def hang(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def die(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.socket.unlink()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Yield a server that is there."""
    own = Server(tmp_path)
    yield own
    own.process.kill()
    own.process.wait(PATIENCE_S)


@dataclass(frozen=True, kw_only=True)
class Away:
    """A house on a server that may hang or die; the house's clock stands still until the store is to be asked again."""

    house: House
    server: Server
    clock: Clock

    def hang(self) -> None:
        """Stop the server; a call to it takes no longer than a moment from now on."""
        self._wait_for_answers(MOMENT_S)
        self.server.hang()

    def die(self) -> None:
        """Kill the server."""
        self.server.die()

    def come_back(self) -> None:
        """Let the server go on or start it again, and let the pause end in which it is not asked."""
        self._wait_for_answers(PATIENCE_S)
        if self.server.process.poll() is None:
            self.server.go_on()
        else:
            self.server.start()
        self.clock.advance(PAUSE_S)

    def _wait_for_answers(self, seconds: float) -> None:
        """Set how long a call waits for the server: a server that is there has any time."""
        self.house.rooms.store._store._client.patience_s = seconds  # type: ignore[attr-defined]


async def opened(build: Build, server: Server, **settings: Any) -> Away:
    clock = Clock()
    house = await build(**({"store": server.url, "sync_ms": 0, "clock": clock} | settings))
    assert (await house.put(slots=20)).status_code in (200, 201)
    return Away(house=house, server=server, clock=clock)


async def ready(house: House) -> tuple[int, bool]:
    answer = await house.client.get("/readyz")
    return answer.status_code, answer.json()["checks"]["store"]["ok"]


@pytest.mark.parametrize("fault", ["hang", "die"])
async def test_answers_go_on_from_the_hot_memory_and_are_learned_when_the_store_is_back(
    build: Build, server: Server, fault: str
) -> None:
    away = await opened(build, server, housekeeping=True)
    house = away.house
    assert await house.outcomes(REDS[0]) == ["filled"]
    getattr(away, fault)()
    answer = (await house.classify(*REDS[1:4])).json()
    assert [one["learned"]["outcome"] for one in answer["predictions"]] == ["pending"] * 3
    assert answer["memory"]["state"] == "stale"
    assert {one["label"] for one in answer["predictions"]} == {"red"}
    away.come_back()
    await until(lambda: house.rooms.desk.pending == 0)
    slots = {slot["slot"] for slot in await house.slots("red")}
    assert slots >= {one["learned"]["slot"] for one in answer["predictions"]}
    answer = (await house.classify(REDS[0])).json()
    assert (answer["memory"]["state"], answer["predictions"][0]["learned"]["outcome"]) == ("fresh", "duplicate")
    assert (await house.metrics())['dmn_memory_updates_total{outcome="lost"}'] == 0


async def test_where_stale_answers_are_not_wanted_calls_are_refused_until_the_store_is_back(
    build: Build, server: Server
) -> None:
    away = await opened(build, server, store_down="refuse")
    house = away.house
    await house.predictions(REDS[0])
    away.hang()
    assert problem(await house.classify(REDS[1]), "store-down")["retry_after"]
    assert await ready(house) == (503, False)
    away.come_back()
    assert await house.outcomes(REDS[1]) == ["filled"]


async def test_readiness_tells_the_truth_while_answers_go_on(build: Build, server: Server) -> None:
    away = await opened(build, server)
    house = away.house
    await house.predictions(REDS[0])
    assert await ready(house) == (200, True)
    away.hang()
    assert await ready(house) == (200, False)
    house.rooms.archive.drop("default")
    assert await ready(house) == (503, False)
    away.come_back()


async def test_what_changes_a_memory_is_refused_and_told_when_to_come_back(build: Build, server: Server) -> None:
    away = await opened(build, server)
    house = away.house
    await house.predictions(REDS[0])
    away.hang()
    reset = await house.client.post("/admin/memory/reset", json={"scope": "all"})
    for answer in (await house.upload("red", REDS[1]), reset, await house.put(), await house.client.get("/memory")):
        assert problem(answer, "store-down")["retry_after"]
    away.come_back()
    assert len(await house.slots("red")) == 1
    assert await house.shots() == []
