"""The five learned offsets (query, key, value, output, text); zero, the identity, until they are trained."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from core.numerics import unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """Offsets b_q, b_k, b_v, b_o, b_t, one row a class. Where no projection is given, all of them are zero.

    Where the others are those of some classes, `query` still holds every class: Eq. (7) takes its mean over all.
    """

    query: Float[Tensor, "all d"]
    key: Float[Tensor, "c d"]
    value: Float[Tensor, "c d"]
    output: Float[Tensor, "c d"]
    text: Float[Tensor, "c d"]

    @staticmethod
    def zeros(classes: int, dim: int) -> Projection:
        """Return the identity, written out."""
        return Projection(**{field.name: torch.zeros(classes, dim) for field in fields(Projection)})

    def of(self, classes: Int[Tensor, " n"]) -> Projection:
        """Return the offsets of some classes, in the order of `classes`."""
        return Projection(
            query=self.query,
            key=self.key[classes],
            value=self.value[classes],
            output=self.output[classes],
            text=self.text[classes],
        )


def project_text(
    text: Float[Tensor, "c d"],
    projection: Projection | None,
) -> Float[Tensor, "c d"]:
    """Return u(t_c + b_t[c]), the classifier of the text branch, Eq. (14)."""
    return text if projection is None else unit(text + projection.text)


def project_query(x: Float[Tensor, "n d"], projection: Projection | None) -> Float[Tensor, "n d"]:
    """Return q = u(x + mean_c b_q[c]), Eq. (7)."""
    return x if projection is None else unit(x + projection.query.mean(0))


def project_slots(
    keys: Float[Tensor, "c s d"],
    offset: Float[Tensor, "c d"] | None,
) -> Float[Tensor, "c s d"]:
    """Return u(m + b[c]) for every slot m of class c, Eq. (8), for keys or values."""
    return unit(keys if offset is None else keys + offset[:, None, :])
