"""Bodies that do not come, and doors that are about to close."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.types import Message

from service.app import create_app
from service.settings import Settings
from service.wiring import open_rooms
from tests.support.fakes import FakeEncoder


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x", "application/json"])
async def test_a_body_that_does_not_come_is_given_up_at_the_servers_own_deadline(kind: str) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    settings = Settings(store="memory", deadline_ms=50)
    headers = [(b"content-type", kind.encode()), (b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": "/classify", "query_string": b"", "headers": headers}
    async with open_rooms(settings, FakeEncoder()) as rooms:
        app = create_app(settings, rooms)
        async with app.router.lifespan_context(app):
            await app(scope, _never, send)
    assert sent[0]["status"] == 504
    assert b"/problems/deadline-exceeded" in sent[1]["body"]


async def test_answers_close_their_connection_once_readiness_is_off() -> None:
    settings = Settings(store="memory")
    async with open_rooms(settings, FakeEncoder()) as rooms:
        app = create_app(settings, rooms)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                assert "connection" not in (await client.get("/livez")).headers
                rooms.batcher.leaving = True
                assert (await client.get("/livez")).headers["connection"] == "close"
