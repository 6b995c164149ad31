"""A hot memory: the tensors of a tenant that answers read, and how stored changes enter them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from core.memory.bank import Slots
from core.memory.codec import FEATURE_BYTES
from core.memory.dynamic import DynamicMemory
from core.prepared_banks import Shelves
from core.snapshot import Snapshot
from service.domain.memory import (
    Stamp,
    StoredSlot,
    TenantRecord,
)
from service.domain.tenant import TenantConfig
from service.stores.protocol import Change

from .convert import stack_features
from .statistics import Tally


@dataclass(slots=True)
class HotMemory:
    """One tenant's memory, ready to be read. `shelves` is touched in the reader alone.

    `names` are those of the classes, and `position` leads from class id to their position; `barred` are purged slots;
    `filled` are dynamic slots and `shots` those that have a feature; `nbytes` counts features and what is kept ready
    from them, `static_bytes` shots and offsets. `tally` is there with the method `auto`. `unread` shots wait for this
    encoder to read their images. `due` says that these, or slots that were scored under other labels, come before the
    memory is what it should be. `away` says that the store could not be asked how it stands.
    """

    record: TenantRecord
    stamp: Stamp
    shelves: Shelves
    synced_at: float
    verified_at: float
    static_bytes: int
    names: tuple[str, ...]
    position: dict[str, int]
    shots: int = 0
    barred: frozenset[tuple[str, str]] = frozenset()
    unread: int = 0
    due: bool = False
    filled: int = 0
    nbytes: int = 0
    away: bool = False
    tally: Tally | None = None

    @property
    def stale(self) -> bool:
        """Whether answers may differ from those of the memory as it should be."""
        return self.away or self.due

    @property
    def config(self) -> TenantConfig:
        """The tenant's configuration."""
        return self.record.config

    @property
    def snapshot(self) -> Snapshot:
        """The memory as it is now."""
        return self.shelves.snapshot

    def measure(self, filled: int) -> None:
        """Count what is held, with so many dynamic slots filled; after each change, in the worker."""
        features = (filled + self.shots) * FEATURE_BYTES * self.snapshot.text.shape[-1]
        self.filled = filled
        self.nbytes = self.shelves.nbytes + self.snapshot.text.nbytes + features
        if self.tally is not None and self.snapshot.adaptation is not None:
            self.nbytes += self.tally.nbytes + self.snapshot.adaptation.nbytes


def apply_changes(hot: HotMemory, changes: Sequence[Change]) -> None:
    """Write the store's slot changes into a hot memory; only the classes that they touch are made anew."""
    snapshot = hot.snapshot
    classes, dim = list(snapshot.dynamic.classes), snapshot.text.shape[-1]
    touched: dict[int, dict[str, StoredSlot | None]] = {}
    for change in changes:
        own = touched.setdefault(hot.position[change.class_id], {})
        own[change.slot.id] = change.slot
        if change.evicted is not None:
            own[change.evicted] = None
    filled = hot.filled
    for index, own in touched.items():
        filled -= len(classes[index])
        classes[index] = _rewrite(classes[index], own, dim)
        filled += len(classes[index])
    memory = DynamicMemory(classes=tuple(classes), slots=snapshot.dynamic.slots)
    hot.shelves.advance(replace(snapshot, dynamic=memory))
    hot.measure(filled)


def update_adaptation(hot: HotMemory) -> None:
    """Bring a hot memory's adaptation to what all counters have counted, as whoever opens it now reads it."""
    snapshot = hot.snapshot
    if hot.tally is not None and snapshot.adaptation is not None:
        hot.shelves.advance(replace(snapshot, adaptation=snapshot.adaptation.known(hot.tally.total, anew=True)))
        hot.measure(hot.filled)


def _rewrite(bank: Slots, own: dict[str, StoredSlot | None], dim: int) -> Slots:
    """Return a bank with slots put in or, where there is None, taken out; in the order that a store reads them in.

    So the same slots give the same answers to the last bit, however they came together.
    """
    new = [slot for slot in own.values() if slot is not None]
    entropies = (*bank.entropies, *(slot.entropy for slot in new))
    ids = (*bank.ids, *(slot.id for slot in new))
    held = [slot for slot, id_ in enumerate(ids) if slot >= len(bank) or id_ not in own]
    order = sorted(held, key=lambda slot: (entropies[slot], ids[slot]))
    keys = torch.cat((bank.keys, stack_features(new, dim).to(bank.keys.device)))
    return Slots(
        keys=keys.index_select(0, torch.tensor(order, dtype=torch.long, device=keys.device)),
        entropies=tuple(entropies[slot] for slot in order),
        ids=tuple(ids[slot] for slot in order),
    )
