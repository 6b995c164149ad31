from __future__ import annotations

import torch

from core.bank import Slots
from core.dynamic import DynamicMemory
from core.snapshot import DEFAULT_BETA, DEFAULT_SLOTS, Snapshot
from core.static import Shots, StaticMemory


def _snapshot() -> Snapshot:
    slots = Slots(keys=torch.tensor([[5.0, 6.0]], dtype=torch.float16), entropies=(0.1,), ids=(0,))
    return Snapshot(
        text=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        dynamic=DynamicMemory(classes=(slots, Slots.empty(2)), slots=3),
        static=StaticMemory(
            classes=(Shots(keys=torch.tensor([[3.0, 4.0]]), ids=(0,)), Shots(keys=torch.empty(0, 2), ids=()))
        ),
    )


def test_defaults_are_the_papers() -> None:
    snapshot = _snapshot()
    assert (DEFAULT_SLOTS, DEFAULT_BETA) == (50, 5.5)
    assert (snapshot.beta, snapshot.tau, snapshot.weights) == (5.5, 100.0, (1.0, 1.0, 1.0))
    assert snapshot.projection is None


def test_a_row_is_text_then_shots_then_slots() -> None:
    row, static = _snapshot().row(0)
    assert row.tolist() == [[1.0, 0.0], [3.0, 4.0], [5.0, 6.0]]
    assert row.dtype == torch.float32
    assert static == 2


def test_a_row_of_nothing_but_text() -> None:
    row, static = _snapshot().row(1)
    assert row.tolist() == [[0.0, 1.0]]
    assert static == 1


def test_a_row_may_be_read_with_other_slots() -> None:
    other = Slots(keys=torch.tensor([[7.0, 8.0], [9.0, 9.0]]), entropies=(0.1, 0.2), ids=(1, 2))
    row, static = _snapshot().row(0, other)
    assert row.tolist() == [[1.0, 0.0], [3.0, 4.0], [7.0, 8.0], [9.0, 9.0]]
    assert static == 2
