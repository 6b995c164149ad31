"""The real command on a real port: from the first answer to the last, whatever signal ends it.

The encoder sees colours; `tests/integration/test_command.py` starts the command with a real one.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, URL, Command

CLASSES = ("red", "green", "blue")
HEAD = (
    b"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Type: image/png\r\n"
    b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n"
)
"""The head of a call whose body the service asks for once it reads it."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False)


def serve(**environment: str) -> Command:
    return Command("fake", "serve", "--port", "0", **environment)


def classify(url: str, seed: int, colour: str = "red") -> httpx.Response:
    with client(url) as own:
        files = [("images", ("a.jpg", picture(colour, seed, form="JPEG", size=(320, 240)), "image/jpeg"))]
        return own.post("/classify", files=files)


def first_label(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["predictions"][0]["label"])


def configure(url: str) -> None:
    with client(url) as own:
        assert own.put("/tenants/default", json={"classes": list(CLASSES)}).status_code == 200


def until(told: Callable[[], bool]) -> None:
    """Ask until it is so; every question is a call of its own, which takes its time."""
    ends = time.monotonic() + PATIENCE_S
    while not told():
        assert time.monotonic() < ends


def waiting_images(url: str) -> float:
    with client(url) as own:
        text = own.get("/metrics").text
    found = re.search(r"^dmn_queue_images (\S+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


def lets_in(url: str) -> bool:
    """Return whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
    except (ConnectionRefusedError, ConnectionResetError):  # the latter who knocked as the door closed
        return False
    return True


def readiness(url: str) -> int:
    with client(url) as own:
        return own.get("/readyz").status_code


def events(command: Command) -> list[dict[str, Any]]:
    """Return the log, which is one JSON object a line; the line with the URL is for people."""
    return [json.loads(line) for line in command.err if line.strip() and not URL.search(line)]


def test_a_visit_from_the_start_to_the_first_answer_and_what_it_remembers() -> None:
    """Start, ask, name classes, ask again, and find that it remembers."""
    with serve(DMN_DRAIN_DELAY_S="0") as command:
        url = command.url()
        assert url.startswith("http://127.0.0.1:")
        assert readiness(url) == 200
        unknown = classify(url, 0)
        assert (unknown.status_code, unknown.json()["type"]) == (409, "/problems/no-classes")
        configure(url)
        reply = classify(url, 0)
        assert first_label(reply) == "red"
        assert reply.json()["predictions"][0]["learned"]["outcome"] == "filled"
        assert classify(url, 0).json()["predictions"][0]["learned"]["outcome"] == "duplicate"
        assert [first_label(classify(url, 1, colour)) for colour in CLASSES] == list(CLASSES)
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
        assert not command.out
        assert "Traceback" not in "".join(command.err)
        names = [one["event"] for one in events(command)]
        assert (names[0], names[-1]) == ("dmn.service.started", "dmn.service.stopped")
        assert "dmn.service.draining" in names
        assert names.count("dmn.request") == 4 + len(CLASSES)


def test_told_to_stop_it_turns_readiness_off_first_answers_what_is_in_flight_and_ends_with_0_when_told_again(
    pool: ThreadPoolExecutor,
) -> None:
    """A batch waits for its second image, which comes when readiness is already off, and the doors are still open."""
    settings = {"DMN_BATCH_IMAGES": "2", "DMN_BATCH_WAIT_MS": "30000", "DMN_DRAIN_DELAY_S": "1000"}
    with serve(**settings) as command:
        url = command.url()
        configure(url)
        first: Future[httpx.Response] = pool.submit(classify, url, 1)
        until(lambda: waiting_images(url) == 1)
        command.signal(signal.SIGTERM)
        until(lambda: readiness(url) == 503)
        assert not first.done()
        with client(url) as own:
            assert own.get("/livez").status_code == 200
        second = pool.submit(classify, url, 2)
        assert first_label(first.result(PATIENCE_S)) in CLASSES
        assert first_label(second.result(PATIENCE_S)) in CLASSES
        command.signal(signal.SIGINT)
        assert command.ended() == 0


def test_what_is_in_flight_when_the_doors_close_is_answered_all_the_same(pool: ThreadPoolExecutor) -> None:
    """A lone image waits for company longer than the doors stay open; of another half comes when nobody is let in."""
    settings = {"DMN_BATCH_IMAGES": "2", "DMN_BATCH_WAIT_MS": "2500", "DMN_DRAIN_DELAY_S": "0.1"}
    data = picture("red")
    with serve(**settings) as command:
        url = command.url()
        configure(url)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=PATIENCE_S) as caller:
            caller.sendall(HEAD % len(data))
            assert caller.recv(1 << 16).startswith(b"HTTP/1.1 100 ")  # it reads the body
            lone: Future[httpx.Response] = pool.submit(classify, url, 1)
            until(lambda: waiting_images(url) == 1 or lone.done())
            caller.sendall(data[: len(data) // 2])
            command.signal(signal.SIGTERM)
            until(lambda: not lets_in(url))
            caller.sendall(data[len(data) // 2 :])
            told = b"".join(iter(lambda: caller.recv(1 << 16), b""))
        assert first_label(lone.result(PATIENCE_S)) in CLASSES
        assert told.startswith(b"HTTP/1.1 200 "), told
        assert b"connection: close" in told
        assert command.ended() == 0
        assert events(command)[-1]["event"] == "dmn.service.stopped"
        assert "Traceback" not in "".join(command.err)


def test_a_port_in_use_is_one_clear_message_and_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Command("fake", "serve", "--port", str(port)) as command:
            assert command.ended() not in {0, None}
            told = "".join(command.err)
            assert str(port) in told
            assert "in use" in told
            assert "Traceback" not in told
            assert not URL.search(told)
            assert not command.out
