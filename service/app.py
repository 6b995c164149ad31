"""Where everything is wired: the one place that picks concrete classes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI

from service.access.authentication import Gate
from service.access.idempotency import Ledger
from service.api.middleware import Porch
from service.api.routes import admin, classify, classify_answer, health, jobs, memory, pages, shots, tenants
from service.api.routes.classify_fast_path import Shortcut

from .api import openapi, problems
from .errors import StoreDown
from .services import Rooms
from .settings import Settings, operator_key_of
from .telemetry import logs
from .wiring import NAME, open_rooms

if TYPE_CHECKING:
    pass


def create_app(settings: Settings, rooms: Rooms | None = None) -> FastAPI:
    """Return the web application; without open rooms it opens its own when it starts, and closes them when it ends.

    Raises:
        ValueError: the operator's key cannot be read.
    """
    keys = settings.auth == "keys"
    operator_key = operator_key_of(settings) if keys else ""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            furnished = await stack.enter_async_context(open_rooms(settings)) if rooms is None else rooms
            ledger = Ledger(furnished.store)
            app.state.rooms, app.state.ledger = furnished, ledger
            app.state.answer = partial(classify_answer.answered, furnished, ledger)
            app.state.gate = await stack.enter_async_context(_gate(furnished, operator_key)) if keys else None
            yield

    app = FastAPI(
        title=NAME,
        version=version(NAME),
        summary="An online image classifier that remembers: Dual Memory Networks over frozen CLIP encoders.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # the framework's own loads its scripts from somebody else's server
        redoc_url=None,
        responses={422: {"description": ""}},  # the framework's own would be no problem (api/document.py)
        # Its own spans, where it makes any, hold addresses and texts of errors; ours do not (telemetry/spans.py).
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(Shortcut, route=classify.ROUTE)
    app.add_middleware(
        Porch,
        max_body_bytes=settings.max_body_bytes,
        max_inflight_bytes=settings.max_inflight_bytes,
        deadline_s=settings.deadline_ms / 1000,
        to_disk={admin.IMPORT: settings.max_import_bytes},
    )
    routers = [part.router for part in (classify, tenants, memory, shots, jobs, admin, health, pages)]
    problems.register(app, [route for router in routers for route in router.routes])
    for router in routers:
        app.include_router(router)
    openapi.describe(app, settings)
    return app


@asynccontextmanager
async def _gate(rooms: Rooms, operator_key: str) -> AsyncIterator[Gate]:
    gate = Gate(rooms.store.find_keys, clock=rooms.clock, wall=rooms.wall, operator_key=operator_key)
    if not operator_key:
        await _note_locked_doors(rooms)
    try:
        yield gate
    finally:
        await gate.aclose()


async def _note_locked_doors(rooms: Rooms) -> None:
    """Say how to make the first key if there is none."""
    how = "give DMN_OPERATOR_KEY, or DMN_OPERATOR_KEY_FILE, and start again"
    if rooms.settings.store != "memory":
        how = f"run `dmn keys create --scope operator` with the same DMN_STORE, or {how}"
    with suppress(StoreDown):  # then nobody can tell
        if not await rooms.store.keys():
            logs.event(logs.NO_KEYS, level=logging.WARNING, how=how)
