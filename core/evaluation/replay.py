"""A stream of features through the method, exactly in order, without a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as dc_replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from core.adaptive.adaptation import Adaptation
from core.classify import Answers, Sample, classify
from core.memory.dynamic import DynamicMemory, Outcome
from core.memory.static import Shots, StaticMemory
from core.prepared_banks import Shelves
from core.readout.fusion import DEFAULT_WEIGHTS, BranchWeights
from core.snapshot import Method, Snapshot

from .metrics import Marks, figures, marks
from .stream_file import Stream
from .stream_orders import iid

BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What overrides the file; None leaves the file's own value or, failing that, the default."""

    slots: int | None = None
    beta: float | None = None
    weights: BranchWeights = DEFAULT_WEIGHTS
    shots: int | None = None
    seed: int | None = None
    learn: bool = True
    method: Method = "dmn"


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Answers in the file's order, the slot of each image (-1: not stored), the memory at the end."""

    text: Float[Tensor, "n c"]
    dynamic: Float[Tensor, "n c"]
    static: Float[Tensor, "n c"] | None
    statistics: Float[Tensor, "n c"] | None
    fused: Float[Tensor, "n c"]
    slot: Int[Tensor, " n"]
    memory: DynamicMemory
    writes: Mapping[str, int]
    seconds: float

    @property
    def branches(self) -> dict[str, Float[Tensor, "n c"] | None]:
        """Return the probabilities of each branch by its name, the fused ones last; None for an absent branch.

        There is a branch of class statistics with the method `auto` alone.
        """
        own = {} if self.statistics is None else {"statistics": self.statistics}
        return {"text": self.text, "dynamic": self.dynamic, "static": self.static, **own, "fused": self.fused}

    @property
    def marks(self) -> dict[str, Marks | None]:
        """Return the first answers of each branch by its name."""
        return {name: None if p is None else marks(p) for name, p in self.branches.items()}

    def arrays(self) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """Return the arrays of an `--out` file."""
        banks = self.memory.classes
        entropies = np.zeros((len(banks), self.memory.slots), np.float32)
        for bank, row in zip(banks, entropies, strict=True):
            row[: len(bank)] = bank.entropies
        out = {name: p.numpy() for name, p in self.branches.items() if p is not None}
        counts = np.array([len(bank) for bank in banks], np.int64)
        return {**out, "slot": self.slot.numpy(), "counts": counts, "entropies": entropies}


def replay(stream: Stream, options: Options, *, progress: Callable[[int], None] = lambda _: None) -> Replay:
    """Return what the method answers to a stream, image by image; `progress` hears how many are done."""
    snapshot = _snapshot(stream, options)
    order = _order(len(stream.features), options.seed)
    shelves, parts, slots = Shelves(snapshot), [], torch.full((len(order),), -1)
    writes = {str(outcome): 0 for outcome in (Outcome.FILLED, Outcome.REPLACED, Outcome.REJECTED)}
    start = time.perf_counter()
    for numbers in torch.split(torch.arange(len(order)), BATCH):
        samples = [Sample(views=stream.features[order[i]], id=i, learn=options.learn) for i in numbers.tolist()]
        answers = classify(shelves, samples)
        snapshot = dc_replace(snapshot, dynamic=answers.memory, adaptation=answers.adaptation)
        shelves.advance(snapshot)
        parts.append(answers)
        if options.learn:
            _count(answers, writes, slots, order[numbers])
        progress(len(samples))
    seconds = time.perf_counter() - start
    back = order.argsort()
    joined = {name: _join(parts, name, back) for name in ("text", "dynamic", "fused")}
    static = _join(parts, "static", back) if snapshot.static.filled else None
    statistics = _join(parts, "statistics", back) if options.method == "auto" else None
    return Replay(
        **joined,
        static=static,
        statistics=statistics,
        slot=slots,
        memory=snapshot.dynamic,
        writes=writes,
        seconds=seconds,
    )


def summary(result: Replay, stream: Stream) -> dict[str, object]:
    """Return the figures of a replay: accuracies and calibration in percent, writes, rate."""
    n = len(result.slot)
    return {
        "n": n,
        "classes": len(stream.text),
        **figures(result.marks, stream.labels),
        "writes": dict(result.writes),
        "images_per_second": round(n / result.seconds, 1) if result.seconds else None,
    }


def _snapshot(stream: Stream, options: Options) -> Snapshot:
    classes, dim = stream.text.shape
    slots = stream.slots if options.slots is None else options.slots
    static = _static(stream, options.shots)
    return Snapshot(
        text=stream.text,
        dynamic=DynamicMemory.empty(classes, dim, slots),
        static=static,
        projection=stream.projection,
        tau=stream.tau,
        beta=stream.beta if options.beta is None else options.beta,
        weights=options.weights,
        adaptation=Adaptation.begin(stream.text, static, stream.tau) if options.method == "auto" else None,
    )


def _static(stream: Stream, first: int | None) -> StaticMemory:
    classes = []
    for c in range(len(stream.text)):
        own = (stream.shot_labels == c).nonzero()[:first, 0]
        classes.append(Shots(keys=stream.shots[own], ids=tuple(own.tolist())))
    return StaticMemory(classes=tuple(classes))


def _order(n: int, seed: int | None) -> Tensor:
    return torch.arange(n) if seed is None else iid(n, seed)


def _count(answers: Answers, writes: dict[str, int], slots: Tensor, places: Tensor) -> None:
    for place, write in zip(places.tolist(), answers.writes, strict=True):
        writes[write.outcome] += 1
        slots[place] = -1 if write.slot is None else write.slot


def _join(parts: list[Answers], name: str, back: Tensor) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])[back]
