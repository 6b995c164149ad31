"""The dock: where bodies arrive that are held on disk, before anybody looks into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import QueueFull

_RETRY_S = 5.0


class Dock:
    """Takes one body of each tenant at a time, and of all together no more bytes than a single one may have.

    So whoever sends one slowly, or never to its end, keeps nobody out but itself.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._most = max_bytes
        self._held: dict[str, int] = {}

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._held

    @contextmanager
    def berth(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """Hold a tenant's place; what is yielded is to be told the size of each part before it is written.

        Raises:
            QueueFull: the tenant has a body here, or, told of a part, the others leave no room for it.
        """
        if tenant in self._held:
            raise QueueFull("Another memory of this tenant is being imported.", retry_after_s=_RETRY_S)
        self._held[tenant] = 0

        def take(size: int) -> None:
            if sum(self._held.values()) + size > self._most:
                raise QueueFull("There is no room on disk for one more memory at the moment.", retry_after_s=_RETRY_S)
            self._held[tenant] += size

        try:
            yield take
        finally:
            del self._held[tenant]
