"""Writes a memory as an export file, part by part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import IncompatibleMemory
from core.memory.codec import FEATURE_BYTES
from service.domain.memory import (
    OFFSETS,
    StoredBank,
    StoredMemory,
    StoredStatistics,
    TenantRecord,
    Training,
)
from service.domain.tenant import TenantConfig
from service.errors import LimitExceeded
from service.memory.convert import dim_of_shared

from .columns import COLUMNS, DTYPES, FORMAT, HEADER_BYTES, LENGTH_PREFIX, METADATA_KEY, TRAINING_KEY, VERSION

PART_BYTES = 1 << 20
"""Size of the parts that a file is handed out in."""


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
        column = np.fromiter(values, DTYPES[dtype])
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
    return {name: found[name] for name in COLUMNS if name in found}


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
    if any(len(row) != width * DTYPES["F32"].itemsize for row in rows):
        raise IncompatibleMemory(f"Trained offsets are not of {width} entries a class.")
    return {
        "offsets.classes": _Column.of((at for at, row in kept if row is not None), "I32"),
        "offsets.rows": _Column(shape=(len(rows), width), pieces=rows, nbytes=sum(map(len, rows))),
    }


def _statistics_columns(config: TenantConfig, statistics: StoredStatistics) -> dict[str, _Column]:
    kept = [(at, statistics.rows[spec.id]) for at, spec in enumerate(config.classes) if spec.id in statistics.rows]
    rows, entry = [row for _, row in kept], DTYPES["F32"].itemsize
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
        said[TRAINING_KEY] = json.dumps(asdict(stored.offsets.training), sort_keys=True)
    entries: dict[str, Any] = {METADATA_KEY: said}
    start = 0
    for name, column in columns.items():
        end = start + column.nbytes
        entries[name] = {"dtype": COLUMNS[name][0], "shape": column.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_PREFIX.size)
    if len(text) > HEADER_BYTES:
        raise LimitExceeded(
            f"The tenant's configuration makes a header of {len(text)} bytes; a file may have {HEADER_BYTES}. Remove "
            "classes or sentences."
        )
    return LENGTH_PREFIX.pack(len(text)) + text


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
