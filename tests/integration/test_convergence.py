"""Workers in processes of their own, over one server; the long form is `tests/soak/convergence.py`."""

from __future__ import annotations

import pytest

from service.stores.embedded import find_binary
from tests.soak.convergence import run
from tests.soak.plan import Options

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")


async def test_store_and_copies_hold_the_surest_of_all_that_was_learned_whatever_ties_comes_twice_or_is_reset() -> None:
    report = await run(Options(candidates=2000, workers=3, classes=12, phases=3))
    assert not report.faults, "\n".join(report.faults)
    assert report.ties, "no class was decided by an id"
    assert report.twice
    assert report.resets == 8
    assert report.outcomes.keys() == {"filled", "replaced", "rejected", "duplicate"}
    assert report.repairs == 0
