"""What core asks of an encoder: pixels and sentences in, unit features out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How a picture becomes the encoder's input.

    `size` is the side of the square input in pixels; `mean` and `std` are per channel, of values in [0, 1];
    `interpolation` is "bicubic" or "bilinear"; `resize_mode` is open_clip's: "shortest" (short side, then centre
    crop), "squash" (both sides, no crop) or "longest" (long side, then padding with `fill`, 0..255).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill: int = 0


class Encoder(Protocol):
    """Frozen image and text towers that share one feature space."""

    @property
    def name(self) -> str:
        """As asked for: `lite`, `ViT-B-16/openai`, `MODEL@FILE`."""

    @property
    def fingerprint(self) -> str:
        """Hash of `origin`; features of two fingerprints never mix."""

    @property
    def origin(self) -> Mapping[str, str]:
        """All that a feature depends on: architecture, weights, preprocessing, feature size and format."""

    @property
    def dim(self) -> int:
        """Feature size D."""

    @property
    def logit_scale(self) -> float:
        """The multiplier tau itself, about 100 for CLIP."""

    @property
    def preprocess(self) -> Preprocess:
        """Geometry and normalisation of the image input."""

    @property
    def device(self) -> torch.device:
        """Where the towers live."""

    def encode_images(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return unit-norm float32 features on `device`; normalises the uint8 pixels there."""

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return unit-norm float32 features on `device`."""
