"""A label set's weights and memories as read at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from core.adaptive.adaptation import Adaptation
from core.memory.bank import Bank, Slots
from core.memory.dynamic import DynamicMemory
from core.memory.static import StaticMemory
from core.readout.fusion import DEFAULT_WEIGHTS, BranchWeights
from core.readout.projection import Projection

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

    def bank(
        self, classes: Sequence[int], slots: Sequence[Slots] | None = None, *, width: int | None = None
    ) -> tuple[Bank, tuple[int, ...]]:
        """Return what some classes are read from, Eq. (12), and how many slots of each are static, Eq. (13).

        Of each its text feature and its shots come first, then its dynamic slots, or those of `slots` in their place.
        The bank is `width` slots wide, or as its widest class is.
        """
        own = [self.dynamic.classes[index] for index in classes] if slots is None else slots
        static = tuple(1 + len(self.static.classes[index]) for index in classes)
        filled = [first + len(some) for first, some in zip(static, own, strict=True)]
        bank = Bank.empty(filled, self.text, width)
        bank.keys[:, 0] = self.text.index_select(0, torch.tensor(classes, device=self.text.device))
        for keys, index, first, end, some in zip(bank.keys, classes, static, filled, own, strict=True):
            if first > 1:
                keys[1:first] = self.static.classes[index].keys
            if end > first:
                keys[first:end] = some.keys
        return bank, static
