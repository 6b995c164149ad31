from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from core.adaptive.whitening import cosines, precision
from tests.support import literal_auto


def _scatter(n: int, dim: int, seed: int = 0) -> Tensor:
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = 0.1 * x * torch.arange(1, dim + 1)
    return x.T @ x / n


def test_a_precision_worked_by_hand() -> None:
    # D = 2, ridge 1, count 6: rho = 2 / 8; t = 0.05: 3/4 * (1.6, 0.4) + 1/4 = (1.45, 0.55), and the floor.
    p = precision(torch.diag(torch.tensor([0.08, 0.02])), 6.0, ridge=1.0)
    torch.testing.assert_close(p, torch.diag(torch.tensor([1 / 1.4501, 1 / 0.5501])))


@pytest.mark.parametrize("count", [1.0, 30.0, 1e5])
def test_a_precision_is_the_literal_one(count: float) -> None:
    scatter = _scatter(40, 7)
    expected = literal_auto.precision(scatter.numpy(), count, 3.0)
    np.testing.assert_allclose(precision(scatter.float(), count, ridge=3.0).numpy(), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("scatter", "count"), [(torch.zeros(3, 3), 5.0), (torch.eye(3), 0.0), (-torch.eye(3), 9.0)])
def test_a_space_without_spread_or_without_images_is_round(scatter: Tensor, count: float) -> None:
    assert torch.equal(precision(scatter, count, ridge=2.0), torch.eye(3))


def test_the_fewer_there_are_the_rounder_the_space() -> None:
    uneven = [torch.linalg.cond(precision(_scatter(40, 5).float(), n, ridge=2.0)).item() for n in (1.0, 10.0, 1e4)]
    assert 1.0 < uneven[0] < uneven[1] < uneven[2]


@pytest.mark.parametrize("below", [0.0, 1e-4, 0.003, 0.2])
def test_a_scatter_that_rounding_left_below_zero_still_has_a_precision(below: float) -> None:
    """What a camera that hardly moves leaves in float32 sums: a few directions of spread, and noise in all others."""
    dim = 32
    turned = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))[0]
    spreads = torch.tensor([8.0] * 4 + [below, -below] * 14) * 1e-4
    p = precision(turned @ torch.diag(spreads) @ turned.T, 1e6, ridge=4.0)
    assert torch.isfinite(p).all()
    assert (torch.linalg.eigvalsh(p) > 0).all()
    assert torch.linalg.cond(p) < 2e5


def test_cosines_worked_by_hand() -> None:
    # A = (3, 0), v = (1, 1), P = diag(1, 3): A'Pv = 3, A'PA = 9, v'Pv = 4.
    z = cosines(torch.tensor([[3.0]]), torch.tensor([9.0]), torch.tensor([4.0]))
    assert z.item() == pytest.approx(0.5)


@pytest.mark.parametrize(("squares", "own"), [(0.0, 1.0), (1.0, 0.0), (-1e-12, 1.0), (1e12, 1e-14), (1e-14, 1e12)])
def test_what_has_no_length_but_rounding_has_no_cosine(squares: float, own: float) -> None:
    assert cosines(torch.tensor([[1e-4]]), torch.tensor([squares]), torch.tensor([own])).item() == 0.0


def test_each_image_may_have_lengths_of_its_own() -> None:
    z = cosines(torch.ones(2, 3), torch.tensor([[1.0, 4.0, 16.0], [4.0, 4.0, 4.0]]), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(z, torch.tensor([[1.0, 0.5, 0.25], [0.25, 0.25, 0.25]]))
