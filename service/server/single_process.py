"""Runs the service in one process: rooms open before it listens, and close after the last call is answered."""

from __future__ import annotations

from rich.console import Console

from service.app import create_app
from service.settings import Settings
from service.wiring import open_rooms

from . import event_loop
from .http_server import Address, Door, announce


def serve(settings: Settings, console: Console) -> int:
    """Serve until told to stop, and return the exit status.

    Raises:
        EncoderUnavailable: the encoder cannot be had.
    """
    return event_loop.run(_serve(settings, console))


async def _serve(settings: Settings, console: Console) -> int:
    status = console.status(f"Loading the encoder {settings.encoder} …")
    status.start()
    async with open_rooms(settings) as rooms:
        status.stop()
        event_loop.settle()

        def opened(address: Address) -> None:
            announce(console, rooms.settings, encoder=rooms.encoder.name, address=address)

        door = Door(create_app(settings, rooms), settings, rooms.batcher, opened)
        await door.serve()
    return 0 if door.started else 1
