"""What several orders of one stream say together: the mean, the worst, and the gain over the frozen head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from core.evaluation.metrics import MEASURES, Figures, Marks, figures
from core.evaluation.stream_orders import Kind

FIRST = 100
"""Images of a stream's beginning that are measured apart: a memory that is still empty must not cost anything."""

FROZEN, ADAPTED = "text", "fused"
"""The branches that a gain lies between."""

_Reduce = Callable[[Sequence[float]], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """One order of a stream that has been run: what each branch said, in that order, and what it cost."""

    branches: Mapping[str, Marks | None]
    labels: Int[Tensor, " n"] | None
    writes: Mapping[str, int]
    seconds: float

    @property
    def n(self) -> int:
        """Images that were answered."""
        return max(len(told.predicted) for told in self.branches.values() if told is not None)

    def figures(self, first: int | None = None) -> Figures:
        """Return the figures of the course, or of its first images."""
        labels = None if self.labels is None else self.labels[:first]
        return figures({name: told and told[:first] for name, told in self.branches.items()}, labels)

    def right(self, branch: str) -> Bool[Tensor, " n"] | None:
        """Return which answers of a branch are right; None where there is no such branch, or no label."""
        told = self.branches[branch]
        return None if told is None or self.labels is None else told.right(self.labels)

    def alone(self) -> dict[str, Any]:
        """Return what the course says by itself."""
        return {**self.figures(), "writes": dict(self.writes)}


def together(courses: Sequence[Course], kind: Kind) -> dict[str, Any]:
    """Return the means over the courses, and beside them the worst ones, the gain, and the first images."""
    every = [course.figures() for course in courses]
    seconds = sum(course.seconds for course in courses)
    return {
        **{name: over([one[name] for one in every], mean) for name in MEASURES},
        "writes": _writes(courses),
        "images_per_second": round(sum(course.n for course in courses) / seconds, 1) if seconds else None,
        "orders": len(courses),
        "stream": kind,
        "worst": {name: over([one[name] for one in every], _worst(name)) for name in MEASURES},
        "gain": _gain([one["accuracy"] for one in every]),
        "first": _first(courses),
    }


def tail(values: Sequence[float]) -> float:
    """Return the mean of the lowest tenth of the values, at least one."""
    return mean(sorted(values)[: math.ceil(len(values) / 10)])


def over(every: Sequence[Mapping[str, float | None]], reduce: _Reduce) -> dict[str, float | None]:
    """Return one measure of every branch over the courses."""
    columns = {branch: [one[branch] for one in every] for branch in every[0]}
    return {
        branch: round(reduce(known), 4) if len(known := [v for v in column if v is not None]) == len(every) else None
        for branch, column in columns.items()
    }


def _worst(name: str) -> _Reduce:
    return max if name == "ece" else min


def average(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over data sets of what each of them says."""
    return {name: over([report[name] for report in reports], mean) for name in MEASURES}


def mean(values: Sequence[float]) -> float:
    """Return the mean of values."""
    return sum(values) / len(values)


def _writes(courses: Sequence[Course]) -> dict[str, float]:
    outcomes = dict.fromkeys(outcome for course in courses for outcome in course.writes)
    return {outcome: round(mean([course.writes.get(outcome, 0) for course in courses]), 4) for outcome in outcomes}


def _gain(accuracies: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the points of accuracy that the adapted answer has over the frozen head's."""
    pairs = [(one[ADAPTED], one[FROZEN]) for one in accuracies]
    gains = torch.tensor([a - b for a, b in pairs if a is not None and b is not None], dtype=torch.float64)
    if not len(gains):
        return dict.fromkeys(("mean", "worst", "standard_error"))
    error = (gains.std() / len(gains) ** 0.5).item() if len(gains) > 1 else None
    return {
        "mean": round(gains.mean().item(), 4),
        "worst": round(gains.min().item(), 4),
        "standard_error": None if error is None else round(error, 4),
    }


def _first(courses: Sequence[Course]) -> dict[str, Any]:
    every = [course.figures(FIRST)["accuracy"] for course in courses]
    return {"images": min(FIRST, *(course.n for course in courses)), "accuracy": over(every, mean)}
