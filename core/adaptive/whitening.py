"""Cosines in a space where the features of a class spread alike in every direction."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_FLOOR = 1e-4
_FLAT = 1e-3
_NOTHING = 1e-9
"""A squared length below this is what rounding leaves of a difference."""


def precision(scatter: Float[Tensor, "d d"], count: float, *, ridge: float) -> Float[Tensor, "d d"]:
    """Return P = [(1 - rho) scatter / t + (rho + 1e-4) I]^-1, t the mean variance, rho = ridge D / (count + ridge D).

    `scatter` is the mean of `count` outer products of what unit-norm features differ by from their class's mean. The
    fewer there are, the rounder the space is taken to be; without any spread P is the identity.
    """
    dim = len(scatter)
    spread = scatter.diagonal().sum()
    sphere = torch.eye(dim, dtype=scatter.dtype, device=scatter.device)
    if count <= 0 or spread <= _FLAT:
        return sphere
    rho = ridge * dim / (count + ridge * dim)
    shape = (1 - rho) * dim / spread * scatter + (rho + _FLOOR) * sphere
    return torch.cholesky_inverse(_factor(shape))


def cosines(
    onto: Float[Tensor, "n c"], squares: Float[Tensor, " c"] | Float[Tensor, "n c"], own: Float[Tensor, " n"]
) -> Float[Tensor, "n c"]:
    """Return A' P v / sqrt(A' P A  v' P v) from the three products; 0 where A or v has no length."""
    over = _over(squares) * _over(own)[:, None]
    return onto * over


def _over(squares: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return 1 / sqrt of squared lengths, and 0 of those that are nothing."""
    return torch.threshold(squares, _NOTHING, math.inf).rsqrt()


def _factor(shape: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Return the Cholesky factor of a matrix, made rounder where rounding left it with a spread below zero.

    That happens to float32 sums of many images that hardly differ. The least eigenvalue tells how much rounding did.
    """
    factor: Float[Tensor, "d d"]
    factor, fault = torch.linalg.cholesky_ex(shape)
    if int(fault):
        rounding = torch.linalg.eigvalsh(shape)[0].abs()
        sphere = torch.eye(len(shape), dtype=shape.dtype, device=shape.device)
        factor = torch.linalg.cholesky(shape + (2.0 * rounding + _FLOOR) * sphere)
    return factor
