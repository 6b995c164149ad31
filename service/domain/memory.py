"""Memories as they are stored: slots, shots, offsets, statistics, and the stamp of their state."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha1

import numpy as np

from .tenant import TenantConfig


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Stamp:
    """Where a memory is in its life.

    `mark` tells apart two histories that count to the same version: a replica that takes over may not have heard of its
    primary's last changes. Only the store that gave it reads it.
    """

    epoch: int
    version: int
    mark: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSlot:
    """One dynamic slot: id, entropy in nats, and the feature's bytes (`core.memory.codec`)."""

    id: str
    entropy: float
    feature: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredBank:
    """A class's dynamic slots by columns, the surest first: a thousand banks are read without an object a slot.

    `features` holds the slots' features one after the other.
    """

    ids: tuple[str, ...] = ()
    entropies: tuple[float, ...] = ()
    features: bytes = b""

    @staticmethod
    def of(slots: Iterable[StoredSlot]) -> StoredBank:
        """Return the bank of some slots, in the order of (entropy, id)."""
        own = sorted(slots, key=lambda slot: (slot.entropy, slot.id))
        return StoredBank(
            ids=tuple(slot.id for slot in own),
            entropies=tuple(slot.entropy for slot in own),
            features=b"".join(slot.feature for slot in own),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[StoredSlot]:
        size = len(self.features) // max(1, len(self.ids))
        for at, (id_, entropy) in enumerate(zip(self.ids, self.entropies, strict=True)):
            yield StoredSlot(id=id_, entropy=entropy, feature=self.features[at * size : (at + 1) * size])

    def best(self, slots: int) -> StoredBank:
        """Return the surest ones, so many at most."""
        size = len(self.features) // max(1, len(self.ids))
        return StoredBank(
            ids=self.ids[:slots], entropies=self.entropies[:slots], features=self.features[: slots * size]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredShot:
    """One shot of a class: id, the feature's bytes, and the image's own where the tenant keeps images.

    The feature is empty while a shot waits to be read by another encoder than it came with. `kept` is the size of an
    image that the store holds and that was not read along.
    """

    id: str
    class_id: str
    feature: bytes
    image: bytes | None = None
    kept: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that count against the tenant's limit."""
        return len(self.feature) + (self.kept if self.image is None else len(self.image))


OFFSETS = 5
"""Trained vectors a class: those of query, key, value, output and text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What is known of a tenant's trained offsets without reading them.

    `created` is wall time in seconds, `dim` the feature size, `shots` how many were trained on. `before` and `after`
    are accuracies on held-out shots in percent, by branch; None where none could be held out.
    """

    id: str
    created: float
    seed: int
    epochs: int
    learning_rate: float
    shots: int
    dim: int
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None

    def without(self, class_ids: Iterable[str]) -> Training:
        """Return what is known once the rows of some classes are gone: other offsets have another id."""
        gone = sorted(class_ids)
        return (
            replace(self, id=sha1(" ".join((self.id, *gone)).encode(), usedforsecurity=False).hexdigest()[:20])
            if gone
            else self
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredOffsets:
    """Trained offsets: by class id b_q, b_k, b_v, b_o, b_t in one row of 5 D little-endian float32. Or none at all."""

    training: Training | None = None
    rows: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that count against the tenant's limit."""
        return sum(map(len, self.rows.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredStatistics:
    """Class statistics, little-endian float32: by class id s_c and S_c in one row; what is of no class in `shared`.

    That is n, G, M, and what calibration needs, in this order; nothing where no image was counted.
    """

    rows: Mapping[str, bytes] = field(default_factory=dict)
    shared: bytes = b""

    @staticmethod
    def total(parts: Iterable[StoredStatistics]) -> StoredStatistics:
        """Return the sum of what was counted apart."""
        rows: dict[str, bytes] = {}
        shared = b""
        for part in parts:
            shared = _added(shared, part.shared)
            for class_id, row in part.rows.items():
                rows[class_id] = _added(rows.get(class_id, b""), row)
        return StoredStatistics(rows=rows, shared=shared)


SEED = "seed"
"""The counter of the statistics that a life begins with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """What one counter has counted by its write number `seq`, `idle_s` seconds ago by the store's clock."""

    seq: int
    statistics: StoredStatistics
    idle_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantRecord:
    """A tenant's configuration, where its features come from, and its stamp.

    `origin` says in words what `fingerprint` is a hash of; `labelling` is the labelling version that the dynamic slots
    were scored under; `created` is when the tenant was made, wall time in seconds. `training` is there where the tenant
    has trained offsets. `shown` is a hash of which shots there are, in whatever order they came; `life` is that of the
    class statistics, another one whenever they begin anew.
    """

    name: str
    config: TenantConfig
    fingerprint: str
    stamp: Stamp
    labelling: str
    origin: Mapping[str, str] = field(default_factory=dict)
    created: float = field(default=0.0, compare=False)
    training: Training | None = None
    shown: str = ""
    life: int = field(default=0, compare=False)

    @property
    def due_labelling(self) -> str:
        """The labelling version that the slots should be scored under."""
        return labelling_of(self.config, self.training, self.shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMemory:
    """Everything of one tenant, read at one moment; slots and shots by class id, shots in the order of their ids.

    `barred` are the class and slot ids that were purged and may not come back until their class is emptied; `offsets`
    are those that `record.training` tells of. `counts` are the class statistics of the record's life, by counter.
    """

    record: TenantRecord
    slots: Mapping[str, StoredBank]
    shots: Mapping[str, tuple[StoredShot, ...]]
    barred: frozenset[tuple[str, str]] = frozenset()
    offsets: StoredOffsets = field(default_factory=StoredOffsets)
    counts: Mapping[str, Count] = field(default_factory=dict)

    @property
    def statistics(self) -> StoredStatistics:
        """The class statistics of all counters together."""
        return StoredStatistics.total(count.statistics for _, count in sorted(self.counts.items()))


def labelling_of(config: TenantConfig, training: Training | None, shown: str = "") -> str:
    """Return the hash of whatever decides which label an image gets.

    Classes and prompts; trained offsets, which move the text head too, Eq. (2); with `auto` the shots, Eq. (17).
    """
    said = [config.labelling]
    if training is not None:
        said.append(training.id)
    if config.method == "auto" and shown:
        said.append(f"shots {shown}")
    if len(said) == 1:
        return config.labelling
    return sha1(" ".join(said).encode(), usedforsecurity=False).hexdigest()[:16]


def shown_of(ids: Iterable[str]) -> str:
    """Return the hash of a set of shots that `TenantRecord.shown` is: a sum, so that one may come or go by itself."""
    total = sum(int(sha1(id_.encode(), usedforsecurity=False).hexdigest()[:12], 16) for id_ in ids) % (1 << 48)
    return f"{total:012x}" if total else ""


def _added(one: bytes, other: bytes) -> bytes:
    """Return the sum of little-endian float32 numbers, entry by entry; b"" counts as zeros."""
    if not one or not other:
        return one or other
    return bytes((np.frombuffer(one, "<f4") + np.frombuffer(other, "<f4")).astype("<f4").data)


def digest_of(ids: Sequence[str], entropies: Sequence[float]) -> str:
    """Return a hash of a bank's slots in the order of (entropy, id): two copies agree if their hashes do."""
    text = b"".join(struct.pack(">d", entropy) + id_.encode() for id_, entropy in zip(ids, entropies, strict=True))
    return sha1(text, usedforsecurity=False).hexdigest()
