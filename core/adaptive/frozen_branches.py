"""What labels traffic under the method `auto`: the text head and the labelled shots, each as far as it can be trusted.

    F = log p_text + gamma z0,   z0_c = cos_P(x - g, m_c - g),

with m_c the mean of the shots of class c, g the mean of these, and P the precision of the shots within their classes.
Nothing of it depends on traffic, so what it labels does not depend on the order of a stream.

How far the shots can be trusted is measured on shots: one of every class at once is left out, and the weight gamma
and the sharpness are taken that explain them best. One class at a time would not do: an image is nearer to any image
than to any text, so the class that lacks its shot would lose to all others. Where no class has two shots there is
nothing to leave out, and the shots count for what the text head is wrong about.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from core.memory.static import StaticMemory

from .statistics import Statistics
from .whitening import cosines, precision

WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Tried for the shots, in units in which their scores spread as far as the text's."""

SHARPNESSES = (0.35, 0.5, 0.7, 1.0, 1.4)
"""Tried for both together."""

LEAN, LEAN_UNMEASURED = 2.0, 8.0
"""How much more statistics count for twice the share of shots that the text head gets wrong.

More where no shot could be left out: then gamma is a guess, and a low one where the text head is weak.
"""

RIDGE = 2.0
_FOLDS = 8
_CELLS = 1 << 19
_FEWEST_ROWS = 256
_DISTRUST = 2.0
_DOUBT = 0.1
_FLAT = 0.01
_AT_ONCE = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The shots as a classifier: their centre g `d`, the precision P `d d`, the directions P (m_c - g) and lengths."""

    centre: Float[Tensor, " d"]
    precision: Float[Tensor, "d d"]
    directions: Float[Tensor, "c d"]
    squares: Float[Tensor, " c"]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (self.centre, self.precision, self.directions, self.squares))

    def read(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Return z0, in [-1, 1]; 0 for a class without shots."""
        v = x - self.centre
        return cosines(v @ self.directions.T, self.squares, ((v @ self.precision) * v).sum(-1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """The branches that traffic does not change: `weight` is gamma, and `sharpness` makes their scores calibrated.

    `held_out` says how many shots these were measured on; 0 where none could be left out. `lean` is how many times as
    much class statistics count as they would beside a text head that is right about every shot.
    """

    shown: Shown | None = None
    weight: float = 0.0
    sharpness: float = 1.0
    held_out: int = 0
    lean: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.shown is None else self.shown.nbytes

    def scores(self, text: Float64[Tensor, "n c"], x: Float[Tensor, "n d"]) -> Float64[Tensor, "n c"]:
        """Return F, Eq. (17), for the text head's log probabilities."""
        return text if self.shown is None else text + self.weight * self.shown.read(x)


def as_statistics(static: StaticMemory, text: Float[Tensor, "c d"]) -> Statistics:
    """Return the shots as images whose classes are known, in float32; some at a time, however many they are."""
    both = Statistics.zeros(*text.shape, device=text.device)
    there = [c for c, shots in enumerate(static.classes) if len(shots)]
    for some in _stretches(there, [len(static.classes[c]) for c in there]):
        keys = torch.cat([static.classes[c].keys.to(text) for c in some])
        numbers = torch.tensor([len(static.classes[c]) for c in some], device=text.device)
        both = _taken(both, keys, torch.tensor(some, device=text.device).repeat_interleave(numbers), 1)
    return both


def trust(static: StaticMemory, shots: Statistics, text: Float[Tensor, "c d"], tau: float) -> Frozen:
    """Return the frozen branches of a tenant, weighed by its shots; the text head alone where there are none.

    `shots` are the statistics of the static memory. `text` are the class weights as they are, without offsets: those
    may have been trained on the very shots.
    """
    if not static.filled:
        return Frozen()
    numbers, shown = shots.counts.long(), _shown(shots)
    labels = torch.arange(len(numbers), device=text.device).repeat_interleave(numbers)
    rows = max(_FEWEST_ROWS, _CELLS // len(text))
    some = _evenly(torch.arange(len(labels), device=text.device), rows)
    keys, known = _keys(static, some, text), labels[some]
    scores = tau * keys @ text.T
    expected = _distrust(scores, known)
    held = list(_left_out(numbers, rows))
    if not held:
        unit = _unit(_spread_of_others(scores, known), _spread_of_others(shown.read(keys), known))
        # Shots that tell no classes apart say nothing of the text head either.
        return Frozen(shown=shown, weight=expected * unit, lean=1.0 + LEAN_UNMEASURED * expected if unit else 1.0)
    # All of a fold are left out, and some of them are read.
    read = [_evenly(out, rows // len(held)) for out in held]
    without = [_shown(_taken(shots, _keys(static, out, text), labels[out], -1)) for out in held]
    keys, known = _keys(static, torch.cat(read), text), labels[torch.cat(read)]
    z = torch.cat([left.read(own) for left, own in zip(without, keys.split([len(r) for r in read]), strict=True)])
    scores = tau * keys @ text.T
    unit = _unit(*(float(each.std(-1, correction=0).mean()) for each in (scores, z)))
    weight, sharpness = _likeliest(scores, unit * z, known, expected)
    return Frozen(
        shown=shown, weight=weight * unit, sharpness=sharpness, held_out=len(known), lean=1.0 + LEAN * expected
    )


def _stretches(classes: list[int], numbers: list[int]) -> Iterator[list[int]]:
    """Yield classes in order, as many together as have so many shots."""
    some: list[int] = []
    held = 0
    for c, number in zip(classes, numbers, strict=True):
        some.append(c)
        held += number
        if held >= _AT_ONCE:
            yield some
            some, held = [], 0
    if some:
        yield some


def _keys(static: StaticMemory, rows: Int[Tensor, " n"], text: Float[Tensor, "c d"]) -> Float[Tensor, "n d"]:
    """Return some of all shots, by their numbers in the order of classes."""
    firsts = [0, *accumulate(len(shots) for shots in static.classes)]
    places = [(bisect_right(firsts, row) - 1, row) for row in rows.tolist()]
    return torch.stack([static.classes[c].keys[row - firsts[c]] for c, row in places]).to(text)


def _taken(both: Statistics, keys: Float[Tensor, "m d"], labels: Int[Tensor, " m"], sign: int) -> Statistics:
    """Return the statistics with some shots more, or with `sign` -1 without them."""
    return replace(
        both,
        sums=both.sums.index_add(0, labels, keys, alpha=sign),
        counts=both.counts + sign * labels.bincount(minlength=len(both.counts)),
        total=both.total + sign * keys.sum(0),
        second=both.second + sign * keys.T @ keys,
        images=both.images + sign * len(keys),
    )


def _shown(shots: Statistics) -> Shown:
    """Return the shots as a classifier; in a round space while they are too few to tell its shape."""
    there = shots.counts > 0
    means = shots.sums[there] / shots.counts[there, None]
    centre = means.mean(0)
    within = shots.second - (means * shots.counts[there, None]).T @ means
    differences = float((shots.counts[there] - 1).sum())
    enough = differences if differences >= len(means) else 0.0
    shape = precision(within / max(differences, 1.0), enough, ridge=RIDGE)
    apart = torch.zeros_like(shots.sums)
    apart[there] = means - centre
    directions = apart @ shape
    return Shown(centre=centre, precision=shape, directions=directions, squares=(directions * apart).sum(-1))


def _left_out(numbers: Int[Tensor, " c"], rows: int) -> Iterator[Int[Tensor, " m"]]:
    """Yield which shots to leave out together, one of every class that has another; none if fewer than two have."""
    several = numbers > 1
    if int(several.sum()) < 2:  # noqa: PLR2004 - with one class there is nothing to tell apart
        return
    first = numbers.cumsum(0) - numbers
    for rank in range(min(_FOLDS, max(1, rows // len(numbers)), int(numbers.max()))):
        yield (first + rank)[several & (numbers > rank)]


def _evenly(rows: Int[Tensor, " m"], most: int) -> Int[Tensor, " n"]:
    """Return at most so many of some rows, evenly among them."""
    return rows[:: -(-len(rows) // max(1, most))]


def _distrust(scores: Float[Tensor, "m c"], labels: Int[Tensor, " m"]) -> float:
    """Return a weight for the shots that grows with how often the text head is wrong about them."""
    right = float((scores.argmax(-1) == labels).sum())
    return _DISTRUST * (1.0 - (right + 0.5) / (len(labels) + 1.0))


def _spread_of_others(scores: Float[Tensor, "m c"], labels: Int[Tensor, " m"]) -> float:
    """Return how far from their mean the scores of the classes that a shot is not of are: of its own it is a part."""
    apart = (scores - scores.mean(-1, keepdim=True)).scatter(1, labels[:, None], 0.0)
    return float((apart.square().sum(-1) / max(scores.shape[-1] - 1, 1)).sqrt().mean())


def _unit(text: float, shots: float) -> float:
    """Return the weight at which the shots' scores spread as far as the text's; 0 where they tell nothing apart."""
    return text / shots if shots > _FLAT else 0.0


def _likeliest(
    text: Float[Tensor, "m c"], shots: Float[Tensor, "m c"], labels: Int[Tensor, " m"], expected: float
) -> tuple[float, float]:
    """Return the weight and the sharpness under which the shots that were left out are likeliest.

    A weight far from what the text head alone makes one expect has to be worth it: few shots say little.
    """
    found = []
    for weight in WEIGHTS:
        together = text + weight * shots
        surprise = math.log((weight + _DOUBT) / (expected + _DOUBT)) ** 2
        for sharpness in SHARPNESSES:
            loss = torch.nn.functional.cross_entropy(sharpness * together, labels, reduction="sum").item()
            found.append((loss + surprise, weight, sharpness))
    _, weight, sharpness = min(found)
    return weight, sharpness
