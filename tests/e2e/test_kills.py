"""The real command, killed under load; the long form, with every moment and a slow disk, is `tests/soak/kills.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.stores.embedded import find_binary
from tests.soak.kills import KINDS, run
from tests.soak.starts import leave, pair

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")

READY_S = 30.0
"""Three times what the long form allows: here a machine may be busy with other tests."""


def test_service_server_or_both_may_be_killed_and_nothing_that_was_told_as_learned_is_missing() -> None:
    report = run(len(KINDS), seed=1, ready_s=READY_S, most=150, extras=False)
    assert not report.faults, "\n".join(report.faults)
    assert report.kinds.keys() == set(KINDS)
    assert report.held > 100
    assert report.cut
    assert report.most_servers == 1
    assert report.looks > 10


def test_a_folder_has_one_server_even_if_who_starts_it_is_killed_before_it_listens(tmp_path: Path) -> None:
    assert not pair(tmp_path / "data")


def test_who_leaves_while_the_server_starts_again_leaves_none_behind(tmp_path: Path) -> None:
    assert not leave(tmp_path / "data")
