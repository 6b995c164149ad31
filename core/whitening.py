"""Cosines in a space where the features of a class spread alike in every direction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_FLOOR = 1e-4
_FLAT = 1e-3
_TINY = 1e-12


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
    return torch.cholesky_inverse(torch.linalg.cholesky(shape))


def cosines(
    onto: Float[Tensor, "n c"], squares: Float[Tensor, " c"] | Float[Tensor, "n c"], own: Float[Tensor, " n"]
) -> Float[Tensor, "n c"]:
    """Return A' P v / sqrt(A' P A  v' P v) from the three products; 0 where a direction has no length."""
    lengths = (squares * own[:, None]).clamp_min(0.0).sqrt()
    return torch.where(lengths > _TINY, onto / lengths.clamp_min(_TINY), 0.0)
