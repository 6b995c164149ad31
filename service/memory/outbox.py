"""Writes that wait while the store is away: candidates by tenant, so many at most, each slot once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from service.stores.protocol import PushCandidate


@dataclass(slots=True)
class _Letters:
    epoch: int
    waiting: dict[tuple[str, str], PushCandidate] = field(default_factory=dict)


class Outbox:
    """Holds what was not pushed. A write belongs to an epoch: what was reset since must not learn it again."""

    def __init__(self, *, room: int) -> None:
        self._room = room
        self._tenants: dict[str, _Letters] = {}

    def __len__(self) -> int:
        return sum(len(letters.waiting) for letters in self._tenants.values())

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._tenants

    @property
    def tenants(self) -> list[str]:
        """Who has something waiting."""
        return list(self._tenants)

    def count(self, tenant: str) -> int:
        """Return how many writes wait for a tenant."""
        return len(self._tenants[tenant].waiting) if tenant in self._tenants else 0

    def forget(self, tenant: str, *, but: int) -> int:
        """Drop what waits for a tenant and belongs to another epoch; return how much that was."""
        letters = self._tenants.get(tenant)
        if letters is None or letters.epoch == but:
            return 0
        return len(self._tenants.pop(tenant).waiting)

    def add(self, tenant: str, epoch: int, candidate: PushCandidate) -> bool:
        """Keep a write; False if there is no room for it. A slot that waits already keeps the lower entropy."""
        letters = self._tenants.get(tenant)
        if letters is None or letters.epoch != epoch:
            letters = _Letters(epoch)
        place = candidate.class_id, candidate.slot.id
        known = letters.waiting.get(place)
        if known is None and len(self) >= self._room:
            return False
        if known is None or _order(candidate) < _order(known):
            letters.waiting[place] = candidate
        self._tenants[tenant] = letters
        return True

    def take(self, tenant: str) -> tuple[int, Sequence[PushCandidate]]:
        """Take out what waits for a tenant, and the epoch that it belongs to."""
        letters = self._tenants.pop(tenant, _Letters(0))
        return letters.epoch, list(letters.waiting.values())


def _order(candidate: PushCandidate) -> tuple[float, bytes]:
    return candidate.slot.entropy, candidate.slot.feature
