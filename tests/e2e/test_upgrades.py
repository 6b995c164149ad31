"""From one release to the next by the real command, on a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from tests.command import Command
from tests.servers import BINARIES, server

pytestmark = pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed")


@pytest.fixture
def store() -> Iterator[str]:
    with server(str(BINARIES["valkey"])) as running:
        yield running.url


def test_a_service_ends_at_once_on_a_store_of_another_major_format_and_says_why(store: str) -> None:
    with Redis.from_url(store) as client:
        client.set("dmn:format", "2")
        with Command("fake", "serve", "--port", "0", store=store) as command:
            assert command.ended() == 2
        said = [line for line in command.err if "dmn:" in line]
        assert len(said) == 1
        assert "The store is of format 2; this version reads 1. Nothing was changed." in said[0]
        assert client.keys("*") == [b"dmn:format"]
