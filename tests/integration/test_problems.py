"""Every refusal is a problem that says what it is, and no fault of ours says more than that."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from service.telemetry.logs import logger
from tests.support.fakes import picture
from tests.support.house import STATUS, Build, House, RawCall, problem, soon

SECRET = "the password is swordfish"


@pytest.mark.parametrize("slug", STATUS)
async def test_each_problem_type_has_a_page(house: House, slug: str) -> None:
    answer = await house.client.get(f"/problems/{slug}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert slug in answer.text
    assert str(STATUS[slug]) in answer.text


@pytest.mark.parametrize("path", ["/problems/none", "/nothing", "/memory/nothing", "/tenants/a/b", "/", "/%00", "/%ff"])
async def test_an_unknown_path_is_not_found(house: House, path: str) -> None:
    problem(await house.client.get(path), "not-found")


@pytest.mark.parametrize("slug", ["<script>", "x' onload='y", "%3Cb%3E"])
async def test_what_is_not_found_is_not_echoed_as_a_page(house: House, slug: str) -> None:
    answer = await house.client.get(f"/problems/{slug}")
    problem(answer, "not-found")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X-Request-ID": "abc-123"}, "abc-123"),
        ({"traceparent": "00-" + "a1" * 16 + "-" + "b" * 16 + "-01"}, "a1" * 16),
        ({"X-Request-ID": "bad id", "traceparent": "00-" + "c3" * 16 + "-" + "b" * 16 + "-01"}, "c3" * 16),
        ({"X-Request-ID": "x" * 129}, None),
        ({"X-Request-ID": ""}, None),
        ({}, None),
    ],
)
async def test_a_sane_request_id_comes_back_and_any_other_is_replaced(
    house: House, headers: dict[str, str], expected: str | None
) -> None:
    for path in ("/livez", "/nothing"):
        answer = await house.client.get(path, headers=headers)
        told = answer.headers["x-request-id"]
        assert told == expected if expected else (len(told) == 32 and told not in headers.values())
    assert answer.json()["request_id"] == told


async def test_request_ids_are_of_one_request_only(house: House) -> None:
    ids = {(await house.client.get("/livez")).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


@pytest.mark.parametrize("length", [b"\xb2", b"1" * 5000, b"-1", b"1e3", b"", b"abc"])
async def test_no_content_length_is_a_fault_of_ours(house: House, length: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", length)]
    call = RawCall(app=house.app, path="/classify", body=[b"x"], headers=headers)
    await call.run()
    assert 400 <= call.status < 500
    assert call.told["status"] == call.status


@pytest.mark.parametrize(
    "path", ["/classify", "/memory/static", "/admin/memory/reset", "/tenants/default/classes", "/livez"]
)
@pytest.mark.parametrize("kind", ["image/png", "application/json", "multipart/form-data; boundary=x"])
async def test_a_client_that_leaves_while_it_sends_is_no_fault_of_ours(house: House, path: str, kind: str) -> None:
    before, seen = await house.memory(), await house.metrics()
    headers = [(b"content-type", kind.encode())]
    start = b'--x\r\nContent-Disposition: form-data; name="label"\r\n\r\nred'
    call = RawCall(app=house.app, path=path, body=[start, b"more"], headers=headers, leaves=True)
    await call.run()
    failed = {name: count for name, count in (await house.metrics()).items() if 'code="5' in name}
    assert failed == {name: count for name, count in seen.items() if 'code="5' in name}
    assert await house.memory() == before


@pytest.mark.parametrize(
    ("room", "method", "call"),
    [
        ("archive", "record", ("GET", "/tenants/default", {})),
        ("store", "load", ("GET", "/memory", {})),
        ("store", "names", ("GET", "/tenants", {})),
        ("store", "reset", ("POST", "/admin/memory/reset", {"json": {"scope": "all"}})),
        ("store", "replace", ("PUT", "/tenants/new", {"json": {"classes": ["a"]}})),
        ("store", "push", ("POST", "/classify", {"content": picture(), "headers": {"Content-Type": "image/png"}})),
        (
            "darkroom",
            "develop",
            ("POST", "/classify", {"content": picture(), "headers": {"Content-Type": "image/png"}}),
        ),
    ],
)
async def test_an_unexpected_error_is_a_problem_that_leaks_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch, room: str, method: str, call: tuple[str, str, dict[str, Any]]
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError(SECRET)

    before = await house.memory()
    with monkeypatch.context() as patch:
        patch.setattr(getattr(house.rooms, room), method, broken)
        answer = await soon(house.client.request(call[0], call[1], **call[2]))
    problem(answer, "internal")
    assert SECRET not in answer.text
    assert "ZeroDivision" not in answer.text
    assert await house.memory() == before
    assert (await house.outcomes(picture("red"))) == ["filled"]


async def test_the_log_of_an_unexpected_error_carries_its_request_id(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from service.telemetry.logs import request_id  # noqa: PLC0415 - read at the moment of the event

            told.append((record.getMessage(), request_id.get()))

    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError(SECRET)

    listener = Listener()
    logger.addHandler(listener)
    try:
        monkeypatch.setattr(house.rooms.store, "load", broken)
        answer = await house.client.get("/memory")
    finally:
        logger.removeHandler(listener)
    assert ("dmn.request.failed", answer.headers["x-request-id"]) in told


JSON_ROUTES = [
    ("PUT", "/tenants/other"),
    ("POST", "/tenants/default/classes"),
    ("POST", "/admin/memory/reset"),
]
BAD_JSON: dict[str, bytes] = {
    "empty": b"",
    "broken": b"{",
    "no utf-8": b'{"classes": ["\xff"]}',
    "null": b"null",
    "a list": b"[]",
    "a string": b'"red"',
    "a number beyond all": b'{"slots": ' + b"9" * 6000 + b"}",
    "unknown field": b'{"classes": ["a"], "scope": "all", "colour": 1}',
    "classes null": b'{"classes": null, "scope": null}',
    "classes of numbers": b'{"classes": [1], "scope": 1}',
    "utf-16": json.dumps({"classes": ["a"]}).encode("utf-16")[:-1],
}


@pytest.mark.parametrize(("method", "path"), JSON_ROUTES)
@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
async def test_json_that_makes_no_sense_is_refused(house: House, method: str, path: str, body: bytes) -> None:
    before = await house.memory()
    headers = {"Content-Type": "application/json"}
    problem(await house.client.request(method, path, content=body, headers=headers), "invalid-request")
    assert await house.memory() == before
    problem(await house.client.get("/tenants/other"), "unknown-tenant")


@pytest.mark.parametrize(("method", "path"), JSON_ROUTES)
@pytest.mark.parametrize("kind", [None, "text/plain", "multipart/form-data; boundary=x"])
async def test_json_under_another_name_is_refused(house: House, method: str, path: str, kind: str | None) -> None:
    before = await house.memory()
    headers = {} if kind is None else {"Content-Type": kind}
    body = b'{"classes": ["new"], "scope": "all"}'
    answer = await house.client.request(method, path, content=body, headers=headers)
    problem(answer, "invalid-request" if answer.status_code == 422 else "unsupported-media-type")
    assert await house.memory() == before


async def test_a_refusal_of_the_whole_call_is_counted_by_its_reason(build: Build) -> None:
    house = await build(max_body_bytes=1000)
    await house.put()
    await house.classify(picture("red", size=(4, 4)), tenant="nobody")
    await house.client.post("/classify", content=b"x", headers={"Content-Type": "text/plain"})
    await house.client.post("/classify", content=b"x" * 2000, headers={"Content-Type": "image/png"})
    told = await house.metrics()
    for reason in ("unknown-tenant", "unsupported-media-type", "body-too-large"):
        assert told.get(f'dmn_rejected_total{{reason="{reason}"}}') == 1.0, reason
