from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from core.memory.bank import Slots
from core.memory.dynamic import DynamicMemory
from core.memory.static import Shots, StaticMemory
from core.prepared_banks import Shelves
from core.readout.projection import Projection
from core.snapshot import Snapshot
from tests.support.fakes import static_without_shots

EAST, NORTH = [1.0, 0.0], [0.0, 1.0]
X = torch.tensor([[0.6, 0.8]])


def _slots(*keys: list[float]) -> Slots:
    return Slots(keys=torch.tensor(keys), entropies=(0.5,) * len(keys), ids=tuple(range(len(keys))))


def _snapshot(*slots: Slots, shots: bool = False, projection: Projection | None = None) -> Snapshot:
    static = static_without_shots(2, 2)
    if shots:
        static = StaticMemory(classes=(Shots(keys=torch.tensor([NORTH]), ids=(0,)), static.classes[1]))
    return Snapshot(
        text=torch.tensor([EAST, NORTH]),
        dynamic=DynamicMemory(classes=slots or (Slots.empty(2),) * 2, slots=50),
        static=static,
        projection=projection,
        tau=10.0,
        beta=0.0,
    )


def test_bare_shelves_score_the_text() -> None:
    dynamic, static = Shelves(_snapshot()).scores(X)
    torch.testing.assert_close(dynamic, torch.tensor([[6.0, 8.0]]))
    assert static is None


def test_shots_are_in_both_branches_and_slots_in_one() -> None:
    """Class 0: text east, shot north; then a slot north. At beta 0 the branches read the mean directions."""
    dynamic, static = Shelves(_snapshot(_slots(NORTH), Slots.empty(2), shots=True)).scores(X)
    assert static is not None
    assert static[0].tolist() == pytest.approx([10 * (0.6 + 0.8) / 2**0.5, 8.0], abs=1e-5)
    assert dynamic[0].tolist() == pytest.approx([10 * (0.6 + 2 * 0.8) / 5**0.5, 8.0], abs=1e-5)


def test_a_class_without_shots_beside_one_with_them_reads_its_text() -> None:
    _, static = Shelves(_snapshot(shots=True)).scores(X)
    assert static is not None
    assert static[0, 1].item() == pytest.approx(8.0, abs=1e-5)


def test_a_patch_reads_other_slots_and_changes_nothing() -> None:
    shelves = Shelves(_snapshot())
    patched = shelves.patched([(0, _slots(NORTH)), (0, Slots.empty(2)), (1, _slots(EAST))], X)
    half = 10 * (0.6 + 0.8) / 2**0.5
    assert patched[0].tolist() == pytest.approx([half, 6.0, half], abs=1e-5)
    torch.testing.assert_close(shelves.scores(X)[0], torch.tensor([[6.0, 8.0]]))


@pytest.mark.parametrize("small", [2**20, 50, 0])
def test_shelves_follow_a_class_that_grows_and_shrinks(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths 4, 8, 12, 16, 20, ... and back: the class moves from shelf to shelf and its neighbour stays right.

    Or all stand on one shelf; or they do while the bank is small.
    """
    monkeypatch.setattr("core.prepared_banks._SMALL", small)
    snapshot = _snapshot()
    shelves = Shelves(snapshot)
    for count in (1, 3, 4, 12, 30, 49, 7, 0, 2):
        grown = _slots(*[NORTH] * count) if count else Slots.empty(2)
        snapshot = replace(snapshot, dynamic=DynamicMemory(classes=(grown, Slots.empty(2)), slots=50))
        shelves.advance(snapshot)
        expected = 10 * (0.6 + count * 0.8) / (1 + count**2) ** 0.5
        assert shelves.scores(X)[0][0].tolist() == pytest.approx([expected, 8.0], abs=1e-4)
        assert shelves.snapshot is snapshot


def test_shelves_hold_offsets_of_every_class() -> None:
    """b_o of class 1 alone is east: f_1 = u(north + east)."""
    zeros = Projection.zeros(2, 2)
    offsets = replace(zeros, output=torch.tensor([[0.0, 0.0], EAST]))
    got, _ = Shelves(_snapshot(projection=offsets)).scores(X)
    assert got[0].tolist() == pytest.approx([6.0, 10 * 1.4 / 2**0.5], abs=1e-4)


@pytest.mark.parametrize("small", [2**20, 0])
def test_many_classes_keep_their_places(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.prepared_banks._SMALL", small)
    classes = 37
    angles = torch.arange(classes) / classes
    text = torch.stack((angles.cos(), angles.sin()), -1)
    rows = tuple(_slots(*text[[c] * (c % 9)].tolist()) if c % 9 else Slots.empty(2) for c in range(classes))
    snapshot = Snapshot(
        text=text,
        dynamic=DynamicMemory(classes=rows, slots=9),
        static=static_without_shots(classes, 2),
        tau=10.0,
    )
    torch.testing.assert_close(Shelves(snapshot).scores(X)[0], 10.0 * X @ text.T)


def test_any_number_of_classes_may_move_to_a_shelf_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.prepared_banks._SMALL", 0)
    classes = 60
    angles = torch.arange(classes) / classes
    text = torch.stack((angles.cos(), angles.sin()), -1)

    def snapshot(filled: int) -> Snapshot:
        rows = tuple(_slots(*text[[c] * 9].tolist()) if c < filled else Slots.empty(2) for c in range(classes))
        memory = DynamicMemory(classes=rows, slots=9)
        return Snapshot(text=text, dynamic=memory, static=static_without_shots(classes, 2), tau=10.0)

    shelves = Shelves(snapshot(1))
    for filled in (60, 2, 30):
        shelves.advance(snapshot(filled))
        torch.testing.assert_close(shelves.scores(X)[0], 10.0 * X @ text.T)


def test_bytes_are_those_of_the_tensors_held() -> None:
    """Two classes of width 4 on one shelf, that starts with four rows: slots 4 x 2, Gram 4 x 4, lengths, one mask."""
    assert Shelves(_snapshot()).nbytes == 4 * 4 * (4 * 2 + 4 * 4 + 4 + 4)
    assert Shelves(_snapshot(shots=True)).nbytes == 4 * 4 * (4 * 2 + 4 * 4 + 4 + 2 * 4)


def test_a_small_bank_stands_on_one_shelf_and_a_large_one_on_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes of 1 and 11 slots: 2 x 12 slots, or 4 and 12; of four rows each."""
    snapshot = _snapshot(_slots(*[NORTH] * 10), Slots.empty(2))
    a_row = {width: 4 * (2 * width + width * width + width + width) for width in (4, 12)}
    assert Shelves(snapshot).nbytes == 4 * a_row[12]
    monkeypatch.setattr("core.prepared_banks._SMALL", 2 * 12 * 2 - 1)
    assert Shelves(snapshot).nbytes == 4 * (a_row[4] + a_row[12])
