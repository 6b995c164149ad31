"""Limits of an image: bytes, pixels, memory, and the number of its parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL.ImageFile import ImageFile

from .errors import Heavy, ImageTooLarge, ImageUnreadable, UnsupportedMediaType
from .formats import PARSERS, format_of, listed
from .small_jpeg import SMALL_BYTES

MAX_SIDE = 65_535
"""Longest side in pixels, JPEG's own limit: every row costs memory beside its pixels."""

MAX_JPEG_SEGMENTS = 1024
"""Metadata and tables; a profile and a description of the largest kind make 512."""

MAX_JPEG_SCANS = 64
"""Passes over the picture; encoders write about ten. Each may cost 65 bytes and 40 ms."""

MAX_PNG_CHUNKS = 65_536
"""Pixels in the usual chunks of 8 KiB would be 512 MiB."""


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
        if not self.formats or not set(self.formats) <= set(PARSERS):
            raise ValueError(f"Image formats {self.formats} are not out of {', '.join(PARSERS)}.")


# What the bytes are ---------------------------------------------------------------------------------------------------


def checked_format(data: bytes, limits: ImageLimits) -> str:
    """Return the format's name where bytes and format are allowed."""
    if not data:
        raise ImageUnreadable("The image is empty: it has 0 bytes. Check how it was read before it was sent.")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"The image has {len(data):,} bytes; the limit is {limits.max_bytes:,} bytes."
            " Scale it down or compress it more strongly before sending it."
        )
    kind = format_of(data)
    if kind is None:
        raise ImageUnreadable(
            f"The {len(data):,} bytes are no image in a known format. Send a {listed(limits.formats)} file."
        )
    if kind not in limits.formats:
        raise UnsupportedMediaType(
            f"The image is in the format {kind}, which is not accepted here. Send it as {listed(limits.formats)}."
        )
    return kind


# What would cost too much ---------------------------------------------------------------------------------------------


def check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    """Raise ImageTooLarge if an image has more pixels than the limit."""
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


def check_memory(size: tuple[int, int], bytes_a_pixel: int, room: int) -> None:
    """Raise Heavy if decoding takes more memory than there is."""
    if (cost := size[0] * size[1] * bytes_a_pixel) > room:
        raise Heavy(cost)


def decoding_bytes(image: ImageFile, kind: str) -> int:
    """Return about what decoding takes, converting to upright RGB included."""
    if kind == "WEBP":
        return WEBP_BYTES
    return 12 if "progressive" in image.info else BASELINE_BYTES


BASELINE_BYTES = 8
WEBP_BYTES = 16


def webp_size(data: bytes) -> tuple[int, int]:
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


def check_parts(data: bytes, kind: str) -> None:
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
    return len(data) <= SMALL_BYTES and len(_JPEG_MARKER.findall(data)) <= MAX_JPEG_SCANS


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
