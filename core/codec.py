"""Features as bytes, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .errors import IncompatibleMemory

FEATURE_FORMAT = "f16le"
"""Little-endian half precision; part of every fingerprint, so that formats never mix."""

FEATURE_BYTES = 2
"""Bytes an entry of a stored feature."""


def encode_feature(feature: Float[Tensor, " d"]) -> bytes:
    """Return a feature as half-precision bytes, 2 D of them."""
    return feature.detach().cpu().to(torch.float16).numpy().astype("<f2").tobytes()


def decode_feature(data: bytes, dim: int) -> Float[Tensor, " d"]:
    """Return the half-precision feature of `encode_feature`, bit for bit.

    Raises:
        IncompatibleMemory: the bytes are not those of a feature of size `dim`.
    """
    if len(data) != FEATURE_BYTES * dim:
        raise IncompatibleMemory(f"A stored feature has {len(data)} bytes; expected {FEATURE_BYTES * dim}.")
    return torch.from_numpy(np.frombuffer(data, "<f2").astype(np.float16))
