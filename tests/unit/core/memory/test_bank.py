from __future__ import annotations

import torch

from core.memory.bank import Slots, pack


def test_no_slots_keep_their_size_and_type() -> None:
    none = Slots.empty(4, dtype=torch.float16)
    assert len(none) == 0
    assert none.keys.shape == (0, 4)
    assert none.keys.dtype == torch.float16


def test_a_bank_is_padded_to_its_longest_row() -> None:
    bank = pack([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])])
    assert torch.equal(bank.keys, torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 4.0], [5.0, 6.0]]]))
    assert torch.equal(bank.occupied, torch.tensor([[True, False], [True, True]]))


def test_a_bank_may_be_wider_than_its_rows() -> None:
    bank = pack([torch.ones(1, 2)], width=3)
    assert bank.keys.shape == (1, 3, 2)
    assert torch.equal(bank.occupied, torch.tensor([[True, False, False]]))


def test_a_bank_is_float32_whatever_its_rows_are() -> None:
    assert pack([torch.ones(1, 2, dtype=torch.float16)]).keys.dtype == torch.float32


def test_a_feature_whose_entries_sum_to_zero_is_occupied() -> None:
    """The authors' script told emptiness by a zero sum."""
    assert pack([torch.tensor([[1.0, -1.0]])]).occupied.all()


def test_a_row_without_slots_is_empty() -> None:
    bank = pack([torch.empty(0, 2), torch.ones(1, 2)])
    assert bank.occupied.tolist() == [[False], [True]]
