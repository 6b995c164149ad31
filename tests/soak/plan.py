"""What the workers of a convergence run are to do: the same in every process, from a seed alone.

An image shows one class, at one of a few levels: images of a class at one level have the same entropy, to the bit, so
that ids decide. Levels rise along the run, so that slots go on being replaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from core.encoders.protocol import Preprocess
from core.numerics import unit
from service.domain.tenant import ClassSpec

TENANT = "zoo"
TAIL = 24
"""Entries of a feature beside those of the classes: they tell images of one class and level apart."""

LEVELS = 30
TWICE = 0.1
"""Share of the images that are delivered twice."""

_LOWEST, _STEP = 0.15, 0.01
_LATE = 200
"""Images between the first and the second delivery of those that come late."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size of a run. `phases` are parts at whose ends everything is compared."""

    candidates: int
    workers: int
    classes: int
    phases: int
    slots: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Image:
    """One candidate: what it shows, how clearly, and the seed of its tail."""

    number: int
    label: int
    level: int

    @property
    def id(self) -> str:
        return f"{self.number * 2654435761 % 2**32:08x}"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One delivery of an image; `bits` are other than 0 where it was in another batch, or a little clearer."""

    number: int
    bits: int = 0


@dataclass(frozen=True, kw_only=True)
class Reset:
    """Empties classes by position, or all."""

    classes: tuple[int, ...] | None


Step = Ask | Reset


class PlainEncoder:
    """Class c is the axis c: scores are exact whatever else is in a batch."""

    name = "plain"
    logit_scale = 20.0
    preprocess = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    device = torch.device("cpu")

    def __init__(self, classes: int) -> None:
        self.dim = classes + TAIL
        self.fingerprint = f"plain-{classes}"
        self.origin = {"weights": "none"}

    def encode_images(self, pixels: Tensor) -> Tensor:
        return unit(torch.ones(len(pixels), self.dim))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        axes = [int("".join(filter(str.isdigit, text)) or 0) for text in texts]
        return torch.nn.functional.one_hot(torch.tensor(axes, dtype=torch.long), self.dim).float()


def class_specs(options: Options) -> tuple[ClassSpec, ...]:
    """Return the classes, in order."""
    return tuple(ClassSpec(name=f"kind {c}") for c in range(options.classes))


def images(options: Options) -> list[Image]:
    """Return all candidates in the order in which they come."""
    random = Random(options.seed)
    out = []
    for number in range(options.candidates):
        level = round(random.gauss(LEVELS * (0.3 + 0.4 * number / options.candidates), LEVELS / 6))
        label = random.randrange(options.classes)
        out.append(Image(number=number, label=label, level=min(LEVELS - 1, max(0, level))))
    return out


def feature(image: Image, bits: int, options: Options) -> Tensor:
    """Return the feature (d,) of one delivery: bit 1 moves the tail's last bits, bit 2 raises the level by one."""
    level = _LOWEST + _STEP * (image.level + (bits >> 1 & 1))
    tail = torch.randn(TAIL, generator=torch.Generator().manual_seed(options.seed * 1_000_003 + image.number))
    out = torch.zeros(options.classes + TAIL)
    out[image.label] = level
    out[options.classes :] = unit(tail) * math.sqrt(1 - level * level) * (1 + 1e-3 * (bits & 1))
    return out


def steps(options: Options, phase: int, worker: int) -> list[Step]:
    """Return what a worker does in a phase, in order."""
    placed = [(at, step) for at, own, step in _placed(options, phase) if own == worker]
    return [step for _, step in sorted(placed, key=lambda one: one[0])]


def _placed(options: Options, phase: int) -> list[tuple[float, int, Step]]:
    """Return every step of a phase: about when it comes, in images, which worker takes it, and what it is."""
    random = Random(f"{options.seed}/{phase}")
    size = options.candidates // options.phases
    last = options.candidates if phase == options.phases - 1 else (phase + 1) * size
    out: list[tuple[float, int, Step]] = []
    for number in range(phase * size, last):
        worker = random.randrange(options.workers)
        out.append((number, worker, Ask(number=number)))
        if random.random() < TWICE:
            other = random.choice((worker, random.randrange(options.workers)))
            late = random.choice((0.0, random.uniform(0, _LATE)))
            out.append((number + late, other, Ask(number=number, bits=random.choice((0, 0, 1, 2, 3)))))
    return out + _resets(options, phase, random, size)


def _resets(options: Options, phase: int, random: Random, size: int) -> list[tuple[float, int, Step]]:
    """Return the resets of a phase: none in the first; then of some classes, of all, and of some again."""
    if phase == 0:
        return []
    some = [tuple(sorted(random.sample(range(options.classes), max(1, options.classes // 4)))) for _ in range(3)]
    spans = ((0.1, 0.3, some[0]), (0.3, 0.6, None), (0.6, 0.9, some[1]), (0.6, 0.9, some[2]))
    return [
        (size * (phase + random.uniform(low, high)), random.randrange(options.workers), Reset(classes=which))
        for low, high, which in spans
    ]
