"""The real command under ten times what it can do; `tests/soak/overload.py` asks for longer, and looks at the times."""

from __future__ import annotations

import asyncio
import sys

import pytest

from service.stores.embedded import find_binary
from tests.soak.overload import alone, overload, served
from tests.support.fakes import COLOURS, PacedEncoder, picture
from tests.support.process import WITH_FAKE

pytestmark = [
    pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="nobody tells the resident size in this way but Linux"),
]

WITH_PACED = WITH_FAKE.replace("FakeEncoder", "PacedEncoder")
RATE = 10 / PacedEncoder.seconds
SECONDS = 8.0
MOST_GROWN_MB = 80.0
CALM_S = 60.0
"""Any answer is in time: nothing here is about how fast this machine is today."""


def test_of_ten_times_what_it_can_do_a_part_is_answered_the_rest_is_refused_and_nothing_stays() -> None:
    images = [picture(colour, seed, form="JPEG", size=(800, 600)) for colour in COLOURS for seed in range(4)]
    with served("fake", images, list(COLOURS), script=WITH_PACED, DMN_MAX_WAIT_MS="150") as service:
        asyncio.run(alone(service, 1.0))
        found = asyncio.run(overload(service, rate=RATE, seconds=SECONDS, seed=0, calm_s=CALM_S))
    assert not found.faults
    assert found.offered.failed == 0
    assert len(found.offered.latencies) > 10
    assert found.offered.refused > len(found.offered.calls) / 2
    assert found.tries == 1, "it still refused when all was answered"
    assert found.gauges == (0.0, 0.0)
    offered_mb = sum(len(image) for image in images) / len(images) * len(found.offered.calls) / 2**20
    assert offered_mb > 2 * MOST_GROWN_MB, "what came would not show if it stayed"
    assert found.grown_mb < MOST_GROWN_MB, found.during_mb
