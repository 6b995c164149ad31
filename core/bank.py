"""Slots of one class, and the padded bank that readouts see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SlotId = int | str
"""A sequence number in a replay, a digest of the decoded pixels in the service. Never both in one memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """The filled slots of one class: keys `n d`, entropies in nats, ids. The order has no meaning to a readout."""

    keys: Float[Tensor, "n d"]
    entropies: tuple[float, ...]
    ids: tuple[SlotId, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def empty(dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Slots:
        """Return no slots of feature size `dim`."""
        return Slots(keys=torch.empty(0, dim, dtype=dtype, device=device), entropies=(), ids=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Bank:
    """Slots of several classes side by side, padded to one width; `occupied` tells the filled ones."""

    keys: Float[Tensor, "c s d"]
    occupied: Bool[Tensor, "c s"]


def pack(rows: Sequence[Float[Tensor, "_ d"]], *, width: int | None = None) -> Bank:
    """Return one bank with `rows[c]` in the first slots of class c, as float32.

    `width` slots a class, at least as many as the longest row; the rest stays empty.
    """
    longest = max(len(row) for row in rows)
    wide = longest if width is None else width
    keys = rows[0].new_empty((len(rows), wide, rows[0].shape[-1]), dtype=torch.float32)
    for own, row in zip(keys, rows, strict=True):
        own[: len(row)] = row
        own[len(row) :] = 0.0
    filled = torch.tensor([len(row) for row in rows], device=keys.device)
    return Bank(keys=keys, occupied=torch.arange(wide, device=keys.device) < filled[:, None])
