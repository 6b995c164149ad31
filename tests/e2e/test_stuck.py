"""A device that hangs: one process says so to whoever starts it anew; of several, the one that hangs is."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Command

HANGING = """
import sys, time
from core.encoders import openclip
from service.cli.main import main
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
    settings = {"DMN_STUCK_S": "4", "DMN_DRAIN_DELAY_S": "0"}
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


def hangs(own: httpx.Client) -> bool:
    """Have the device hang, unless the caller's time is over before its image is there, and return whether it does."""
    assert post(own, "white", 100).status_code in {503, 504}
    return own.get("/livez").status_code == 503


def test_one_process_whose_device_hangs_is_not_alive_and_says_why() -> None:
    with serve() as command, client(command.url()) as own:
        configure(own)
        assert own.get("/livez").json()["live"]
        until(lambda: hangs(own))
        told = own.get("/livez").json()
        assert not told["live"]
        assert "has not come back" in told["checks"]["worker"]["detail"]


def test_of_several_processes_the_one_whose_device_hangs_is_started_anew() -> None:
    with serve("--http-workers", "1") as command, client(command.url()) as own:
        configure(own)
        reply = post(own, "white")
        assert (reply.status_code, reply.json()["type"]) == (503, "/problems/queue-full")
        command.line(lambda line: "dmn.process.stuck" in line)
        command.line(lambda line: "dmn.process.started" in line)
        until(lambda: own.get("/readyz").status_code == 200)
        until(lambda: own.put("/tenants/default", json={"classes": ["red", "white"]}).status_code == 200)
        until(lambda: post(own, "red").status_code == 200)
        assert own.get("/livez").status_code == 200
