"""Figures that a hand can check."""

from __future__ import annotations

import pytest
import torch

from core.evaluation.metrics import accuracy, auroc, calibration_error, false_positive_rate, macro_accuracy, marks

P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.7, 0.3]])
LABELS = torch.tensor([0, 0, 1, 1])


def test_accuracy_is_the_percentage_of_right_answers() -> None:
    assert accuracy(marks(P), LABELS) == pytest.approx(75.0)


def test_macro_accuracy_weighs_the_classes_that_occur_alike() -> None:
    assert macro_accuracy(marks(P), torch.tensor([0, 0, 0, 1])) == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert macro_accuracy(marks(P[:2]), LABELS[:2]) == pytest.approx(100.0)


def test_calibration_error_by_hand() -> None:
    """Four bins of one image each: |1 - .9|, |1 - .8|, |1 - .6|, |0 - .7|; their mean is 0.35."""
    assert calibration_error(marks(P), LABELS) == pytest.approx(35.0, abs=1e-4)


def test_images_of_one_bin_are_averaged_before_they_are_compared() -> None:
    """Confidence 0.75 four times, right three times: no error."""
    p = torch.tensor([[0.75, 0.25]] * 4)
    assert calibration_error(marks(p), torch.tensor([0, 0, 0, 1])) == pytest.approx(0.0, abs=1e-5)


def test_a_perfect_guess_has_no_calibration_error() -> None:
    assert calibration_error(marks(torch.eye(3)), torch.arange(3)) == pytest.approx(0.0)


def test_the_area_is_the_share_of_pairs_in_which_the_known_one_scores_higher() -> None:
    """Known 0.9, 0.5 against unknown 0.5, 0.1: of four pairs three are in order and one ties, (3 + 1/2) / 4."""
    assert auroc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1])) == pytest.approx(87.5)
    assert auroc(torch.tensor([0.9]), torch.tensor([0.1])) == 100.0
    assert auroc(torch.tensor([0.1]), torch.tensor([0.9])) == 0.0


def test_the_false_positive_rate_counts_the_unknown_above_what_95_percent_of_the_known_reach() -> None:
    """Of twenty known ones nineteen have to pass, so the bar is the second lowest, 0.2."""
    known = torch.linspace(0.1, 2.0, 20)
    assert false_positive_rate(known, torch.tensor([0.15, 0.05, 0.25, 3.0])) == pytest.approx(50.0)
    assert false_positive_rate(known, torch.tensor([0.1])) == 0.0


def test_of_few_known_ones_all_have_to_pass() -> None:
    assert false_positive_rate(torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.3])) == pytest.approx(50.0)
