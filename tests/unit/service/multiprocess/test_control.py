"""What a process is told when it starts, what it says, and that it hears when nobody is left."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.multiprocess.control import Lifeline, Plan, plan_of
from service.settings import Settings

PATIENCE_S = 60.0


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Lifeline]]:
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    line = Lifeline(theirs.detach())
    with ours, line._socket:
        yield ours, line


def plan(**settings: object) -> Plan:
    return Plan(role="back", index=1, settings=Settings(**settings), hatches=("/a", "/b"), door=7)  # type: ignore[arg-type]


def test_a_plan_arrives_as_it_was_made() -> None:
    made = plan(store="redis://:secret@host", devices=("cpu", "cuda:0"), data_dir=Path("/x"), image_formats=("PNG",))
    assert plan_of(made.line()) == made
    assert made.line().count(b"\n") == 1


def test_what_the_environment_says_by_then_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    line = plan(max_images=3).line()
    monkeypatch.setenv("DMN_MAX_IMAGES", "5")
    monkeypatch.setenv("DMN_PORT", "1")
    assert (plan_of(line).settings.max_images, plan_of(line).settings.port) == (3, 8000)


def test_a_process_is_told_what_to_be_and_says_what_became_of_it(ends: tuple[socket.socket, Lifeline]) -> None:
    ours, line = ends
    ours.sendall(plan().line())
    assert line.plan() == plan()
    assert not line.told
    line.ready({"encoder": "lite"})
    assert line.told
    line.failed("There is no such device.")
    told = [json.loads(part) for part in ours.recv(4096).splitlines()]
    assert told == [{"ready": {"encoder": "lite"}}, {"failed": "There is no such device."}]


def test_a_process_that_nobody_started_is_refused(ends: tuple[socket.socket, Lifeline]) -> None:
    ours, line = ends
    ours.close()
    with pytest.raises(ValueError, match="for `dmn serve` alone"):
        line.plan()
    line.ready({})  # nobody is left to hear it


def test_what_a_process_starts_does_not_hold_its_line(ends: tuple[socket.socket, Lifeline]) -> None:
    _, line = ends
    assert not line._socket.get_inheritable()


async def test_who_holds_the_other_end_is_missed_at_once(ends: tuple[socket.socket, Lifeline]) -> None:
    ours, line = ends
    stop = asyncio.Event()
    watching = asyncio.create_task(line.cut(stop.set))
    await asyncio.sleep(0)
    assert not stop.is_set()
    ours.close()
    async with asyncio.timeout(PATIENCE_S):
        await stop.wait()
    await watching
