from __future__ import annotations

import torch

from core.memory.static import Shots, StaticMemory
from tests.support.fakes import static_without_shots


def test_a_memory_without_shots_is_not_filled() -> None:
    memory = static_without_shots(3, 4)
    assert not memory.filled
    assert [len(shots) for shots in memory.classes] == [0, 0, 0]
    assert memory.classes[0].keys.shape == (0, 4)


def test_one_shot_of_one_class_fills_it() -> None:
    memory = StaticMemory(
        classes=(*static_without_shots(1, 4).classes, Shots(keys=torch.ones(1, 4), ids=("a",))),
    )
    assert memory.filled
    assert [len(shots) for shots in memory.classes] == [0, 1]
