"""Two services on one store share a tenant's places, and what a killed one held is free again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx
import pytest
from redis import Redis

from service.stores.redis.keys import Keys
from tests.support.fakes import picture
from tests.support.process import WITH_FAKE, Command
from tests.support.servers import BINARIES, server

BINARY = next((found for found in BINARIES.values() if found), None)
pytestmark = pytest.mark.skipif(BINARY is None, reason="no Valkey or Redis server is installed")

PATIENCE_S = 60.0
LEASES = Keys("default").quota[1]

NEVER_DONE = f"""
import threading
from tests.support.fakes import FakeEncoder
quick, warm = FakeEncoder.encode_images, []
def encode(self, pixels):
    if warm:
        threading.Event().wait()
    warm.append(True)
    return quick(self, pixels)
FakeEncoder.encode_images = encode
{WITH_FAKE}"""
"""A service whose device hangs on the first image after it was warmed up."""


def ask(url: str, seed: int) -> httpx.Response:
    image = ("images", (f"{seed}.png", picture("red", seed), "image/png"))
    return httpx.post(f"{url}/classify", files=[image], timeout=PATIENCE_S)


def leave_waiting(url: str) -> None:
    """Post an image that is never answered, as its service is killed first."""
    with pytest.raises(httpx.TransportError):
        ask(url, 1)


def test_the_place_of_an_image_whose_service_is_killed_is_held_until_its_lease_is_over_and_then_free() -> None:
    assert BINARY is not None
    own = {"DMN_TENANT_CONCURRENT": "1", "DMN_CANARY_S": "0"}
    with (
        server(BINARY) as store,
        Command("fake", "serve", "--port", "0", store=store.url, **own) as other,
        Command("fake", "serve", "--port", "0", store=store.url, script=NEVER_DONE, **own) as hangs,
        Redis(unix_socket_path=str(store.socket), decode_responses=True) as kept,
    ):
        url, stuck = other.url(), hangs.url()
        httpx.put(f"{url}/tenants/default", json={"classes": ["red", "blue"]}).raise_for_status()
        assert ask(url, 0).status_code == 200
        _until(lambda: lease_end(kept) is None)  # that of the first image is given back soon after its answer
        caller = threading.Thread(target=leave_waiting, args=(stuck,))
        caller.start()
        _until(lambda: "dmn_batch_images_count 1.0" in httpx.get(f"{stuck}/metrics").text)
        for _ in range(2):  # it is renewed while its image is at work, and the place stays taken
            end = lease_end(kept)
            assert end is not None
            _until(lambda end=end: (lease_end(kept) or 0) > end)  # type: ignore[misc]
            assert ask(url, 2).status_code == 429, "a place was lost while its image is at work"
        hangs.process.kill()
        caller.join(PATIENCE_S)
        end = lease_end(kept)
        assert end is not None
        _until(lambda: ask(url, 3).status_code == 200)
        seconds, micros = kept.time()
        assert seconds * 1_000_000 + micros >= end, "a place was given away before its lease was over"


def lease_end(kept: Redis) -> float | None:
    """Return when the tenant's lease ends by the clock of the store, in microseconds; None if there is none."""
    leases = kept.zrange(LEASES, 0, -1, withscores=True)
    assert len(leases) <= 1, leases
    return leases[0][1] if leases else None


def _until(told: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not told():
        assert time.monotonic() < ends
        time.sleep(0.05)  # bounded above
