"""What routes are handed."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from service.access.idempotency import Ledger, digest_of
from service.api.schemas.base import Key, StampOut, TenantName
from service.errors import PROBLEMS, InvalidRequest, ServiceError
from service.services import Rooms
from service.stores.protocol import Remembered, Stamp
from service.tenants import migration

from .security import tenant_of

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

GONE = 499
"""Status, seen in logs and metrics alone, of calls whose client left."""


_OUR_FAULT = 500


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
    return await migration.rooms_of(rooms, tenant)


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
LimitDep = Annotated[int, Query(ge=1, le=1000, description="items a page")]
CursorDep = Annotated[str | None, Query(description="`next` of the page before")]


class CallHeaders(BaseModel):
    """The headers of a call with images, for a route that reads them itself; names are in lower case."""

    model_config = ConfigDict(frozen=True)

    tenant: TenantName | None = Field(None, alias="x-tenant", description="tenant, if not the default one")
    deadline_ms: float | None = Field(
        None, alias="x-deadline-ms", gt=0, lt=1e9, description="milliseconds the answer may take"
    )
    key: Key | None = Field(None, alias="idempotency-key", description="one answer for all retries of a call")


def deadline_of(given_ms: float | None, rooms: Rooms) -> float:
    """Return the moment of the rooms' clock by which a call is to be answered."""
    longest_ms = rooms.settings.deadline_ms
    return rooms.clock() + (longest_ms if given_ms is None else min(given_ms, longest_ms)) / 1000


def parsed(model: type[M], place: str, given: Mapping[str, str]) -> M:
    """Return what a call's query or headers say.

    Raises:
        RequestValidationError: as the framework itself would, had it read them.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": (place, *one["loc"])} for one in error.errors()]) from error


def as_parameters(model: type[BaseModel], place: str) -> list[dict[str, object]]:
    """Return what the OpenAPI document says of such a query, or of such headers."""
    told = []
    for name, schema in model.model_json_schema()["properties"].items():
        said = {key: value for key, value in schema.items() if key not in ("title", "description")}
        told.append(
            {"name": name, "in": place, "required": False, "schema": said, "description": schema["description"]}
        )
    return told


def stamp_out(stamp: Stamp, *, stale: bool = False) -> StampOut:
    """Return where a memory is, as answers say it."""
    return StampOut(**stamp_told(stamp, stale=stale))


def stamp_told(stamp: Stamp, *, stale: bool = False) -> dict[str, Any]:
    """Return the same without its model."""
    return {"version": stamp.version, "epoch": stamp.epoch, "state": "stale" if stale else "fresh"}


def json_answer(
    told: BaseModel | Mapping[str, object], digest: str, status: int = 200, *, final: bool = True
) -> Remembered:
    """Return a model, or what one would say, as an answer that can be kept, if it is `final`."""
    body = to_json(told, inf_nan_mode="null")
    return Remembered(digest=digest, status=status, media_type="application/json", body=body, final=final)


def is_final(results: Iterable[object]) -> bool:
    """Return whether a retry could do no better: no image failed by a fault of the service or for want of time."""
    faults = (result for result in results if isinstance(result, ServiceError))
    return all(PROBLEMS[fault.slug].status < _OUR_FAULT for fault in faults)


async def digest_if(key: str | None, parts: Callable[[], Iterable[bytes | str]]) -> str:
    """Return the digest of a request that has a key; of bodies too large to hash on the event loop."""
    return "" if key is None else await asyncio.to_thread(digest_of, parts())


def response_of(answer: Remembered, headers: dict[str, str] | None = None) -> Response:
    """Return a kept answer as it was."""
    return Response(answer.body, status_code=answer.status, media_type=answer.media_type, headers=headers)


def page(items: Sequence[T], limit: int, cursor: str | None, key: Callable[[T], str]) -> tuple[list[T], str | None]:
    """Return the items after a cursor, `limit` of them, and the cursor of the next page. `items` are in order.

    Raises:
        InvalidRequest: the cursor was not one of ours, or its item is gone.
    """
    start = 0
    if cursor is not None:
        after = cursor_key(cursor)
        found = next((i for i, item in enumerate(items) if key(item) == after), None)
        if found is None:
            raise InvalidRequest("The item of this cursor is gone; start from the first page.")
        start = found + 1
    part = list(items[start : start + limit])
    more = start + limit < len(items)
    return part, cursor_of(key(part[-1])) if more else None


def cursor_of(key: str) -> str:
    """Return an opaque cursor that stands after a key."""
    return base64.urlsafe_b64encode(key.encode()).decode()


def cursor_key(cursor: str) -> str:
    """Return the key that a cursor stands after.

    Raises:
        InvalidRequest: the cursor was not one of ours.
    """
    try:
        return base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("The cursor is not one that this service gave.") from error


async def unless_gone(request: Request, work: Coroutine[object, object, Response]) -> Response:
    """Return the work's answer, or drop the work as soon as the client leaves. The body must have been read."""
    own, left = asyncio.current_task(), False

    def leave(gone: asyncio.Task[None]) -> None:
        nonlocal left
        if own is not None and not gone.cancelled() and gone.exception() is None:
            left = own.cancel()

    gone = asyncio.create_task(_disconnected(request.receive))
    gone.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left and own is not None and not own.uncancel():
            return Response(status_code=GONE)
        raise  # somebody else wants this call to end
    finally:
        gone.remove_done_callback(leave)
        gone.cancel()


async def _disconnected(receive: Callable[[], Awaitable[object]]) -> None:
    while True:
        message = await receive()
        if isinstance(message, dict) and message["type"] == "http.disconnect":
            return
