"""Accuracy over a stream as a picture; the one file that knows matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from service.errors import InvalidRequest

from .aggregate import ADAPTED, FROZEN, Course

LEAST_WINDOW = 20
"""Images that a running mean is taken over, at least; otherwise a tenth of the stream."""

_LINES = {FROZEN: ("text head", "#8a8a8a"), ADAPTED: ("fused", "#0b6e4f")}


def check_library() -> None:
    """Return if curves can be drawn.

    Raises:
        InvalidRequest: matplotlib is not installed.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise InvalidRequest(
            "A report draws its curves with matplotlib, which is not installed; pip install 'dmn-clip-service[report]'."
        ) from error


def draw(file: Path, title: str, courses: Sequence[Course]) -> None:
    """Write a PNG: the running accuracy of both branches, its mean over the orders and the range between them."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only who wants a report needs it

    length = min(course.n for course in courses)
    window = max(LEAST_WINDOW, length // 10)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for branch, (name, colour) in _LINES.items():
        rights = [right for course in courses if (right := course.right(branch)) is not None]
        curves = torch.stack([running(right[:length], window) for right in rights])
        if length > LEAST_WINDOW:
            curves = curves[:, LEAST_WINDOW - 1 :]  # before, a single answer moves it by many points
        seen = range(length - curves.shape[1] + 1, length + 1)
        axes.plot(seen, curves.mean(0).tolist(), color=colour, label=name)
        if len(curves) > 1:
            axes.fill_between(seen, curves.amin(0).tolist(), curves.amax(0).tolist(), color=colour, alpha=0.15, lw=0)
    axes.set_title(title, parse_math=False, wrap=True)
    axes.set(xlabel="images", ylabel=f"accuracy of the last {window} images, %", xlim=(0, length))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font lacks is a name all the same
        figure.savefig(file, format="png")


def running(right: Bool[Tensor, " n"], window: int) -> Float64[Tensor, " n"]:
    """Return for each image the share in percent of right answers among the last `window`, fewer at the beginning."""
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), right.double().cumsum(0)))
    ends = torch.arange(1, len(right) + 1)
    starts = (ends - window).clamp(min=0)
    return 100.0 * (sums[ends] - sums[starts]) / (ends - starts)
