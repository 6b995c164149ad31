"""Unit norm, entropy and affinity, each with the range in which it holds."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import InvalidFeature

VIEW_EPS = 1e-6
"""Added inside the logarithm when views are compared, Eq. (2)."""

ENTROPY_EPS = 1e-8
"""Added inside the logarithm of a sample's entropy, Eq. (4)."""

_TINY = torch.finfo(torch.float32).tiny


def unit(v: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Return v / |v| along the last axis. A zero vector stays zero."""
    return torch.div(v, torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(_TINY))


def entropy(p: Float[Tensor, "*n c"], eps: float = ENTROPY_EPS) -> Float[Tensor, "*n"]:
    """Return the Shannon entropy -sum p ln(p + eps) in nats, in [0, ln c] up to eps."""
    return -(p * (p + eps).log()).sum(-1)


SHARPEST = 1e12
"""A beta beyond this reads like this one: cosines in float32 differ by 6e-8 at least, or not at all."""


def affinity(cosine: Float[Tensor, "*n"], beta: float) -> Float[Tensor, "*n"]:
    """Return exp(-beta (1 - cosine)), Eq. (9); in (0, 1] for beta >= 0.

    A cosine that rounding left above 1 counts as 1.
    """
    return torch.exp(-min(beta, SHARPEST) * (1.0 - cosine).clamp_min(0.0))


def checked_unit(v: Float[Tensor, "*n d"], *, dim: int | None = None, what: str = "feature") -> Float[Tensor, "*n d"]:
    """Return v as float32 with unit norm along the last axis.

    Raises:
        InvalidFeature: v is empty in its last axis, not `dim` long, non-finite, or zero somewhere.
    """
    if v.ndim == 0 or v.shape[-1] == 0:
        raise InvalidFeature(f"A {what} has no entries; expected a vector.")
    if dim is not None and v.shape[-1] != dim:
        raise InvalidFeature(f"A {what} has {v.shape[-1]} entries; expected {dim}.")
    v = v.to(torch.float32)
    norm = torch.linalg.vector_norm(v, dim=-1)
    # An overflowing norm means that float32 cannot hold the direction either.
    if not torch.isfinite(norm).all():
        raise InvalidFeature(f"A {what} holds a value that is not finite.")
    if (norm == 0).any():
        raise InvalidFeature(f"A {what} is all zeros and has no direction.")
    return unit(v)
