"""Clients that leave before they are answered, and calls that end for another reason."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from service.api.responses import GONE, unless_gone


class Client:
    """Sends nothing more, until it leaves."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}


class Work:
    """Never ends by itself; knows whether it has begun, and whether it was dropped."""

    def __init__(self) -> None:
        self.begun, self.dropped = asyncio.Event(), False

    async def run(self) -> Response:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.dropped = True
            raise
        return Response()


def _answering(client: Client, work: Work) -> asyncio.Task[Response]:
    request = Request({"type": "http", "headers": []}, client.receive)
    return asyncio.create_task(unless_gone(request, work.run()))


async def test_the_work_for_a_client_that_leaves_is_dropped() -> None:
    client, work = Client(), Work()
    answering = _answering(client, work)
    await work.begun.wait()
    client.left.set()
    assert (await answering).status_code == GONE
    assert work.dropped
    assert not answering.cancelling()


async def test_who_is_told_to_stop_stops_and_takes_it_for_no_client_that_left() -> None:
    client, work = Client(), Work()
    answering = _answering(client, work)
    await work.begun.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert work.dropped


async def test_who_is_told_to_stop_while_the_client_leaves_stops() -> None:
    client, work = Client(), Work()
    answering = _answering(client, work)
    await work.begun.wait()
    client.left.set()
    await asyncio.sleep(0)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering


async def test_a_client_that_leaves_as_it_is_answered_leaves_no_trace() -> None:
    client = Client()

    async def answered() -> Response:
        client.left.set()
        return Response(status_code=204)

    request = Request({"type": "http", "headers": []}, client.receive)
    answering = asyncio.create_task(unless_gone(request, answered()))
    assert (await answering).status_code == 204
    assert not answering.cancelling()
