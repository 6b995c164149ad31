"""Every key of the Redis store, made here. The hash tag `{tenant}` keeps a tenant on one node of a cluster."""

from __future__ import annotations

from collections.abc import Iterable

TENANTS = "dmn:tenants"
"""Sorted set of all tenant names, in the order of their letters."""


class Keys:
    """The keys of one tenant."""

    __slots__ = ("_root",)

    def __init__(self, tenant: str) -> None:
        self._root = f"dmn:{{{tenant}}}"

    @property
    def config(self) -> str:
        """Hash: format, name, configuration, fingerprint, epoch, bank, version, settled, slots."""
        return f"{self._root}:cfg"

    @property
    def epochs(self) -> str:
        """Counter of epochs and banks; it outlives the tenant, so that no epoch comes twice."""
        return f"{self._root}:epochs"

    @property
    def log(self) -> str:
        """Stream of slot changes; the id of an entry is the version that it made."""
        return f"{self._root}:log"

    @property
    def tombstones(self) -> str:
        """Set of `class id/slot id` that were purged in this epoch."""
        return f"{self._root}:tomb"

    @property
    def shots(self) -> tuple[str, str, str]:
        """Hashes by shot id: class id, feature bytes, image bytes."""
        return f"{self._root}:static:class", f"{self._root}:static:feature", f"{self._root}:static:image"

    @property
    def answers(self) -> tuple[str, str, str, str]:
        """Answers by idempotency key, bodies and heads apart; when each ends; and the bytes of all bodies."""
        root = f"{self._root}:idem"
        return f"{root}:body", f"{root}:head", f"{root}:ends", f"{root}:bytes"

    @property
    def banks(self) -> str:
        """Set of the banks that have keys, the present one and those to be swept."""
        return f"{self._root}:banks"

    def classes(self, bank: int) -> str:
        """Set of the class ids that have keys in a bank."""
        return f"{self._root}:b{bank}:classes"

    def slots(self, bank: int, class_id: str) -> tuple[str, str]:
        """Return a class's entropies (sorted set) and features (hash), by slot id."""
        return f"{self._root}:b{bank}:z:{class_id}", f"{self._root}:b{bank}:h:{class_id}"

    def every_slot(self, bank: int, class_ids: Iterable[str]) -> list[str]:
        """Return the keys of several classes."""
        return [key for class_id in class_ids for key in self.slots(bank, class_id)]
