"""What the predictor is asked and returns: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from service.domain.memory import Stamp
from service.telemetry.metrics import Lap


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What became of an image in the dynamic memory; `outcome` is one of the metric's."""

    outcome: str
    label: str
    entropy: float
    slot: str | None = None
    evicted: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One slot or shot that spoke for an answer; `entropy` of slots only."""

    label: str
    id: str
    affinity: float
    entropy: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The strongest slots and shots behind an answer."""

    dynamic: tuple[Trace, ...]
    static: tuple[Trace, ...]


class Choice(NamedTuple):
    """A class that a branch gives an image, its position among the tenant's classes, and its probability."""

    label: str
    position: int
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One image's answer: the first choice of each branch, and what they say together.

    `probabilities` (c,), on the CPU, are those of the fusion in the tenant's order of classes, and `top` the likeliest
    of them, `fused` the first of these. `stale` says that the memory may be behind the store's, or waits for upkeep;
    `due` that it does the latter. `digest` is what the memory knows the image by.
    """

    probabilities: Tensor
    top: tuple[Choice, ...]
    text: Choice
    dynamic: Choice
    static: Choice | None
    statistics: Choice | None
    learned: Learned
    explanation: Explanation | None
    stamp: Stamp
    stale: bool
    due: bool
    laps: list[Lap]
    digest: str = ""

    @property
    def fused(self) -> Choice:
        """The answer."""
        return self.top[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One image for the desk: the features of its views, its digest, and what is asked."""

    views: Tensor
    digest: str
    learn: bool
    explain: bool
    top_k: int = 5
