"""How good a branch's answers are: accuracy, calibration, and telling the known from the unknown. All in percent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 15
"""Bins of equal width of the calibration error."""

ACCEPTED = 0.95
"""Share of the known that the false-positive rate accepts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """What a branch said to each image: the likeliest class, and its probability."""

    predicted: Int[Tensor, " n"]
    confidence: Float[Tensor, " n"]

    def __getitem__(self, images: slice | Bool[Tensor, " n"]) -> Marks:
        return Marks(predicted=self.predicted[images], confidence=self.confidence[images])

    def right(self, labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return which answers are right."""
        return self.predicted == labels


def marks(p: Float[Tensor, "n c"]) -> Marks:
    """Return the first answers of a branch to n images."""
    return Marks(predicted=p.argmax(-1), confidence=p.amax(-1))


def accuracy(told: Marks, labels: Int[Tensor, " n"]) -> float:
    """Return the share of right answers."""
    return 100.0 * told.right(labels).double().mean().item()


def macro_accuracy(told: Marks, labels: Int[Tensor, " n"]) -> float:
    """Return the mean over the classes that occur of their share of right answers."""
    right = told.right(labels).double()
    return 100.0 * torch.stack([right[labels == c].mean() for c in torch.unique(labels)]).mean().item()


def calibration_error(told: Marks, labels: Int[Tensor, " n"]) -> float:
    """Return the expected calibration error over `BINS` bins."""
    confidence, right = told.confidence.double(), told.right(labels).double()
    gap = torch.zeros(BINS, dtype=torch.float64)
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    gap.index_add_(0, bins, right - confidence)
    return 100.0 * (gap.abs().sum() / len(labels)).item()


def auroc(known: Float[Tensor, " n"], unknown: Float[Tensor, " m"]) -> float:
    """Return how often a known image scores above an unknown one; a tie counts half."""
    ranked, _ = unknown.double().sort()
    below = torch.searchsorted(ranked, known.double(), right=False)
    not_above = torch.searchsorted(ranked, known.double(), right=True)
    return 100.0 * ((below + not_above).double() / (2 * len(unknown))).mean().item()


def false_positive_rate(known: Float[Tensor, " n"], unknown: Float[Tensor, " m"]) -> float:
    """Return the share of the unknown that score at least what `ACCEPTED` of the known reach."""
    least = known.sort(descending=True).values[math.ceil(ACCEPTED * len(known)) - 1]
    return 100.0 * (unknown >= least).double().mean().item()


Figures = dict[str, dict[str, float | None]]
"""By measure and branch, in percent to four places; None where there is no such branch, or no label."""

MEASURES: dict[str, Callable[[Marks, Tensor], float]] = {
    "accuracy": accuracy,
    "macro_accuracy": macro_accuracy,
    "ece": calibration_error,
}


def figures(branches: Mapping[str, Marks | None], labels: Int[Tensor, " n"] | None) -> Figures:
    """Return every measure of every branch."""
    return {
        name: {
            branch: None if told is None or labels is None else round(measure(told, labels), 4)
            for branch, told in branches.items()
        }
        for name, measure in MEASURES.items()
    }
