"""What routes are handed."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import Depends, Header, Query, Request

from service.access.idempotency import Ledger
from service.api.schemas.base import Key, TenantName
from service.services import Rooms
from service.tenants import encoder_routing

from .security import tenant_of

T = TypeVar("T")


async def _rooms(request: Request) -> Rooms:
    rooms: Rooms = request.app.state.rooms
    return rooms


async def _ledger(request: Request) -> Ledger:
    ledger: Ledger = request.app.state.ledger
    return ledger


async def _tenant(
    request: Request,
    x_tenant: Annotated[TenantName | None, Header(description="tenant, if not the default one")] = None,
    tenant: Annotated[TenantName | None, Query(description="the same as `X-Tenant`")] = None,
) -> str:
    return tenant_of(request, x_tenant, tenant)


async def _own_rooms(rooms: Annotated[Rooms, Depends(_rooms)], tenant: Annotated[str, Depends(_tenant)]) -> Rooms:
    return await encoder_routing.rooms_of(rooms, tenant)


async def _deadline(
    rooms: Annotated[Rooms, Depends(_rooms)],
    x_deadline_ms: Annotated[float | None, Header(gt=0, lt=1e9, description="milliseconds the answer may take")] = None,
) -> float:
    return deadline_of(x_deadline_ms, rooms)


RoomsDep = Annotated[Rooms, Depends(_rooms)]
"""The rooms of the house: of its own encoder, where it has two."""

OwnRoomsDep = Annotated[Rooms, Depends(_own_rooms)]
"""Those that the memory of the tenant at hand is of."""

LedgerDep = Annotated[Ledger, Depends(_ledger)]
TenantDep = Annotated[str, Depends(_tenant)]
DeadlineDep = Annotated[float, Depends(_deadline)]
KeyDep = Annotated[Key | None, Header(alias="Idempotency-Key", description="one answer for all retries of a call")]


def deadline_of(given_ms: float | None, rooms: Rooms) -> float:
    """Return the moment of the rooms' clock by which a call is to be answered."""
    longest_ms = rooms.settings.deadline_ms
    return rooms.clock() + (longest_ms if given_ms is None else min(given_ms, longest_ms)) / 1000
