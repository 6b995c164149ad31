"""One tenant's memory as one file, for export, import and snapshots: safetensors, by columns, the rest as metadata.

```
dynamic.entropies   F64 (n,)     nats                          static.image_sizes  I64 (m,)    bytes; 0: none kept
dynamic.classes     I32 (n,)     position in the config        static.classes      I32 (m,)
dynamic.features    F16 (n, d)   bit for bit                   static.features     F16 (f, d)  of those that have one
dynamic.ids         U8           one a line                    static.ids          U8
barred.classes      I32 (b,)                                   static.has_feature  U8 (m,)     0: waits for its feature
barred.ids          U8                                         static.images       U8          one after the other
```

Where a tenant has trained offsets or class statistics there are, besides:

```
offsets.classes     I32 (o,)                                   statistics.classes  I32 (r,)
offsets.rows        F32 (o, 5 d)                               statistics.rows     F32 (r, 1 + d)  s_c and S_c
                                                               statistics.shared   F32             n, G, M, ...
```

Rows stand in the order of the classes; within one, slots by (entropy, id), shots and barred ids by id. So a memory has
one file only, byte for byte, and a class is one stretch of each column. Metadata are strings: `format`, `version` (of
the format), `tenant`, `created`, `fingerprint`, `origin` and `config` (both JSON), `labelling`, `epoch`,
`memory_version`; and `training` (JSON) where there are offsets, which a release that does not know them refuses.

Any safetensors reader opens such a file. The container is written and read here all the same: the library orders
metadata at random, wants each column whole in memory, and lets a name pass that comes twice. What comes in may be
hostile, so nothing is made in a size that the file claims before the file's own size has confirmed it.
"""

from __future__ import annotations

import json
import math
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from core.errors import IncompatibleMemory
from core.memory.codec import FEATURE_BYTES
from service.domain.tenant import ClassSpec, TenantConfig, checked, tenant_name
from service.errors import DuplicateClass, InvalidRequest, LimitExceeded
from service.memory.statistics import dim_of_shared, shared_entries
from service.settings import Settings
from service.stores.protocol import (
    OFFSETS,
    SEED,
    Count,
    Stamp,
    StoredBank,
    StoredMemory,
    StoredOffsets,
    StoredShot,
    StoredStatistics,
    TenantRecord,
    Training,
)

FORMAT = "dmn-memory"
VERSION = "1"
"""Version of the format. A file of another one is refused."""

PART_BYTES = 1 << 20
"""Size of the parts that a file is handed out in."""

HEADER_BYTES = 100_000_000
"""Bytes of the longest header, as the safetensors library has it."""

_COLUMNS: Mapping[str, tuple[str, int]] = {
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

_OFFSETS = frozenset(("offsets.classes", "offsets.rows"))
"""Columns of a memory that has trained offsets: both, and the metadata `training`, or none of them."""

_STATISTICS = frozenset(("statistics.classes", "statistics.rows", "statistics.shared"))
"""Columns of a memory that has class statistics: all of them, or none."""

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "U8": np.dtype("u1"),
}
_METADATA: Mapping[str, int] = {
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

_TRAINING = "training"
_TRAINING_CHARS = 4096

_NAMED = "__metadata__"
_PREFIX = struct.Struct("<Q")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ID_BYTES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
_ID_CHARS = 64
_DIM = 1 << 16
_MARKS = 1 << 14
_CLASS_MARKS, _PROMPT_MARKS = 64, 4
_CHECKED_ENTRIES = 1 << 20
_INT64 = range(1 << 63)
_UNIT_TOLERANCE = 0.01
_LARGEST_OFFSET = 1e6
_LARGEST_SUM = 1e12
_PERCENT = 100.0
_BRANCHES = ("text", "static", "fused")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NATS_BELOW, _NATS_ABOVE = 1e-6, 1e-3

Columns = Mapping[str, NDArray[Any]]
"""The columns of a file by name, as views into it."""


# Writing --------------------------------------------------------------------------------------------------------------


def parts(stored: StoredMemory, *, created: str, size: int = PART_BYTES) -> Iterator[bytes]:
    """Yield the file of a memory in parts of `size` bytes, the last one shorter; nothing is copied but a part.

    The memory has to have its shots' images along. Barred ids of classes that the tenant lacks are left out, and so
    are banks without a slot. `created` is when, in ISO 8601; the same memory and time make the same bytes.

    Raises:
        LimitExceeded: the configuration is too long for a header.
        IncompatibleMemory: features are of several sizes.
    """
    columns = _columns(stored)
    pieces = chain([_header(stored, columns, created)], *(column.pieces for column in columns.values()))
    return _regrouped(pieces, size)


def size_of(stored: StoredMemory, *, created: str) -> int:
    """Return the bytes of the file that `parts` would make.

    Raises:
        LimitExceeded, IncompatibleMemory: as for `parts`.
    """
    columns = _columns(stored)
    return len(_header(stored, columns, created)) + sum(column.nbytes for column in columns.values())


def write(stored: StoredMemory, path: Path, *, created: str) -> int:
    """Write the file of a memory, as `parts` makes it, and return its bytes.

    Raises:
        LimitExceeded, IncompatibleMemory: as for `parts`; nothing was written.
    """
    made = parts(stored, created=created)
    with path.open("wb") as file:
        return sum(file.write(part) for part in made)


def dim_of(stored: StoredMemory) -> int | None:
    """Return the feature size D of a memory, or None while it has no feature."""
    for bank in stored.slots.values():
        if bank.ids:
            return len(bank.features) // len(bank.ids) // FEATURE_BYTES
    sizes = (len(shot.feature) for own in stored.shots.values() for shot in own if shot.feature)
    first = next(sizes, None)
    return None if first is None else first // FEATURE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """One column to be written: its shape, its bytes piece by piece, and how many these are."""

    shape: tuple[int, ...]
    pieces: Sequence[bytes]
    nbytes: int

    @staticmethod
    def of(values: Iterable[float], dtype: str) -> _Column:
        column = np.fromiter(values, _DTYPES[dtype])
        return _Column(shape=column.shape, pieces=(column.tobytes(),), nbytes=column.nbytes)

    @staticmethod
    def lines(ids: Iterable[str]) -> _Column:
        return _Column.joined(["\n".join(ids).encode()])

    @staticmethod
    def joined(pieces: Sequence[bytes]) -> _Column:
        size = sum(map(len, pieces))
        return _Column(shape=(size,), pieces=pieces, nbytes=size)

    @staticmethod
    def features(pieces: Sequence[bytes], rows: int, dim: int) -> _Column:
        size = sum(map(len, pieces))
        if size != rows * dim * FEATURE_BYTES:
            raise IncompatibleMemory(f"{rows} stored features have {size} bytes; expected {dim} entries each.")
        return _Column(shape=(rows, dim), pieces=pieces, nbytes=size)


def _columns(stored: StoredMemory) -> dict[str, _Column]:
    dim = dim_of(stored) or 0
    found = _dynamic_columns(stored, dim) | _static_columns(stored, dim) | _barred_columns(stored)
    if stored.offsets.training is not None:
        found |= _offset_columns(stored, stored.offsets.training)
    statistics = stored.statistics
    if statistics.shared:
        found |= _statistics_columns(stored.record.config, statistics)
    return {name: found[name] for name in _COLUMNS if name in found}


def _dynamic_columns(stored: StoredMemory, dim: int) -> dict[str, _Column]:
    banks = [stored.slots.get(spec.id, StoredBank()) for spec in stored.record.config.classes]
    count = sum(map(len, banks))
    classes = chain.from_iterable([at] * len(bank) for at, bank in enumerate(banks))
    return {
        "dynamic.classes": _Column.of(classes, "I32"),
        "dynamic.entropies": _Column.of(chain.from_iterable(bank.entropies for bank in banks), "F64"),
        "dynamic.features": _Column.features([bank.features for bank in banks], count, dim),
        "dynamic.ids": _Column.lines(chain.from_iterable(bank.ids for bank in banks)),
    }


def _static_columns(stored: StoredMemory, dim: int) -> dict[str, _Column]:
    banks = [stored.shots.get(spec.id, ()) for spec in stored.record.config.classes]
    shots = list(chain.from_iterable(banks))
    if any(shot.image is None and shot.kept for shot in shots):
        raise ValueError("The memory was loaded without the images of its shots.")
    images = [shot.image or b"" for shot in shots]
    features = [shot.feature for shot in shots if shot.feature]
    classes = chain.from_iterable([at] * len(bank) for at, bank in enumerate(banks))
    return {
        "static.classes": _Column.of(classes, "I32"),
        "static.ids": _Column.lines(shot.id for shot in shots),
        "static.has_feature": _Column.of((bool(shot.feature) for shot in shots), "U8"),
        "static.features": _Column.features(features, len(features), dim),
        "static.image_sizes": _Column.of(map(len, images), "I64"),
        "static.images": _Column.joined(images),
    }


def _barred_columns(stored: StoredMemory) -> dict[str, _Column]:
    position = {spec.id: at for at, spec in enumerate(stored.record.config.classes)}
    barred = sorted((position[own], id_) for own, id_ in stored.barred if own in position)
    return {
        "barred.classes": _Column.of((at for at, _ in barred), "I32"),
        "barred.ids": _Column.lines(id_ for _, id_ in barred),
    }


def _offset_columns(stored: StoredMemory, training: Training) -> dict[str, _Column]:
    """Return the rows of the classes that have one."""
    kept = [(at, stored.offsets.rows.get(spec.id)) for at, spec in enumerate(stored.record.config.classes)]
    rows = [row for _, row in kept if row is not None]
    width = OFFSETS * training.dim
    if any(len(row) != width * _DTYPES["F32"].itemsize for row in rows):
        raise IncompatibleMemory(f"Trained offsets are not of {width} entries a class.")
    return {
        "offsets.classes": _Column.of((at for at, row in kept if row is not None), "I32"),
        "offsets.rows": _Column(shape=(len(rows), width), pieces=rows, nbytes=sum(map(len, rows))),
    }


def _statistics_columns(config: TenantConfig, statistics: StoredStatistics) -> dict[str, _Column]:
    kept = [(at, statistics.rows[spec.id]) for at, spec in enumerate(config.classes) if spec.id in statistics.rows]
    rows, entry = [row for _, row in kept], _DTYPES["F32"].itemsize
    size = len(statistics.shared)
    width = 1 + dim_of_shared(size // entry)
    if any(len(row) != width * entry for row in rows):
        raise IncompatibleMemory("Class statistics are of several feature sizes.")
    return {
        "statistics.classes": _Column.of((at for at, _ in kept), "I32"),
        "statistics.rows": _Column(shape=(len(rows), width), pieces=rows, nbytes=sum(map(len, rows))),
        "statistics.shared": _Column(shape=(size // entry,), pieces=[statistics.shared], nbytes=size),
    }


def _header(stored: StoredMemory, columns: Mapping[str, _Column], created: str) -> bytes:
    said = _metadata(stored.record, created)
    if stored.offsets.training is not None:
        said[_TRAINING] = json.dumps(asdict(stored.offsets.training), sort_keys=True)
    entries: dict[str, Any] = {_NAMED: said}
    start = 0
    for name, column in columns.items():
        end = start + column.nbytes
        entries[name] = {"dtype": _COLUMNS[name][0], "shape": column.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX.size)
    if len(text) > HEADER_BYTES:
        raise LimitExceeded(
            f"The tenant's configuration makes a header of {len(text)} bytes; a file may have {HEADER_BYTES}. Remove "
            "classes or sentences."
        )
    return _PREFIX.pack(len(text)) + text


def _metadata(record: TenantRecord, created: str) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "tenant": record.name,
        "created": created,
        "fingerprint": record.fingerprint,
        "origin": json.dumps(dict(record.origin), ensure_ascii=False, sort_keys=True),
        "labelling": record.labelling,
        "config": record.config.to_json(),
        "epoch": str(record.stamp.epoch),
        "memory_version": str(record.stamp.version),
    }


def _regrouped(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes of pieces of any size in parts of one size."""
    held = bytearray()
    for piece in pieces:
        for start in range(0, len(piece), size):
            held += memoryview(piece)[start : start + size]
            if len(held) >= size:
                yield bytes(held[:size])
                del held[:size]
    if held:
        yield bytes(held)


# Reading --------------------------------------------------------------------------------------------------------------


def read(path: Path, *, settings: Settings) -> StoredMemory:
    """Return the memory that a file holds, all of it checked; whether the encoder fits is for the caller to see.

    The file must not change meanwhile: it is read in place.

    Raises:
        InvalidRequest: the file is damaged, contradicts itself, or is of an unknown version.
        LimitExceeded: it holds more than the settings allow a tenant.
    """
    if path.stat().st_size < _PREFIX.size:
        raise InvalidRequest("The file is no safetensors file: it is too short to have a header.")
    metadata, columns = _container(np.memmap(path, np.uint8, "r").view(np.ndarray))
    record = _record(metadata, settings)
    config = record.config
    _check_sizes(columns, settings)
    slots = _slots(columns, config, *_most(record, settings))
    return StoredMemory(
        record=record,
        slots=slots,
        shots=_shots(columns, config, settings),
        barred=_barred(columns, config, slots, settings),
        offsets=_offsets(columns, config, record.training),
        counts=_statistics(columns, config),
    )


def _container(data: NDArray[np.uint8]) -> tuple[dict[str, str], Columns]:
    """Return a safetensors file's metadata, each value a string of fair length, and its columns, types checked."""
    (length,) = _PREFIX.unpack(data[: _PREFIX.size].tobytes())
    start = _PREFIX.size + length
    if start > len(data) or length > HEADER_BYTES:
        raise InvalidRequest(
            f"The file is no safetensors file, or is cut off: it announces a header of {length} bytes and has "
            f"{len(data)} in all; a header may have {HEADER_BYTES}."
        )
    header = _json(data[_PREFIX.size : start].tobytes(), "header", _MARKS)
    metadata = _checked_metadata(header.pop(_NAMED, None))
    # All of what belongs to offsets or to statistics, or nothing: then the file is that of a release without them.
    without = frozenset() if _TRAINING in metadata else _OFFSETS
    without |= frozenset() if _STATISTICS & set(header) else _STATISTICS
    wanted = [name for name in _COLUMNS if name not in without]
    _check_names(header, wanted, "tensor")
    body = data[start:]
    stretches = {name: _stretch(name, header[name]) for name in wanted}
    _check_cover(stretches.values(), len(body))
    return metadata, {
        name: body[begin:end].view(_DTYPES[_COLUMNS[name][0]]).reshape(shape)
        for name, (shape, begin, end) in stretches.items()
    }


def _json(text: bytes, what: str, most: int) -> dict[str, Any]:
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
        raise InvalidRequest(f"The file names {_shown(twice)} twice.")
    return found


def _checked_metadata(found: Any) -> dict[str, str]:
    """Return the metadata if the format is known, nothing is missing, unknown, no text, or too long."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InvalidRequest(f"The file is no exported memory: its metadata does not say the format {FORMAT!r}.")
    version = found.get("version")
    # Before anything else: another version may have other names.
    if version != VERSION:
        named = f"is of version {_shown(version)}" if isinstance(version, str) else "does not say the version"
        raise InvalidRequest(
            f"The file {named} of its format; this service reads version {VERSION!r}. Import it with the release that "
            "wrote it, or export it anew."
        )
    wanted = {**_METADATA, **({_TRAINING: _TRAINING_CHARS} if _TRAINING in found else {})}
    _check_names(found, wanted, "metadata")
    for name, value in found.items():
        _check_text(name, value, wanted[name])
    return found


def _check_names(found: Mapping[str, Any], wanted: Iterable[str], what: str) -> None:
    for name in wanted:
        if name not in found:
            raise InvalidRequest(f"The file lacks the {what} {name!r}.")
    for name in set(found).difference(wanted):
        raise InvalidRequest(f"The file has the {what} {_shown(name)}, which version {VERSION!r} does not know.")


def _check_text(name: str, value: Any, limit: int) -> None:
    if not isinstance(value, str) or len(value) > limit:
        raise InvalidRequest(f"The metadata {name!r} is no text of at most {limit} characters.")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in set(value)):
        raise InvalidRequest(f"The metadata {name!r} holds a control character or is not valid Unicode.")


def _stretch(name: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    """Return shape, first byte and end of a column if they agree with each other and with its type and rank."""
    dtype, rank = _COLUMNS[name]
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidRequest(f"The tensor {name!r} is not described by dtype, shape and data_offsets.")
    if entry["dtype"] != dtype:
        raise InvalidRequest(f"The tensor {name!r} is of type {_shown(entry['dtype'])}; expected {dtype}.")
    shape = _counts(name, "shape", entry["shape"], rank)
    begin, end = _counts(name, "data_offsets", entry["data_offsets"], 2)
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise InvalidRequest(f"The tensor {name!r} has {end - begin} bytes, which is not what its shape takes.")
    if rank > 1 and shape[-1] > _DIM:
        raise InvalidRequest(f"The tensor {name!r} has features of {shape[-1]} entries; at most {_DIM} are read.")
    return shape, begin, end


def _counts(name: str, what: str, found: Any, count: int) -> tuple[int, ...]:
    if isinstance(found, list) and len(found) == count and all(type(one) is int and one in _INT64 for one in found):
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


def _record(metadata: Mapping[str, str], settings: Settings) -> TenantRecord:
    if not metadata["fingerprint"]:
        raise InvalidRequest("The file does not say the fingerprint of the encoder that its features came from.")
    _check_time(metadata["created"])
    return TenantRecord(
        name=tenant_name(metadata["tenant"]),
        config=_config(metadata["config"], settings),
        fingerprint=metadata["fingerprint"],
        stamp=Stamp(epoch=_count("epoch", metadata), version=_count("memory_version", metadata)),
        labelling=metadata["labelling"],
        origin=_origin(metadata["origin"]),
        training=_training(metadata[_TRAINING]) if _TRAINING in metadata else None,
    )


def _training(text: str) -> Training:
    """Return what a file says of its offsets, every number finite and in its range."""
    found, hints = _json(text.encode(), "training", _TRAINING_CHARS), get_type_hints(Training)
    if set(found) != set(hints):
        raise InvalidRequest("The file's training lacks a field, or has one that is not known here.")
    training = Training(**{name: _of_type(hints[name], name, value, "training") for name, value in found.items()})
    branches = [training.before or {}, training.after or {}]
    counts = (training.seed, training.epochs, training.shots, training.dim)
    percents = [value for branch in branches for value in branch.values()]
    if not _ID.fullmatch(training.id) or min(counts) < 0 or not 0 < training.dim <= _DIM or max(counts) not in _INT64:
        raise InvalidRequest("The file's training has an id or a number that cannot be.")
    if not all(name in _BRANCHES and 0 <= value <= _PERCENT for one in branches for name, value in one.items()):
        raise InvalidRequest("The file's training has a held-out accuracy that is no percentage of a known branch.")
    if not all(map(math.isfinite, (training.created, training.learning_rate, *percents))):
        raise InvalidRequest("The file's training has a number that is not finite.")
    return training


def _check_time(text: str) -> None:
    try:
        datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(f"The metadata 'created' is {_shown(text)}, which is no time in ISO 8601.") from error


def _count(name: str, metadata: Mapping[str, str]) -> int:
    text = metadata[name]
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequest(f"The metadata {name!r} is {_shown(text)}, which is no whole number from 0 on.")
    return int(text)


def _origin(text: str) -> dict[str, str]:
    found = _json(text.encode(), "origin", _MARKS)
    for name, value in found.items():
        _check_text("origin", name, _METADATA["origin"])
        _check_text("origin", value, _METADATA["origin"])
    return found


def _config(text: str, settings: Settings) -> TenantConfig:
    """Return the configuration of a file, as `TenantConfig.to_json` wrote it, within the limits."""
    marks = _MARKS + settings.max_classes * (_CLASS_MARKS + _PROMPT_MARKS * settings.max_prompts)
    config = _typed(_json(text.encode(), "configuration", marks))
    try:
        tidy = checked(config, settings)
    except DuplicateClass as error:
        raise InvalidRequest(f"The file's configuration is wrong: {error.detail}") from error
    if tidy != config:
        raise InvalidRequest("The file's configuration has names or sentences that are not tidy: NFC, no space around.")
    return config


def _typed(values: Mapping[str, Any]) -> TenantConfig:
    """Return the configuration of parsed JSON; a field that an older release lacks has what it did then."""
    _check_fields(values, TenantConfig)
    # What there may be many of is looked at here, up to the first fault: pydantic would make an object for each.
    typed = {"method": "dmn", **values}
    if "classes" in values:
        typed["classes"] = tuple(_spec(one) for one in _list(values["classes"], "classes"))
    if "templates" in values:
        typed["templates"] = _texts(values["templates"], "templates")
    if "weights" in values:
        typed["weights"] = tuple(_list(values["weights"], "weights"))
    hints = get_type_hints(TenantConfig)
    return TenantConfig(**{name: _of_type(hints[name], name, value) for name, value in typed.items()})


def _of_type(kind: Any, name: str, value: Any, what: str = "configuration") -> Any:
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]["msg"]
        raise InvalidRequest(f"The file's {what} is wrong at {name!r}: {fault}.") from error


def _spec(found: Any) -> ClassSpec:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise InvalidRequest("The file's configuration has a class without a name.")
    _check_fields(found, ClassSpec)
    return ClassSpec(name=found["name"], prompts=_texts(found.get("prompts", []), "prompts"))


def _texts(found: Any, what: str) -> tuple[str, ...]:
    if not all(isinstance(one, str) for one in _list(found, what)):
        raise InvalidRequest(f"The file's configuration is wrong at {what!r}: not all of them are texts.")
    return tuple(found)


def _list(found: Any, what: str) -> list[Any]:
    if not isinstance(found, list):
        raise InvalidRequest(f"The file's configuration is wrong at {what!r}: it is no list.")
    return found


def _check_fields(values: Mapping[str, Any], kind: type[TenantConfig | ClassSpec]) -> None:
    for name in set(values).difference(one.name for one in fields(kind)):
        raise InvalidRequest(f"The file's configuration has the field {_shown(name)}, which is not known here.")


def _check_sizes(columns: Columns, settings: Settings) -> None:
    """Return if rows agree in number, features in size, and all together are no more bytes than a tenant may hold."""
    for first, *others in (
        ("dynamic.classes", "dynamic.entropies", "dynamic.features"),
        ("static.classes", "static.has_feature", "static.image_sizes"),
    ):
        for other in others:
            if len(columns[other]) != len(columns[first]):
                raise InvalidRequest(
                    f"The tensors {first!r} and {other!r} have {len(columns[first])} and {len(columns[other])} rows."
                )
    features = [columns["dynamic.features"], columns["static.features"]]
    dims = {rows.shape[1] for rows in features if len(rows)}
    if len(dims) > 1 or 0 in dims:
        raise InvalidRequest(f"Features have {' and '.join(map(str, sorted(dims)))} entries; expected one size.")
    offsets = columns["offsets.rows"].nbytes if "offsets.rows" in columns else 0
    total = sum(rows.nbytes for rows in features) + columns["static.images"].nbytes + offsets
    if total > settings.tenant_max_bytes:
        raise LimitExceeded(
            f"The file holds {total} bytes of features, images and offsets; a tenant may hold "
            f"{settings.tenant_max_bytes}."
        )


def _most(record: TenantRecord, settings: Settings) -> tuple[int, float]:
    """Return how many slots a class may have, and the largest entropy of one.

    Slots that another label set scored wait to be scored anew, and until then stand as that one left them.
    """
    current = record.labelling == record.due_labelling
    slots = record.config.slots if current else max(record.config.slots, settings.max_slots)
    classes = len(record.config.classes) if current else settings.max_classes
    return slots, math.log(max(1, classes)) + _NATS_ABOVE


def _slots(columns: Columns, config: TenantConfig, most: int, most_nats: float) -> dict[str, StoredBank]:
    entropies, features = columns["dynamic.entropies"], columns["dynamic.features"]
    ends = _class_ends(columns, "dynamic", config)
    ids = _ids(columns, "dynamic")
    # Written so that NaN, which compares with nothing, is caught too.
    if not ((entropies >= -_NATS_BELOW) & (entropies <= most_nats)).all():
        raise InvalidRequest(f"An entropy in the file is no number from 0 to {most_nats:.3f} nats.")
    _check_features(features, "dynamic")
    found = {}
    for spec, begin, end in _stretches(config, ends):
        bank = StoredBank(
            ids=tuple(ids[begin:end]),
            entropies=tuple(entropies[begin:end].tolist()),
            features=features[begin:end].tobytes(),
        )
        _check_bank(bank, spec.name, most)
        found[spec.id] = bank
    return found


def _check_bank(bank: StoredBank, name: str, most: int) -> None:
    if len(bank) > most:
        raise InvalidRequest(f"The class {name!r} has {len(bank)} slots in the file; at most {most} are allowed.")
    _check_once(bank.ids, "slots", name)
    order = list(zip(bank.entropies, bank.ids, strict=True))
    if order != sorted(order):
        raise InvalidRequest(f"The slots of the class {name!r} are not in the order of entropy and id.")


def _shots(columns: Columns, config: TenantConfig, settings: Settings) -> dict[str, tuple[StoredShot, ...]]:
    ends = _class_ends(columns, "static", config)
    found: dict[str, tuple[StoredShot, ...]] = {}
    for spec, begin, end in _stretches(config, ends):
        if end - begin > settings.max_shots:
            raise LimitExceeded(
                f"The class {spec.name!r} has {end - begin} shots in the file; at most {settings.max_shots} are "
                "allowed."
            )
    ids = _ids(columns, "static")
    # Shots are kept by id alone, whatever their class.
    _check_once(ids, "shots")
    features, images = _shot_features(columns), _shot_images(columns)
    for spec, begin, end in _stretches(config, ends):
        own = [
            StoredShot(id=id_, class_id=spec.id, feature=feature, image=image)
            for id_, feature, image in zip(ids[begin:end], features, images, strict=False)
        ]
        found[spec.id] = tuple(own)
        _check_shots(own, spec.name)
    return found


def _check_shots(own: Sequence[StoredShot], name: str) -> None:
    ids = [shot.id for shot in own]
    if ids != sorted(ids):
        raise InvalidRequest(f"The shots of the class {name!r} are not in the order of their ids.")
    for shot in own:
        if not shot.feature and shot.image is None:
            raise InvalidRequest(f"The shot {shot.id!r} has neither a feature nor an image.")


def _shot_features(columns: Columns) -> Iterator[bytes]:
    """Return the features of the shots, one after the other; b"" for one that waits for its own."""
    features, flags = columns["static.features"], columns["static.has_feature"]
    if (flags > 1).any() or int(np.count_nonzero(flags)) != len(features):
        raise InvalidRequest(f"static.has_feature does not tell which shots the {len(features)} features belong to.")
    _check_features(features, "static")
    rows = iter(features)
    return (next(rows).tobytes() if flag else b"" for flag in flags)


def _shot_images(columns: Columns) -> Iterator[bytes | None]:
    """Return the kept images of the shots, one after the other; None where none is kept."""
    sizes, images = columns["static.image_sizes"], columns["static.images"]
    # Each by itself before their sum, which could overflow.
    if ((sizes < 0) | (sizes > len(images))).any() or int(sizes.sum()) != len(images):
        raise InvalidRequest(f"The sizes of the images do not add up to the {len(images)} bytes that the file has.")
    ends = np.cumsum(sizes)
    return (
        images[end - size : end].tobytes() if size else None
        for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)
    )


def _barred(
    columns: Columns, config: TenantConfig, slots: Mapping[str, StoredBank], settings: Settings
) -> frozenset[tuple[str, str]]:
    ends = _class_ends(columns, "barred", config)
    most = settings.max_classes * settings.max_slots
    if len(columns["barred.classes"]) > most:
        raise LimitExceeded(f"The file bars more than {most} ids.")
    ids = _ids(columns, "barred")
    found: set[tuple[str, str]] = set()
    for spec, begin, end in _stretches(config, ends):
        own = ids[begin:end]
        _check_once(own, "barred ids", spec.name)
        if own != sorted(own):
            raise InvalidRequest(f"The barred ids of the class {spec.name!r} are not in order.")
        if not set(own).isdisjoint(slots.get(spec.id, StoredBank()).ids):
            raise InvalidRequest(f"The class {spec.name!r} holds a slot whose id is barred.")
        found.update((spec.id, id_) for id_ in own)
    return frozenset(found)


def _offsets(columns: Columns, config: TenantConfig, training: Training | None) -> StoredOffsets:
    """Return the trained offsets, one row a class at most, each value finite and no longer than any training makes."""
    if training is None:
        return StoredOffsets()
    rows, width = columns["offsets.rows"], OFFSETS * training.dim
    if rows.shape[1] != width or len(rows) != len(columns["offsets.classes"]):
        raise InvalidRequest(f"offsets.rows is not {width} numbers for each class of offsets.classes.")
    dims = {columns[name].shape[1] for name in ("dynamic.features", "static.features") if len(columns[name])}
    if dims - {training.dim}:
        raise InvalidRequest("The offsets in the file are not of the size of its features.")
    ends = _class_ends(columns, "offsets", config)
    step = max(1, _CHECKED_ENTRIES // width)
    if not all((np.abs(rows[at : at + step]) <= _LARGEST_OFFSET).all() for at in range(0, len(rows), step)):
        raise InvalidRequest(f"An offset in the file is no finite number from -{_LARGEST_OFFSET} to {_LARGEST_OFFSET}.")
    found = {}
    for spec, begin, end in _stretches(config, ends):
        if end - begin > 1:
            raise InvalidRequest(f"The class {spec.name!r} has more than one row of offsets.")
        found[spec.id] = rows[begin].tobytes()
    return StoredOffsets(training=training, rows=found)


def _statistics(columns: Columns, config: TenantConfig) -> dict[str, Count]:
    """Return the class statistics, each number finite, nothing counted less than not at all."""
    if "statistics.shared" not in columns:
        return {}
    rows, shared = columns["statistics.rows"], columns["statistics.shared"]
    dims = {columns[name].shape[1] for name in ("dynamic.features", "static.features") if len(columns[name])}
    dim = rows.shape[1] - 1
    if dim < 0 or len(rows) != len(columns["statistics.classes"]) or dims - {dim} or len(shared) != shared_entries(dim):
        raise InvalidRequest("The class statistics in the file do not fit together, or not its features.")
    _check_sums(rows, shared, dim)
    found = {}
    for spec, begin, end in _stretches(config, _class_ends(columns, "statistics", config)):
        if end - begin > 1:
            raise InvalidRequest(f"The class {spec.name!r} has more than one row of statistics.")
        found[spec.id] = rows[begin].tobytes()
    return {SEED: Count(seq=1, statistics=StoredStatistics(rows=found, shared=shared.tobytes()))}


def _check_sums(rows: NDArray[np.float32], shared: NDArray[np.float32], dim: int) -> None:
    """Return if sums are such as unit-norm features can make: none is larger than how many images are in it."""
    step, slack = max(1, _CHECKED_ENTRIES // max(1, dim)), 1 + 2 * _UNIT_TOLERANCE
    parts = [rows[at : at + step] for at in range(0, len(rows), step)]
    if not all((np.abs(part) <= _LARGEST_SUM).all() for part in (*parts, shared)):
        raise InvalidRequest(f"A sum in the file's class statistics is no finite number up to {_LARGEST_SUM:g}.")
    images, squares = shared[0], shared[1 + dim : 1 + dim + dim * dim : dim + 1]
    if any((part < 0).any() for part in (rows[:, 0], shared[:1], squares, shared[1 + dim + dim * dim :])):
        raise InvalidRequest("The file's class statistics count fewer than no images.")
    if (rows[:, 0] > slack * images).any() or (np.abs(shared) > slack * images).any():
        raise InvalidRequest("A sum in the file's class statistics is larger than its images can make it.")
    if any((np.abs(part) > slack * part[:, :1]).any() for part in parts):
        raise InvalidRequest("A sum in the file's class statistics is larger than the images of its class can make it.")


def _class_ends(columns: Columns, what: str, config: TenantConfig) -> list[int]:
    """Return the row after the last one of each class."""
    rows, count = columns[f"{what}.classes"], len(config.classes)
    if ((rows < 0) | (rows >= count)).any():
        raise InvalidRequest(f"{what}.classes names a class beyond the {count} of the configuration.")
    if (rows[1:] < rows[:-1]).any():
        raise InvalidRequest(f"The rows of {what}.classes are not in the order of the classes.")
    ends: list[int] = np.searchsorted(rows, np.arange(count), side="right").tolist()
    return ends


def _stretches(config: TenantConfig, ends: Sequence[int]) -> Iterator[tuple[ClassSpec, int, int]]:
    """Yield each class that has rows, with its first one and the one after its last."""
    for spec, begin, end in zip(config.classes, (0, *ends), ends, strict=False):
        if end > begin:
            yield spec, begin, end


def _ids(columns: Columns, what: str) -> list[str]:
    """Return the ids of rows, each of letters, digits, dots, underscores and hyphens, 64 at most."""
    count, lines = len(columns[f"{what}.classes"]), columns[f"{what}.ids"]
    # Before the lines are split: the bytes are then no more than the longest ids would take.
    if len(lines) > count * (_ID_CHARS + 1) or np.count_nonzero(lines == ord("\n")) != max(0, count - 1):
        raise InvalidRequest(f"{what}.ids is not one id of at most {_ID_CHARS} characters a line for {count} rows.")
    text = lines.tobytes()
    ids = text.decode("latin-1").split("\n") if count else []
    if text.translate(None, _ID_BYTES + b"\n") or not all(0 < len(id_) <= _ID_CHARS for id_ in ids):
        raise InvalidRequest(
            f"An id in {what}.ids is not 1 to {_ID_CHARS} letters, digits, dots, underscores and hyphens."
        )
    return ids


def _check_once(ids: Sequence[str], what: str, name: str | None = None) -> None:
    if len(set(ids)) != len(ids):
        where = "" if name is None else f" of the class {name!r}"
        raise InvalidRequest(f"Two {what}{where} have the same id.")


def _check_features(features: NDArray[np.float16], what: str) -> None:
    """Return if every feature is finite and of unit norm, as near as half precision comes to it."""
    step = max(1, _CHECKED_ENTRIES // max(1, features.shape[1]))
    for start in range(0, len(features), step):
        rows = features[start : start + step].astype(np.float32)
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        if not np.isfinite(norms).all():
            raise InvalidRequest(f"A feature in {what}.features holds a value that is not finite.")
        if (np.abs(norms - 1.0) > _UNIT_TOLERANCE).any():
            raise InvalidRequest(f"A feature in {what}.features has not the length 1.")


def _shown(value: Any) -> str:
    """Return what a file says, short enough and plain enough for a sentence."""
    return ascii(value[:_ID_CHARS]) if isinstance(value, str) else "no text"
