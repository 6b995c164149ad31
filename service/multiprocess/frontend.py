"""An HTTP process: it reads calls and decodes their images, and asks a worker process for the rest.

request ──porch──> call ──hatch──> let in ──darkroom──> pixels ──hatch──> answer

`/classify` is read and answered here, `/livez`, `/readyz` and `/metrics` are told of the whole service, and every other
route is passed on as it is, with its key, to a worker process. A tenant's calls go to one worker process, where its
memory is hot.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.datastructures import MutableHeaders, QueryParams
from starlette.types import Message, Receive, Scope, Send

from core.encoders.protocol import Preprocess
from service.access.api_keys import claimed_tenant
from service.access.authentication import Gate
from service.api import problems
from service.api.middleware import Porch, patience_of
from service.api.request_params import headers_of
from service.api.routes import admin, classify
from service.api.routes.classify_fast_path import Shortcut
from service.api.schemas.health import CheckOut, LiveOut, ReadyOut
from service.api.security import Guarded
from service.classify import ClassifyCall
from service.domain.records import StoredKey
from service.errors import DeadlineExceeded, QueueFull, ServiceError, StoreDown
from service.images.decode import Developed
from service.images.errors import ImageFault
from service.images.limits import ImageLimits
from service.inference.decode_pool import Darkroom
from service.server import event_loop
from service.server.http_server import Door
from service.settings import DEFAULT_TENANT, Settings, operator_key_of
from service.telemetry import tracing
from service.telemetry.metrics import Metrics

from .control import Lifeline, Plan
from .worker_client import GRACE_S, RETRY_S, Image, Window, nobody_there

if TYPE_CHECKING:
    from service.telemetry.spans import Spans

_PROBE_S = 2.0
"""How long a worker process may take to say that it is ready."""

_BATCH = 32
"""What is outstanding at a worker process that is not crowded, where the settings do not say it."""

_OWN = frozenset(("/classify", "/livez", "/readyz", "/metrics"))
_FAULT = "dmn.fault"
"""Where a request that could not be passed on says why."""


async def attend(plan: Plan, lifeline: Lifeline) -> int:
    """Serve over HTTP until told to stop or left alone, and return the exit status.

    Raises:
        ValueError: traces cannot be sent.
    """
    disable_created_metrics()
    of_all = CollectorRegistry()
    MultiProcessCollector(of_all)  # reads the files in which each process keeps its own
    async with tracing.opened(plan.settings) as traces:
        front = Front(plan.settings, plan.hatches, Metrics(CollectorRegistry()), of_all, traces)
        return await _attend(front, plan, lifeline)


async def _attend(front: Front, plan: Plan, lifeline: Lifeline) -> int:
    door = Door(front, plan.settings, front.lodge, lambda _: lifeline.ready({}))
    async with front.in_touch() as met:
        alone = asyncio.create_task(lifeline.cut(door.close))
        await asyncio.wait((alone, asyncio.create_task(met.wait())), return_when=asyncio.FIRST_COMPLETED)
        event_loop.settle()
        await door.serve([socket.socket(fileno=plan.door)])
        alone.cancel()
    return 0 if door.started else 1


class Lodge:
    """What the porch asks of the rooms, where there are none: it stands for them, and for their `batcher`."""

    def __init__(self, settings: Settings, metrics: Metrics, traces: Spans | None, clock: Callable[[], float]) -> None:
        self.settings, self.metrics, self.traces, self.clock = settings, metrics, traces, clock
        self.leaving = False

    @property
    def batcher(self) -> Lodge:
        """Who knows whether the service leaves, and when to come again."""
        return self

    def retry_after_s(self) -> float:
        """Return when to come again."""
        return RETRY_S

    def knock(self, *, tenant: str, deadline: float) -> None:
        """Let every call be read: the worker process says whether there is room, before anything is decoded."""


class Front:
    """The web application of an HTTP process, as ASGI has it; `/metrics` shows what is in the registry `shown`."""

    def __init__(
        self,
        settings: Settings,
        hatches: Sequence[str],
        metrics: Metrics,
        shown: CollectorRegistry,
        traces: Spans | None = None,
    ) -> None:
        self.lodge, self._shown = Lodge(settings, metrics, traces, time.monotonic), shown
        self._windows = [Window(path, self._develop, self.lodge.clock) for path in hatches]
        self._crowded = (settings.batch_images or _BATCH) / settings.http_workers
        self._darkroom: Darkroom | None = None
        self._met = asyncio.Event()
        self._gate: Gate | None = None
        if settings.auth == "keys":
            operator_key = operator_key_of(settings)
            self._gate = Gate(self._find_keys, clock=self.lodge.clock, wall=time.time, operator_key=operator_key)
        self._app = self._furnished(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in _OWN:
            await self._app(scope, receive, send)
            return
        parting = _Parting(send, self.lodge)
        try:
            async with asyncio.timeout(_patience_s(scope)):
                await self._home(_tenant_of(scope)).pass_on(scope, receive, parting.send)
        except TimeoutError:
            await self._refuse(DeadlineExceeded("The deadline passed before the call was answered."), scope, parting)
        except QueueFull as error:
            await self._refuse(error, scope, parting)

    @asynccontextmanager
    async def in_touch(self) -> AsyncIterator[asyncio.Event]:
        """Keep in touch with the worker processes; the event tells that one was there."""
        tasks = [asyncio.create_task(window.keep(self._meet), name="dmn-window") for window in self._windows]
        try:
            yield self._met
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._gate is not None:
                await self._gate.aclose()
            if self._darkroom is not None:
                self._darkroom.close()

    # Calls to /classify ----------------------------------------------------------------------------------------------

    async def _answer(self, call: ClassifyCall, key: str | None, digest: str) -> Response:
        return await self._choose(call.tenant, key).answer(call, key, digest)

    async def _find_keys(self, ids: Sequence[str]) -> Sequence[StoredKey | StoreDown | None]:
        """Have keys looked up by a worker process, any: all have one store."""
        return await self._home("").find_keys(ids)

    def _choose(self, tenant: str, key: str | None) -> Window:
        """Return the tenant's own worker process; where it is crowded and another is much emptier, that one.

        Two calls with one key have to meet, so they always go home.
        """
        home = self._home(tenant)
        if key is not None or home.load <= self._crowded:
            return home
        least = min((window for window in self._windows if window.open), key=lambda window: window.load)
        return least if 2 * least.load < home.load else home

    def _home(self, tenant: str) -> Window:
        """Return the worker process where the tenant's memory is hot, of those that are there.

        By rendezvous: while one is away its tenants go elsewhere, and nobody else's do.

        Raises:
            QueueFull: none is there.
        """
        there = [(i, window) for i, window in enumerate(self._windows) if window.open]
        if not there:
            raise nobody_there()
        return max(there, key=lambda one: hashlib.sha256(f"{one[0]} {tenant}".encode()).digest())[1]

    def _meet(self, how: Preprocess) -> None:
        """Make images ready as the encoder wants them, which is the same in every worker process."""
        if self._darkroom is None:
            settings = self.lodge.settings
            limits = ImageLimits(
                max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels, formats=settings.image_formats
            )
            threads = math.ceil(settings.decode_workers / settings.http_workers)
            room = settings.decode_bytes // settings.http_workers
            self._darkroom = Darkroom(how, limits, threads=threads, room=room)
            self._met.set()

    async def _develop(self, image: Image, tenant: str, views: int) -> Developed:
        if isinstance(image, ImageFault):
            raise image
        if isinstance(image, bytes) and self._darkroom is not None:
            return await self._darkroom.develop(image, tenant=tenant, views=views)
        raise TypeError("An image is developed where its bytes are.")

    # The rest --------------------------------------------------------------------------------------------------------

    def _furnished(self, settings: Settings) -> FastAPI:
        """Return the application of the routes that are answered here."""
        app = FastAPI(
            openapi_url=None,
            redirect_slashes=False,
            telemetry={"tracing": False, "metrics": False, "logs": False},  # as in create_app
        )
        app.state.rooms, app.state.answer, app.state.gate = self.lodge, self._answer, self._gate
        app.router.route_class = Guarded
        app.add_middleware(Shortcut, route=classify.ROUTE)
        app.add_middleware(
            Porch,
            max_body_bytes=settings.max_body_bytes,
            max_inflight_bytes=max(settings.max_body_bytes, settings.max_inflight_bytes // settings.http_workers),
            deadline_s=settings.deadline_ms / 1000,
            to_disk={admin.IMPORT: settings.max_import_bytes},
        )
        problems.register(app)
        app.include_router(classify.router)
        app.add_api_route("/livez", _live)
        app.add_api_route("/readyz", self._ready)
        app.add_api_route("/metrics", self._metrics)
        app.router.default = _raise_fault
        return app

    async def _refuse(self, fault: ServiceError, scope: Scope, parting: _Parting) -> None:
        """Tell a caller whose request was to be passed on why it was not, if nothing was told yet."""
        if not parting.begun:
            await self._app({**scope, _FAULT: fault}, _nothing_more, parting.send)

    async def _ready(self, response: Response) -> ReadyOut:
        """Return 200 if a worker process can classify images now, else 503, with each reason."""
        told = [one for one in await self._asked() if one is not None]
        best = max(told, key=lambda one: one.ready, default=ReadyOut(ready=False, checks={}))
        checks = best.checks | {"workers": CheckOut(ok=bool(told), detail=f"{len(told)} of {len(self._windows)}")}
        if self.lodge.leaving:
            checks["draining"] = CheckOut(ok=False, detail="stopping")
        fine = best.ready and not self.lodge.leaving
        response.status_code = 200 if fine else 503
        return ReadyOut(ready=fine, checks=checks)

    async def _metrics(self) -> Response:
        """Return the metrics of all processes together."""
        await self._asked()  # which has them measure what is measured when somebody looks
        text = await asyncio.to_thread(generate_latest, self._shown)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _asked(self) -> list[ReadyOut | None]:
        """Return what each worker process says of itself, None of one that is not there."""
        return await asyncio.gather(*(window.ask(_PROBE_S) for window in self._windows))


class _Parting:
    """Hands an answer on, and asks the client to come back by another connection once this process leaves."""

    def __init__(self, send: Send, lodge: Lodge) -> None:
        self._send, self._lodge = send, lodge
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            if self._lodge.leaving:
                MutableHeaders(scope=message)["Connection"] = "close"
        await self._send(message)


async def _live() -> LiveOut:
    """Answer, which is all that is asked of an HTTP process; a worker process that is stuck ends by itself."""
    return LiveOut(live=True, checks={})


async def _raise_fault(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001 - as ASGI has it
    raise scope[_FAULT]


async def _nothing_more() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _tenant_of(scope: Scope) -> str:
    """Return whose request it is, as far as it matters where it goes: the worker process looks closer."""
    _, first, *rest = scope["path"].split("/")
    if first == "tenants" and rest and rest[0]:
        return str(rest[0])
    headers = headers_of(scope)
    named = headers.get("x-tenant") or QueryParams(scope["query_string"]).get("tenant")
    return named or claimed_tenant(headers.get("authorization", "")) or DEFAULT_TENANT


def _patience_s(scope: Scope) -> float | None:
    """Return after how many seconds a request with a deadline is given up; the worker process keeps it itself."""
    patience_s = patience_of(headers_of(scope))
    return None if patience_s is None else patience_s + GRACE_S
