"""A label set's weights and memories as read at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .adapted import Adaptation
from .bank import Slots
from .dynamic import DynamicMemory
from .fusion import DEFAULT_WEIGHTS, BranchWeights
from .projection import Projection
from .static import StaticMemory

Method = Literal["dmn", "auto"]
"""`dmn` is the paper's, faithfully; `auto` adds class statistics, each branch as far as it can be trusted."""

DEFAULT_SLOTS = 50
DEFAULT_BETA = 5.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Class weights t_c `c d`, both memories, offsets (None: all zero), and the numbers of a readout.

    `beta` is the affinity's sharpness, `tau` the encoder's logit scale, `weights` those of the fusion. With the method
    `auto` there is an `adaptation` too, and the answer is its; with `dmn` there is none.
    """

    text: Float[Tensor, "c d"]
    dynamic: DynamicMemory
    static: StaticMemory
    projection: Projection | None = None
    tau: float = 100.0
    beta: float = DEFAULT_BETA
    weights: BranchWeights = DEFAULT_WEIGHTS
    adaptation: Adaptation | None = None

    def filled(self, index: int) -> int:
        """Return how many slots class `index` is read from, Eq. (12)."""
        return 1 + len(self.static.classes[index]) + len(self.dynamic.classes[index])

    def row(self, index: int, slots: Slots | None = None) -> tuple[Float[Tensor, "n d"], int]:
        """Return what class `index` is read from, Eq. (12), and how many of it the static memory holds, Eq. (13).

        Its text feature and its shots come first, then its dynamic slots, or `slots` in their place.
        """
        shots = self.static.classes[index].keys
        own = self.dynamic.classes[index] if slots is None else slots
        row = torch.cat((self.text[index : index + 1], shots, own.keys))
        return row, 1 + len(shots)
