"""Small ordinary JPEGs, whose size is read without Pillow's parser."""

from __future__ import annotations

import re

# Small JPEGs ----------------------------------------------------------------------------------------------------------

SMALL_BYTES = 65_536
"""Bytes of a file that Pillow hands to its decoder in one piece. Of a larger one the decoder takes nearly all time."""

# Quantisation tables of 8 bits, and three colours of 8 bits that are coded in one pass.
_ORDINARY_HEAD = re.compile(
    rb"\xff\xd8\xff\xe0\0\x10JFIF\0.{9}(?:\xff\xdb\0\x43[\0-\3].{64})+\xff\xc0\0\x11\x08(..)(..)\x03.{9}", re.DOTALL
)
_HUFFMAN_TABLES = b"\xff\xc4"
_SCAN_HEAD = re.compile(rb"\xff\xda\0\x0c\x03.{9}", re.DOTALL)


def small_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a small JPEG with nothing in its head but what decoding needs; of any other None.

    Of such a file the decoder alone makes the same pixels at about half the price: Pillow's parser is Python. One with
    a comment or a description in it is none.
    """
    head = _ORDINARY_HEAD.match(data) if len(data) <= SMALL_BYTES else None
    if head is None:
        return None
    at = head.end()
    while data.startswith(_HUFFMAN_TABLES, at):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    height, width = int.from_bytes(head[1], "big"), int.from_bytes(head[2], "big")
    return (width, height) if width and height and _SCAN_HEAD.match(data, at) else None
