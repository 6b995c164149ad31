"""From one release or encoder to the next by the real command, on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Command
from tests.support.servers import BINARIES, server, until

pytestmark = pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed")

NAMED = """
import sys
from service.cli.main import main
from core.encoders import openclip
from tests.support.fakes import FakeEncoder
class Named(FakeEncoder):
    def __init__(self, name):
        super().__init__(name)
        self.name = name
openclip.load = lambda name, **_: Named(name)
sys.argv[0] = "dmn"
main()
"""
"""The command as it is, but that any name is an encoder's, whose features go by that name."""


@pytest.fixture
def store() -> Iterator[str]:
    with server(str(BINARIES["valkey"])) as running:
        yield running.url


def served(store: str, **environment: str) -> Command:
    """Serve the encoder `fake`, and whatever else the environment says."""
    return Command("fake", "serve", "--port", "0", store=store, script=NAMED, DMN_DRAIN_DELAY_S="0", **environment)


def migrate(url: str, *options: str, status: int = 0) -> Any:
    """Run `dmn memory migrate` for the tenant `shop`, and return what it prints, or on which words it ends."""
    with Command("lite", "memory", "migrate", "--tenant", "shop", "--url", url, "--json", *options) as command:
        assert command.ended() == status, command.err
        return json.loads(command.out) if not status else "".join(command.err)


def test_a_tenant_moves_to_the_next_encoder_and_back_and_then_that_encoder_is_served_alone(store: str) -> None:
    def answer(url: str, seed: int = 0) -> str:
        """Return which encoder answers a picture that is learned."""
        told = client.post(
            f"{url}/classify",
            content=picture("red", seed),
            headers={"X-Tenant": "shop", "Content-Type": "image/png"},
        )
        assert told.status_code == 200, told.text
        return str(told.json()["model"])

    with httpx.Client(timeout=PATIENCE_S) as client:
        with served(store, DMN_NEXT_ENCODER="next") as one, served(store, DMN_NEXT_ENCODER="next") as two:
            urls = one.url(), two.url()
            shop = {"classes": ["red", "green"], "retention": "images"}
            assert client.put(f"{urls[0]}/tenants/shop", json=shop).status_code == 201
            assert {answer(url, seed) for seed in range(4) for url in urls} == {"fake"}
            until("the shadow is filled", lambda: migrate(urls[0])["shadow"] == {"slots": 4, "shots": 0})
            there = migrate(urls[1], "--switch")
            assert (there["encoder"], there["slots"]) == ("next", 4)
            until("both follow", lambda: {answer(url, 9) for url in urls} == {"next"})
            restored = client.post(
                f"{urls[0]}/admin/memory/snapshots/{there['snapshot']}/restore", headers={"X-Tenant": "shop"}
            )
            assert restored.status_code == 200, restored.text
            until("both are back", lambda: {answer(url, 9) for url in urls} == {"fake"})
            migrate(urls[0], "--abandon")
            migrate(urls[0], "--switch")
            assert "there is no other one here" in migrate(urls[1], "--switch", status=2)
        with served(store, DMN_ENCODER="next") as after:
            url = after.url()
            assert answer(url, 10) == "next"
            assert migrate(url)["next"] is None
