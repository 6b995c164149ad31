"""The method `auto`: the frozen branches and the class statistics of traffic, added up as far as they can be trusted.

    A_c = S_c - s_c g + (t_c - mean t) / 2,   g = G / n,   S, s, G, n of traffic and of the shots together,
    z_c = cos_P(x - g, A_c + r_c / 4 (x - g)),   P the precision of what images differ by within their classes,
    L_c = log p_text,c + w z_c,   w = gamma + tau lean e / (e + 40 C),   e = n + 10 shots.

The query's own insert, a quarter of its responsibilities, is always a virtual one: an image is counted after it was
read. Directions and precision are made anew when enough images were counted since, at numbers that do not depend on
how images came together: an answer does not depend on what else was in its batch.

Scores that many images built are larger than the frozen branches', and no more certain. They are brought to the
spread of these, image by image, and then to the one temperature under which they claim what the frozen branches claim:
halfway between how often those are right, and how sure an answer is, Eq. (22). No label is needed for that, and no
answer changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from core.memory.static import StaticMemory

from .frozen_branches import Frozen, as_statistics, trust
from .statistics import SHARPER, TEMPERATURES, Counted, Running, Statistics
from .whitening import cosines, precision

ANCHOR = 0.5
"""Images that the direction of a class's text is worth."""

OWN = 0.25
"""Images that a query itself is worth when it is read."""

RAMP = 40.0
"""Images a class after which statistics count half."""

WORTH = 10.0
"""Images that a shot is worth there; shots that count for nothing are worth none."""

RIDGE = 4.0
_PATIENCE = 32
"""Images after which directions are made anew, or a 32nd part of all; and images before a temperature counts half."""

FULL = 1 << 23
"""Images after which no more are counted: float32 sums would soon not feel one more."""

_AT_ONCE = 1 << 13
_NEGLIGIBLE = 1e-4
_AGREED = 1e-3
_LEAST, _MOST = -2.0, 2.0
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Directions:
    """What is read of the statistics: g `d`, P `d d`, the directions A_c P `c d`, A_c' P A_c `c`, and w.

    `temperature` is a logarithm, Eq. (22).
    """

    centre: Float[Tensor, " d"]
    precision: Float[Tensor, "d d"]
    directions: Float[Tensor, "c d"]
    squares: Float[Tensor, " c"]
    weight: float
    temperature: float

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (self.centre, self.precision, self.directions, self.squares))


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptation:
    """What a tenant with the method `auto` has beside its memories.

    `text` are the class weights, `shots` the statistics of the labelled shots, `total` those of traffic, and
    `directions` what was made of both when `made_at` images had been counted.
    """

    tau: float
    text: Float[Tensor, "c d"]
    frozen: Frozen
    shots: Statistics
    total: Running
    directions: Directions
    made_at: int

    @staticmethod
    def begin(
        text: Float[Tensor, "c d"], static: StaticMemory, tau: float, statistics: Statistics | None = None
    ) -> Adaptation:
        """Return the adaptation of a label set and its shots, with what was counted before, if anything."""
        shots = as_statistics(static, text)
        known = Statistics.zeros(*text.shape, device=text.device) if statistics is None else statistics
        frozen, total = trust(static, shots, text, tau), Running.of(known)
        return Adaptation(
            tau=tau,
            text=text,
            frozen=frozen,
            shots=shots,
            total=total,
            directions=_directions(text, frozen, shots, known, tau),
            made_at=total.images,
        )

    def known(self, statistics: Statistics, *, anew: bool = False) -> Adaptation:
        """Return the adaptation with other statistics; directions are made anew if enough images came to them."""
        return self._with(Running.of(statistics), anew=anew)

    def counting(self, counted: Counted) -> Adaptation:
        """Return the adaptation with some images more; directions are made anew if these are enough."""
        return self._with(self.total.put(counted))

    def _with(self, total: Running, *, anew: bool = False) -> Adaptation:
        if self.made_at <= total.images < _next(self.made_at) and not anew:
            return replace(self, total=total)
        total = total.settled()
        made = _directions(self.text, self.frozen, self.shots, total.added, self.tau)
        return replace(self, total=total, directions=made, made_at=total.images)

    @property
    def statistics(self) -> Statistics:
        """The statistics of traffic, added up."""
        return self.total.whole

    @property
    def images(self) -> int:
        """How many images of traffic were counted."""
        return self.total.images

    @property
    def behind(self) -> bool:
        """Whether images were counted since directions were made."""
        return self.made_at != self.images

    @property
    def nbytes(self) -> int:
        """Bytes held; the class weights are the label set's own."""
        return self.shots.nbytes + self.total.nbytes + self.directions.nbytes + self.frozen.nbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """Probabilities of the statistics alone and of everything together, one row an image; `counted` are their rows.

    `adaptation` is the one after these images.
    """

    statistics: Float[Tensor, "n c"]
    fused: Float[Tensor, "n c"]
    counted: tuple[Counted, ...]
    adaptation: Adaptation


def adapt(
    adaptation: Adaptation,
    x: Float[Tensor, "n d"],
    text: Float[Tensor, "n c"],
    frozen: Float[Tensor, "n c"],
    count: Sequence[bool],
) -> Adapted:
    """Return the adapted answers to images in order; those that `count` are added to the statistics, once read.

    `text` are log probabilities of the text head, `frozen` the scores of the frozen branches, Eq. (17).
    """
    known = adaptation.images
    fresh = [own and known < FULL for own in count]
    responsible = _responsible(frozen)
    reference = frozen * adaptation.frozen.sharpness if adaptation.frozen.held_out else text
    now = adaptation
    counted: list[Counted] = []
    read = []
    for part in _parts(known, adaptation.made_at, fresh):
        z = _read(now.directions, x[part], responsible[part])
        level = _level(torch.add(text[part], z, alpha=now.directions.weight), reference[part])
        warm = level * math.exp(-now.directions.temperature)
        read.append(((now.tau * z).softmax(-1), warm.softmax(-1)))
        if any(fresh[part]):
            counted.append(_count(x[part], responsible[part], level, reference[part], fresh[part]))
            now = now.counting(counted[-1])
    alone, fused = read[0] if len(read) == 1 else (torch.cat(rows) for rows in zip(*read, strict=True))
    return Adapted(statistics=alone, fused=fused, counted=tuple(counted), adaptation=now)


def temperature(statistics: Statistics) -> float:
    """Return the logarithm of the temperature, Eq. (22): where agreement is what the frozen branches claim.

    Of all where it is, within a thousandth, that nearest to 0: where most images are sure under many temperatures,
    rounding must not choose. It moves away from 0 as images come: n / (n + 32) of the way.
    """
    images = float(statistics.images)
    if images <= 0:
        return 0.0
    above = ((statistics.agreed - statistics.sure) / images).tolist()
    found = min(max(0.0, _falls_to(_AGREED, above)), _falls_to(-_AGREED, above))
    return float(found * images / (images + _PATIENCE))


def _falls_to(level: float, above: Sequence[float]) -> float:
    """Return the first logarithm of a temperature at which what agreement is above the claim has fallen to a level."""
    at = next((k for k, gap in enumerate(above) if gap <= level), None)
    if at is None or at == 0:
        return _MOST if at is None else _LEAST
    share = (above[at - 1] - level) / (above[at - 1] - above[at])
    return _LEAST + (at - 1 + share) * (_MOST - _LEAST) / (TEMPERATURES - 1)


def _responsible(frozen: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Return how much of an image each class takes, Eq. (18); what is next to nothing leaves a class as it is."""
    return torch.threshold((SHARPER * frozen).softmax(-1), _NEGLIGIBLE, 0.0)


def _read(made: Directions, x: Float[Tensor, "n d"], responsible: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Return z with each query's own insert, Eq. (20)."""
    v = x - made.centre
    own = ((v @ made.precision) * v).sum(-1)
    along, share = v @ made.directions.T, OWN * responsible
    with_own = torch.addcmul(along, share, own[:, None])
    return cosines(with_own, torch.addcmul(made.squares, share, along + with_own), own)


def _level(logits: Float[Tensor, "n c"], reference: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Return scores that spread over the classes as far as the reference's do, image by image."""
    spread, wanted = torch.stack((logits, reference)).std(-1, correction=0, keepdim=True).unbind()
    return logits * (wanted / spread.clamp_min(_TINY))


def _count(
    x: Float[Tensor, "n d"],
    responsible: Float[Tensor, "n c"],
    level: Float[Tensor, "n c"],
    reference: Float[Tensor, "n c"],
    fresh: Sequence[bool],
) -> Counted:
    if not all(fresh):
        rows = torch.tensor(fresh, device=x.device)
        x, responsible, level, reference = x[rows], responsible[rows], level[rows], reference[rows]
    sure, first = reference.softmax(-1).max(-1)
    return Counted(x=x, responsibilities=responsible, agreed=_agreed(level, first), sure=sure)


def _agreed(level: Float[Tensor, "n c"], first: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
    """Return the mean of two probabilities, that of a given class and the largest, under each temperature.

    Of both: where much is changed, the first alone would make answers too sure, and the other too unsure.
    """
    sharpness = torch.linspace(-_LEAST, -_MOST, TEMPERATURES, device=level.device).exp()
    two = torch.stack((first, level.argmax(-1)), 1)[:, :, None].expand(-1, -1, TEMPERATURES)
    some = max(1, _AT_ONCE // level.shape[1])
    parts = zip(level.split(some), two.split(some), strict=True)
    # The temperatures stand side by side, as processors like it: few classes alone fill no vector.
    return torch.cat([(own[:, :, None] * sharpness).softmax(1).gather(1, both).mean(1) for own, both in parts])


def _parts(known: int, made_at: int, fresh: Sequence[bool]) -> Iterator[slice]:
    """Yield stretches of images, each up to one after which directions are made anew; `known` were counted before."""
    start = 0
    for at, counts in enumerate(fresh, 1):
        known += counts
        if counts and known >= _next(made_at):
            yield slice(start, at)
            start, made_at = at, known
    if start < len(fresh):
        yield slice(start, len(fresh))


def _next(images: int) -> int:
    """Return how many images have to be counted before directions are made anew."""
    return images + max(1, min(images, _PATIENCE), images // _PATIENCE)


def _directions(
    text: Float[Tensor, "c d"], frozen: Frozen, shots: Statistics, traffic: Statistics, tau: float
) -> Directions:
    """Return what is read of shots and traffic together, Eq. (19) to (21)."""
    both = shots + traffic
    images = float(both.images)
    seen = float(traffic.images) + (WORTH * float(shots.images) if frozen.weight > 0.0 else 0.0)
    centre = both.total / max(images, 1.0)
    apart = both.sums - both.counts[:, None] * centre + ANCHOR * (text - text.mean(0))
    weighed = both.sums / both.counts.clamp_min(_TINY).sqrt()[:, None]
    shape = precision((both.second - weighed.T @ weighed) / max(images, 1.0), images, ridge=RIDGE)
    directions = apart @ shape
    return Directions(
        centre=centre,
        precision=shape,
        directions=directions,
        squares=(directions * apart).sum(-1),
        weight=frozen.weight + tau * frozen.lean * seen / (seen + RAMP * len(text)),
        temperature=temperature(traffic),
    )
