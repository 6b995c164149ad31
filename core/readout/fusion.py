"""The weighted mean of the branches' probabilities."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

BranchWeights = tuple[float, float, float]
"""Weights of text, dynamic and static branch; not negative, not all zero."""

DEFAULT_WEIGHTS: BranchWeights = (1.0, 1.0, 1.0)


def fuse(
    text: Float[Tensor, "n c"],
    dynamic: Float[Tensor, "n c"],
    static: Float[Tensor, "n c"] | None,
    weights: BranchWeights = DEFAULT_WEIGHTS,
) -> Float[Tensor, "n c"]:
    """Return (a1 P_t + a2 P_d + a3 P_s) / (a1 + a2 + a3), Eq. (15); a3 counts as 0 without a static branch.

    Where that leaves no weight at all, the answer is the text branch: it is the one that is always there.
    """
    branches = [(weights[0], text), (weights[1], dynamic)]
    if static is not None:
        branches.append((weights[2], static))
    largest = max(weight for weight, _ in branches)
    if largest == 0:
        return text
    # By the largest first: a sum of very large weights would overflow.
    branches = [(weight / largest, p) for weight, p in branches]
    total = sum(weight for weight, _ in branches)
    return sum((weight / total * p for weight, p in branches[1:]), start=branches[0][0] / total * branches[0][1])
