from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from core.statistics import TEMPERATURES, Statistics, counted
from tests import literal_auto


def _some(n: int, classes: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, dim, generator=random), dim=-1)
    shares = torch.randn(n, classes, generator=random).softmax(-1)
    return x, shares, torch.rand(n, TEMPERATURES, generator=random), torch.rand(n, generator=random)


def test_sums_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    got = counted(x, shares, torch.ones(2, TEMPERATURES), torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(got.sums, torch.tensor([[1.15, 0.2], [0.45, 0.6]]))
    torch.testing.assert_close(got.counts, torch.tensor([1.25, 0.75]))
    torch.testing.assert_close(got.total, torch.tensor([1.6, 0.8]))
    torch.testing.assert_close(got.second, torch.tensor([[1.36, 0.48], [0.48, 0.64]]))
    assert (got.images.item(), got.sure.item()) == (2.0, 0.75)
    assert torch.equal(got.agreed, torch.full((TEMPERATURES,), 2.0))


def test_sums_are_the_literal_ones() -> None:
    x, shares, agreed, sure = _some(40, 5, 7)
    got, expected = counted(x, shares, agreed, sure), literal_auto.Sums.none(5, 7)
    for image, own in zip(x.double().numpy(), shares.double().numpy(), strict=True):
        expected.add(image, own)
    for name in ("sums", "counts", "total", "second", "images"):
        np.testing.assert_allclose(getattr(got, name).numpy(), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_parts_add_up_to_the_whole_in_any_order() -> None:
    given = _some(30, 4, 6)
    whole, order = counted(*given), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    for numbers in ([order], order.split(7), order.split(1)):
        together = Statistics.zeros(4, 6)
        for some in numbers:
            together = together + counted(*(each[some] for each in given))
        for field in fields(Statistics):
            torch.testing.assert_close(getattr(together, field.name), getattr(whole, field.name), rtol=1e-5, atol=1e-5)


def test_nothing_is_counted_of_no_image() -> None:
    none = Statistics.zeros(4, 6)
    for field in fields(Statistics):
        assert not getattr(none, field.name).any()
        assert getattr(none, field.name).dtype == torch.float32
    assert none.nbytes == 4 * (4 * 6 + 4 + 6 + 6 * 6 + 1 + TEMPERATURES + 1)


def test_adding_leaves_both_alone() -> None:
    one, other = counted(*_some(3, 2, 4)), counted(*_some(3, 2, 4, seed=1))
    before = one.sums.clone(), other.sums.clone()
    assert not torch.equal((one + other).sums, one.sums)
    assert torch.equal(one.sums, before[0])
    assert torch.equal(other.sums, before[1])
