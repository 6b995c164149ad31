"""An HTTP process's way to one worker process: calls and requests out, answers back, and word when it is gone."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from core.encoders.protocol import Preprocess
from service.api.schemas.health import ReadyOut
from service.classify import ClassifyCall, Delivery
from service.domain.records import StoredKey
from service.errors import DeadlineExceeded, QueueFull, StoreDown
from service.images.decode import Developed
from service.images.errors import ImageFault
from service.telemetry import logs

from .ipc import Frame, Line, connect
from .messages import call_fields, found_key, preprocess_of, scope_fields

Image = bytes | ImageFault | Delivery

Develop = Callable[[Image, str, int], Awaitable[Developed]]
"""Makes of an image so many views, or raises why it cannot."""

AGAIN_S = 0.05
"""Between two tries to reach a worker process that is not there: it may be starting."""

RETRY_S = 1.0
"""When a call may come again that nobody can work on now; starting takes seconds, but others may be there."""

GRACE_S = 1.0
"""A worker process keeps deadlines itself; one that hangs is given so much longer."""

KEYS_S = 10.0
"""How long a worker process may take to look up keys; the store that it asks has deadlines of its own."""


def nobody_there() -> QueueFull:
    """Return what a call is told that no worker process can take."""
    return QueueFull("No worker process is there to take the call; one is being started.", retry_after_s=RETRY_S)


def left_alone() -> QueueFull:
    """Return what a call is told whose worker process ended under it."""
    return QueueFull(
        "The worker process that had the call ended. What it did of it by then is kept; send the call again.",
        retry_after_s=RETRY_S,
    )


@dataclass(kw_only=True, slots=True, eq=False)
class _Call:
    """A call that waits for its answer, and the images of it that are being made ready."""

    tenant: str
    images: Sequence[Image]
    views: int
    answer: asyncio.Future[Frame] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Window:
    """The way to the worker process behind a socket's path; it is looked for again whenever it is gone.

    `load` is how many images times views this process has there.
    """

    def __init__(self, path: str, develop: Develop, clock: Callable[[], float]) -> None:
        self._path, self._develop, self._clock = path, develop, clock
        self._line: Line | None = None
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count()
        self.load = 0

    @property
    def open(self) -> bool:
        """Whether the worker process is there."""
        return self._line is not None

    async def keep(self, met: Callable[[Preprocess], None]) -> None:
        """Keep in touch, until cancelled; `met` is told how its encoder wants images whenever it is there anew."""
        while True:
            try:
                await self._listen(met)
            except OSError:
                pass  # it is not there, or not yet
            except Exception as error:  # noqa: BLE001 - it must outlive whatever it hears
                logs.event(logs.FAILED, level=logging.ERROR, error=error)
            await asyncio.sleep(AGAIN_S)

    async def answer(self, call: ClassifyCall, key: str | None, digest: str) -> Response:
        """Return the worker's answer to a call; its images are made ready once the worker wants them.

        Raises:
            QueueFull: the worker is not there, or no longer.
            DeadlineExceeded: it does not answer in time.
        """
        line, left_s = self._line, call.deadline - self._clock()
        if line is None:
            raise nobody_there()
        id_, size = next(self._ids), len(call.images) * call.views
        own = _Call(tenant=call.tenant, images=call.images, views=call.views)
        self._calls[id_] = own
        self.load += size
        line.send(call_fields(call, key, digest) | {"do": "call", "id": id_, "left_s": left_s})
        try:
            async with asyncio.timeout(max(0.0, left_s) + GRACE_S):
                frame = await own.answer
        except TimeoutError as error:
            raise DeadlineExceeded("The deadline passed before the call was answered.") from error
        finally:
            self.load -= size
            del self._calls[id_]
            for task in own.tasks:
                task.cancel()
            if own.answer.cancelled():  # as waiting for it was: the client left, or the time is up
                line.send({"do": "drop", "id": id_})
        return Response(bytes(frame.body), status_code=frame.head["status"], headers=frame.head["headers"])

    async def ask(self, seconds: float) -> ReadyOut | None:
        """Return whether the worker says that it is ready, and why; None if it is not there or says nothing."""
        try:
            line = await connect(self._path)
        except OSError:
            return None
        try:
            line.send({"do": "ask"})
            async with asyncio.timeout(seconds):
                frame = await line.receive()
        except TimeoutError:
            return None
        finally:
            line.close()
        return None if frame is None else ReadyOut(**frame.head)

    async def find_keys(self, ids: Sequence[str]) -> Sequence[StoredKey | StoreDown | None]:
        """Return what the worker finds out now about some API keys, as `MemoryStore.find_keys` does.

        Raises:
            QueueFull: the worker is not there, or no longer.
            DeadlineExceeded: it does not answer in time.
        """
        try:
            line = await connect(self._path)
        except OSError as error:
            raise nobody_there() from error
        try:
            line.send({"do": "keys", "ids": list(ids)})
            async with asyncio.timeout(KEYS_S):
                frame = await line.receive()
        except TimeoutError as error:
            raise DeadlineExceeded("The API key could not be looked up in time.") from error
        finally:
            line.close()
        if frame is None:
            raise left_alone()
        return [found_key(one) for one in frame.head["found"]]

    # What the worker says --------------------------------------------------------------------------------------------

    async def _listen(self, met: Callable[[Preprocess], None]) -> None:
        """Connect, and hear the worker until it is gone."""
        line = await connect(self._path)
        try:
            line.send({"do": "link"})
            while (frame := await line.receive()) is not None:
                if frame.head["is"] == "here":
                    met(preprocess_of(frame.head["preprocess"]))
                    self._line = line
                else:
                    self._hear(line, frame)
        finally:
            line.close()
            self._lose()

    def _hear(self, line: Line, frame: Frame) -> None:
        call = self._calls.get(frame.head["id"])
        if call is None:
            return  # given up meanwhile
        if frame.head["is"] == "go":
            task = asyncio.create_task(self._send(line, call, frame.head["id"], frame.head["at"]))
            call.tasks.add(task)
            task.add_done_callback(call.tasks.discard)
        elif not call.answer.done():
            call.answer.set_result(frame)

    def _lose(self) -> None:
        """Tell everyone who waits that nobody will answer."""
        self._line = None
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_exception(left_alone())

    async def _send(self, line: Line, call: _Call, id_: int, at: int) -> None:
        """Make an image ready and send it, or why it cannot be used."""
        head: dict[str, Any] = {"do": "image", "id": id_, "at": at}
        try:
            developed = await self._develop(call.images[at], call.tenant, call.views)
        except ImageFault as fault:
            line.send(head | {"fault": fault.slug, "detail": str(fault)})
        except Exception as error:  # noqa: BLE001 - a fault of ours with one image is no fault of its neighbours
            logs.event(logs.FAILED, level=logging.ERROR, error=error)
            line.send(head | {"fault": "internal", "detail": "An unexpected error occurred with this image."})
        else:
            await line.flush()
            pixels = developed.pixels.numpy().data.cast("B")
            line.send(head | {"digest": developed.digest, "shape": tuple(developed.pixels.shape)}, pixels)

    # Requests that are passed on -------------------------------------------------------------------------------------

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the worker's application answer a request, message by message, on a connection of its own.

        Raises:
            QueueFull: the worker is not there, or no longer; nothing was sent back.
        """
        try:
            line = await connect(self._path)
        except OSError as error:
            raise nobody_there() from error
        body = asyncio.create_task(_carry(line, receive))
        try:
            line.send({"do": "http", "scope": scope_fields(scope)})
            await _bring(line, send)
        except QueueFull:
            if not body.done():  # or it is the client that is gone
                raise
        finally:
            body.cancel()
            line.close()


async def _carry(line: Line, receive: Receive) -> None:
    """Hand a request's body through, as far as the other end takes it; hang up if the client does."""
    while (message := await receive())["type"] == "http.request":
        await line.flush()
        line.send({"more": message.get("more_body", False)}, message.get("body", b""))
    line.close()


async def _bring(line: Line, send: Send) -> None:
    """Bring an answer back."""
    started = False
    while (frame := await line.receive()) is not None:
        if "status" in frame.head:
            started = True
            headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in frame.head["headers"]]
            await send({"type": "http.response.start", "status": frame.head["status"], "headers": headers})
        else:
            await send({"type": "http.response.body", "body": bytes(frame.body), "more_body": frame.head["more"]})
            if not frame.head["more"]:
                return
    if not started:
        raise left_alone()
    logs.event(logs.ANSWER_CUT, level=logging.WARNING, why="the worker process ended in the midst of its answer")
