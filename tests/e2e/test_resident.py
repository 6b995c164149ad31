"""A service whose memories come and go stays as large as its budget; `tests/soak/memory.py` looks at it for longer."""

from __future__ import annotations

import sys

import pytest

from service.stores.embedded import find_binary
from tests.soak.memory import soak

pytestmark = [
    pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="nobody tells the resident size in this way but Linux"),
]


def test_the_resident_size_does_not_grow_with_memories_that_come_and_go() -> None:
    told = soak(requests=200, tenants=24, hot=4, images=60, seed=0, visit=1, heard=lambda *_: None)
    sizes = list(told["resident_mb"].values())
    grown = sizes[-1] * told["growth"]
    assert told["failed"] == 0
    # What came would have to stay: a leak of a twentieth of it would show.
    assert grown < told["evictions"] * told["memory_mb"] / 20, sizes
