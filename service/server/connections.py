"""The doorstep: how long a caller may stand there, how much it may say before it is let in, and how many may.

A server that only waits for requests is held up by those who never finish one. So every connection has a moment by
which it must have moved: sent a request's head, the rest of a body that nobody reads any more, or taken more of its
answer. (How long a body may take that is read is the porch's affair, and an idle connection's time is uvicorn's.)
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.problem_types import PROBLEMS

LINGER_S = 1.0
"""For whoever is turned away to read why: who hangs up on unread bytes takes back what it said last."""

_FRAMING = 8
"""Bytes of framing that each byte of a chunked body may bring; with one byte a chunk it is six."""

_SLUGS = {400: "invalid-request", 408: "deadline-exceeded", 431: "invalid-request", 503: "queue-full"}
"""As what callers are counted that are turned away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How many callers there may be, in how many seconds each must say what it wants, in how many bytes.

    `answer_s` is how long an answer may wait for a caller that does not take it.
    """

    callers: int
    head_s: float
    head_bytes: int
    answer_s: float


@dataclass(kw_only=True, slots=True)
class Doorstep:
    """Everybody who is connected. `turned_away` hears of each who is, by problem."""

    patience: Patience
    turned_away: Callable[[str], object]
    callers: set[Caller] = field(default_factory=set)
    waiting: dict[Caller, None] = field(default_factory=dict)
    """Those without a request, whoever has waited longest first."""

    def caller(self, **uvicorns: Any) -> Caller:
        """Return the protocol of a new connection."""
        return Caller(self, **uvicorns)

    def has_room(self) -> bool:
        """Return whether there is room for one more; who has waited longest without a request makes some."""
        if len(self.callers) >= self.patience.callers and self.waiting:
            next(iter(self.waiting)).leave()
        return len(self.callers) < self.patience.callers

    def sweep(self, now: float) -> None:
        """Part with those whose time is up."""
        for one in [one for one in self.callers if one.due < now]:
            one.give_up()


class Caller(HttpToolsProtocol):
    """One connection. `due` is the moment of the loop's clock by which it must have moved; infinite where it may not.

    What uvicorn does not do: it would wait forever for the rest of a head, for a body that was refused and for an
    answer to be taken, hold heads of any size, let trailers pass for headers, take in callers without limit, and read
    the body of a request that asks for an upgrade as the next request.
    """

    def __init__(self, step: Doorstep, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._step, self._patience = step, step.patience
        self.parser = cast("HttpRequestParser", _Parser(self))
        self.due = math.inf
        self._in_head, self._whole = True, True
        self._beside = self._body = 0
        self._away = False
        self._status = 400

    # What the transport tells ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let it stand on the doorstep, if there is room."""
        super().connection_made(transport)
        if self._step.has_room():
            self._step.callers.add(self)
            self._step.waiting[self] = None
            self._be_due(self._patience.head_s)
        elif len(self._step.callers) < 2 * self._patience.callers:
            self._step.callers.add(self)
            self._turn_away(503)
        else:
            transport.abort()  # there is no room even to be told so

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._step.callers.discard(self)
        self._step.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hear it, as far as it may still speak."""
        if self._away:
            return
        if self._in_head and self.due == math.inf:
            self._be_due(self._patience.head_s)
        self._beside += len(data)
        super().data_received(data)
        if self._beside > self._patience.head_bytes + _FRAMING * self._body and not self._away:
            self._turn_away(431)

    def pause_writing(self) -> None:
        """Give it time to take its answer."""
        self._be_due(self._patience.answer_s)
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that it does."""
        self._be_due(self._patience.answer_s if self.transport.is_closing() else math.inf)
        super().resume_writing()

    # What the parser tells -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._in_head, self._whole = True, False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header in; what stands behind the body is none, and was checked by nobody."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let the request in, unless the parser is about to begin it anew.

        Raises:
            ValueError: its head is too large, or nobody knows whom it is for or where it ends; the parser wraps it, and
                `send_400_response` answers.
        """
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._patience.head_bytes:
            self._status = 431
            raise ValueError(size)
        _check(self.parser, self.headers)
        if self.parser.should_upgrade():
            return
        self._in_head, self._body, self.due = False, 0, math.inf
        self._step.waiting.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body in."""
        self._beside -= len(body)
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next request, which may begin with what is at hand."""
        if self.parser.should_upgrade():
            return
        self._in_head = self._whole = True
        self._beside = 0
        super().on_message_complete()
        if not self._answering():
            self._wait()

    # What uvicorn tells ----------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that was answered before it was there."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._be_due(self._patience.answer_s)
        elif not self._whole:
            self._be_due(self._patience.head_s)
        elif not self._answering():
            self._wait()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - a problem says it
        """Turn it away."""
        self._turn_away(self._status)

    def timeout_keep_alive_handler(self) -> None:
        """Part with an idle connection, whether its last answer was taken or not."""
        self.leave()

    # Partings --------------------------------------------------------------------------------------------------------

    def give_up(self) -> None:
        """Part with it, since it did not move in time; who was about to say something is told."""
        if self._answering() and not self.flow.write_paused:
            self.due = math.inf  # it is we who let it wait
        elif self._in_head and self._beside and not self._away:
            self._turn_away(408)
        else:
            self.leave()

    def leave(self) -> None:
        """Hang up at once, whatever it did not take."""
        self._step.callers.discard(self)
        self._step.waiting.pop(self, None)
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _wait(self) -> None:
        self._step.waiting[self] = None
        if not self._beside and not self.flow.write_paused:
            self.due = math.inf  # it is idle, and uvicorn's timer runs

    def _turn_away(self, status: int) -> None:
        """Say why, listen to nothing more, and hang up soon."""
        self._away = True
        self._step.waiting.pop(self, None)
        self._step.turned_away(_SLUGS[status])
        if self.pipeline or self.transport.is_closing() or (self._answering() and self.cycle.response_started):
            self.transport.close()  # another answer is under way, and this must not be taken for a part of it
            return
        if self._answering() and not self.cycle.more_body:
            self.cycle.keep_alive = False  # it is what comes behind a request that makes no sense
            return
        if self._answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(refusal(status))
        self.transport.write_eof()
        self._be_due(LINGER_S)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _be_due(self, seconds: float) -> None:
        self.due = self.loop.time() + seconds


class _Parser:
    """The parser of requests, to which an upgrade means nothing: none is offered.

    What it is made of takes a request that asks for one to end with its head, whatever is said of a body; so such a
    request is begun anew without asking.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller, self._own = caller, HttpRequestParser(caller)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def feed_data(self, data: bytes) -> None:
        """Parse what has come.

        Raises:
            HttpParserError: it is no HTTP.
        """
        while data:
            try:
                self._own.feed_data(data)
            except HttpParserUpgrade as asked:
                data = self._head_without_upgrade() + data[asked.args[0] :]
                self._own = HttpRequestParser(self._caller)
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        first = b"%s %s HTTP/%s" % (self.get_method(), self._caller.url, self.get_http_version().encode())
        rest = (b"%s: %s" % (name, value) for name, value in self._caller.headers if name != b"upgrade")
        return b"\r\n".join((first, *rest, b"\r\n"))


def _check(parser: HttpRequestParser, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Return if two servers in a row could not read a head differently (RFC 9112, 3.2 and 6.1).

    Raises:
        ValueError: it names no host, or several; its body is coded in a way that is not undone here; it asks for a
            tunnel.
    """
    old = parser.get_http_version() == "1.0"
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 and (hosts or not old):
        raise ValueError(hosts)
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or old):
        raise ValueError(codings)
    if parser.get_method() == b"CONNECT":
        raise ValueError(parser.get_method())


def refusal(status: int) -> bytes:
    """Return a whole answer of HTTP to somebody whose request was not read."""
    phrase, retry = HTTPStatus(status).phrase, b""
    told: dict[str, object] = {"type": "about:blank", "title": phrase, "status": status, "detail": _DETAILS[status]}
    if status == 503:  # noqa: PLR2004 - the only one that has a page
        told |= {"type": f"/problems/{_SLUGS[status]}", "title": PROBLEMS[_SLUGS[status]].title, "retry_after": 1.0}
        retry = b"retry-after: 1\r\n"
    body = json.dumps(told).encode()
    head = b"content-type: application/problem+json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
    safe = b"x-content-type-options: nosniff\r\ncache-control: no-store\r\n"
    return STATUS_LINE[status] + head + retry + safe + b"\r\n" + body


_DETAILS = {
    400: "What was sent is no HTTP request. Check the client, and what stands between it and this service.",
    408: "The head of the request did not arrive in time.",
    431: "The head of the request, its URL and headers, is larger than this service takes.",
    503: "More callers are connected than this service takes, and all of them are being answered.",
}
