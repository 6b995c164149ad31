"""A picture becomes uint8 views of the encoder's size: the plain one first, augmented ones after it.

View 1 is the encoder's own preprocessing without its normalisation, equal to open_clip's pixel by pixel. Views 2..V are
random-resized-crops with a flip and AugMix, as in DMN (Zhang et al., CVPR 2024, arXiv 2403.17589). Everything is a
function of the picture and a seed: there is no global generator, so any number of threads may call at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from core.errors import InvalidImage

from .augmix import BILINEAR, augmix
from .protocol import Preprocess

CROP_SCALE = (0.5, 1.0)
"""Share of the picture's area that an augmented view shows."""

CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of an augmented view before it is resized to a square."""

_CROP_TRIES = 10
_THIN = 32  # long side over short side; open_clip's intermediate picture grows with it, without bound
_GAP = 3  # crops are cut from a copy whose short side is at most this many times the encoder's
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": BILINEAR}


def plain(image: Image.Image, how: Preprocess) -> UInt8[Tensor, "3 s s"]:
    """Return view 1, open_clip's evaluation transform before normalisation; s = how.size.

    Pictures more than 32 times as long as wide differ from open_clip's by less than a pixel's width, or are refused
    there: its intermediate picture would not fit into memory, or would have no pixels.

    Raises:
        InvalidImage: the picture is not RGB, or has no pixels.
        ValueError: `how` names an unknown interpolation or resize mode.
    """
    _check(image)
    if how.interpolation not in _RESAMPLING or how.resize_mode not in _FRAMES:
        raise ValueError(f"Preprocessing {how.interpolation!r}, {how.resize_mode!r} is unknown.")
    if image.size != (how.size, how.size):  # of one that has the size every frame is a copy
        image = _FRAMES[how.resize_mode](image, how, _RESAMPLING[how.interpolation])
    return torch.from_numpy(_planes(image))


def augmented(image: Image.Image, count: int, how: Preprocess, *, seed: int) -> UInt8[Tensor, "v 3 s s"]:
    """Return views 2..count + 1 (v = count, s = how.size): random-resized-crop, flip with p = 0.5, AugMix.

    The draws come one after the other from `numpy.random.default_rng(seed)`, so the first n views do not depend on
    how many follow.

    Raises:
        InvalidImage: the picture is not RGB, or has no pixels.
    """
    _check(image)
    if count < 1:
        return torch.empty((0, 3, how.size, how.size), dtype=torch.uint8)
    rng = np.random.default_rng(seed)
    source = _reduced(image, how.size)
    return torch.from_numpy(np.stack([_planes(augmix(_crop(source, how.size, rng), rng)) for _ in range(count)]))


def crops(image: Image.Image, count: int, how: Preprocess, *, seed: int) -> UInt8[Tensor, "v 3 s s"]:
    """Return what a picture is trained with, Eq. (16): random-resized-crops with a flip (v = count, s = how.size).

    The draws come one after the other from `numpy.random.default_rng(seed)`, as those of `augmented`.

    Raises:
        InvalidImage: the picture is not RGB, or has no pixels.
    """
    _check(image)
    rng, source = np.random.default_rng(seed), _reduced(image, how.size)
    cut = [_planes(_crop(source, how.size, rng)) for _ in range(count)]
    return torch.from_numpy(np.stack(cut)) if cut else torch.empty((0, 3, how.size, how.size), dtype=torch.uint8)


def joined(first: UInt8[Tensor, "3 s s"], others: UInt8[Tensor, "n 3 s s"]) -> UInt8[Tensor, "v 3 s s"]:
    """Return view 1 and after it the others (v = 1 + n)."""
    # By numpy: torch's own copy would start a team of threads in each of the threads that decode.
    return torch.from_numpy(np.concatenate((first.numpy()[None], others.numpy())))


def seed_of(pixels: UInt8[Tensor, "3 s s"]) -> int:
    """Return a seed in [0, 2^64) made from the plain view, so that a retry of a picture draws the same views."""
    return int.from_bytes(hashlib.sha256(_content(pixels)).digest()[:8], "big")


def digest(pixels: UInt8[Tensor, "3 s s"]) -> str:
    """Return 20 hex characters of the SHA-256 of shape and pixels: the content part of a slot's id."""
    hashed = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    hashed.update(_content(pixels))
    return hashed.hexdigest()[:20]


def _check(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise InvalidImage(f"A picture has mode {image.mode}; expected RGB.")
    if 0 in image.size:
        raise InvalidImage(f"A picture has {image.width} x {image.height} pixels; expected one at least.")


def _planes(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels as (3, h, w), a copy, as PIL lends its own read-only."""
    # A pixel is one word, red lowest, as PIL keeps it: words are taken apart faster than bytes are transposed.
    words = np.frombuffer(image.tobytes("raw", "RGBX"), "<u4").reshape(image.height, image.width)
    planes = np.empty((3, *words.shape), np.uint8)
    planes[0], planes[1], planes[2] = words, words >> 8, words >> 16
    return planes


def _content(pixels: Tensor) -> memoryview:
    """Return the pixels one after the other, copied only where they lie otherwise."""
    content: memoryview = pixels.contiguous().numpy().data
    return content


# The frames of view 1 -------------------------------------------------------------------------------------------------


def _shortest(image: Image.Image, how: Preprocess, resampling: Image.Resampling) -> Image.Image:
    """Return the centre of the picture resized to a short side of how.size."""
    image = _middle(image)
    short = min(image.size)
    width, height = how.size * image.width // short, how.size * image.height // short
    # Halves round to even, as open_clip's centre crop does it.
    left, top = round((width - how.size) / 2), round((height - how.size) / 2)
    return image.resize((width, height), resampling).crop((left, top, left + how.size, top + how.size))


def _squash(image: Image.Image, how: Preprocess, resampling: Image.Resampling) -> Image.Image:
    """Return the picture resized to a square, whatever its ratio."""
    return _lowered(image, how.size).resize((how.size, how.size), resampling)


def _longest(image: Image.Image, how: Preprocess, resampling: Image.Resampling) -> Image.Image:
    """Return the picture resized to a long side of how.size, on a square of how.fill."""
    ratio = max(image.size) / how.size
    width, height = max(1, round(image.width / ratio)), max(1, round(image.height / ratio))
    square = Image.new("RGB", (how.size, how.size), (how.fill, how.fill, how.fill))
    resized = _lowered(image, height).resize((width, height), resampling)
    square.paste(resized, ((how.size - width) // 2, (how.size - height) // 2))
    return square


_FRAMES: dict[str, Callable[[Image.Image, Preprocess, Image.Resampling], Image.Image]] = {
    "shortest": _shortest,
    "squash": _squash,
    "longest": _longest,
}


def _middle(image: Image.Image) -> Image.Image:
    """Return the picture, or of a very thin one the middle: all that a centre crop will see of it."""
    width, height = image.size
    # What is cut off is even, so that the middle stays where it was.
    left = max(0, width - _THIN * height) // 2
    top = max(0, height - _THIN * width) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def _lowered(image: Image.Image, height: int) -> Image.Image:
    """Return the picture, or a very tall one averaged down to four to eight times `height`.

    PIL resizes the width first and keeps every row meanwhile, which for a picture of one column and millions of rows
    is hundreds of times what the picture itself takes.
    """
    factor = image.height // (4 * height)
    return image.reduce((1, factor)) if factor > 1 and image.height > _THIN * image.width else image


# The augmented views --------------------------------------------------------------------------------------------------


def _reduced(image: Image.Image, size: int) -> Image.Image:
    """Return the picture, or of a large one a copy whose short side is three times `size`.

    A crop's short side is at least 0.61 of the picture's, so it still shrinks by 1.8 or more; dozens of crops from
    the full picture would cost many times its decoding and differ by about one level in 256.
    """
    shrink = min(image.size) / (_GAP * size)
    if shrink <= 1:
        return image
    return image.resize((round(image.width / shrink), round(image.height / shrink)), BILINEAR, reducing_gap=2.0)


def _crop(image: Image.Image, size: int, rng: Generator) -> Image.Image:
    """Return a random-resized-crop, (size, size), bilinear as the paper's, flipped left to right with p = 0.5."""
    crop = image.resize((size, size), BILINEAR, box=_box(image.width, image.height, rng))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop  # noqa: PLR2004 - a coin


def _box(width: int, height: int, rng: Generator) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in pixels, inside the picture, of random area, ratio and place."""
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*CROP_SCALE)
        root = math.sqrt(math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]))))
        w, h = round(math.sqrt(area) * root), round(math.sqrt(area) / root)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return _central_box(width, height)


def _central_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the largest central box of an allowed ratio: what is left to a picture too thin for random ones."""
    w = max(1, min(width, round(height * CROP_RATIO[1])))
    h = max(1, min(height, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
