"""The door: uvicorn, which closes in steps, and the one line that says where it is."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from socket import socket
from types import FrameType
from typing import Any, Protocol, cast

import uvicorn
from rich.console import Console

from service.settings import Settings
from service.telemetry import logs
from service.telemetry.metrics import Metrics

from .connections import Doorstep, Patience

Address = tuple[str, int]

_TICKS = 10
"""Of uvicorn's, which are a second."""

_LAST_WORDS_S = 0.25
"""For callers to say what they want who came just before the door closed."""


class Gate(Protocol):
    """Who is told that the door will close, and readiness is off; whoever comes before it does is answered."""

    leaving: bool

    @property
    def metrics(self) -> Metrics:
        """Where those are counted whom the doorstep turns away."""


class Door(uvicorn.Server):
    """Turns readiness off first when told to stop, so that a balancer looks elsewhere before the door closes."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        gate: Gate,
        opened: Callable[[Address], None],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._step = Doorstep(
            patience=Patience(
                callers=math.ceil(settings.max_connections / max(1, settings.http_workers)),
                head_s=settings.header_timeout_s,
                head_bytes=settings.max_header_bytes,
                answer_s=settings.deadline_ms / 1000,
            ),
            turned_away=lambda slug: gate.metrics.rejected.labels(slug).inc(),
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=cast("Any", self._step.caller),
                ws="none",
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=math.ceil(settings.keep_alive_s),
                proxy_headers=False,  # nobody asks where a call comes from
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
            )
        )
        self._gate, self._delay_s, self._opened, self._sleep = gate, settings.drain_delay_s, opened, sleep

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Open, and tell where."""
        await super().startup(sockets)
        if self.started:
            self._opened(self.servers[0].sockets[0].getsockname()[:2])

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Close the door behind whoever was there before, hear what they have to say, and see everybody out."""
        await self._let_last_in()
        if not self.force_exit:
            await self._sleep(_LAST_WORDS_S)
        await super().shutdown(sockets)

    async def _let_last_in(self) -> None:
        """Listen no more; callers who are connected, and whom nobody has looked at yet, would be cut off with that."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            held = [socket(fileno=os.dup(listener.fileno())) for listener in server.sockets]
            server.close()
            last = [caller for listener in held for caller in _knocking(listener)]
            for caller in last:
                await loop.connect_accepted_socket(self._caller, caller)

    def _caller(self) -> asyncio.Protocol:
        state = self.lifespan.state
        return self._step.caller(config=self.config, server_state=self.server_state, app_state=state)

    async def on_tick(self, counter: int) -> bool:
        """Look at the doorstep every second."""
        if counter % _TICKS == 0:
            self._step.sweep(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - both signals mean the same
        """Stop in steps at the first signal, and at once at the second.

        The base class would raise the signal again when it is done, which ends the process before the rooms close.
        """
        if self._gate.leaving:
            self.should_exit = self.force_exit = True
            return
        self._gate.leaving = True
        logs.event(logs.DRAINING, delay_s=self._delay_s)
        asyncio.get_running_loop().call_later(self._delay_s, self.close)

    def close(self) -> None:
        """Let nobody in any more; who is inside is served to the end, also who is still about to say what it wants."""
        self._gate.leaving = True
        self.should_exit = True


def _knocking(listener: socket) -> Iterator[socket]:
    """Yield whoever waits to be let in, and close the listener behind the last one."""
    with listener, suppress(BlockingIOError):
        listener.setblocking(False)  # noqa: FBT003 - its only argument
        while True:
            yield listener.accept()[0]


def announce(console: Console, settings: Settings, *, encoder: str, address: Address) -> None:
    """Say where the service is, and what becomes of memories."""
    host, port = address
    shown = f"[{host}]" if ":" in host else host
    console.print(
        f"dmn serves {encoder} on http://{shown}:{port} (routes: /docs). {kept(settings)} Ctrl-C stops it.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def kept(settings: Settings) -> str:
    """Return where memories are kept, as a sentence."""
    if settings.store == "memory":
        return "Memories are not kept: they end with this process (DMN_STORE=memory)."
    if settings.store == "embedded":
        return f"Memories are kept in {settings.data_dir}."
    return "Memories are kept in the store."
