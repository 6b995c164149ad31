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

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from core.encoders.protocol import Preprocess
from core.encoders.views import augmented, crops, digest, joined, plain, seed_of

MAX_SIDE = 65_535
"""Longest side in pixels, JPEG's own limit: every row costs memory beside its pixels."""

MAX_JPEG_SEGMENTS = 1024
"""Metadata and tables; a profile and a description of the largest kind make 512."""

MAX_JPEG_SCANS = 64
"""Passes over the picture; encoders write about ten. Each may cost 65 bytes and 40 ms."""

MAX_PNG_CHUNKS = 65_536
"""Pixels in the usual chunks of 8 KiB would be 512 MiB."""


class ImageFault(Exception):
    """Why one image cannot be used; the message is for the person who sent it."""

    slug: ClassVar[str]
    status: ClassVar[int]


class UnsupportedMediaType(ImageFault):
    """The image has a format that is known, and not accepted here."""

    slug = "unsupported-media-type"
    status = 415


class ImageUnreadable(ImageFault):
    """The bytes are no picture, or a broken one."""

    slug = "image-unreadable"
    status = 422


class ImageTooLarge(ImageFault):
    """The image has more bytes or pixels than allowed."""

    slug = "image-too-large"
    status = 413


class Heavy(Exception):
    """Decoding an image takes `cost` bytes of memory, more than it may take now. Nothing was decoded."""

    def __init__(self, cost: int) -> None:
        super().__init__(cost)
        self.cost = cost


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What an image may be: its size in bytes, its pixels by its header, and its format.

    `formats` are names out of JPEG, PNG, WEBP, GIF, BMP and TIFF. What decoding takes is told by
    `_bytes_a_pixel`.

    Raises:
        ValueError: a limit is below one, or a format is unknown or none is given.
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = 40_000_000
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise ValueError(f"Image limits of {self.max_bytes} bytes and {self.max_pixels} pixels admit no image.")
        if not self.formats or not set(self.formats) <= set(_PARSERS):
            raise ValueError(f"Image formats {self.formats} are not out of {', '.join(_PARSERS)}.")


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
    kind = _admitted(data, limits)
    try:
        _refuse_busy(data, kind)
        if kind == "WEBP":  # its parser takes the memory of two pictures as soon as it sees a file
            _refuse_large(_webp_size(data), limits)
            _refuse_heavy(_webp_size(data), _WEBP_BYTES, room)
        if kind == "JPEG" and (size := _ordinary_size(data)):
            _refuse_large(size, limits)
            _refuse_heavy(size, _BASELINE_BYTES, room)
            with suppress(ValueError):  # of a broken one the parser says what is wrong
                return Image.frombytes("RGB", size, data, "jpeg", "RGB", "")
        with _PARSERS[kind](BytesIO(data)) as image:
            _refuse_large(image.size, limits)
            _refuse_heavy(image.size, _bytes_a_pixel(image, kind), room)
            image.load()
            return _upright(image)
    except (ImageFault, Heavy):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{error} Scale the image down before sending it.") from error
    except Exception as error:  # a parser shown hostile bytes raises anything, from KeyError to MemoryError
        raise ImageUnreadable(
            f"The {kind} image cannot be decoded: {_reason(error)}. Check that the file is whole and opens elsewhere."
        ) from error


# What the bytes are ---------------------------------------------------------------------------------------------------


def _admitted(data: bytes, limits: ImageLimits) -> str:
    """Return the format's name where bytes and format are allowed."""
    if not data:
        raise ImageUnreadable("The image is empty: it has 0 bytes. Check how it was read before it was sent.")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"The image has {len(data):,} bytes; the limit is {limits.max_bytes:,} bytes."
            " Scale it down or compress it more strongly before sending it."
        )
    kind = _format_of(data)
    if kind is None:
        raise ImageUnreadable(
            f"The {len(data):,} bytes are no image in a known format. Send a {_names(limits.formats)} file."
        )
    if kind not in limits.formats:
        raise UnsupportedMediaType(
            f"The image is in the format {kind}, which is not accepted here. Send it as {_names(limits.formats)}."
        )
    return kind


def _format_of(data: bytes) -> str | None:
    """Return the format that the first bytes name, one of `_PARSERS` or another that deserves a name; else None."""
    return next((name for name, pattern in _SIGNATURES.items() if pattern.match(data)), None)


# Read by ourselves, since asking a parser would mean to show unwanted formats to it.
_SIGNATURES: dict[str, re.Pattern[bytes]] = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "JPEG": rb"\xff\xd8\xff",
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "WEBP": rb"RIFF.{4}WEBP",
        "GIF": rb"GIF8[79]a",
        "BMP": rb"BM.{13}\0\0\0",
        "TIFF": rb"II[*+]\0|MM\0[*+]",
        "AVIF": rb".{4}ftypavi[fs]",
        "HEIC": rb".{4}ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1)",
        "JPEG 2000": rb"\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51",
        "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n",
        "ICO": rb"\0\0[\1\2]\0[^\0]\0",
        "PSD": rb"8BPS\0[\1\2]",
        "PDF": rb"%PDF-",
        "PostScript": rb"%!PS",
        "SVG": rb"(?:\xef\xbb\xbf)?\s*<(?:svg|(?:\?xml|!DOCTYPE svg|!--).{0,1000}<svg)[\s>]",
    }.items()
}


def _names(formats: tuple[str, ...]) -> str:
    *others, last = formats
    return f"{', '.join(others)} or {last}" if others else last


def _reason(error: Exception) -> str:
    """Return what a parser said, short and on one line."""
    said = str(error) if error.args else ""  # a SyntaxError without words says "None"
    return " ".join(said.split())[:200].rstrip(".") or type(error).__name__


# What would cost too much ---------------------------------------------------------------------------------------------


def _refuse_large(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"The image has {width} x {height} = {width * height:,} pixels; the limit is {limits.max_pixels:,} pixels."
            " Scale it down before sending it."
        )
    if max(size) > MAX_SIDE:
        raise ImageTooLarge(
            f"The image has {width} x {height} pixels; the limit is {MAX_SIDE:,} pixels a side."
            " Cut or scale it down before sending it."
        )


def _refuse_heavy(size: tuple[int, int], bytes_a_pixel: int, room: int) -> None:
    if (cost := size[0] * size[1] * bytes_a_pixel) > room:
        raise Heavy(cost)


def _bytes_a_pixel(image: ImageFile, kind: str) -> int:
    """Return about what decoding takes, converting to upright RGB included."""
    if kind == "WEBP":
        return _WEBP_BYTES
    return 12 if "progressive" in image.info else _BASELINE_BYTES


_BASELINE_BYTES = 8
_WEBP_BYTES = 16


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height by the header of a WebP; (0, 0) where there is none that makes sense.

    https://developers.google.com/speed/webp/docs/riff_container, RFC 6386 9.1, and of lossless ones RFC 9649 3.
    """
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:  # noqa: PLR2004 - of the longest of the three
        return 0, 0
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        sides = int.from_bytes(body[1:5], "little")
        return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _refuse_busy(data: bytes, kind: str) -> None:
    """Refuse files made of countless tiny parts: within every other limit, they can hold a parser for hours.

    Raises:
        ImageUnreadable: a JPEG has too many segments or scans, or a PNG too many chunks.
    """
    if kind == "JPEG" and not _has_few_markers(data):
        segments = scans = 0
        for is_scan in _jpeg_segments(data):
            segments, scans = segments + 1, scans + is_scan
            if segments > MAX_JPEG_SEGMENTS or scans > MAX_JPEG_SCANS:
                raise ImageUnreadable(
                    f"The JPEG image has more than {MAX_JPEG_SCANS} scans or {MAX_JPEG_SEGMENTS:,} segments, as no"
                    " camera or program writes them. Save it anew."
                )
    if kind == "PNG" and any(count > MAX_PNG_CHUNKS for count in _png_chunks(data)):
        raise ImageUnreadable(f"The PNG image has more than {MAX_PNG_CHUNKS:,} chunks. Save it anew.")


_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # those that start a segment, or end the picture


def _has_few_markers(data: bytes) -> bool:
    """Return whether a small JPEG has fewer markers, and so segments and scans, than would be too many of either."""
    return len(data) <= _SMALL and len(_JPEG_MARKER.findall(data)) <= MAX_JPEG_SCANS


def _jpeg_segments(data: bytes) -> Iterator[bool]:
    """Yield for each segment of the picture whether a scan follows it.

    What comes after the picture's end is not looked at: phones append a film there.
    """
    at, scanned = 2, False
    while marker := _JPEG_MARKER.search(data, at):
        is_scan, is_end = marker[1] == b"\xda", marker[1] == b"\xd9"
        if is_end and scanned:
            return
        yield is_scan
        scanned |= is_scan
        at = marker.end() + (0 if is_end else int.from_bytes(data[marker.end() : marker.end() + 2], "big"))


def _png_chunks(data: bytes) -> Iterator[int]:
    """Yield the number of each chunk, from 1."""
    at, count = 8, 0
    while at < len(data):
        count += 1
        yield count
        at += 12 + int.from_bytes(data[at : at + 4], "big")


# Small JPEGs ----------------------------------------------------------------------------------------------------------

_SMALL = 65_536
"""Bytes of a file that Pillow hands to its decoder in one piece. Of a larger one the decoder takes nearly all time."""

# Quantisation tables of 8 bits, and three colours of 8 bits that are coded in one pass.
_ORDINARY_HEAD = re.compile(
    rb"\xff\xd8\xff\xe0\0\x10JFIF\0.{9}(?:\xff\xdb\0\x43[\0-\3].{64})+\xff\xc0\0\x11\x08(..)(..)\x03.{9}", re.DOTALL
)
_HUFFMAN_TABLES = b"\xff\xc4"
_SCAN_HEAD = re.compile(rb"\xff\xda\0\x0c\x03.{9}", re.DOTALL)


def _ordinary_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a small JPEG with nothing in its head but what decoding needs; of any other None.

    Of such a file the decoder alone makes the same pixels at about half the price: Pillow's parser is Python. One with
    a comment or a description in it is none.
    """
    head = _ORDINARY_HEAD.match(data) if len(data) <= _SMALL else None
    if head is None:
        return None
    at = head.end()
    while data.startswith(_HUFFMAN_TABLES, at):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    height, width = int.from_bytes(head[1], "big"), int.from_bytes(head[2], "big")
    return (width, height) if width and height and _SCAN_HEAD.match(data, at) else None


# The parsers ----------------------------------------------------------------------------------------------------------


class _Jpeg(JpegImageFile):
    """One JPEG and nothing in it: no pictures behind the first, no resolution out of its EXIF block."""

    def _read_dpi_from_exif(self) -> None:
        # Nobody asks for it, and on a garbled block it would warn or fail though the picture is fine.
        return


_PARSERS: dict[str, Callable[[BytesIO], ImageFile]] = {
    "JPEG": _Jpeg,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}


# From what was decoded to RGB -----------------------------------------------------------------------------------------


def _upright(image: ImageFile) -> Image.Image:
    """Return the loaded image as RGB, turned as its EXIF orientation says."""
    turn = _TURNS.get(_orientation(image))
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8 if it makes sense; 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - garbled EXIF raises anything, and must not fail a fine picture
        return 1


def _rgb(image: ImageFile) -> Image.Image:
    """Return the loaded image with three channels of 8 bits, over white where it is transparent."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        clear = image if image.mode == "RGBA" else image.convert("RGBA")
        white.paste(clear, mask=clear)
        return white
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for one of Adobe's, whose inks are inverted; only their marker says so.
        return ImageChops.invert(image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return grey values of more than 8 bits, (h, w), as the 8 highest ones.

    32-bit integers and floats do not say where white is: it is the end of the narrowest of 8, 16 and 31 bits that
    holds them all, and for floats 1, or 255, or failing both the brightest value, with the darkest then black.
    """
    if values.dtype.kind == "f":
        return _stretched(values)
    known = (16,) if values.dtype.itemsize == np.dtype(np.uint16).itemsize else (8, 16, 31)
    bits = next(bits for bits in known if int(values.max()) < 1 << bits)
    return (values.clip(0) >> (bits - 8)).astype(np.uint8)


def _stretched(values: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it holds values that are not finite")
    if low >= 0 and high <= _WHITE:
        low, high = 0.0, 1.0 if high <= 1 else float(_WHITE)
    # In float64, as the distance of two float32 values may be none.
    shares = np.subtract(values, low, dtype=np.float64) / ((high - low) or 1.0)
    levels: NDArray[np.uint8] = np.rint(_WHITE * shares).astype(np.uint8)
    return levels


_WHITE = 255
