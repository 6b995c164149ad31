"""The darkroom: bytes that someone sent become uint8 pixels of the encoder's size, or a verdict on this one image.

ImageFault
├── UnsupportedMediaType  415  a format that is known, and not accepted here
├── ImageUnreadable       422  no picture, or a broken one
└── ImageTooLarge         413  more bytes or pixels than allowed

Every function here may run in any number of threads at once and sets nothing global. That is why `PIL.Image.open` is
not used: it guesses among parsers, and it warns of large pictures by a module-wide limit and module-wide warning
filters. The first bytes name the format instead, exactly one parser of an allowed format is shown the data (of a small
JPEG with an ordinary head, its decoder alone), and `max_pixels` is compared with the header before a pixel is decoded.
`PIL.Image.MAX_IMAGE_PIXELS` may keep its default; only where `max_pixels` is set above twice that (179 million) do
Pillow's own checks of WebP refuse first.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from core.encoders.protocol import Preprocess
from core.encoders.views import augmented, crops, digest, joined, plain, seed_of

from .errors import Heavy, ImageFault, ImageTooLarge, ImageUnreadable
from .formats import PARSERS, parser_reason
from .limits import (
    BASELINE_BYTES,
    WEBP_BYTES,
    ImageLimits,
    check_memory,
    check_parts,
    check_pixels,
    checked_format,
    decoding_bytes,
    webp_size,
)
from .rgb import upright_rgb
from .small_jpeg import small_jpeg_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Developed:
    """An image as the encoder takes it: its views, the plain one first, and the digest of that one."""

    pixels: UInt8[Tensor, "v 3 s s"]
    digest: str


def develop(data: bytes, *, views: int, how: Preprocess, limits: ImageLimits, room: int = sys.maxsize) -> Developed:
    """Return `views` views of an encoded image (v = views >= 1, s = how.size) and the digest of the first.

    The views are seeded from the first one's pixels: the same bytes give the same views, in every process.

    Raises:
        UnsupportedMediaType: its format is known and not accepted.
        ImageUnreadable: it is no picture, or a broken one.
        ImageTooLarge: it has more bytes or pixels than allowed.
        Heavy: decoding it takes more than `room` bytes.
    """
    image = decode(data, limits, room)
    first = plain(image, how)
    if views == 1:
        return Developed(pixels=first[None], digest=digest(first))
    others = augmented(image, views - 1, how, seed=seed_of(first))
    return Developed(pixels=joined(first, others), digest=digest(first))


def cut(
    data: bytes, *, count: int, seed: int, how: Preprocess, limits: ImageLimits, room: int = sys.maxsize
) -> UInt8[Tensor, "v 3 s s"]:
    """Return `count` random crops of an encoded image, those of a seed (v = count, s = how.size).

    Raises:
        UnsupportedMediaType, ImageUnreadable, ImageTooLarge, Heavy: as for `develop`.
    """
    return crops(decode(data, limits, room), count, how, seed=seed)


def decode(data: bytes, limits: ImageLimits, room: int = sys.maxsize) -> Image.Image:
    """Return the first frame of an encoded image as RGB: fully decoded, upright, 8 bits, on white where transparent.

    Colour profiles are not applied, as in the preprocessing that the encoders were trained with.

    Raises:
        UnsupportedMediaType: its format is known and not accepted.
        ImageUnreadable: it is no picture, or a broken one.
        ImageTooLarge: it has more bytes or pixels than allowed.
        Heavy: decoding it takes more than `room` bytes.
    """
    kind = checked_format(data, limits)
    try:
        check_parts(data, kind)
        if kind == "WEBP":  # its parser takes the memory of two pictures as soon as it sees a file
            check_pixels(webp_size(data), limits)
            check_memory(webp_size(data), WEBP_BYTES, room)
        if kind == "JPEG" and (size := small_jpeg_size(data)):
            check_pixels(size, limits)
            check_memory(size, BASELINE_BYTES, room)
            with suppress(ValueError):  # of a broken one the parser says what is wrong
                return Image.frombytes("RGB", size, data, "jpeg", "RGB", "")
        with PARSERS[kind](BytesIO(data)) as image:
            check_pixels(image.size, limits)
            check_memory(image.size, decoding_bytes(image, kind), room)
            image.load()
            return upright_rgb(image)
    except (ImageFault, Heavy):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{error} Scale the image down before sending it.") from error
    except Exception as error:  # a parser shown hostile bytes raises anything, from KeyError to MemoryError
        raise ImageUnreadable(
            f"The {kind} image cannot be decoded: {parser_reason(error)}. "
            "Check that the file is whole and opens elsewhere."
        ) from error
