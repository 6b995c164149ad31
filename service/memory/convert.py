"""Stored bytes and tensors: how what a store holds becomes a snapshot, and statistics become bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from core.adaptive.adaptation import Adaptation
from core.adaptive.statistics import Statistics
from core.errors import IncompatibleMemory
from core.memory.bank import Slots
from core.memory.codec import FEATURE_BYTES, decode_features
from core.memory.dynamic import DynamicMemory
from core.memory.static import Shots, StaticMemory
from core.readout.projection import Projection
from core.snapshot import Snapshot
from service.domain.memory import (
    OFFSETS,
    StoredBank,
    StoredMemory,
    StoredShot,
    StoredSlot,
    StoredStatistics,
)


def stack_features(stored: Iterable[StoredSlot | StoredShot], dim: int) -> Tensor:
    """Return stored features (n, d) in half precision."""
    return decode_features(b"".join(one.feature for one in stored), dim)


def static_bytes(stored: StoredMemory, dim: int) -> int:
    """Return the bytes of shots, their kept images and trained offsets: those that no image of a stream adds to.

    A shot that waits for its feature counts with it.
    """
    shots = [shot for own in stored.shots.values() for shot in own]
    return stored.offsets.nbytes + sum(shot.nbytes + (0 if shot.feature else dim * FEATURE_BYTES) for shot in shots)


def held_bytes(stored: StoredMemory, dim: int) -> int:
    """Return the bytes of features, kept images and trained offsets that count against a tenant's limit."""
    return sum(len(bank) for bank in stored.slots.values()) * dim * FEATURE_BYTES + static_bytes(stored, dim)


def encode_offsets(projection: Projection, class_ids: Sequence[str]) -> dict[str, bytes]:
    """Return trained offsets as a store keeps them: by class id, five vectors of little-endian float32 in one row."""
    parts = [getattr(projection, field.name) for field in fields(Projection)]
    rows = torch.cat(parts, dim=1).cpu().numpy().astype("<f4")
    return {class_id: row.tobytes() for class_id, row in zip(class_ids, rows, strict=True)}


def projection_of(stored: StoredMemory, like: Tensor) -> Projection | None:
    """Return a memory's trained offsets for class weights `like` (c, d), zero for classes without; None if untrained.

    Raises:
        IncompatibleMemory: they are of another size.
    """
    if stored.offsets.training is None:
        return None
    classes, dim = like.shape
    table = np.zeros((classes, OFFSETS * dim), np.float32)
    for at, spec in enumerate(stored.record.config.classes):
        row = stored.offsets.rows.get(spec.id)
        if row is not None:
            if len(row) != table.itemsize * table.shape[1]:
                raise IncompatibleMemory(
                    f"Trained offsets have {len(row)} bytes a class; expected {OFFSETS * dim} entries."
                )
            table[at] = np.frombuffer(row, "<f4")
    parts = torch.from_numpy(table).to(like).split(dim, dim=1)
    return Projection(**{field.name: part.clone() for field, part in zip(fields(Projection), parts, strict=True)})


def snapshot_of(stored: StoredMemory, text: Tensor, tau: float) -> Snapshot:
    """Return a stored memory as core reads it, for class weights and the encoder's logit scale."""
    config, dim = stored.record.config, text.shape[-1]
    banks = [stored.slots.get(spec.id, StoredBank()) for spec in config.classes]
    shots = [[shot for shot in stored.shots.get(spec.id, ()) if shot.feature] for spec in config.classes]
    static = StaticMemory(
        classes=tuple(
            Shots(keys=stack_features(own, dim).to(text.device), ids=tuple(shot.id for shot in own)) for own in shots
        )
    )
    return Snapshot(
        text=text,
        dynamic=DynamicMemory(classes=tuple(_slots(bank, dim, text.device) for bank in banks), slots=config.slots),
        static=static,
        projection=projection_of(stored, text),
        tau=tau,
        beta=config.beta,
        weights=config.weights,
        adaptation=_adaptation(stored, text, static, tau) if config.method == "auto" else None,
    )


def _adaptation(stored: StoredMemory, text: Tensor, static: StaticMemory, tau: float) -> Adaptation:
    ids = [spec.id for spec in stored.record.config.classes]
    return Adaptation.begin(text, static, tau, decode(stored.statistics, ids, text))


def _slots(bank: StoredBank, dim: int, device: torch.device) -> Slots:
    return Slots(keys=decode_features(bank.features, dim).to(device), entropies=bank.entropies, ids=bank.ids)


_SHARED = ("images", "total", "second", "agreed", "sure")
"""What is of no class, in the order in which it is stored."""


def encode(statistics: Statistics, class_ids: Sequence[str], which: Tensor | None = None) -> StoredStatistics:
    """Return statistics as a store keeps them: rows of all classes, or of those told by `which`."""
    rows = torch.cat((statistics.counts[:, None], statistics.sums), dim=1).cpu().numpy().astype("<f4")
    told = range(len(class_ids)) if which is None else which.nonzero()[:, 0].tolist()
    shared = torch.cat([getattr(statistics, name).reshape(-1) for name in _SHARED])
    return StoredStatistics(
        rows={class_ids[at]: rows[at].tobytes() for at in told}, shared=shared.cpu().numpy().astype("<f4").tobytes()
    )


def shared_entries(dim: int) -> int:
    """Return how many numbers of no class statistics have."""
    blank = Statistics.zeros(1, dim, device="meta")
    return sum(getattr(blank, name).numel() for name in _SHARED)


def dim_of_shared(entries: int) -> int:
    """Return the feature size D of which statistics have so many numbers of no class."""
    # D + D^2 of them depend on it.
    return (math.isqrt(4 * (entries - shared_entries(0)) + 1) - 1) // 2


def decode(stored: StoredStatistics, class_ids: Sequence[str], like: Tensor) -> Statistics:
    """Return stored statistics for class weights `like` (c, d); zero for a class without a row.

    Raises:
        IncompatibleMemory: they are of another size.
    """
    blank = Statistics.zeros(*like.shape, device=like.device)
    if not stored.shared:
        return blank
    sizes = {name: getattr(blank, name).numel() for name in _SHARED}
    flat = np.frombuffer(stored.shared, "<f4")
    table = np.zeros((len(class_ids), 1 + like.shape[1]), np.float32)
    rows = {at: np.frombuffer(stored.rows[own], "<f4") for at, own in enumerate(class_ids) if own in stored.rows}
    if len(flat) != sum(sizes.values()) or any(len(row) != table.shape[1] for row in rows.values()):
        raise IncompatibleMemory(f"Stored class statistics are not those of features of {like.shape[1]} entries.")
    for at, row in rows.items():
        table[at] = row
    parts = torch.from_numpy(flat.astype(np.float32)).to(like).split(list(sizes.values()))
    shared = {name: part.reshape(getattr(blank, name).shape) for name, part in zip(_SHARED, parts, strict=True)}
    by_class = torch.from_numpy(table).to(like)
    return Statistics(counts=by_class[:, 0].clone(), sums=by_class[:, 1:].clone(), **shared)
