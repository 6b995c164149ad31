"""Pages of a list: the limit, and an opaque cursor."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import Query

from service.errors import InvalidRequest

from .dependencies import T

LimitDep = Annotated[int, Query(ge=1, le=1000, description="items a page")]
CursorDep = Annotated[str | None, Query(description="`next` of the page before")]


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
