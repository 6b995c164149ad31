"""Whatever is done to a body or its headers, the answer is no fault of ours."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest

from tests.fakes import picture
from tests.integration.conftest import House, zipped

SMALL = picture("red", 1, size=(6, 5))
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "\x00",
    "\U0001f408",
    "{}",
    [],
    {},
    ["red"],
    [[]],
    {"name": "red"},
    "NaN",
    "a" * 300,
)
PIECES = (b"\r\n", b"\0", b"--x", b"--x--", b'"', b";", b"PK\1\2", b"\xff" * 8)
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="label"\r\n\r\nred\r\n'
    b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    + SMALL
    + b"\r\n--x--\r\n"
)
ZIP = zipped({"red/1.png": SMALL, "blue/2.png": picture("blue", 2, size=(6, 5))}, compression=8)
CALL = json.dumps({"images": [{"data": base64.b64encode(SMALL).decode()}] * 2}).encode()
SEEDS: list[tuple[str, str, str, bytes]] = [
    ("POST", "/classify", "multipart/form-data; boundary=x", FORM),
    ("POST", "/memory/static", "multipart/form-data; boundary=x", FORM),
    ("POST", "/memory/static", "application/zip", ZIP),
    ("POST", "/classify", "application/json", CALL),
    ("POST", "/classify", "image/png", SMALL),
]
CONFIG: dict[str, Any] = {
    "classes": ["red", {"name": "blue", "prompts": ["a blue thing"]}],
    "templates": ["a {}."],
    "slots": 5,
    "beta": 5.5,
    "weights": [1, 1, 1],
    "learn": True,
    "retention": "features",
}
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("PUT", "/tenants/fuzz", CONFIG),
    ("POST", "/tenants/default/classes", {"classes": ["white", {"name": "new", "prompts": ["a thing"]}]}),
    ("POST", "/admin/memory/reset", {"scope": "all", "classes": ["red"]}),
]


def _mutated(data: bytes, draw: random.Random) -> bytes:
    """Return the bytes with a few pieces changed, removed, doubled, or moved."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(out) + 1)
        length = draw.choice((1, 2, 4, 16, 200))
        match draw.randrange(6):
            case 0 if at < len(out):
                out[at] = draw.randrange(256)
            case 1:
                del out[at : at + length]
            case 2:
                out[at:at] = out[at : at + length]
            case 3:
                out[at:at] = draw.randbytes(length)
            case 4:
                out[at : at + length] = draw.choice(PIECES)
            case _:
                piece = out[at : at + length]
                del out[at : at + length]
                to = draw.randrange(len(out) + 1)
                out[to:to] = piece
    return bytes(out)


def _changed(value: Any, draw: random.Random) -> Any:
    """Return the value with some of its parts replaced by odd ones."""
    if draw.random() < 0.2:
        return draw.choice(ODD)
    if isinstance(value, dict):
        out = {name: _changed(own, draw) for name, own in value.items() if draw.random() < 0.95}
        return out | ({str(draw.choice(ODD))[:20]: draw.choice(ODD)} if draw.random() < 0.1 else {})
    if isinstance(value, list):
        return [_changed(own, draw) for own in value for _ in range(draw.choice((0, 1, 1, 1, 2)))]
    return value


@pytest.mark.parametrize("seed", range(5))
async def test_no_mutation_of_an_upload_is_a_fault_of_ours(house: House, seed: int) -> None:
    draw = random.Random(seed)
    method, path, kind, body = SEEDS[seed]
    for _ in range(80):
        sent = _mutated(body, draw)
        told = kind.encode() if draw.random() < 0.8 else _mutated(kind.encode(), draw)
        headers = [(b"Content-Type", told.translate(None, b"\r\n\0"))]
        answer = await house.client.request(method, path, content=sent, headers=headers)
        assert answer.status_code < 500, (answer.text, headers, sent)
        assert answer.headers["content-type"] == (
            "application/json" if answer.status_code < 300 else "application/problem+json"
        )
    answer = await house.client.request(method, path, content=body, headers={"Content-Type": kind})
    assert answer.status_code in {200, 201}, answer.text


@pytest.mark.parametrize("seed", range(3))
async def test_no_mutation_of_a_json_body_is_a_fault_of_ours(house: House, seed: int) -> None:
    draw = random.Random(100 + seed)
    method, path, body = BODIES[seed]
    headers = {"Content-Type": "application/json"}
    for _ in range(80):
        sent = json.dumps(_changed(body, draw)).encode()
        if draw.random() < 0.3:
            sent = _mutated(sent, draw)
        answer = await house.client.request(method, path, content=sent, headers=headers)
        assert answer.status_code < 500, (answer.text, sent)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
        if method == "PUT" and answer.status_code < 300 and answer.json()["classes"]:
            (one,) = await house.predictions(SMALL, tenant="fuzz")
            assert isinstance(one["score"], float), sent
    assert (await house.client.request(method, path, json=body)).status_code < 500


async def test_no_mutation_of_headers_and_query_is_a_fault_of_ours(house: House) -> None:
    draw = random.Random(7)
    names = ("X-Tenant", "X-Deadline-Ms", "Idempotency-Key", "X-Request-ID", "traceparent", "Content-Type", "Accept")
    values = (b"", b"default", b"1", b"\xff\xfe", b"a" * 5000, b"image/png", b"text/plain;q=x", b"'--", b"%00", b"\t")
    queries = ("top_k", "learn", "views", "explain", "tenant", "limit", "cursor", "label", "nothing")
    for _ in range(150):
        headers = [(draw.choice(names).encode(), draw.choice(values)) for _ in range(draw.randint(0, 4))]
        query = [(draw.choice(queries), draw.choice((*map(str, ODD), "1", "red"))) for _ in range(draw.randint(0, 4))]
        method, path = draw.choice(
            (
                ("POST", "/classify"),
                ("GET", "/memory"),
                ("GET", "/memory/static"),
                ("DELETE", "/memory/static"),
                ("GET", "/memory/dynamic/red"),
                ("DELETE", "/memory/dynamic/red/x"),
                ("GET", "/tenants"),
                ("POST", "/memory/static"),
            )
        )
        content = SMALL if method == "POST" else None
        answer = await house.client.request(method, path, params=query, headers=headers, content=content)
        assert answer.status_code < 500, (answer.text, method, path, headers, query)
        if answer.status_code >= 400:
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
