from __future__ import annotations

import torch

from core.memory.bank import Slots
from core.memory.dynamic import DynamicMemory
from core.memory.static import Shots, StaticMemory
from core.snapshot import DEFAULT_BETA, DEFAULT_SLOTS, Snapshot


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


def test_a_class_is_read_from_its_text_then_its_shots_then_its_slots() -> None:
    bank, static = _snapshot().bank([0])
    assert bank.keys.tolist() == [[[1.0, 0.0], [3.0, 4.0], [5.0, 6.0]]]
    assert bank.keys.dtype == torch.float32
    assert bank.occupied.tolist() == [[True, True, True]]
    assert static == (2,)


def test_a_class_may_have_nothing_but_its_text() -> None:
    bank, static = _snapshot().bank([1])
    assert bank.keys.tolist() == [[[0.0, 1.0]]]
    assert static == (1,)


def test_classes_stand_side_by_side_in_the_order_and_width_asked_for() -> None:
    bank, static = _snapshot().bank([1, 0], width=4)
    assert bank.keys[:, :2].tolist() == [[[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [3.0, 4.0]]]
    assert bank.occupied.tolist() == [[True, False, False, False], [True, True, True, False]]
    assert static == (1, 2)


def test_a_class_may_be_read_with_other_slots() -> None:
    other = Slots(keys=torch.tensor([[7.0, 8.0], [9.0, 9.0]]), entropies=(0.1, 0.2), ids=(1, 2))
    bank, static = _snapshot().bank([0, 0], [other, Slots.empty(2)])
    assert bank.keys.tolist() == [
        [[1.0, 0.0], [3.0, 4.0], [7.0, 8.0], [9.0, 9.0]],
        [[1.0, 0.0], [3.0, 4.0], *[[0.0, 0.0]] * 2],
    ]
    assert static == (2, 2)
