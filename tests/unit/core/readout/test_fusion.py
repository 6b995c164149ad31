from __future__ import annotations

import torch

from core.readout.fusion import DEFAULT_WEIGHTS, fuse

TEXT, DYNAMIC, STATIC = (torch.tensor([[p, 1 - p]]) for p in (0.9, 0.6, 0.3))


def test_defaults_weigh_all_branches_alike() -> None:
    assert DEFAULT_WEIGHTS == (1.0, 1.0, 1.0)
    torch.testing.assert_close(fuse(TEXT, DYNAMIC, STATIC), torch.tensor([[0.6, 0.4]]))


def test_without_shots_the_static_weight_counts_as_zero() -> None:
    torch.testing.assert_close(fuse(TEXT, DYNAMIC, None, (1.0, 1.0, 100.0)), torch.tensor([[0.75, 0.25]]))


def test_weights_by_hand() -> None:
    """(1 * 0.9 + 2 * 0.6 + 3 * 0.3) / 6 = 0.5."""
    torch.testing.assert_close(fuse(TEXT, DYNAMIC, STATIC, (1.0, 2.0, 3.0)), torch.tensor([[0.5, 0.5]]))


def test_a_weight_of_zero_leaves_its_branch_out() -> None:
    torch.testing.assert_close(fuse(TEXT, DYNAMIC, STATIC, (0.0, 0.0, 2.0)), STATIC)


def test_where_no_weight_is_left_the_text_answers() -> None:
    assert torch.equal(fuse(TEXT, DYNAMIC, None, (0.0, 0.0, 1.0)), TEXT)
