"""Runs the HTTP server: rooms open before it listens, and close after the last call is answered."""

from __future__ import annotations

import asyncio
import math
from socket import socket
from types import FrameType

import uvicorn
from rich.console import Console

from . import logs, loop
from .app import create_app, open_rooms
from .rooms import Rooms
from .settings import Settings


def serve(settings: Settings, console: Console) -> int:
    """Serve until told to stop, and return the exit status.

    Raises:
        EncoderUnavailable: the encoder cannot be had.
    """
    return loop.run(_serve(settings, console))


async def _serve(settings: Settings, console: Console) -> int:
    status = console.status(f"Loading the encoder {settings.encoder} …")
    status.start()
    async with open_rooms(settings) as rooms:
        status.stop()
        loop.settle()
        config = uvicorn.Config(
            create_app(settings, rooms),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody asks where a call comes from
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
        )
        server = _Server(config, settings, rooms, console)
        await server.serve()
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Turns readiness off first when told to stop, so that a balancer looks elsewhere before the doors close."""

    def __init__(self, config: uvicorn.Config, settings: Settings, rooms: Rooms, console: Console) -> None:
        super().__init__(config)
        self._settings, self._rooms, self._console = settings, rooms, console

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._console.print(
            f"dmn serves {self._rooms.encoder.name} on http://{shown}:{port} (routes: /docs). "
            f"{_kept(self._rooms.settings)} Ctrl-C stops it.",
            highlight=False,
            soft_wrap=True,
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - both signals mean the same
        """Stop in steps at the first signal, and at once at the second.

        The base class would raise the signal again when it is done, which ends the process before the rooms close.
        """
        if self._rooms.batcher.leaving:
            self.should_exit = self.force_exit = True
            return
        self._rooms.batcher.leaving = True
        logs.event(logs.DRAINING, delay_s=self._settings.drain_delay_s)
        asyncio.get_running_loop().call_later(self._settings.drain_delay_s, self._close)

    def _close(self) -> None:
        self._rooms.batcher.draining = True
        self.should_exit = True


def _kept(settings: Settings) -> str:
    """Return where memories are kept, as a sentence."""
    if settings.store == "memory":
        return "Memories are not kept: they end with this process (DMN_STORE=memory)."
    if settings.store == "embedded":
        return f"Memories are kept in {settings.data_dir}."
    return "Memories are kept in the store."
