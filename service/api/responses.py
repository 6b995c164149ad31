"""Responses: JSON bodies, memory stamps, replayed answers, and calls whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel
from pydantic_core import to_json

from service.access.idempotency import digest_of
from service.api.schemas.base import StampOut
from service.domain.memory import Stamp
from service.domain.records import Remembered
from service.errors import ServiceError
from service.problem_types import PROBLEMS

GONE = 499
"""Status, seen in logs and metrics alone, of calls whose client left."""


_OUR_FAULT = 500


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
