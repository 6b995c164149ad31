"""A device that hangs: one process says so to whoever starts it anew; of several, the one that hangs is."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Command

HANGING = """
import sys, time
from core import openclip
from service.cli import main
from tests.support.fakes import FakeEncoder

class Hanging(FakeEncoder):
    def encode_images(self, pixels):
        if pixels.float().mean() > 200:
            time.sleep(10_000)
        return super().encode_images(pixels)

openclip.load = lambda *_, **__: Hanging()
sys.argv[0] = "dmn"
main()
"""


def serve(*more: str) -> Command:
    settings = {"DMN_STUCK_S": "1", "DMN_DRAIN_DELAY_S": "0"}
    return Command("fake", "serve", "--port", "0", *more, script=HANGING, **settings)


def until(told: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not told():
        assert time.monotonic() < ends


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False)


def configure(own: httpx.Client) -> None:
    assert own.put("/tenants/default", json={"classes": ["red", "white"]}).status_code == 200


def post(own: httpx.Client, colour: str, wait_ms: int = 60_000) -> httpx.Response:
    headers = {"Content-Type": "image/png", "X-Deadline-Ms": str(wait_ms)}
    return own.post("/classify", content=picture(colour), headers=headers)


def test_one_process_whose_device_hangs_is_not_alive_and_says_why() -> None:
    with serve() as command, client(command.url()) as own:
        configure(own)
        assert own.get("/livez").json()["live"]
        assert post(own, "white", 100).status_code == 504
        until(lambda: own.get("/livez").status_code == 503)
        told = own.get("/livez").json()
        assert not told["live"]
        assert "has not come back" in told["checks"]["worker"]["detail"]


def test_of_several_processes_the_one_whose_device_hangs_is_started_anew() -> None:
    with serve("--http-workers", "1") as command, client(command.url()) as own:
        configure(own)
        answer = post(own, "white")
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/queue-full")
        command.line(lambda line: "dmn.process.stuck" in line)
        command.line(lambda line: "dmn.process.started" in line)
        until(lambda: own.get("/readyz").status_code == 200)
        configure(own)
        assert post(own, "red").status_code == 200
        assert own.get("/livez").status_code == 200
