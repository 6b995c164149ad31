"""A worker process: all rooms around one device, answering what HTTP processes hand in through the hatch.

A connection is of one of these kinds, by its first frame:

- `link`: calls to `/classify`, any number at a time. A call comes in without its images; when it is let in and they are
  wanted, the front hears `go`, decodes, and sends each as soon as it is ready.
- `http`: one request of any other route, message by message as ASGI has them, to the whole web application.
- `ask`: whether this process is ready, as `/readyz` tells it.
- `keys`: what is kept of some API keys now, for the front's own gate.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fastapi import FastAPI, Response
from starlette.types import Message

from service import health
from service.api.problems import AllFailed, problem, problem_response, refusal
from service.api.routes.classify_answer import answered
from service.api.routes.health import measure, ready
from service.app import create_app
from service.classify import ClassifyCall
from service.errors import Internal, ServiceError, StoreDown
from service.images.decode import Developed
from service.images.errors import ImageFault, ImageTooLarge, ImageUnreadable, UnsupportedMediaType
from service.server import event_loop
from service.services import Rooms
from service.telemetry import logs
from service.wiring import open_rooms

from .control import Lifeline, Plan
from .ipc import Frame, Line
from .messages import key_fields

_FAULTS: dict[str, type[ImageFault]] = {
    kind.slug: kind for kind in (ImageTooLarge, ImageUnreadable, UnsupportedMediaType)
}
_UNDER_WAY = "dmn-call"
"""Name of the tasks that are given time to end."""


async def work(plan: Plan, lifeline: Lifeline) -> int:
    """Serve the hatch until told to stop or left alone, and return the exit status.

    Raises:
        EncoderUnavailable, StoreDown, ValueError: as `open_rooms` does.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    alone = asyncio.create_task(lifeline.cut(stop.set))
    try:
        async with open_rooms(plan.settings) as rooms, serving(rooms, plan.hatches[plan.index]):
            event_loop.settle()
            lifeline.ready({"encoder": rooms.encoder.name})
            hung = asyncio.create_task(_end_if_stuck(rooms), name="dmn-watch")
            await stop.wait()
            hung.cancel()
    finally:
        alone.cancel()
    return 0


async def _end_if_stuck(rooms: Rooms) -> None:
    """End this process at once if its device hangs; a thread that does not come back cannot be waited for."""
    why = await health.stuck(rooms)
    logs.event(logs.STUCK, level=logging.ERROR, why=why.detail)
    os._exit(1)


@asynccontextmanager
async def serving(rooms: Rooms, path: str) -> AsyncIterator[None]:
    """Take connections at a path; at the end no new ones, and what is under way has the time that settings give."""
    app = create_app(rooms.settings, rooms)
    async with app.router.lifespan_context(app):
        counter = _Counter(rooms, app)
        server = await asyncio.get_running_loop().create_unix_server(lambda: Line(counter.take), path)
        try:
            yield
        finally:
            server.close()
            await counter.finish(rooms.settings.drain_timeout_s)


class _Counter:
    """Serves whoever connects."""

    def __init__(self, rooms: Rooms, app: FastAPI) -> None:
        self._rooms, self._app = rooms, app
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, line: Line) -> None:
        """Serve one connection."""
        self._spawn(self._serve(line), "dmn-line")

    async def finish(self, seconds: float) -> None:
        """Let what is under way end, no longer than that, and hang up."""
        self._rooms.batcher.draining = True
        under_way = [task for task in self._tasks if task.get_name() == _UNDER_WAY]
        if under_way:
            await asyncio.wait(under_way, timeout=seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, line: Line) -> None:
        try:
            first = await line.receive()
            kind = "" if first is None else first.head["do"]
            if first is not None and kind == "http":
                await self._spawn(self._pass_on(line, first.head), _UNDER_WAY)
            elif kind == "link":
                await self._link(line)
            elif kind == "ask":
                measure(self._rooms)
                line.send((await ready(self._rooms, Response())).model_dump())
            elif first is not None and kind == "keys":
                line.send({"found": await self._found(first.head["ids"])})
            while await line.receive() is not None:
                pass  # who hangs up on what it has not read takes back what it has just said
        finally:
            line.close()

    async def _found(self, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """Return what is kept of some API keys, read now: whoever asks keeps it for a while."""
        try:
            found = await self._rooms.store.find_keys(ids)
        except StoreDown as error:
            found = [error] * len(ids)
        return [key_fields(one) for one in found]

    async def _link(self, line: Line) -> None:
        """Answer calls until the front is gone; what it had asked by then is given up, as when a client leaves."""
        line.send({"is": "here", "preprocess": asdict(self._rooms.encoder.preprocess)})
        calls: dict[int, _Call] = {}
        try:
            while (frame := await line.receive()) is not None:
                self._hear(line, calls, frame)
        finally:
            for call in calls.values():
                call.task.cancel()

    def _hear(self, line: Line, calls: dict[int, _Call], frame: Frame) -> None:
        id_ = frame.head["id"]
        if frame.head["do"] == "call":
            images = [_Sent(line, id_, at) for at in range(frame.head["images"])]
            task = self._spawn(self._answer(line, frame.head, images), _UNDER_WAY)
            calls[id_] = _Call(images=images, task=task)
            task.add_done_callback(lambda _: calls.pop(id_, None))
        elif id_ not in calls:
            return  # it was answered, or given up, before this came
        elif frame.head["do"] == "image":
            calls[id_].images[frame.head["at"]].arrive(frame)
        else:
            calls[id_].task.cancel()

    async def _answer(self, line: Line, head: dict[str, Any], images: Sequence[_Sent]) -> None:
        logs.request_id.set(head["request_id"])
        logs.traceparent.set(head["traceparent"])
        call = ClassifyCall(
            tenant=head["tenant"],
            images=images,
            learn=head["learn"],
            views=head["views"],
            explain=head["explain"],
            deadline=self._rooms.clock() + head["left_s"],
            top_k=head["top_k"],
        )
        answer = await self._told(call, head["key"], head["digest"])
        await line.flush()
        told = {"is": "answer", "id": head["id"], "status": answer.status_code, "headers": dict(answer.headers)}
        line.send(told, bytes(answer.body))

    async def _told(self, call: ClassifyCall, key: str | None, digest: str) -> Response:
        """Return what the caller is told, whatever happens."""
        try:
            return await answered(self._rooms, self._app.state.ledger, call, key, digest)
        except (ServiceError, AllFailed) as error:
            return refusal(error, self._rooms.metrics)
        except Exception as error:  # noqa: BLE001 - the last one who can turn it into an answer
            logs.event(logs.FAILED, level=logging.ERROR, error=error)
            return problem_response(problem("internal", "An unexpected error occurred."))

    async def _pass_on(self, line: Line, head: dict[str, Any]) -> None:
        """Let the application answer one request that comes through the hatch."""
        scope = head["scope"] | {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "raw_path": head["scope"]["raw_path"].encode("latin-1"),
            "query_string": head["scope"]["query_string"].encode("latin-1"),
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head["scope"]["headers"]],
        }

        async def receive() -> Message:
            frame = await line.receive()
            if frame is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": bytes(frame.body), "more_body": frame.head["more"]}

        async def send(message: Message) -> None:
            await line.flush()
            if message["type"] == "http.response.start":
                headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
                line.send({"status": message["status"], "headers": headers})
            else:
                line.send({"more": message.get("more_body", False)}, message.get("body", b""))

        await self._app(scope, receive, send)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """A call under way."""

    images: Sequence[_Sent]
    task: asyncio.Task[None]


class _Sent:
    """An image that the front keeps until it is asked for."""

    def __init__(self, line: Line, call: int, at: int) -> None:
        self._line, self._call, self._at = line, call, at
        self._future: asyncio.Future[Developed] = asyncio.get_running_loop().create_future()

    async def developed(self) -> Developed:
        """Ask for it and return it as it arrives; the pixels stay where they were read to.

        Raises:
            ImageFault, Internal: the front could not use it.
        """
        self._line.send({"is": "go", "id": self._call, "at": self._at})
        return await self._future

    def arrive(self, frame: Frame) -> None:
        """Hand it on, or why it cannot be used."""
        if self._future.done():  # nobody waits any more
            return
        if "fault" in frame.head:
            self._future.set_exception(_FAULTS.get(frame.head["fault"], Internal)(frame.head["detail"]))
            return
        pixels = torch.frombuffer(frame.body, dtype=torch.uint8).reshape(frame.head["shape"])
        self._future.set_result(Developed(pixels=pixels, digest=frame.head["digest"]))
