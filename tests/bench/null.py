"""An encoder that costs next to nothing: what is left of a request's time is the server's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from core.encoders.protocol import Preprocess
from core.numerics import unit

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")

_CELLS = 16


class NullEncoder:
    """Sees the mean colours of 16 x 16 cells, 768 numbers, through a fixed random projection to 512.

    With `device_s` it takes so many seconds a batch, as if a device were at work, and no processor.
    """

    name = "null"
    fingerprint = "null-1"
    dim = 512
    logit_scale = 100.0
    preprocess = Preprocess(size=96, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    device = torch.device("cpu")

    def __init__(self, device_s: float = 0.0) -> None:
        self._device_s = device_s
        self.origin = {"architecture": "mean-pool 16 x 16 x 3, projection 768 x 512", "weights": self.fingerprint}
        self._projection = torch.randn(3 * _CELLS**2, self.dim, generator=torch.Generator().manual_seed(0))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return the features (n, 512) of pixels (n, 3, 96, 96)."""
        time.sleep(self._device_s)  # a device at work: this thread waits, and others have the processor
        cells = torch.nn.functional.avg_pool2d(pixels.float(), self.preprocess.size // _CELLS)
        return unit((cells.flatten(1) - 127.5) @ self._projection)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return a random direction for each text, the same for the same text."""
        return torch.stack([self._text(text) for text in texts]) if texts else torch.empty(0, self.dim)

    def _text(self, text: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return unit(torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)))
