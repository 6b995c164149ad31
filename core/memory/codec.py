"""Features as bytes, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from core.errors import IncompatibleMemory

FEATURE_FORMAT = "f16le"
"""Little-endian half precision; part of every fingerprint, so that formats never mix."""

FEATURE_BYTES = 2
"""Bytes an entry of a stored feature."""


def encode_feature(feature: Float[Tensor, " d"]) -> bytes:
    """Return a feature as half-precision bytes, 2 D of them."""
    return feature.detach().cpu().to(torch.float16).numpy().astype("<f2").tobytes()


def decode_features(data: bytes, dim: int) -> Float[Tensor, "n d"]:
    """Return the half-precision features that `encode_feature` wrote one after the other, bit for bit.

    Raises:
        IncompatibleMemory: the bytes are not those of features of size `dim`.
    """
    if len(data) % (FEATURE_BYTES * dim):
        raise IncompatibleMemory(
            f"Stored features have {len(data)} bytes; expected a multiple of {FEATURE_BYTES * dim}."
        )
    # A copy, since bytes are read-only, and in the machine's own order of bytes.
    return torch.from_numpy(np.frombuffer(data, "<f2").astype(np.float16).reshape(-1, dim))
