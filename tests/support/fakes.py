"""An encoder without weights, and pictures that it tells apart by colour."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.encoders.protocol import Preprocess
from core.memory.static import Shots, StaticMemory
from core.numerics import unit

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 200),
    "yellow": (200, 200, 30),
    "white": (230, 230, 230),
}


class FakeEncoder:
    """Sees an 8 x 8 thumbnail, and knows the words for a few colours; deterministic, on the CPU."""

    name = "fake"
    dim = 3 + 64 * 3
    logit_scale = 20.0
    preprocess = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    device = torch.device("cpu")

    def __init__(self, fingerprint: str = "fake-1") -> None:
        self.fingerprint = fingerprint
        self.origin = {"architecture": "fake", "weights": fingerprint}
        self.images = 0
        self.texts = 0

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 8)
        mean = small.mean((2, 3))
        texture = (small - mean[:, :, None, None]).flatten(1)
        return unit(torch.cat((mean - 0.3, 0.5 * texture), 1) + 1e-4)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.texts += len(texts)
        return torch.stack([_text(text, self.dim) for text in texts]) if texts else torch.empty(0, self.dim)


@lru_cache(maxsize=4096)
def _text(text: str, dim: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    feature = 0.02 * torch.randn(dim, generator=torch.Generator().manual_seed(seed))
    for word, colour in COLOURS.items():
        if word in text:
            feature[:3] += torch.tensor(colour) / 255 - 0.3
    return unit(feature)


class PacedEncoder(FakeEncoder):
    """Takes its time, as a small model on a CPU does: so many seconds an image."""

    seconds = 0.05

    def encode_images(self, pixels: Tensor) -> Tensor:
        time.sleep(self.seconds * len(pixels))
        return super().encode_images(pixels)


def picture(colour: str = "red", seed: int = 0, *, form: str = "PNG", size: tuple[int, int] = (48, 40)) -> bytes:
    """Return a noisy picture of a colour, as bytes of an image file."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def static_without_shots(classes: int, dim: int) -> StaticMemory:
    return StaticMemory(classes=(Shots(keys=torch.empty(0, dim), ids=()),) * classes)
