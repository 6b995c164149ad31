"""Calls to `/classify` pass the framework by; nobody outside can tell."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from service.api.routes.classify_fast_path import Shortcut
from service.api.schemas.classify import ClassifyOut
from service.services import Rooms
from tests.support import pictures
from tests.support.house import Build, House, problem

JPEG = {"content": pictures.jpeg(), "headers": {"Content-Type": "image/jpeg"}}
CALLS: dict[str, dict[str, Any]] = {
    "a picture": JPEG,
    "explained": {**JPEG, "params": {"learn": "false", "explain": "true", "top_k": "2", "views": "3"}},
    "several, one broken": {
        "files": [("images", ("a.jpg", pictures.jpeg())), ("images", ("b.jpg", b"no picture"))],
    },
    "all broken": {"content": b"no picture", "headers": {"Content-Type": "image/jpeg"}},
    "no body": {},
    "text": {"content": b"hello", "headers": {"Content-Type": "text/plain"}},
    "an unknown parameter": {**JPEG, "params": {"lern": "false"}},
    "a parameter out of range": {**JPEG, "params": {"top_k": "0"}},
    "a header that is no number": {**JPEG, "headers": {"Content-Type": "image/jpeg", "X-Deadline-Ms": "soon"}},
    "two tenants": {**JPEG, "params": {"tenant": "a"}, "headers": {"Content-Type": "image/jpeg", "X-Tenant": "b"}},
    "nobody's tenant": {**JPEG, "headers": {"Content-Type": "image/jpeg", "X-Tenant": "nobody"}},
    "another site": {**JPEG, "headers": {"Content-Type": "image/jpeg", "Origin": "http://elsewhere"}},
    "too much": {"content": bytes(200_000), "headers": {"Content-Type": "image/jpeg"}},
    "a wrong method": {"method": "DELETE"},
}


async def _passed_on(self: Shortcut, scope: Scope, receive: Receive, send: Send) -> None:
    await self._app(scope, receive, send)


def told_of(answer: httpx.Response) -> tuple[int, dict[str, str], Any]:
    """Return an answer without what differs between any two."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "server-timing")}
    headers.pop("content-length", None)  # the ids of requests are in it
    body = answer.text.replace(answer.headers["x-request-id"], "")
    return answer.status_code, headers, body


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_call_is_answered_as_by_the_framework(
    build: Build, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any]
) -> None:
    ours, theirs = [await build(max_body_bytes=100_000) for _ in range(2)]
    asked = {"method": "POST", "url": "/classify", **call}
    for house in (ours, theirs):
        await house.put()
    own = await ours.client.request(**asked)
    monkeypatch.setattr(Shortcut, "__call__", _passed_on)
    assert told_of(own) == told_of(await theirs.client.request(**asked))


OURS, NOBODYS = (("Authorization", f"Bearer {key}") for key in ("correct-horse-battery-staple", "dmn_nobody_s"))
HEADERS: dict[str, list[tuple[str, str]]] = {
    "no key": [],
    "a key": [OURS],
    "nobody's key": [NOBODYS],
    "two keys": [OURS, NOBODYS],
    "two tenants": [OURS, ("X-Tenant", "default"), ("X-Tenant", "other")],
    "two tenants, nobody's first": [OURS, ("X-Tenant", "nobody"), ("X-Tenant", "default")],
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
async def test_a_call_with_keys_is_let_in_as_by_the_framework(
    build: Build, monkeypatch: pytest.MonkeyPatch, headers: list[tuple[str, str]]
) -> None:
    ours, theirs = [await build(auth="keys", operator_key=OURS[1].removeprefix("Bearer ")) for _ in range(2)]
    for house in (ours, theirs):
        told = await house.client.put("/tenants/default", json={"classes": ["red"]}, headers=[OURS])
        assert told.status_code == 200
    call: dict[str, Any] = {**JPEG, "headers": [("Content-Type", "image/jpeg"), *headers]}
    own = await ours.client.post("/classify", **call)
    monkeypatch.setattr(Shortcut, "__call__", _passed_on)
    assert told_of(own) == told_of(await theirs.client.post("/classify", **call))


async def test_an_error_that_nobody_expected_is_a_problem_of_ours(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        raise RuntimeError("by the test")

    monkeypatch.setitem(house.app.state._state, "answer", fails)
    assert "test" not in problem(await house.client.post("/classify", **JPEG), "internal")["detail"]


@pytest.mark.parametrize("call", ["a picture", "explained", "several, one broken"])
async def test_an_answer_is_to_the_byte_what_its_schema_says(house: House, call: str) -> None:
    await house.upload("red", pictures.jpeg())
    answer = await house.client.request("POST", "/classify", **CALLS[call])
    assert answer.status_code == 200
    assert ClassifyOut.model_validate_json(answer.content).model_dump_json().encode() == answer.content


async def test_calls_are_counted_by_their_route(house: House) -> None:
    rooms: Rooms = house.rooms
    own = rooms.metrics.requests.labels("POST", "/classify", "200")
    before = own._value.get()
    await house.client.post("/classify", **JPEG)
    assert own._value.get() == before + 1
