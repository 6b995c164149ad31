"""Class statistics: what the method `auto` keeps of traffic, sums alone.

    S_c = sum r_c x,   s_c = sum r_c,   G = sum x,   M = sum x x',   n = sum 1,

with r the responsibilities of the frozen branches, so that these do not depend on what was counted before: any order
of a stream gives the same. Agreement alone is counted of answers as they were given, and so depends a little on the
order. All of them are sums and add up: replicas count apart, and what they counted together is the sum of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

SHARPER = 1.5
"""Exponent of the frozen branches' probabilities in the responsibilities."""

TEMPERATURES = 17
"""Temperatures, evenly in their logarithm from 1/e^2 to e^2, under which agreement is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Sums over the images that were counted.

    `agreed` are the adapted probabilities of the frozen branches' first class and of their own, halfway between, under
    each temperature; `sure` are the frozen branches' own, Eq. (22).
    """

    sums: Float[Tensor, "c d"]
    counts: Float[Tensor, " c"]
    total: Float[Tensor, " d"]
    second: Float[Tensor, "d d"]
    images: Float[Tensor, ""]
    agreed: Float[Tensor, " k"]
    sure: Float[Tensor, ""]

    @staticmethod
    def zeros(classes: int, dim: int, *, device: torch.device | str = "cpu") -> Statistics:
        """Return those of no image."""
        sizes = {
            "sums": (classes, dim),
            "counts": (classes,),
            "total": (dim,),
            "second": (dim, dim),
            "images": (),
            "agreed": (TEMPERATURES,),
            "sure": (),
        }
        return Statistics(**{name: torch.zeros(size, device=device) for name, size in sizes.items()})

    def __add__(self, other: Statistics) -> Statistics:
        """Return those of the images of both."""
        return Statistics(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Statistics)}
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(getattr(self, field.name).nbytes for field in fields(Statistics))


def counted(
    x: Float[Tensor, "n d"],
    responsibilities: Float[Tensor, "n c"],
    agreed: Float[Tensor, "n k"],
    sure: Float[Tensor, " n"],
) -> Statistics:
    """Return the statistics of some images, Eq. (18); responsibilities of an image sum to 1, or a little less."""
    return Statistics(
        sums=responsibilities.T @ x,
        counts=responsibilities.sum(0),
        total=x.sum(0),
        second=x.T @ x,
        images=x.new_tensor(float(len(x))),
        agreed=agreed.sum(0),
        sure=sure.sum(),
    )
