"""Image formats: signatures and Pillow's parsers."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO

from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile


def format_of(data: bytes) -> str | None:
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


def listed(formats: tuple[str, ...]) -> str:
    """Return format names as a phrase: `A, B or C`."""
    *others, last = formats
    return f"{', '.join(others)} or {last}" if others else last


def parser_reason(error: Exception) -> str:
    """Return what a parser said, short and on one line."""
    said = str(error) if error.args else ""  # a SyntaxError without words says "None"
    return " ".join(said.split())[:200].rstrip(".") or type(error).__name__


# The parsers ----------------------------------------------------------------------------------------------------------


class _Jpeg(JpegImageFile):
    """One JPEG and nothing in it: no pictures behind the first, no resolution out of its EXIF block."""

    def _read_dpi_from_exif(self) -> None:
        # Nobody asks for it, and on a garbled block it would warn or fail though the picture is fine.
        return


PARSERS: dict[str, Callable[[BytesIO], ImageFile]] = {
    "JPEG": _Jpeg,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
