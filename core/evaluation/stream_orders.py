"""Orders of a stream, as indices into it: shuffled, in runs of one class, skewed, or drifting.

Each is drawn from a seed alone, so that it can be repeated elsewhere.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from core.errors import InvalidStream

Kind = Literal["iid", "runs", "zipf", "drift"]
KINDS: tuple[Kind, ...] = get_args(Kind)

RUN = 20
"""Mean length of a run of one class."""

BLOCKS = 10
"""Parts of the classes that come one after another in a drift."""


def order_of(
    kind: Kind, seed: int, *, n: int, labels: Int[Tensor, " n"] | None, text: Float[Tensor, "c d"]
) -> Int[Tensor, " m"]:
    """Return an order of a stream of n images; `zipf` leaves some of them out.

    Raises:
        InvalidStream: the kind needs labels, and the stream has none.
    """
    if kind == "iid":
        return iid(n, seed)
    if labels is None:
        raise InvalidStream(f"The stream has no 'labels', and an order of kind {kind!r} is made by them; use 'iid'.")
    if kind == "runs":
        return runs(labels, seed)
    return zipf(labels, seed) if kind == "zipf" else drift(blocks_along(text)[labels], seed)


def iid(n: int, seed: int) -> Int[Tensor, " n"]:
    """Return all images in shuffled order."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(n))


def runs(labels: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """Return all images, one class at a time, in runs of geometric lengths with mean `RUN`.

    A run's class is drawn by how many of its images are left, never the one before if there is another; the last run
    of a class is as long as what is left.
    """
    rng = np.random.default_rng(seed)
    left = _by_class(labels, rng)
    order: list[Tensor] = []
    last = -1
    while left:
        others = [c for c in left if c != last] or [last]
        sizes = np.array([len(left[c]) for c in others])
        last = others[rng.choice(len(others), p=sizes / sizes.sum())]
        length = int(rng.geometric(1 / RUN))
        order.append(left[last][:length])
        left[last] = left[last][length:]
        if not len(left[last]):
            del left[last]
    return torch.cat(order)


def zipf(labels: Int[Tensor, " n"], seed: int) -> Int[Tensor, " m"]:
    """Return the largest subset whose class frequencies go like 1 / rank, rounded, in shuffled order.

    The seed draws the ranks. Every class that occurs keeps at least one image.
    """
    rng = np.random.default_rng(seed)
    ranked = list(_by_class(labels, rng).values())
    ranked = [ranked[i] for i in rng.permutation(len(ranked))]
    first = min(len(own) * rank for rank, own in enumerate(ranked, 1))
    subset = torch.cat([own[: max(1, round(first / rank))] for rank, own in enumerate(ranked, 1)])
    return subset[torch.from_numpy(rng.permutation(len(subset)))]


def drift(blocks: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """Return all images, block after block in the order of the blocks' numbers, shuffled inside."""
    shuffled = iid(len(blocks), seed)
    return shuffled[blocks[shuffled].argsort(stable=True)]


def blocks_along(text: Float[Tensor, "c d"]) -> Int[Tensor, " c"]:
    """Return for each class which of the `BLOCKS` equal parts along the text's first principal component it is in.

    The component points to where its largest entry is positive; which way it does is otherwise left to chance.
    """
    centred = (text - text.mean(0)).double()
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    direction = direction * direction[direction.abs().argmax()].sign()
    blocks = torch.empty(len(text), dtype=torch.long)
    for number, classes in enumerate(torch.tensor_split((centred @ direction).argsort(stable=True), BLOCKS)):
        blocks[classes] = number
    return blocks


def mixed(order: Int[Tensor, " m"], others: Int[Tensor, " k"], seed: int) -> Int[Tensor, " mk"]:
    """Return an order with others mixed in anywhere; each of both keeps its order."""
    places = np.random.default_rng(seed).integers(0, len(order) + 1, len(others))
    return torch.from_numpy(np.insert(order.numpy(), np.sort(places), others.numpy()))


def _by_class(labels: Int[Tensor, " n"], rng: np.random.Generator) -> dict[int, Int[Tensor, " _"]]:
    """Return the images of each class that occurs, shuffled."""
    shuffled = torch.from_numpy(rng.permutation(len(labels)))
    return {int(c): shuffled[labels[shuffled] == c] for c in labels.unique()}
