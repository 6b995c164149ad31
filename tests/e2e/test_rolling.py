"""Real instances behind a real proxy, restarted one after the other; the long forms are `tests/soak/rolling.py`.

One proxy spreads connections, so that clients meet what an instance does with theirs when it leaves; one requests.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.soak.rolling import Options, missing, run

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ON_ONE_STORE = Options(instances=2, by="connection", seconds=0, rate=10, tenants=6, warm_s=60)
ON_A_CLUSTER = Options(instances=3, on_cluster=True, by="request", seconds=0, rate=10, tenants=6, warm_s=60)
"""How soon memories are warm is for the long form to say: here a machine may be busy with other tests."""


@pytest.mark.parametrize("options", [ON_ONE_STORE, ON_A_CLUSTER], ids=["two on one store", "three on a cluster"])
def test_instances_restart_in_turn_and_no_call_fails_no_write_is_lost_and_memories_are_soon_warm(
    options: Options,
) -> None:
    report = asyncio.run(run(options))
    assert not report.faults, "\n".join(report.faults)
    assert report.failed == 0
    assert [one.instance for one in report.restarts] == list(report.taken)
    assert all(report.taken.values()), "an instance was never asked"
    assert report.slots > 10
    assert report.shots
    assert report.made
