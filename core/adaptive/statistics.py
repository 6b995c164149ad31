"""Class statistics: what the method `auto` keeps of traffic, sums alone.

    S_c = sum r_c x,   s_c = sum r_c,   G = sum x,   M = sum x x',   n = sum 1,

with r the responsibilities of the frozen branches, so that these do not depend on what was counted before: any order
of a stream gives the same. Agreement alone is counted of answers as they were given, and so depends a little on the
order. All of them are sums and add up: replicas count apart, and what they counted together is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Images that are counted, one row each: feature, responsibilities, agreement and sureness, Eq. (18) and (22).

    Responsibilities of an image sum to 1, or a little less.
    """

    x: Float[Tensor, "n d"]
    responsibilities: Float[Tensor, "n c"]
    agreed: Float[Tensor, "n k"]
    sure: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.x)

    def added_to(self, statistics: Statistics) -> Statistics:
        """Return the statistics of these images and others."""
        return Statistics(
            sums=statistics.sums.addmm(self.responsibilities.T, self.x),
            counts=statistics.counts + self.responsibilities.sum(0),
            total=statistics.total + self.x.sum(0),
            second=statistics.second.addmm(self.x.T, self.x),
            images=statistics.images + len(self),
            agreed=statistics.agreed + self.agreed.sum(0),
            sure=statistics.sure + self.sure.sum(),
        )


LOOSE = 32
"""Rows after which a running total adds them up: sums over D x D cost as much for one image as for so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """Statistics that grow image by image: `added` and, not added up yet, fewer than `LOOSE` rows; `images` in all.

    Nothing is changed in place: who holds one keeps what it was.
    """

    added: Statistics
    loose: tuple[Counted, ...]
    images: int

    @staticmethod
    def of(statistics: Statistics) -> Running:
        """Return a total that begins with these; it asks them how many images they are of."""
        return Running(added=statistics, loose=(), images=int(statistics.images))

    def put(self, counted: Counted) -> Running:
        """Return the total with some images more."""
        more = Running(added=self.added, loose=(*self.loose, counted), images=self.images + len(counted))
        return more if sum(map(len, more.loose)) < LOOSE else more.settled()

    def settled(self) -> Running:
        """Return the same total with nothing loose."""
        return self if not self.loose else replace(self, added=_joined(self.loose).added_to(self.added), loose=())

    @property
    def whole(self) -> Statistics:
        """The statistics of all images."""
        return self.settled().added

    @property
    def nbytes(self) -> int:
        """Bytes held, with as many loose rows as there may be, so that it stays the same while they come and go."""
        classes, dim = self.added.sums.shape
        row = dim + classes + TEMPERATURES + 1
        return self.added.nbytes + (LOOSE - 1) * row * self.added.sums.itemsize


def _joined(parts: Sequence[Counted]) -> Counted:
    if len(parts) == 1:
        return parts[0]
    return Counted(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Counted)}
    )
