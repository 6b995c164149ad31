"""What has to be seen to while nobody asks: writes that wait, what was counted, memories that drift, snapshots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import torch
from jaxtyping import UInt8
from torch import Tensor

from service.domain.tenant import is_shadow
from service.errors import NoClasses, ServiceError, StoreDown, UnknownTenant
from service.memory.statistics_sync import EXCHANGE_S
from service.services import Rooms
from service.telemetry import logs

from . import snapshots

TICK_S = 1.0

_CANARY_SHARE = 0.25
"""Of the time after which readiness ends: one canary may fail, or wait behind other work."""

_ASK_S = 600.0
"""How often the store is asked whether the time for a tenant's next snapshot has come."""


async def keep_house(rooms: Rooms) -> None:
    """See to everything every second, until cancelled; a device that hangs keeps nothing else waiting."""
    housekeeper = Housekeeper(rooms)
    await asyncio.gather(
        _every_second(housekeeper.tick), _every_second(partial(feel_pulse, rooms)), _every_second(rooms.quotas.renew)
    )


async def _every_second(duty: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        await duty()


async def feel_pulse(rooms: Rooms) -> None:
    """Try the encoder with an image of nobody's, if none was encoded lately: readiness must not depend on traffic."""
    due_s = rooms.settings.canary_s * _CANARY_SHARE
    if due_s and rooms.clock() - rooms.batcher.succeeded >= due_s:
        await _attempt(partial(rooms.batcher.probe, canary(rooms.encoder.preprocess.size)))


def canary(size: int) -> UInt8[Tensor, "1 3 s s"]:
    """Return an image that is always the same: three ramps, across, down, and across again backwards."""
    ramp = torch.linspace(0, 255, size).to(torch.uint8)
    return torch.stack((ramp.expand(size, size), ramp[:, None].expand(size, size), ramp.flip(0).expand(size, size)))[
        None
    ]


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
            if not is_shadow(tenant) and self._may_ask(tenant):
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
