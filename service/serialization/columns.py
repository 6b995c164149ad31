"""The columns of an export file: names, types, limits."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "dmn-memory"
VERSION = "1"
"""Version of the format. A file of another one is refused."""

HEADER_BYTES = 100_000_000
"""Bytes of the longest header, as the safetensors library has it."""

COLUMNS: Mapping[str, tuple[str, int]] = {
    "dynamic.entropies": ("F64", 1),
    "static.image_sizes": ("I64", 1),
    "dynamic.classes": ("I32", 1),
    "static.classes": ("I32", 1),
    "barred.classes": ("I32", 1),
    "offsets.classes": ("I32", 1),
    "statistics.classes": ("I32", 1),
    "offsets.rows": ("F32", 2),
    "statistics.rows": ("F32", 2),
    "statistics.shared": ("F32", 1),
    "dynamic.features": ("F16", 2),
    "static.features": ("F16", 2),
    "dynamic.ids": ("U8", 1),
    "static.ids": ("U8", 1),
    "barred.ids": ("U8", 1),
    "static.has_feature": ("U8", 1),
    "static.images": ("U8", 1),
}
"""Type and rank of each column, in the order of the file: the widest first, so that each begins where it should."""

OFFSETS_COLUMNS = frozenset(("offsets.classes", "offsets.rows"))
"""Columns of a memory that has trained offsets: both, and the metadata `training`, or none of them."""

STATISTICS_COLUMNS = frozenset(("statistics.classes", "statistics.rows", "statistics.shared"))
"""Columns of a memory that has class statistics: all of them, or none."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "U8": np.dtype("u1"),
}
METADATA_CHARS: Mapping[str, int] = {
    "format": 64,
    "version": 64,
    "tenant": 64,
    "created": 64,
    "fingerprint": 256,
    "origin": 1 << 16,
    "labelling": 64,
    "config": HEADER_BYTES,
    "epoch": 15,
    "memory_version": 15,
}
"""What is said beside the columns, and in how many characters at most."""

TRAINING_KEY = "training"
TRAINING_CHARS = 4096

METADATA_KEY = "__metadata__"
LENGTH_PREFIX = struct.Struct("<Q")
ID_CHARS = 64

Columns = Mapping[str, NDArray[Any]]
"""The columns of a file by name, as views into it."""


def quoted(value: Any) -> str:
    """Return what a file says, short enough and plain enough for a sentence."""
    return ascii(value[:ID_CHARS]) if isinstance(value, str) else "no text"
