"""Pictures made in memory, ordinary and odd: each function returns the bytes that a client would send."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
"""EXIF tag of the orientation."""


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Return an RGB picture with a gradient, a red corner and a blue block: no two of its turns and flips are equal."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = x, y[:, None], (x + y[:, None]) / 2
    pixels[: max(1, height // 4), : max(1, width // 4)] = (230, 20, 20)
    pixels[height // 2 :, : max(1, width // 3)] = (20, 30, 220)
    return Image.fromarray(pixels)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an RGB picture of independent random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the picture in one of Pillow's formats."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(width: int = 96, height: int = 64, **options: Any) -> bytes:
    return encoded(scene(width, height), "JPEG", **{"quality": 95, "subsampling": 0} | options)


def png(width: int = 96, height: int = 64) -> bytes:
    return encoded(scene(width, height), "PNG")


def webp(width: int = 96, height: int = 64) -> bytes:
    return encoded(scene(width, height), "WEBP", lossless=True)


def gif(width: int = 96, height: int = 64) -> bytes:
    return encoded(scene(width, height), "GIF")


def animated(kind: str) -> bytes:
    """Return a GIF, WebP or PNG of three frames: red, green, blue."""
    first, *others = (Image.new("RGB", (32, 24), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    return encoded(first, kind, save_all=True, append_images=others, duration=100, lossless=True)


def truncated(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def text() -> bytes:
    """Return what somebody renamed to .jpg."""
    return b"Dear all, please find the picture attached. " * 40


def huge_png(side: int = 13_000) -> bytes:
    """Return a PNG of side x side black pixels, 1 bit each, in a few kilobytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return _png(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), body)


def claiming_png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims any size, with hardly any pixels behind it."""
    return _png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(64)))


def chunked_png(count: int) -> bytes:
    """Return a fine small PNG with `count` empty private chunks."""
    data = png(8, 8)
    return data[:33] + chunk(b"teSt", b"") * count + data[33:]


def text_bomb_png(size: int = 2**26) -> bytes:
    """Return a PNG with a compressed text chunk that unpacks to `size` bytes."""
    data = png(8, 8)
    return data[:33] + chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(size), 9)) + data[33:]


def profile_bomb_png(size: int = 2**26) -> bytes:
    """Return a PNG with a colour profile that unpacks to `size` bytes."""
    data = png(8, 8)
    return data[:33] + chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(size), 9)) + data[33:]


def chunk(name: bytes, body: bytes) -> bytes:
    """Return one PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(header: bytes, body: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def cmyk() -> Image.Image:
    """Return a CMYK picture of three blocks: pure cyan, pure yellow, paper white."""
    pixels = np.zeros((48, 96, 4), np.uint8)
    pixels[:, :32, 0] = 255
    pixels[:, 32:64, 2] = 255
    return Image.fromarray(pixels, "CMYK")


def cmyk_jpeg() -> bytes:
    """Return `cmyk()` as Adobe's programs write it: inverted, with their marker."""
    return encoded(cmyk(), "JPEG", quality=95)


def plain_cmyk_jpeg() -> bytes:
    """Return `cmyk()` as everybody else may write it: not inverted, without Adobe's marker."""
    data = encoded(Image.eval(cmyk(), lambda level: 255 - level), "JPEG", quality=95)
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def grey16_png() -> bytes:
    """Return a 16-bit grey PNG, 256 x 2, whose high byte is the column and whose low byte is 255 in row 1."""
    columns = np.arange(256, dtype=np.uint16) << 8
    return encoded(Image.fromarray(np.stack([columns, columns | 255])), "PNG")


def rgba_png() -> bytes:
    """Return a blue PNG, 3 x 1: opaque, half transparent, transparent."""
    pixels = np.array([[(0, 0, 255, 255), (0, 0, 255, 128), (0, 0, 255, 0)]], np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def la_png() -> bytes:
    """Return a black grey-and-alpha PNG, 3 x 1: opaque, half transparent, transparent."""
    return encoded(Image.fromarray(np.array([[(0, 255), (0, 128), (0, 0)]], np.uint8), "LA"), "PNG")


def palette_png() -> bytes:
    """Return a palette PNG, 3 x 1: red, green half transparent, blue transparent."""
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return encoded(image, "PNG", transparency=bytes([255, 128, 0]))


def keyed_png() -> bytes:
    """Return an RGB PNG, 2 x 1, black and red, that calls black transparent."""
    return encoded(Image.fromarray(np.array([[(0, 0, 0), (255, 0, 0)]], np.uint8)), "PNG", transparency=(0, 0, 0))


def bilevel_png() -> bytes:
    """Return a 1-bit PNG, 2 x 1: black, white."""
    return encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), "PNG")


def one_pixel(kind: str = "PNG") -> bytes:
    return encoded(Image.new("RGB", (1, 1), (10, 200, 30)), kind)


def heavy_png(size: int = 20 * 10**6) -> bytes:
    """Return a fine small PNG of at least `size` bytes."""
    return png(8, 8) + bytes(size)


def turned(orientation: int, kind: str = "PNG") -> bytes:
    """Return the scene, stored so that this EXIF orientation makes it upright again."""
    undo = {
        1: (),
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }
    image = scene()
    for step in undo.get(orientation, ()):
        image = image.transpose(step)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def broken_exif_jpeg(garbage: bytes = b"II*\0\x08\0\0\0\xff\xff" + bytes(range(40))) -> bytes:
    """Return a fine JPEG with an EXIF block of garbage."""
    return with_segment(jpeg(), b"\xe1", b"Exif\0\0" + garbage)


def with_segment(data: bytes, marker: bytes, body: bytes, count: int = 1) -> bytes:
    """Return the JPEG with `count` copies of one more segment behind its start."""
    return data[:2] + (b"\xff" + marker + struct.pack(">H", 2 + len(body)) + body) * count + data[2:]


def scanned_jpeg(scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated `scans` times: a few bytes each, a whole pass to decode."""
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]
