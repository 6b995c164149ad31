"""The real command is sent what no client sends; `tests/soak/mutations.py` sends more, to a real encoder."""

from __future__ import annotations

import sys

import pytest

from service.stores.embedded import find_binary
from tests.soak.mutations import SETTINGS, run, served
from tests.support.mutants import CLASSES, KINDS

pytestmark = [
    pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="nobody tells the resident size in this way but Linux"),
]

COUNT = 600


def test_no_mutant_is_a_fault_of_ours_ends_the_service_reaches_another_tenant_or_stays_in_memory() -> None:
    with served("fake", [], CLASSES, **SETTINGS) as service:
        ran = run(service, count=COUNT, seed=0)
    assert not ran.found.faults
    assert not ran.broken, ran
    for kind in KINDS:
        assert sum(ran.found.statuses[kind].values()) >= COUNT // len(KINDS)
    assert ran.found.total[200] > COUNT / 20, "hardly anything was taken"
    assert ran.found.total[422] > COUNT / 20, "hardly anything was refused"
