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

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from service.domain.memory import (
    OFFSETS,
    SEED,
    Count,
    StoredBank,
    StoredMemory,
    StoredOffsets,
    StoredShot,
    StoredStatistics,
    Training,
)
from service.domain.tenant import TenantConfig
from service.errors import InvalidRequest, LimitExceeded
from service.memory.convert import shared_entries
from service.settings import Settings

from .checks import (
    CHECKED_ENTRIES,
    LARGEST_OFFSET,
    NATS_BELOW,
    check_bank,
    check_features,
    check_once,
    check_shots,
    check_sizes,
    check_sums,
    class_ends,
    class_stretches,
    most_slots_and_entropy,
    row_ids,
)
from .columns import LENGTH_PREFIX, Columns
from .container import read_container
from .metadata import record_of

# Reading --------------------------------------------------------------------------------------------------------------


def read(path: Path, *, settings: Settings) -> StoredMemory:
    """Return the memory that a file holds, all of it checked; whether the encoder fits is for the caller to see.

    The file must not change meanwhile: it is read in place.

    Raises:
        InvalidRequest: the file is damaged, contradicts itself, or is of an unknown version.
        LimitExceeded: it holds more than the settings allow a tenant.
    """
    if path.stat().st_size < LENGTH_PREFIX.size:
        raise InvalidRequest("The file is no safetensors file: it is too short to have a header.")
    metadata, columns = read_container(np.memmap(path, np.uint8, "r").view(np.ndarray))
    record = record_of(metadata, settings)
    config = record.config
    check_sizes(columns, settings)
    slots = _slots(columns, config, *most_slots_and_entropy(record, settings))
    return StoredMemory(
        record=record,
        slots=slots,
        shots=_shots(columns, config, settings),
        barred=_barred(columns, config, slots, settings),
        offsets=_offsets(columns, config, record.training),
        counts=_statistics(columns, config),
    )


def _slots(columns: Columns, config: TenantConfig, most: int, most_nats: float) -> dict[str, StoredBank]:
    entropies, features = columns["dynamic.entropies"], columns["dynamic.features"]
    ends = class_ends(columns, "dynamic", config)
    ids = row_ids(columns, "dynamic")
    # Written so that NaN, which compares with nothing, is caught too.
    if not ((entropies >= -NATS_BELOW) & (entropies <= most_nats)).all():
        raise InvalidRequest(f"An entropy in the file is no number from 0 to {most_nats:.3f} nats.")
    check_features(features, "dynamic")
    found = {}
    for spec, begin, end in class_stretches(config, ends):
        bank = StoredBank(
            ids=tuple(ids[begin:end]),
            entropies=tuple(entropies[begin:end].tolist()),
            features=features[begin:end].tobytes(),
        )
        check_bank(bank, spec.name, most)
        found[spec.id] = bank
    return found


def _shots(columns: Columns, config: TenantConfig, settings: Settings) -> dict[str, tuple[StoredShot, ...]]:
    ends = class_ends(columns, "static", config)
    found: dict[str, tuple[StoredShot, ...]] = {}
    for spec, begin, end in class_stretches(config, ends):
        if end - begin > settings.max_shots:
            raise LimitExceeded(
                f"The class {spec.name!r} has {end - begin} shots in the file; at most {settings.max_shots} are "
                "allowed."
            )
    ids = row_ids(columns, "static")
    # Shots are kept by id alone, whatever their class.
    check_once(ids, "shots")
    features, images = _shot_features(columns), _shot_images(columns)
    for spec, begin, end in class_stretches(config, ends):
        own = [
            StoredShot(id=id_, class_id=spec.id, feature=feature, image=image)
            for id_, feature, image in zip(ids[begin:end], features, images, strict=False)
        ]
        found[spec.id] = tuple(own)
        check_shots(own, spec.name)
    return found


def _shot_features(columns: Columns) -> Iterator[bytes]:
    """Return the features of the shots, one after the other; b"" for one that waits for its own."""
    features, flags = columns["static.features"], columns["static.has_feature"]
    if (flags > 1).any() or int(np.count_nonzero(flags)) != len(features):
        raise InvalidRequest(f"static.has_feature does not tell which shots the {len(features)} features belong to.")
    check_features(features, "static")
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
    ends = class_ends(columns, "barred", config)
    most = settings.max_classes * settings.max_slots
    if len(columns["barred.classes"]) > most:
        raise LimitExceeded(f"The file bars more than {most} ids.")
    ids = row_ids(columns, "barred")
    found: set[tuple[str, str]] = set()
    for spec, begin, end in class_stretches(config, ends):
        own = ids[begin:end]
        check_once(own, "barred ids", spec.name)
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
    ends = class_ends(columns, "offsets", config)
    step = max(1, CHECKED_ENTRIES // width)
    if not all((np.abs(rows[at : at + step]) <= LARGEST_OFFSET).all() for at in range(0, len(rows), step)):
        raise InvalidRequest(f"An offset in the file is no finite number from -{LARGEST_OFFSET} to {LARGEST_OFFSET}.")
    found = {}
    for spec, begin, end in class_stretches(config, ends):
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
    check_sums(rows, shared, dim)
    found = {}
    for spec, begin, end in class_stretches(config, class_ends(columns, "statistics", config)):
        if end - begin > 1:
            raise InvalidRequest(f"The class {spec.name!r} has more than one row of statistics.")
        found[spec.id] = rows[begin].tobytes()
    return {SEED: Count(seq=1, statistics=StoredStatistics(rows=found, shared=shared.tobytes()))}
