"""What a training run is given and returns: recipe, progress, trained offsets, and the checks before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from core.errors import UnfitShots
from core.readout.projection import Projection

DEFAULT_EPOCHS = 20
DEFAULT_LEARNING_RATE = 1e-4
"""That of a label set whose scores are 100 times a cosine, as the paper's are; see `Recipe.rate`."""

LEAST_LEARNING_RATE = 1e-7
"""What the cosine schedule comes down to."""

BATCH = 128
WEIGHT_DECAY = 1e-4
ADAM_EPS = 1e-8

MOST_UNEQUAL = 20
"""Shots of a class over those of another, at most: of a step's 128 queries the smaller one would have six or fewer."""

_PAPERS_SCALE = 100.0
PAIR = 2

Queries = Callable[[int], Float[Tensor, "m d"]]
"""Features to train on in a pass (from 0), one a shot, class after class, in the order of the static memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to train: passes over the shots at most, the first step's learning rate, seed of the order and the choice."""

    epochs: int = DEFAULT_EPOCHS
    learning_rate: float | None = None
    seed: int = 0

    def rate(self, tau: float) -> float:
        """Return the learning rate; where none is said, one that moves scores as far a step as the paper's does.

        A step of Adam moves an offset by the rate, however small the gradient is, and a score by tau times that.
        """
        return DEFAULT_LEARNING_RATE * _PAPERS_SCALE / tau if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a training is: `phase` is "held-out" or "all", `done` its share of all there is to do, from 0 to 1.

    `epoch` is the present pass of `epochs`, from 1 (0: none has begun), `loss` that of the last step, and `accuracy`
    that of text and static branch together on the held-out shots after the last whole pass, in percent; None where
    none is known.
    """

    phase: str
    epoch: int
    epochs: int
    loss: float | None
    accuracy: float | None
    done: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a training came to.

    `projection` is None where no pass made the held-out loss lower: these shots are better off without. `losses` are
    the mean losses of the `epochs` passes over all shots, `held_out` loss and accuracy (percent, text and static branch
    together) of the held-out ones after 0, 1, .. passes. `before` and `after` say how the paper's method answers these,
    with an empty dynamic memory: accuracy in percent of text, static and fused. Where nothing could be held out
    `held_out` is empty and the two are None.
    """

    projection: Projection | None
    epochs: int
    losses: tuple[float, ...] = ()
    held_out: tuple[tuple[float, float], ...] = ()
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None


def check(counts: Sequence[int]) -> None:
    """Return if a label set whose classes have so many shots can be trained on them.

    Raises:
        UnfitShots: fewer than two classes, a class without a shot (it would be taught that nothing is ever one), or
            one with more than `MOST_UNEQUAL` times the shots of another.
    """
    if sum(count > 0 for count in counts) < PAIR:
        raise UnfitShots(
            "Training needs shots of two classes at least, to tell them apart; upload some for each class."
        )
    if 0 in counts:
        raise UnfitShots(
            f"{counts.count(0)} of {len(counts)} classes have no shot, and training on the others would teach that "
            "nothing is one of them. Upload shots for each class, or remove those classes."
        )
    if max(counts) > MOST_UNEQUAL * min(counts):
        raise UnfitShots(
            f"One class has {max(counts)} shots and another {min(counts)}: more than {MOST_UNEQUAL} times as many "
            "would drown the smaller one. Upload more of the one, or remove some of the other."
        )


def needed_bytes(counts: Sequence[int], dim: int) -> int:
    """Return about how many bytes of the device a training takes, for classes with so many shots.

    All classes are padded to the largest. Held for each slot are ten vectors of its size, six rows of its class's Gram
    matrix, and ten numbers for each query of a step: with their gradients, what was measured on 100 and 1000 classes.
    """
    width = 1 + max(counts, default=0)
    return 4 * len(counts) * width * (10 * dim + 6 * width + 10 * BATCH)
