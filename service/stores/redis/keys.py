"""Every key of the Redis store, made here. The hash tag `{tenant}` keeps a tenant on one node of a cluster."""

from __future__ import annotations

from collections.abc import Iterable

TENANTS = "dmn:tenants"
"""Sorted set of all tenant names, in the order of their letters."""

MAJOR = "dmn:format"
"""String: the major format of the whole store; not there while it is the first."""

KEYED = "dmn:keyed"
"""Sorted set of the tenants that have API keys, and of '' if some keys belong to none."""


class Keys:
    """The keys of one tenant; those of its shadow, by `tenants.shadow_of`, are on the same node.

    A *bank* holds all dynamic slots, a *pile* all shots, a *frame* all trained offsets, a *life* all class
    statistics. Each has a number, that of the epoch that it was written for; the configuration names the ones that are
    read.
    """

    __slots__ = ("_root",)

    def __init__(self, tenant: str) -> None:
        own, _, aside = tenant.partition("/")
        self._root = f"dmn:{{{own}}}:{aside}" if aside else f"dmn:{{{own}}}"

    @property
    def config(self) -> str:
        """Hash: what `TenantRecord` has, and `format`, `slots`, `bank`, `pile`, `settled`; see `lua/replace.lua`.

        And `mark`, that of the present version, and `base`, that of the settled one; `frame` and `training` where there
        are trained offsets; `shown`, hash of the shots that there are; `life`, that of the class statistics.
        """
        return f"{self._root}:cfg"

    @property
    def epochs(self) -> str:
        """Counter of epochs; it outlives the tenant, so that no epoch comes twice."""
        return f"{self._root}:epochs"

    @property
    def log(self) -> str:
        """Stream of slot changes; the id of an entry is the version that it made."""
        return f"{self._root}:log"

    @property
    def written(self) -> str:
        """Hash of the banks and piles that have keys: `b<number>` -> ids of its classes, `s<number>` -> nothing."""
        return f"{self._root}:written"

    @property
    def frames(self) -> str:
        """Set of the numbers of frames that have a key."""
        return f"{self._root}:frames"

    @property
    def answers(self) -> tuple[str, str, str, str]:
        """Answers by idempotency key, bodies and heads apart; when each ends; and the bytes of all bodies."""
        root = f"{self._root}:idem"
        return f"{root}:body", f"{root}:head", f"{root}:ends", f"{root}:bytes"

    @property
    def snapshots(self) -> str:
        """Hash of the snapshots that are whole: id -> what is known of it (JSON)."""
        return f"{self._root}:snaps"

    @property
    def jobs(self) -> str:
        """Hash of the latest jobs: id -> how it stands (JSON)."""
        return f"{self._root}:jobs"

    @property
    def api_keys(self) -> str:
        """Hash of the tenant's API keys: id -> what is kept of it (JSON).

        Here, and not all in one place, so that they go with the tenant in the same step, and no node has them all.
        """
        return f"{self._root}:keys"

    def snapshot(self, id_: str) -> str:
        """Hash of a snapshot's file: number of the part, from 0 -> bytes."""
        return f"{self._root}:snap:{id_}"

    def claim(self, what: str) -> str:
        """Return the key that is there while someone sees to something."""
        return f"{self._root}:claim:{what}"

    @property
    def quota(self) -> tuple[str, str, str]:
        """Token bucket (hash), leases of images at work (sorted set, lease -> its end), and how many these are."""
        root = f"{self._root}:quota"
        return f"{root}:bucket", f"{root}:leases", f"{root}:held"

    def shots(self, pile: int) -> tuple[str, str, str]:
        """Hashes by shot id: class id and size of the image, feature bytes, image bytes."""
        root = f"{self._root}:s{pile}"
        return f"{root}:class", f"{root}:feature", f"{root}:image"

    def offsets(self, frame: int) -> str:
        """Hash of trained offsets: class id -> 5 D little-endian float32."""
        return f"{self._root}:o{frame}"

    @property
    def lives(self) -> str:
        """Set of the numbers of lives that have keys."""
        return f"{self._root}:lives"

    def counters(self, life: int) -> str:
        """Hash of the counters of a life: name -> number and wall time (seconds) of its latest write."""
        return f"{self._root}:t{life}"

    def counter(self, life: int, name: str) -> str:
        """Hash of what a counter has counted: class id -> 1 + D little-endian float32; '' -> what is of no class."""
        return f"{self._root}:t{life}:{name}"

    def slots(self, bank: int, class_id: str) -> tuple[str, str]:
        """Return a class's entropies (sorted set) and features (hash), by slot id.

        An id that has a feature, an empty one, and no entropy is barred: its slot was purged.
        """
        return f"{self._root}:b{bank}:z:{class_id}", f"{self._root}:b{bank}:h:{class_id}"

    def every_slot(self, bank: int, class_ids: Iterable[str]) -> list[str]:
        """Return the keys of several classes."""
        return [key for class_id in class_ids for key in self.slots(bank, class_id)]
