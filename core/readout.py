"""One readout for both memories: a query and a bank give adaptive class weights, and these give scores.

Eq. (9) to (11) read a bank twice: once for the affinities, once for the weighted sum of values. The sum enters the
score only through its products with x and with itself, so with the class Gram matrix G = V V' kept beside the bank

    a = sum_m w_m v_m,   a . x = w . (V x),   |a|^2 = w' G w,   a . b_o = w . (V b_o),

and a bank is read once. Where no projection is trained, V = K and V x is the similarity itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .bank import Bank
from .numerics import SHARPEST
from .projection import Projection, project_slots

_TINY = 1e-20


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A bank made ready to be read: projected keys and values, and what Eq. (10) needs of them.

    `values` is the very tensor `keys`, `onto_output` and `output` are None, where nothing is projected.
    """

    keys: Float[Tensor, "c s d"]
    values: Float[Tensor, "c s d"]
    gram: Float[Tensor, "c s s"]
    onto_output: Float[Tensor, "c s"] | None
    output: Float[Tensor, "c d"] | None


def prepare(bank: Bank, projection: Projection | None = None) -> Prepared:
    """Return the bank with Eq. (8) applied; `projection` holds the rows of the bank's classes, in its order."""
    if projection is None:
        keys = project_slots(bank.keys, None)
        return Prepared(keys=keys, values=keys, gram=keys @ keys.mT, onto_output=None, output=None)
    values = project_slots(bank.keys, projection.value)
    return Prepared(
        keys=project_slots(bank.keys, projection.key),
        values=values,
        gram=values @ values.mT,
        onto_output=(values @ projection.output[:, :, None])[..., 0],
        output=projection.output,
    )


def scores(
    prepared: Prepared,
    masks: Mapping[str, Bool[Tensor, "... c s"]],
    x: Float[Tensor, "n d"],
    query: Float[Tensor, "n d"],
    *,
    beta: float,
    tau: float,
) -> dict[str, Float[Tensor, "n c"]]:
    """Return tau f_c . x, Eq. (9) to (11), once for each mask of slots that count as filled.

    `x` are the unprojected image features, `query` their projections by Eq. (7). A mask is one for all images, or has
    one for each, `n c s`. Every class needs at least one filled slot in every mask. The similarities are computed
    once, whatever the number of masks.
    """
    similar = _products(prepared.keys, query)
    onto_x = similar if prepared.values is prepared.keys else _products(prepared.values, x)
    return {name: tau * _cosines(prepared, _weights(similar, mask, beta), onto_x, x) for name, mask in masks.items()}


def _products(slots: Float[Tensor, "c s d"], x: Float[Tensor, "n d"]) -> Float[Tensor, "n c s"]:
    """Return slot . x for all of them, as one matrix product over the flat bank."""
    classes, width, dim = slots.shape
    return (slots.reshape(-1, dim) @ x.T).T.reshape(len(x), classes, width)


def _weights(
    similar: Float[Tensor, "n c s"],
    mask: Bool[Tensor, "... c s"],
    beta: float,
) -> Float[Tensor, "n c s"]:
    """Return affinities over their class's largest one: Eq. (10) cancels it, and nothing underflows."""
    masked = similar.masked_fill(~mask, -torch.inf)
    below = (masked - masked.amax(-1, keepdim=True)).clamp_min(-4.0)  # cosines differ by 2 at most; keeps 0 * inf out
    return torch.exp(min(beta, SHARPEST) * below) * mask


def _cosines(
    prepared: Prepared,
    weights: Float[Tensor, "n c s"],
    onto_x: Float[Tensor, "n c s"],
    x: Float[Tensor, "n d"],
) -> Float[Tensor, "n c"]:
    """Return f_c . x for f_c = u(u(a_c) + b_o[c]), from the products of a_c alone, Eq. (10) and (11)."""
    by_class = weights.transpose(0, 1)
    squares = ((by_class @ prepared.gram) * by_class).sum(-1).T
    length = squares.clamp_min(_TINY).sqrt()
    along = (weights * onto_x).sum(-1) / length
    if prepared.output is None or prepared.onto_output is None:
        return along
    across = (weights * prepared.onto_output).sum(-1) / length
    norm = (1.0 + 2.0 * across + prepared.output.square().sum(-1)).clamp_min(_TINY).sqrt()
    return (along + x @ prepared.output.T) / norm
