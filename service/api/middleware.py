"""The outermost step: an id and a log line for each request, a limit on its body, and no error that is no problem."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.services import Rooms
from service.telemetry import logs
from service.telemetry.metrics import Metrics

from .problems import problem, problem_response
from .request_params import headers_of
from .responses import GONE

if TYPE_CHECKING:
    from service.telemetry.spans import RequestSpan

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_LONGEST_LENGTH = 18
_ID_BYTES = 16
"""Of randomness in an id: from one that counts, a caller would read how much the others ask."""
_GRACE_S = 0.25
_LARGE = 10
"""A body that goes to disk may take so many deadlines to arrive."""
_SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
"""Said with every answer that does not say otherwise: it is what its type says, and nobody keeps it for another."""
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_PROBES = frozenset(("/livez", "/readyz", "/metrics"))
"""Asked every few seconds: neither logged nor traced."""


class Porch:
    """ASGI middleware; `metrics` are looked up for each request, since the rooms open after the app is made.

    `to_disk` names the paths whose bodies are not held in memory, and their own limits in bytes.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        max_inflight_bytes: int,
        deadline_s: float,
        to_disk: Mapping[str, int],
    ) -> None:
        self._app, self._max_body_bytes, self._max_inflight_bytes = app, max_body_bytes, max_inflight_bytes
        self._inflight_bytes, self._deadline_s, self._to_disk = 0, deadline_s, to_disk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, rooms = headers_of(scope), scope["app"].state.rooms
        traced = rooms.traces is not None and scope["path"] not in _PROBES
        span: RequestSpan | None = rooms.traces.request(headers) if traced else None
        own_id = _request_id(headers, span)
        token = logs.request_id.set(own_id)
        start, visit = perf_counter(), _Visit(send, own_id, rooms)
        try:
            await self._let_in(scope, headers, receive, visit)
        except ClientDisconnect:
            visit.status = visit.status or GONE
        except Exception as error:  # noqa: BLE001 - the last one who can turn it into an answer
            logs.event(logs.FAILED, level=logging.ERROR, error=error)
            if not visit.status:
                await problem_response(problem("internal", "An unexpected error occurred."))(scope, receive, visit.send)
        finally:
            self._record(scope, rooms.metrics, visit.status or 500, perf_counter() - start, span)
            logs.request_id.reset(token)

    async def _let_in(self, scope: Scope, headers: Mapping[str, str], receive: Receive, visit: _Visit) -> None:
        body = _Body(
            limit=self._to_disk.get(scope["path"], self._max_body_bytes), in_memory=scope["path"] not in self._to_disk
        )
        if _length(headers) > body.limit:
            visit.rooms.metrics.rejected.labels("body-too-large").inc()
            await problem_response(problem("body-too-large", _too_large(body)))(scope, receive, visit.send)
            return
        try:
            async with _within(patience_of(headers)):
                await self._app(scope, self._bounded(receive, body), visit.send)
        except TimeoutError:
            late = problem("deadline-exceeded", "The deadline passed before the call was answered.")
            await problem_response(late)(scope, receive, visit.send)
        finally:
            self._inflight_bytes -= body.seen * body.in_memory

    def _bounded(self, receive: Receive, body: _Body) -> Receive:
        """Count the body as it comes, whatever its length was said to be, by itself and with all others."""
        patience_s = self._deadline_s * (1 if body.in_memory else _LARGE)
        arrives_by = asyncio.get_running_loop().time() + patience_s

        async def bounded() -> Message:
            if body.whole:
                return await receive()  # nothing more of it: that the client leaves
            try:
                async with asyncio.timeout_at(arrives_by):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(504, "The body did not arrive in time.") from error
            body.whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            body.seen += size
            self._inflight_bytes += size * body.in_memory
            # HTTPException is the one that FastAPI's own body parsing lets through.
            if body.seen > body.limit:
                raise HTTPException(413, _too_large(body))
            if self._inflight_bytes > self._max_inflight_bytes:
                raise HTTPException(503, "Too many bodies are being answered at once.")
            return message

        return bounded

    def _record(self, scope: Scope, metrics: Metrics, status: int, seconds: float, span: RequestSpan | None) -> None:
        route = _route(scope)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        metrics.requests.labels(method, route, str(status)).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        if route not in _PROBES:
            logs.event(logs.REQUEST, method=method, route=route, status=status, ms=round(1000 * seconds, 1))
        if span is not None:
            span.close(request_id=logs.request_id.get(), method=method, route=route, status=status)


@dataclass(slots=True)
class _Body:
    """How much of a body has come, and may come."""

    limit: int
    in_memory: bool
    seen: int = 0
    whole: bool = False


def _within(seconds: float | None) -> AbstractAsyncContextManager[object]:
    """Return what ends a wait after so many seconds; None: never."""
    return nullcontext() if seconds is None else asyncio.timeout(seconds)


def _too_large(body: _Body) -> str:
    return f"The body has more than the {body.limit} bytes that are allowed."


class _Visit:
    """Remembers the status of an answer, and adds the request's id to it."""

    def __init__(self, send: Send, own_id: str, rooms: Rooms) -> None:
        self._send, self._id, self.rooms = send, own_id, rooms
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._id
            for name, value in _SAFE.items():
                headers.setdefault(name, value)
            if self.rooms.batcher.leaving:
                headers["Connection"] = "close"  # or the client's next call would meet a closed door
        await self._send(message)


def _route(scope: Scope) -> str:
    """Return the template of the route that was taken; the document's own route does not name itself."""
    route = scope.get("route")
    if route is not None:
        return str(route.path)
    return scope["path"] if scope["path"] == scope["app"].openapi_url else "unmatched"


def patience_of(headers: Mapping[str, str]) -> float | None:
    """Return the seconds after which a call with `X-Deadline-Ms` is given up, None for those without.

    Calls with images keep the deadline themselves, image by image; they get a little longer here, to say so.
    """
    try:
        given = float(headers.get("x-deadline-ms", math.inf))
    except ValueError:
        return None
    return given / 1000 + _GRACE_S if 0 < given < math.inf else None


def _length(headers: Mapping[str, str]) -> int:
    """Return the length that a body is said to have; 0 where nothing sensible is said, since it is counted anyway."""
    told = headers.get("content-length", "")
    return int(told) if told.isascii() and told.isdigit() and len(told) <= _LONGEST_LENGTH else 0


def _request_id(headers: Mapping[str, str], span: RequestSpan | None) -> str:
    """Return what the caller calls this request, where that is sane: its trace, or an id; else a new id, or trace."""
    trace = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if trace:
        return trace[1]
    given = headers.get("x-request-id", "")
    if _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(_ID_BYTES) if span is None else span.trace_id
