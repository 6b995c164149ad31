"""A shortcut to one route, past the framework's routing and dependencies.

For a call to `/classify` these take about as long on the event loop as all the rooms do. The framework keeps the route:
for other methods, and for the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.security import Guarded

Handler = Callable[[Request, Exception], Awaitable[Response]]


class Shortcut:
    """ASGI middleware; `route` is one whose endpoint takes a request alone, and whose path is as it stands."""

    def __init__(self, app: ASGIApp, *, route: Guarded) -> None:
        self._app, self._route = app, route
        self._methods: Collection[str] = route.methods or ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the route's own requests, and pass on all others."""
        if scope["type"] != "http" or scope["path"] != self._route.path or scope["method"] not in self._methods:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        request = Request(scope, receive, send)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        try:
            await self._route.admit(request)
            answer: Response = await self._route.endpoint(request)
        except Exception as error:
            handler = _handler(request.app.exception_handlers, error)
            if handler is None:
                raise
            return await handler(request, error)
        return answer


def _handler(handlers: dict[Any, Any], error: Exception) -> Handler | None:
    """Return who turns an error into an answer, as the framework finds it: the one of its nearest kind."""
    return next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), None)
