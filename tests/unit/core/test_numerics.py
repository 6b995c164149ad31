from __future__ import annotations

import math

import pytest
import torch

from core.errors import InvalidFeature
from core.numerics import ENTROPY_EPS, VIEW_EPS, affinity, checked_unit, entropy, unit


def test_unit_divides_by_the_length() -> None:
    assert torch.equal(unit(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))


def test_unit_works_along_the_last_axis() -> None:
    got = unit(torch.tensor([[[3.0, 4.0], [0.0, -2.0]]]))
    torch.testing.assert_close(got, torch.tensor([[[0.6, 0.8], [0.0, -1.0]]]))


def test_unit_leaves_a_zero_vector_zero() -> None:
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_entropy_of_a_flat_guess_is_ln_c() -> None:
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4), abs=1e-6)


def test_entropy_is_in_nats() -> None:
    assert entropy(torch.tensor([0.5, 0.5])).item() == pytest.approx(0.693147, abs=1e-6)


def test_entropy_of_certainty_is_zero() -> None:
    assert entropy(torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(0.0, abs=1e-7)


def test_entropy_adds_eps_inside_the_logarithm() -> None:
    got = entropy(torch.tensor([0.5, 0.5], dtype=torch.float64), 0.1).item()
    assert got == pytest.approx(-math.log(0.6), abs=1e-12)


def test_views_and_samples_have_their_own_eps() -> None:
    assert (VIEW_EPS, ENTROPY_EPS) == (1e-6, 1e-8)


def test_affinity_by_hand() -> None:
    got = affinity(torch.tensor([1.0, 0.5, 0.0]), 2.0)
    torch.testing.assert_close(got, torch.tensor([1.0, math.exp(-1), math.exp(-2)]))


def test_affinity_without_sharpness_is_one() -> None:
    assert torch.equal(affinity(torch.tensor([1.0, -1.0]), 0.0), torch.ones(2))


def test_a_cosine_that_rounding_left_above_one_counts_as_one() -> None:
    assert affinity(torch.tensor([1.0 + 2e-7]), 1e4).item() == 1.0


def test_checked_unit_normalises_and_becomes_float32() -> None:
    got = checked_unit(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (torch.tensor([1.0, math.nan]), "not finite"),
        (torch.tensor([1.0, math.inf]), "not finite"),
        (torch.tensor([[1.0, 2.0], [0.0, -math.inf]]), "not finite"),
        (torch.zeros(2), "zeros"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "zeros"),
        (torch.ones(3), "3 entries; expected 2"),
        (torch.ones(2, 0), "no entries"),
        (torch.tensor([1e300, 0.0], dtype=torch.float64), "not finite"),
    ],
)
def test_what_is_no_feature_is_refused(feature: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidFeature, match=message):
        checked_unit(feature, dim=2)


def test_a_refusal_names_what_was_refused() -> None:
    with pytest.raises(InvalidFeature, match=r"A shot has 3 entries; expected 2\."):
        checked_unit(torch.ones(3), dim=2, what="shot")
