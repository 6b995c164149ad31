"""From a loaded image to upright RGB with 8 bits a channel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops
from PIL.ImageFile import ImageFile

# From what was decoded to RGB -----------------------------------------------------------------------------------------


def upright_rgb(image: ImageFile) -> Image.Image:
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
