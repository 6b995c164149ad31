"""What identifies an encoder: the digest of its weights, text tower and preprocessing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import open_clip
import torch
from torch import Tensor, nn

from core.errors import EncoderUnavailable
from core.memory.codec import FEATURE_FORMAT

from .protocol import Preprocess


def preprocess_of(model: nn.Module) -> Preprocess:
    """Return how an open_clip model wants its images; EncoderUnavailable if its input is not square."""
    settings = open_clip.get_model_preprocess_cfg(model)
    size = settings["size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[1]:
        raise EncoderUnavailable(
            f"The encoder's input is {sides[0]} x {sides[1]} pixels, but only square inputs are served; "
            "choose another model.",
        )
    return Preprocess(
        size=int(sides[0]),
        mean=_channels(settings["mean"]),
        std=_channels(settings["std"]),
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",  # as open_clip reads it
        resize_mode=settings["resize_mode"],
        fill=int(settings["fill_color"]),
    )


def _channels(value: float | Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def origin_of(architecture: str, weights: Mapping[str, Tensor], pre: Preprocess, dim: int) -> dict[str, str]:
    """Return all that a feature depends on, each in words or as a hash."""
    return {
        "architecture": architecture,
        "weights": _digest(weights)[:16],
        "preprocessing": json.dumps(asdict(pre), sort_keys=True),
        "feature size": str(dim),
        "feature format": FEATURE_FORMAT,
    }


def fingerprint_of(origin: Mapping[str, str]) -> str:
    """Return the sha256, in hex, of where features come from."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256, in hex, of all weights; they are read on the CPU, in name order."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        # A view of the bytes, not a copy: NumPy has no bfloat16, so the tensor is read as bytes first.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
