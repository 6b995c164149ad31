"""The safetensors container of an export file: header, metadata, stretches of bytes."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest

from .columns import (
    COLUMNS,
    DTYPES,
    FORMAT,
    HEADER_BYTES,
    LENGTH_PREFIX,
    METADATA_CHARS,
    METADATA_KEY,
    OFFSETS_COLUMNS,
    STATISTICS_COLUMNS,
    TRAINING_CHARS,
    TRAINING_KEY,
    VERSION,
    Columns,
    quoted,
)

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
LARGEST_DIM = 1 << 16
MOST_MARKS = 1 << 14
INT64 = range(1 << 63)


def read_container(data: NDArray[np.uint8]) -> tuple[dict[str, str], Columns]:
    """Return a safetensors file's metadata, each value a string of fair length, and its columns, types checked."""
    (length,) = LENGTH_PREFIX.unpack(data[: LENGTH_PREFIX.size].tobytes())
    start = LENGTH_PREFIX.size + length
    if start > len(data) or length > HEADER_BYTES:
        raise InvalidRequest(
            f"The file is no safetensors file, or is cut off: it announces a header of {length} bytes and has "
            f"{len(data)} in all; a header may have {HEADER_BYTES}."
        )
    header = parse_json(data[LENGTH_PREFIX.size : start].tobytes(), "header", MOST_MARKS)
    metadata = _checked_metadata(header.pop(METADATA_KEY, None))
    # All of what belongs to offsets or to statistics, or nothing: then the file is that of a release without them.
    without = frozenset() if TRAINING_KEY in metadata else OFFSETS_COLUMNS
    without |= frozenset() if STATISTICS_COLUMNS & set(header) else STATISTICS_COLUMNS
    wanted = [name for name in COLUMNS if name not in without]
    _check_names(header, wanted, "tensor")
    body = data[start:]
    stretches = {name: _stretch(name, header[name]) for name in wanted}
    _check_cover(stretches.values(), len(body))
    return metadata, {
        name: body[begin:end].view(DTYPES[COLUMNS[name][0]]).reshape(shape)
        for name, (shape, begin, end) in stretches.items()
    }


def parse_json(text: bytes, what: str, most: int) -> dict[str, Any]:
    """Return a JSON object that has no name twice, and `most` strings and characters outside of them at most.

    That bounds how many objects are made of it: an empty list takes two characters, and fifty times the memory.
    """
    if not _few_marks(text, most):
        raise InvalidRequest(f"The file's {what} is no JSON, or holds more values than are allowed.")
    try:
        found = json.loads(text.decode(), object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The file's {what} is no valid JSON.") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"The file's {what} is no JSON object.")
    return found


def _few_marks(text: bytes, most: int) -> bool:
    """Return whether a text has `most` strings and characters outside of them at most; it looks no further."""
    count = end = 0
    for string in _STRING.finditer(text):
        count += 1 + string.start() - end
        end = string.end()
        if count > most:
            return False
    return count + len(text) - end <= most


def _named_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequest(f"The file names {quoted(twice)} twice.")
    return found


def _checked_metadata(found: Any) -> dict[str, str]:
    """Return the metadata if the format is known, nothing is missing, unknown, no text, or too long."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InvalidRequest(f"The file is no exported memory: its metadata does not say the format {FORMAT!r}.")
    version = found.get("version")
    # Before anything else: another version may have other names.
    if version != VERSION:
        named = f"is of version {quoted(version)}" if isinstance(version, str) else "does not say the version"
        raise InvalidRequest(
            f"The file {named} of its format; this service reads version {VERSION!r}. Import it with the release that "
            "wrote it, or export it anew."
        )
    wanted = {**METADATA_CHARS, **({TRAINING_KEY: TRAINING_CHARS} if TRAINING_KEY in found else {})}
    _check_names(found, wanted, "metadata")
    for name, value in found.items():
        check_text(name, value, wanted[name])
    return found


def _check_names(found: Mapping[str, Any], wanted: Iterable[str], what: str) -> None:
    for name in wanted:
        if name not in found:
            raise InvalidRequest(f"The file lacks the {what} {name!r}.")
    for name in set(found).difference(wanted):
        raise InvalidRequest(f"The file has the {what} {quoted(name)}, which version {VERSION!r} does not know.")


def check_text(name: str, value: Any, limit: int) -> None:
    """Raise InvalidRequest if a metadata value is no text of fair length."""
    if not isinstance(value, str) or len(value) > limit:
        raise InvalidRequest(f"The metadata {name!r} is no text of at most {limit} characters.")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in set(value)):
        raise InvalidRequest(f"The metadata {name!r} holds a control character or is not valid Unicode.")


def _stretch(name: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    """Return shape, first byte and end of a column if they agree with each other and with its type and rank."""
    dtype, rank = COLUMNS[name]
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidRequest(f"The tensor {name!r} is not described by dtype, shape and data_offsets.")
    if entry["dtype"] != dtype:
        raise InvalidRequest(f"The tensor {name!r} is of type {quoted(entry['dtype'])}; expected {dtype}.")
    shape = _counts(name, "shape", entry["shape"], rank)
    begin, end = _counts(name, "data_offsets", entry["data_offsets"], 2)
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise InvalidRequest(f"The tensor {name!r} has {end - begin} bytes, which is not what its shape takes.")
    if rank > 1 and shape[-1] > LARGEST_DIM:
        raise InvalidRequest(
            f"The tensor {name!r} has features of {shape[-1]} entries; at most {LARGEST_DIM} are read."
        )
    return shape, begin, end


def _counts(name: str, what: str, found: Any, count: int) -> tuple[int, ...]:
    if isinstance(found, list) and len(found) == count and all(type(one) is int and one in INT64 for one in found):
        return tuple(found)
    raise InvalidRequest(f"The {what} of the tensor {name!r} is not {count} whole numbers from 0 on.")


def _check_cover(stretches: Iterable[tuple[tuple[int, ...], int, int]], size: int) -> None:
    """Return if the columns fill the file's body, without a gap, an overlap or a rest."""
    at = 0
    for begin, end in sorted((begin, end) for _, begin, end in stretches):
        if begin != at:
            raise InvalidRequest(f"The file's tensors overlap or leave a gap at byte {min(begin, at)}.")
        at = end
    if at != size:
        raise InvalidRequest(f"The file is cut off, or too long: its tensors take {at} bytes and it has {size}.")
