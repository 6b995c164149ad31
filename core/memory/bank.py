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

    @staticmethod
    def empty(filled: Sequence[int], like: Float[Tensor, "_ d"], width: int | None = None) -> Bank:
        """Return a bank of zeros, float32, whose first slots are to be filled, so many of each class."""
        wide = max(filled) if width is None else width
        keys = like.new_zeros((len(filled), wide, like.shape[-1]), dtype=torch.float32)
        told = torch.tensor(filled, device=like.device)
        return Bank(keys=keys, occupied=torch.arange(wide, device=like.device) < told[:, None])


def pack(rows: Sequence[Float[Tensor, "_ d"]], *, width: int | None = None) -> Bank:
    """Return one bank with `rows[c]` in the first slots of class c, as float32.

    `width` slots a class, at least as many as the longest row; the rest stays empty.
    """
    bank = Bank.empty([len(row) for row in rows], rows[0], width)
    for keys, row in zip(bank.keys, rows, strict=True):
        keys[: len(row)] = row
    return bank
