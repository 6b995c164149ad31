"""AugMix (Hendrycks et al., 2020): random chains of image operations, mixed into one view."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageOps

CHAINS = 3
"""Chains of operations that AugMix mixes."""

CHAIN_DEPTH = (1, 3)
"""Least and greatest number of operations in a chain."""
BILINEAR = Image.Resampling.BILINEAR


def augmix(image: Image.Image, rng: Generator) -> Image.Image:
    """Return m image + (1 - m) sum_i w_i chain_i(image), w ~ Dirichlet(1, 1, 1), m ~ Beta(1, 1).

    AugMix (Hendrycks et al., ICLR 2020, arXiv 1912.02781) at severity 1. The paper mixes after normalisation. The
    weights sum to one and normalisation is affine, so mixing before it gives the same, up to rounding to a level.
    """
    weights = rng.dirichlet(np.ones(CHAINS))
    share = rng.beta(1.0, 1.0)
    mixed = share * _floats(image)
    for weight in weights:
        mixed += np.float32((1.0 - share) * weight) * _floats(_chain(image, rng))
    return Image.fromarray(np.rint(mixed).clip(0, 255).astype(np.uint8))


def _floats(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image, dtype=np.float32)


def _chain(image: Image.Image, rng: Generator) -> Image.Image:
    """Return the picture after one to three operations drawn with replacement."""
    for _ in range(rng.integers(CHAIN_DEPTH[0], CHAIN_DEPTH[1], endpoint=True)):
        image = _OPERATIONS[rng.integers(len(_OPERATIONS))](image, rng)
    return image


def _strength(rng: Generator) -> float:
    """Return the share of an operation's full range that severity 1 uses, in [0.01, 0.1)."""
    return rng.uniform(0.1, 1.0) / 10


def _signed(rng: Generator) -> float:
    return _strength(rng) if rng.random() < 0.5 else -_strength(rng)  # noqa: PLR2004 - a coin


def _autocontrast(image: Image.Image, _: Generator) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, _: Generator) -> Image.Image:
    return ImageOps.equalize(image)


def _posterize(image: Image.Image, _: Generator) -> Image.Image:
    """Keep four bits: fewer come only with greater severity."""
    return ImageOps.posterize(image, 4)


def _solarize(image: Image.Image, rng: Generator) -> Image.Image:
    """Invert the brightest levels, at most the top tenth of 256."""
    return ImageOps.solarize(image, 256 - int(256 * _strength(rng)))


def _rotate(image: Image.Image, rng: Generator) -> Image.Image:
    """Turn by at most 3 degrees, a tenth of 30."""
    return image.rotate(30 * _signed(rng), BILINEAR)


def _shear_x(image: Image.Image, rng: Generator) -> Image.Image:
    return _affine(image, (1.0, 0.3 * _signed(rng), 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Image.Image, rng: Generator) -> Image.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.3 * _signed(rng), 1.0, 0.0))


def _translate_x(image: Image.Image, rng: Generator) -> Image.Image:
    return _moved(image, round(image.width / 3 * _signed(rng)), 0)


def _translate_y(image: Image.Image, rng: Generator) -> Image.Image:
    return _moved(image, 0, round(image.height / 3 * _signed(rng)))


def _moved(image: Image.Image, right: int, down: int) -> Image.Image:
    """Return the picture moved by whole pixels, black where it was."""
    moved = Image.new("RGB", image.size)
    moved.paste(image, (right, down))
    return moved


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """Return the picture read at (a x + b y + c, d x + e y + f), black where that lies outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BILINEAR)


_OPERATIONS: tuple[Callable[[Image.Image, Generator], Image.Image], ...] = (
    _autocontrast,
    _equalize,
    _posterize,
    _solarize,
    _rotate,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
