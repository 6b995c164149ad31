"""Sizes of pipelines, and slices of work that fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

SLICE_BYTES = 1 << 20
"""Read or written in one command, so that the server never stalls."""

SWEEP_KEYS = 256


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Return the items in slices of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def slices_by_size(items: Sequence[T], weight: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """Return the items in parts of at most `SLICE_BYTES`; an item that is larger makes a part of its own."""
    start, held = 0, 0
    for at, item in enumerate(items):
        own = weight(item)
        if at > start and held + own > SLICE_BYTES:
            yield items[start:at]
            start, held = at, 0
        held += own
    if start < len(items):
        yield items[start:]
