"""The dynamic memory's write rule: propose a slot write, apply it. State in, state out; nothing is changed in place.

Samples of a class are ordered by (entropy, id). A bank holds the L smallest seen for its class, after any stream in
any order: the rule is a streaming top-L, so replicas that exchange their writes converge without a lock, and a
retry of the same id changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from .bank import SlotId, Slots


class Outcome(StrEnum):
    """What became of a candidate."""

    FILLED = "filled"
    REPLACED = "replaced"
    REJECTED = "rejected"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A sample on its way into the memory: its pseudo-label's position, plain feature, entropy in nats, and id."""

    label: int
    key: Float[Tensor, " d"]
    entropy: float
    id: SlotId


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotWrite:
    """The decision on one candidate: `slot` is the place it takes (None: none), `evicted` the id that leaves."""

    outcome: Outcome
    candidate: Candidate
    slot: int | None = None
    evicted: SlotId | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicMemory:
    """One bank of at most `slots` slots for each class, by class position."""

    classes: tuple[Slots, ...]
    slots: int

    @staticmethod
    def empty(classes: int, dim: int, slots: int, *, dtype: torch.dtype = torch.float32) -> DynamicMemory:
        """Return an empty memory whose keys are kept as `dtype`."""
        return DynamicMemory(classes=(Slots.empty(dim, dtype=dtype),) * classes, slots=slots)


def propose(memory: DynamicMemory, candidate: Candidate) -> SlotWrite:
    """Return what the memory does with a candidate, Eq. (5): fill a free slot, replace the largest, or nothing."""
    own = memory.classes[candidate.label]
    if candidate.id in own.ids:
        return _repeat(own, candidate)
    if len(own) < memory.slots:
        return SlotWrite(outcome=Outcome.FILLED, candidate=candidate, slot=len(own))
    worst = max(zip(own.entropies, own.ids, strict=True), default=None)
    if worst is None or (candidate.entropy, candidate.id) > worst:
        return SlotWrite(outcome=Outcome.REJECTED, candidate=candidate)
    evicted = worst[1]
    return SlotWrite(outcome=Outcome.REPLACED, candidate=candidate, slot=own.ids.index(evicted), evicted=evicted)


def apply(memory: DynamicMemory, write: SlotWrite) -> DynamicMemory:
    """Return the memory after a write; the same object if the write changes nothing."""
    if write.slot is None:
        return memory
    label = write.candidate.label
    changed = _put(memory.classes[label], write.slot, write.candidate)
    classes = (*memory.classes[:label], changed, *memory.classes[label + 1 :])
    return DynamicMemory(classes=classes, slots=memory.slots)


def _repeat(own: Slots, candidate: Candidate) -> SlotWrite:
    """Keep the lower (entropy, feature bytes) of two with one id, so that replicas agree on their last bits."""
    slot = own.ids.index(candidate.id)
    new = (candidate.entropy, _bytes(candidate.key.to(own.keys.dtype)))
    if new < (own.entropies[slot], _bytes(own.keys[slot])):
        return SlotWrite(outcome=Outcome.DUPLICATE, candidate=candidate, slot=slot)
    return SlotWrite(outcome=Outcome.DUPLICATE, candidate=candidate)


def _bytes(key: Float[Tensor, " d"]) -> bytes:
    return key.cpu().numpy().tobytes()


def _put(own: Slots, slot: int, candidate: Candidate) -> Slots:
    if slot == len(own):
        keys = torch.cat((own.keys, candidate.key.to(own.keys)[None]))
    else:
        keys = own.keys.clone()
        keys[slot] = candidate.key
    return Slots(
        keys=keys,
        entropies=(*own.entropies[:slot], candidate.entropy, *own.entropies[slot + 1 :]),
        ids=(*own.ids[:slot], candidate.id, *own.ids[slot + 1 :]),
    )
