"""One readout for both memories: a query and a bank give adaptive class weights, and these give scores.

Eq. (9) to (11) read a bank twice: once for the affinities, once for the weighted sum of values. The sum enters the
score only through its products with x and with itself, so with the class Gram matrix G = V V' kept beside the bank

    a = sum_m w_m v_m,   a . x = w . (V x),   |a|^2 = w' G w,   a . b_o = w . (V b_o),

and a bank is read once. What Eq. (8) does to a slot is done to its products, so that there is one bank for keys and
values, as it is stored:

    k_m . q = (m . q + b_k . q) / |m + b_k|,   v_m . x = (m . x + b_v . x) / |m + b_v|.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from core.memory.bank import Bank
from core.numerics import SHARPEST

from .projection import Projection

_TINY = 1e-20
_FEW = 3
_AT_ONCE = 1 << 17
"""Affinities that a CPU works on at a time: what is made of them stays in a core's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turned:
    """What a readout needs of trained offsets: b_k, b_v and b_o, 1 / |m + b_v|, and v_m . b_o."""

    key: Float[Tensor, "c d"]
    value: Float[Tensor, "c d"]
    output: Float[Tensor, "c d"]
    value_scale: Float[Tensor, "c s"]
    onto_output: Float[Tensor, "c s"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A bank made ready to be read: its slots, 1 / |m + b_k|, and the Gram matrices of the values."""

    slots: Float[Tensor, "c s d"]
    scale: Float[Tensor, "c s"]
    gram: Float[Tensor, "c s s"]
    turned: Turned | None = None

    def of(self, classes: slice) -> Prepared:
        """Return a stretch of the classes."""
        turned = self.turned and Turned(**{f.name: getattr(self.turned, f.name)[classes] for f in fields(Turned)})
        return Prepared(slots=self.slots[classes], scale=self.scale[classes], gram=self.gram[classes], turned=turned)


def prepare(bank: Bank, projection: Projection | None = None) -> Prepared:
    """Return a bank with what Eq. (8) and (10) need; `projection` holds the rows of its classes, in its order."""
    slots = bank.keys
    gram = slots @ slots.mT
    squares = gram.diagonal(dim1=1, dim2=2)
    if projection is None:
        scale = _over(squares)
        return Prepared(slots=slots, scale=scale, gram=_scaled(gram, scale))
    onto_key, onto_value, onto_output = (
        (slots @ offset[:, :, None])[..., 0] for offset in (projection.key, projection.value, projection.output)
    )
    key, value = (offset.square().sum(-1, keepdim=True) for offset in (projection.key, projection.value))
    scale = _over(squares + 2.0 * onto_value + value)
    turned = Turned(
        key=projection.key,
        value=projection.value,
        output=projection.output,
        value_scale=scale,
        onto_output=(onto_output + (projection.value * projection.output).sum(-1, keepdim=True)) * scale,
    )
    return Prepared(
        slots=slots,
        scale=_over(squares + 2.0 * onto_key + key),
        gram=_scaled(gram + onto_value[:, :, None] + onto_value[:, None, :] + value[..., None], scale),
        turned=turned,
    )


def barrier(mask: Bool[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return 0 for slots that count as filled, and minus infinity for the others."""
    return mask.log()


def scores(
    prepared: Prepared,
    barriers: Float[Tensor, "c b #n s"],
    x: Float[Tensor, "n d"],
    query: Float[Tensor, "n d"],
    *,
    beta: float,
    tau: float,
) -> Float[Tensor, "b n c"]:
    """Return tau f_c . x, Eq. (9) to (11), once for each of b barriers, which say what slots count as filled.

    `x` are the unprojected image features, `query` their projections by Eq. (7). A barrier is one for all images, or
    has one for each. Every class needs at least one filled slot in every barrier. The slots are read once, whatever the
    number of barriers.
    """
    classes, width, _ = prepared.slots.shape
    some = max(1, _AT_ONCE // (width * len(x) * barriers.shape[1]))
    if some >= classes or x.device.type != "cpu":
        cosines = _cosines(prepared, barriers, x, query, min(beta, SHARPEST))
    else:
        stretches = [slice(start, start + some) for start in range(0, classes, some)]
        cosines = torch.cat(
            [_cosines(prepared.of(part), barriers[part], x, query, min(beta, SHARPEST)) for part in stretches]
        )
    return (tau * cosines).permute(1, 2, 0)


def _cosines(
    prepared: Prepared,
    barriers: Float[Tensor, "c b #n s"],
    x: Float[Tensor, "n d"],
    query: Float[Tensor, "n d"],
    beta: float,
) -> Float[Tensor, "c b n"]:
    """Return f_c . x for f_c = u(u(a_c) + b_o[c]), from the products of a_c alone, Eq. (10) and (11)."""
    turned = prepared.turned
    similar, onto_x = _similar(prepared, x, query)
    # Affinities over their class's largest one: Eq. (10) cancels it, and nothing underflows.
    exponents = torch.add(barriers, similar[:, None], alpha=beta)
    weights = (exponents - exponents.amax(-1, keepdim=True)).exp()
    by_class = weights.flatten(1, 2)
    squares = ((by_class @ prepared.gram) * by_class).sum(-1).view(weights.shape[:-1])
    over = _over(squares)
    along = (weights * onto_x[:, None]).sum(-1) * over
    if turned is None:
        return along
    across = (weights * turned.onto_output[:, None, None]).sum(-1) * over
    norm = (1.0 + 2.0 * across + turned.output.square().sum(-1)[:, None, None]).clamp_min(_TINY).sqrt()
    return (along + (turned.output @ x.T)[:, None]) / norm


def _similar(
    prepared: Prepared, x: Float[Tensor, "n d"], query: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "c n s"], Float[Tensor, "c n s"]]:
    """Return k_m . q and v_m . x of all slots; the same where nothing is trained."""
    turned = prepared.turned
    if turned is None:
        similar = _products(prepared.slots, x) * prepared.scale[:, None]
        return similar, similar
    onto_query, onto_x = _products(prepared.slots, torch.cat((query, x))).split(len(x), dim=1)
    return (
        (onto_query + (turned.key @ query.T)[..., None]) * prepared.scale[:, None],
        (onto_x + (turned.value @ x.T)[..., None]) * turned.value_scale[:, None],
    )


def _products(slots: Float[Tensor, "c s d"], x: Float[Tensor, "n d"]) -> Float[Tensor, "c n s"]:
    """Return slot . x for all of them, as one matrix product over the flat bank."""
    classes, width, dim = slots.shape
    flat = slots.reshape(-1, dim)
    if len(x) <= _FEW:
        # Two or three images take half as long this way round, and thirty as long again.
        return (x @ flat.T).view(len(x), classes, width).transpose(0, 1)
    return (flat @ x.T).view(classes, width, len(x)).transpose(1, 2).contiguous()


def _over(squares: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return 1 / sqrt of squared lengths, kept finite."""
    return squares.clamp_min(_TINY).rsqrt()


def _scaled(gram: Float[Tensor, "c s s"], scale: Float[Tensor, "c s"]) -> Float[Tensor, "c s s"]:
    return gram * scale[:, :, None] * scale[:, None, :]
