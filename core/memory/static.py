"""The static memory: labelled shots, one bank a class, changed only by whoever uploads or deletes them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from .bank import SlotId


@dataclass(frozen=True, kw_only=True, slots=True)
class Shots:
    """The shots of one class: plain features `k d` and their ids."""

    keys: Float[Tensor, "k d"]
    ids: tuple[SlotId, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticMemory:
    """All shots of a label set, by class position."""

    classes: tuple[Shots, ...]

    @property
    def filled(self) -> bool:
        """Whether there is a shot at all; without one the static branch is absent, Eq. (13)."""
        return any(len(shots) for shots in self.classes)
