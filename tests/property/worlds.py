"""Small label sets with memories and streams, drawn by hypothesis, in the forms of core and of the literal method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from core.classify import Answers, Sample, classify
from core.memory.bank import Slots
from core.memory.dynamic import Candidate, DynamicMemory, apply, propose
from core.memory.static import Shots, StaticMemory
from core.prepared_banks import Shelves
from core.readout.projection import Projection
from core.snapshot import Snapshot
from tests.support import literal

PROBABILITY = 1e-5
"""Largest difference between probabilities that float32 explains at a logit scale of 100."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A snapshot with an empty dynamic memory, and images to send to it."""

    snapshot: Snapshot
    samples: tuple[Sample, ...]

    @property
    def size(self) -> tuple[int, int]:
        classes, dim = self.snapshot.text.shape
        return classes, dim

    def method(self, dtype: type[np.floating] = np.float64, *, relative: bool = False) -> literal.Method:
        """Return the snapshot as the literal form takes it."""
        snapshot, (classes, dim) = self.snapshot, self.size
        offsets = literal.no_offsets(classes, dim, dtype)
        if snapshot.projection is not None:
            given = snapshot.projection
            offsets = literal.Offsets(**{f.name: array(getattr(given, f.name), dtype) for f in fields(given)})
        return literal.Method(
            text=array(snapshot.text, dtype),
            shots=[list(array(own.keys, dtype)) for own in snapshot.static.classes],
            offsets=offsets,
            slots=snapshot.dynamic.slots,
            tau=snapshot.tau,
            beta=snapshot.beta,
            weights=snapshot.weights,
            relative=relative,
        )

    def images(self, dtype: type[np.floating] = np.float64) -> list[np.ndarray]:
        """Return the views of every image as the literal form takes them."""
        return [array(sample.views, dtype) for sample in self.samples]

    def certain(self) -> bool:
        """Return whether every decision of the stream is wide enough for float32 to get it right."""
        return literal.certain(self.method(), self.images())


def array(tensor: Tensor, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """Return a tensor as a NumPy array of a type."""
    return tensor.numpy().astype(dtype)


def run(snapshot: Snapshot, samples: Sequence[Sample], sizes: Sequence[int]) -> tuple[list[Answers], DynamicMemory]:
    """Send the samples in batches of these sizes (the last one takes the rest) through shelves that follow."""
    shelves, parts, rest, sizes = Shelves(snapshot), [], list(samples), [*sizes, len(samples)]
    for size in sizes:
        batch, rest = rest[:size], rest[size:]
        if batch:
            answers = classify(shelves, batch)
            snapshot = replace(snapshot, dynamic=answers.memory)
            shelves.advance(snapshot)
            parts.append(answers)
    return parts, snapshot.dynamic


def joined(parts: Sequence[Answers], branch: str) -> Tensor:
    """Return one branch's probabilities of several batches."""
    return torch.cat([getattr(part, branch) for part in parts])


def branches(answers: Answers) -> dict[str, Tensor]:
    """Return the branches that are there."""
    names = ("text", "dynamic", "static", "fused")
    return {name: p for name in names if (p := getattr(answers, name)) is not None}


def close(a: Tensor, b: Tensor, tolerance: float = PROBABILITY) -> None:
    """Assert that two tensors agree everywhere."""
    torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)


def learned(snapshot: Snapshot, samples: Sequence[Sample]) -> Snapshot:
    """Return the snapshot after it has learnt the samples."""
    if not samples:
        return snapshot
    return replace(snapshot, dynamic=classify(Shelves(snapshot), samples).memory)


def contents(memory: DynamicMemory) -> list[set[tuple[int | str, float, bytes]]]:
    """Return what each class holds, bit for bit and without an order."""
    return [
        {
            (number, nats, key.numpy().tobytes())
            for number, nats, key in zip(own.ids, own.entropies, own.keys, strict=True)
        }
        for own in memory.classes
    ]


def after(memory: DynamicMemory, candidates: Sequence[Candidate]) -> DynamicMemory:
    """Return the memory after the candidates, in their order."""
    for candidate in candidates:
        memory = apply(memory, propose(memory, candidate))
    return memory


def as_candidates(memory: DynamicMemory) -> list[Candidate]:
    """Return all that a memory holds as candidates for another one."""
    return [
        Candidate(label=label, key=own.keys[slot], entropy=own.entropies[slot], id=own.ids[slot])
        for label, own in enumerate(memory.classes)
        for slot in range(len(own))
    ]


def gaussian(rng: np.random.Generator, *shape: int) -> Tensor:
    """Return standard normal float32 values."""
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def directions(rng: np.random.Generator, *shape: int) -> Tensor:
    """Return random unit vectors along the last axis."""
    return torch.nn.functional.normalize(gaussian(rng, *shape), dim=-1)


def offsets(rng: np.random.Generator, classes: int, dim: int, size: float = 0.1) -> Projection:
    """Return five random offsets of norm about `size`."""
    return Projection(**{f.name: size * directions(rng, classes, dim) for f in fields(Projection)})


@dataclass(frozen=True)
class Maker:
    """Draws features as an encoder gives them: all near one direction, classes and images around it."""

    rng: np.random.Generator
    common: Tensor
    spread: float

    def near(self, centre: Tensor, *shape: int) -> Tensor:
        """Return unit vectors at about `spread` from a direction."""
        noise = directions(self.rng, *shape, len(self.common))
        return torch.nn.functional.normalize(centre + self.spread * noise, dim=-1)

    def sample(self, text: Tensor, number: int | str, views: int, *, learn: bool) -> Sample:
        """Return an image of a random class, with its views around it."""
        plain = self.near(text[self.rng.integers(len(text))])
        crops = torch.nn.functional.normalize(plain + 0.3 * self.spread * directions(self.rng, views, len(plain)))
        return Sample(views=torch.cat((plain[None], crops[1:])), id=number, learn=learn)


@st.composite
def worlds(
    draw: st.DrawFn,
    *,
    images: tuple[int, int] = (1, 24),
    with_shots: bool | None = None,
    with_offsets: bool | None = None,
    with_views: bool = True,
    read_only: bool = False,
) -> World:
    """Draw a label set of 1 to 6 classes and a stream; what is None is drawn too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    classes, dim = draw(st.integers(1, 6), label="classes"), draw(st.integers(3, 16), label="dim")
    shot_counts = [0] * classes
    if draw(st.booleans()) if with_shots is None else with_shots:
        shot_counts = draw(st.lists(st.integers(0, 3), min_size=classes, max_size=classes).filter(any), label="shots")
    projected = draw(st.booleans(), label="projected") if with_offsets is None else with_offsets
    common = directions(rng, dim)
    make = Maker(rng, common, draw(st.sampled_from((0.15, 0.3, 0.6)), label="spread"))
    text = make.near(common, classes)
    snapshot = Snapshot(
        text=text,
        dynamic=DynamicMemory.empty(classes, dim, draw(st.integers(0, 4), label="slots")),
        static=StaticMemory(
            classes=tuple(
                Shots(keys=make.near(t, count), ids=tuple(range(count)))
                for t, count in zip(text, shot_counts, strict=True)
            )
        ),
        projection=offsets(rng, classes, dim) if projected else None,
        beta=draw(st.sampled_from((0.0, 1.0, 5.5, 20.0)), label="beta"),
        weights=draw(st.sampled_from(((1.0, 1.0, 1.0), (1.0, 0.3, 3.0), (0.5, 2.0, 0.0))), label="weights"),
    )
    views = st.sampled_from((1, 1, 1, 2, 10, 20)) if with_views else st.just(1)
    count = draw(st.integers(*images), label="images")
    kinds = draw(
        st.lists(st.tuples(views, st.booleans() if read_only else st.just(value=True)), min_size=count, max_size=count)
    )
    samples = tuple(make.sample(text, n, crops, learn=learn) for n, (crops, learn) in enumerate(kinds))
    return World(snapshot=snapshot, samples=samples)


def slots_of(rng: np.random.Generator, dim: int, count: int, *, first: int = 0) -> Slots:
    """Return random filled slots."""
    return Slots(
        keys=directions(rng, count, dim),
        entropies=tuple(rng.random(count).tolist()),
        ids=tuple(range(first, first + count)),
    )
