"""What has to be seen to while nobody asks: writes that wait, what was counted, memories that drift, snapshots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from . import logs, snapshots
from .errors import NoClasses, ServiceError, StoreDown, UnknownTenant
from .rooms import Rooms
from .tallies import EXCHANGE_S

TICK_S = 1.0

_ASK_S = 600.0
"""How often the store is asked whether the time for a tenant's next snapshot has come."""


async def keep_house(rooms: Rooms) -> None:
    """See to everything every second, until cancelled."""
    housekeeper = Housekeeper(rooms)
    while True:
        await asyncio.sleep(TICK_S)
        await housekeeper.tick()


class Housekeeper:
    """Sees to everything, each thing as often as it needs it; what fails is tried again the next time."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._asked_at: dict[str, float] = {}

    async def tick(self) -> None:
        """See to whatever is due by the rooms' clock."""
        rooms = self._rooms
        if rooms.desk.pending:
            await _attempt(rooms.desk.deliver)
        await _attempt(rooms.archive.settle)
        for tenant in rooms.archive.tenants:
            await _attempt(partial(rooms.archive.exchange, tenant, EXCHANGE_S))
            if rooms.settings.verify_s:
                await _attempt(partial(rooms.archive.verify, tenant, rooms.settings.verify_s))
            if self._may_ask(tenant):
                await _attempt(partial(snapshots.on_schedule, rooms, tenant))

    def _may_ask(self, tenant: str) -> bool:
        """Return whether it is worth asking the store for this tenant's next snapshot."""
        now = self._rooms.clock()
        if now - self._asked_at.get(tenant, -_ASK_S) < min(_ASK_S, self._rooms.settings.snapshot_every_s):
            return False
        self._asked_at[tenant] = now
        return True


async def _attempt(duty: Callable[[], Awaitable[None]]) -> None:
    try:
        await duty()
    except (StoreDown, UnknownTenant, NoClasses):
        return  # told elsewhere
    except ServiceError as error:
        logs.event(logs.UPKEEP_REFUSED, level=logging.WARNING, detail=error.detail)
    except Exception as error:  # noqa: BLE001 - the next duty is not to blame
        logs.event(logs.UPKEEP_FAILED, level=logging.ERROR, error=error)
