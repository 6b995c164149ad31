"""Image towers: from uint8 pixels to raw features, by torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from core.encoders.protocol import Preprocess

from .simplify import features_of

Tower: TypeAlias = Callable[[UInt8[Tensor, "n 3 h w"]], Float[Tensor, "n d"]]
"""Returns raw features of pixels that stand on the CPU, on the device where the tower lives."""


class PixelTower(nn.Module):
    """An image tower with its normalisation in front, which is float32 whatever the tower is."""

    scale: Tensor
    shift: Tensor

    def __init__(self, visual: nn.Module, preprocess: Preprocess, *, channels_last: bool = False) -> None:
        super().__init__()
        weights = next(visual.parameters())
        mean, std = (torch.tensor(of, device=weights.device)[:, None, None] for of in (preprocess.mean, preprocess.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.dtype = weights.dtype
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.visual = visual.to(memory_format=self.layout)

    def forward(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return raw features on the tower's device."""
        return features_of(self.visual, self.normalised(pixels).to(self.dtype, memory_format=self.layout))

    def normalised(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Return (pixels / 255 - mean) / std, on the tower's device; they travel there as bytes."""
        return pixels.to(self.scale.device).to(torch.float32) * self.scale + self.shift
