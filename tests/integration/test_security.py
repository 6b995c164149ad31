"""What an attacker tries: each line of the hard limits, and what callers could make the service say or keep."""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from service.settings import Settings
from service.telemetry import logs
from tests.support.fakes import picture
from tests.support.house import Build, House, RawCall, problem, soon, zipped

SECRET = "swordfish"
CRLF = "a\r\nX-Evil: 1"


# What every answer says of itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/livez"),
        ("GET", "/metrics"),
        ("GET", "/memory"),
        ("GET", "/nothing"),
        ("PUT", "/classify"),
        ("POST", "/classify"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/problems/internal"),
    ],
)
async def test_no_answer_is_kept_for_another_or_taken_for_what_it_is_not(house: House, method: str, path: str) -> None:
    answer = await house.client.request(method, path)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


class _Links(HTMLParser):
    """Notes what a page would run or fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        runs = [(tag, value) for name, value in attrs if name.startswith("on") or name in ("src", "style", "action")]
        self.found += runs + [(tag, None)] * (tag in ("script", "link", "iframe", "object", "form", "img", "base"))


@pytest.mark.parametrize("path", ["/docs", "/problems/internal"])
async def test_pages_run_nothing_fetch_nothing_and_may_not_either(house: House, path: str) -> None:
    answer = await house.client.get(path)
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    links = _Links()
    links.feed(answer.text)
    assert not links.found


async def test_the_documents_name_every_route_and_escape_what_they_say(house: House) -> None:
    page = (await house.client.get("/docs")).text
    paths = (await house.client.get("/openapi.json")).json()["paths"]
    for path, item in paths.items():
        for method in item:
            assert f"<code>{method.upper()} {path}</code>" in page
    assert "X-Deadline-Ms".lower() in page.lower()


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/tenants/default", "DELETE, GET, PUT"),
        ("/memory/static", "DELETE, GET, POST"),
        ("/memory/static/train", "DELETE, POST"),
        ("/admin/memory/snapshots", "GET, POST"),
        ("/classify", "POST"),
        ("/livez", "GET"),
        ("/tenants", "GET"),
    ],
)
async def test_a_refused_method_is_told_all_that_are_allowed(house: House, path: str, allowed: str) -> None:
    answer = await house.client.request("PATCH", path)
    problem(answer, "method-not-allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("query", [{"lern": "false"}, {"Learn": "false"}, {"learn": "false", "x": "1"}, {"": "1"}])
async def test_a_query_that_is_misspelt_does_not_learn(house: House, query: dict[str, str]) -> None:
    before = await house.memory()
    told = problem(await house.classify(picture("red"), **query), "invalid-request")
    assert any(name in told["detail"] for name in query)
    assert await house.memory() == before


# Pages of others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://test"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://test.evil.example"},
        {"Origin": "//"},
    ],
)
async def test_no_page_of_another_site_may_speak_through_its_readers_browser(
    house: House, headers: dict[str, str]
) -> None:
    before = await house.memory()
    problem(await house.classify(picture("red"), headers=headers), "forbidden")
    answer = await house.client.post("/admin/memory/reset", json={"scope": "all"}, headers=headers)
    problem(answer, "forbidden")
    assert await house.memory() == before
    assert (await house.client.get("/livez", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://test"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"},
        {"Sec-Fetch-Site": "none"},
        {},
    ],
)
async def test_pages_of_the_same_site_and_everything_else_may(house: House, headers: dict[str, str]) -> None:
    assert (await house.classify(picture("red"), headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "EVIL.example:8000", "127.0.0.1.evil.example", "localhost.evil.example."]
)
async def test_no_page_may_have_its_own_name_lead_here(house: House, host: str) -> None:
    """A browser says of such a call that it is of the page's own site, or nothing at all."""
    before = await house.memory()
    headers = {"Host": host, "Origin": f"http://{host}"}
    problem(await house.classify(picture("red"), headers=headers), "forbidden")
    problem(await house.client.get("/memory", headers={"Host": host}), "forbidden")
    assert await house.memory() == before
    assert (await house.client.get("/livez", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("localhost:8000", "127.0.0.1:8000", "10.0.0.1", "[::1]:8000", "[fd00::1]", "dmn", "dmn:8000", "a.localhost"),
        *("dmn.example.org", "DMN.example.org.:80"),
    ],
)
async def test_by_address_and_by_names_that_nobody_else_can_have_callers_come_in(build: Build, host: str) -> None:
    own = await build(open_hosts=("dmn.example.org",))
    assert (await own.client.get("/tenants", headers={"Host": host})).status_code == 200


# What goes into headers and logs --------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """Return what returns all that was logged so far, as machines and as people see it."""
    with caplog.at_level(logging.DEBUG, logs.logger.name):
        forms = [logs._Json(""), logs._Text("")]
        yield lambda: "\n".join(form.format(record) for form in forms for record in caplog.records)


@pytest.mark.parametrize(
    "value", ["x\r\ny", "a b", "\u2028", "a\tb", "x" * 5000, '"', "{}", "\x1b[31m", "id\n{}", "é", "<script>"]
)
@pytest.mark.parametrize("header", ["X-Request-ID", "traceparent", "X-Tenant", "Idempotency-Key", "X-Deadline-Ms"])
async def test_no_header_forges_a_header_or_a_line(
    house: House, said: Callable[[], str], header: str, value: str
) -> None:
    raw = [(header.lower().encode(), value.encode()), (b"content-type", b"image/png")]
    call = RawCall(app=house.app, path="/classify", body=[picture("red")], headers=raw)
    await call.run()
    assert call.status < 500
    for name, own in call.sent[0]["headers"]:
        assert re.fullmatch(rb"[a-z0-9-]+", name.lower())
        assert re.fullmatch(rb"[\x21-\x7e][\x20-\x7e]*", own)
    names = {name.lower() for name, _ in call.sent[0]["headers"]}
    assert b"x-evil" not in names
    assert all(line.startswith(("{", *"0123456789", "  |")) for line in said().splitlines())
    assert "\x1b" not in said()


@pytest.mark.parametrize("name", ["a\u202eb", 'say "no"', "a;dur=1", "<b>", "é" * 200, "a,b=c", "\U0001f408"])
async def test_a_class_name_stays_a_value_wherever_it_is_told(house: House, said: Callable[[], str], name: str) -> None:
    await house.put(classes=[name, "red"])
    answer = await house.classify(picture("red"))
    assert answer.status_code == 200
    assert re.fullmatch(r"(\w+;dur=[\d.]+(, )?)+", answer.headers["server-timing"])
    assert name in (await house.client.get("/tenants/default")).json()["classes"][0].values()
    metrics = (await house.client.get("/metrics")).text
    assert name not in metrics
    assert name not in said()
    assert (await house.client.get("/memory/dynamic/" + "nobody%0d%0aX-Evil:1")).status_code == 404


@pytest.mark.parametrize("name", [CRLF, "a\x00b", "\x7f", "a\x85b", "\n", " ", "\ud800"])
async def test_a_class_name_with_control_characters_is_refused(house: House, name: str) -> None:
    body = json.dumps({"classes": ["red", name]}).encode()
    answer = await house.client.put("/tenants/x", content=body, headers={"Content-Type": "application/json"})
    problem(answer, "invalid-request")


@pytest.mark.parametrize("tenant", ["a\r\nb", "../../etc", "a{b}", "a b", "*", "é", "a" * 65, ".hidden", ""])
async def test_no_tenant_name_leads_out_of_its_keys(house: House, tenant: str) -> None:
    answer = await house.client.put(f"/tenants/{quote(tenant, safe='')}", json={"classes": ["red"]})
    assert answer.status_code in {404, 405, 422}
    assert answer.headers["content-type"] == "application/problem+json"


async def test_no_image_feature_or_answer_is_logged(house: House, said: Callable[[], str]) -> None:
    await house.put(classes=["crimson red", "blue"])
    answer = await house.classify(picture("red"), headers={"Idempotency-Key": "my-own-key"})
    slot = answer.json()["predictions"][0]["learned"]["slot"]
    body = "U2VjcmV0IHBpY3R1cmUgb2YgYSBzZWNyZXQgY2F0"
    for kind in ("image/png", "application/json", "multipart/form-data; boundary=x", "text/plain"):
        refused = await house.client.post("/classify", content=body, headers={"Content-Type": kind})
        assert refused.status_code in {415, 422}
    for field in ("data", "wrong"):
        await house.client.post("/classify", json={"images": [{field: body}]})
    await house.client.put("/tenants/default", json={"classes": [{"nom": body}]})
    assert "dmn.request" in said()
    for own in ("crimson", slot, "my-own-key", "image/png", body):
        assert own not in said()


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@127.0.0.1:1/0",
        f"redis://:{SECRET}@nowhere.invalid:6379",
        f"redis+sentinel://127.0.0.1:1/x?sentinel_password={SECRET}",
        f"redis+cluster://:{SECRET}@127.0.0.1:1",
    ],
)
async def test_the_stores_password_is_told_to_nobody(build: Build, said: Callable[[], str], url: str) -> None:
    with pytest.raises(Exception, match="store") as refused:
        await build(store=url, store_timeout_ms=300)
    assert SECRET not in f"{refused.value!r} {refused.value} {said()}"
    assert SECRET not in Settings(store=url).store_kind


# Bodies ---------------------------------------------------------------------------------------------------------------

DEEP = 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"images":' * DEEP,
        b'{"images":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"images": [{"data": ' + b"[" * DEEP,
        b'{"x":' * 5000 + b"1" + b"}" * 5000,
    ],
    ids=range(6),
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/classify"),
        ("PUT", "/tenants/deep"),
        ("POST", "/tenants/default/classes"),
        ("POST", "/admin/memory/reset"),
        ("POST", "/memory/static/train"),
    ],
)
async def test_no_depth_of_json_is_a_fault_of_ours(house: House, method: str, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    problem(await soon(house.client.request(method, path, content=body, headers=headers)), "invalid-request")


@pytest.mark.parametrize(
    "number", ["9" * 5000, "1e999", "-1e999", "0." + "1" * 5000, "NaN", "Infinity", "1e-999", "-0"]
)
@pytest.mark.parametrize("field", ["slots", "beta", "weights"])
async def test_no_number_in_json_is_a_fault_of_ours(house: House, field: str, number: str) -> None:
    value = f"[{number},1,1]" if field == "weights" else number
    body = f'{{"classes": ["red", "blue"], "{field}": {value}}}'.encode()
    headers = {"Content-Type": "application/json"}
    answer = await house.client.put("/tenants/numbers", content=body, headers=headers)
    assert answer.status_code in {200, 201, 422}, answer.text
    if answer.status_code < 300:
        (one,) = await house.predictions(picture("red"), tenant="numbers")
        assert np.isfinite(one["score"])


@pytest.mark.parametrize(
    "value", ["9" * 5000, "1e5", "0x5", "٣", "1_000", " 5", "+5", "-0", "5.0", "1e400", "true", ""]
)
@pytest.mark.parametrize("name", ["top_k", "views", "learn", "explain"])
async def test_no_value_in_a_query_is_a_fault_of_ours(house: House, name: str, value: str) -> None:
    answer = await house.classify(picture("red"), **{name: value})
    assert answer.status_code in {200, 422}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/tenants/half", r'{"classes": ["\ud800"]}'),
        ("PUT", "/tenants/half", r'{"classes": [{"name": "red", "prompts": ["a \udfff"]}]}'),
        ("POST", "/tenants/default/classes", r'{"classes": ["\ud800"]}'),
        ("POST", "/admin/memory/reset", r'{"scope": "all", "classes": ["\ud800"]}'),
    ],
)
async def test_half_a_surrogate_in_json_is_no_text_and_no_fault_of_ours(
    house: House, method: str, path: str, body: str
) -> None:
    answer = await house.client.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert "not valid Unicode" in problem(answer, "invalid-request")["detail"]


async def test_of_doubled_keys_the_last_one_counts_and_none_is_a_fault_of_ours(house: House) -> None:
    body = b'{"classes": ["red"], "classes": ["blue", "green"], "slots": 3, "slots": 4}'
    answer = await house.client.put("/tenants/twice", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201
    told = (await house.client.get("/tenants/twice")).json()
    assert ([one["name"] for one in told["classes"]], told["slots"]) == (["blue", "green"], 4)


def _form(parts: int, *, head: bytes = b"", body: bytes = b"x", name: bytes = b"images", file: bool = True) -> bytes:
    where = b'; filename="a.png"' if file else b""
    one = (
        b'--x\r\nContent-Disposition: form-data; name="'
        + name
        + b'"'
        + where
        + b"\r\n"
        + head
        + b"\r\n"
        + body
        + b"\r\n"
    )
    return one * parts + b"--x--\r\n"


@pytest.mark.parametrize(
    ("body", "slug"),
    [
        (_form(20_000), "too-many-images"),
        (_form(20_000, file=False), "invalid-request"),
        (_form(1, head=b"X: y\r\n" * 100_000), "invalid-request"),
        (_form(1, head=b"X: " + b"y" * 1_000_000 + b"\r\n"), "invalid-request"),
        (_form(1, name=b"n" * 1_000_000), "invalid-request"),
        (_form(1, body=b"x" * 3_000_000, name=b"label", file=False), "invalid-request"),
        (b"--x\r\n" * 100_000, "invalid-request"),
        (b"x" * 1_000_000, "invalid-request"),
    ],
    ids=["files", "fields", "part headers", "part header", "part name", "long field", "boundaries", "preamble"],
)
@pytest.mark.parametrize("path", ["/classify", "/memory/static"])
async def test_no_multipart_body_costs_more_than_its_bytes(house: House, path: str, body: bytes, slug: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(await soon(house.client.post(path, content=body, headers=headers)), slug)


@pytest.mark.parametrize("boundary", ["x" * 10_000, "", '"', "a b", "é", "x; boundary=y", "-"])
async def test_no_boundary_is_a_fault_of_ours(house: House, boundary: str) -> None:
    headers = [(b"Content-Type", f"multipart/form-data; boundary={boundary}".encode())]
    answer = await soon(house.client.post("/classify", content=_form(1), headers=headers))
    assert answer.status_code in {422, 415}


@pytest.mark.parametrize("count", [1000, 6000])
async def test_many_query_parameters_are_refused_or_ignored_at_once(house: House, count: int) -> None:
    query = "&".join(f"a{at}=1" for at in range(count))
    assert (await soon(house.client.get(f"/memory?{query}"))).status_code == 200
    problem(await soon(house.client.post(f"/classify?{query}", content=picture())), "invalid-request")


# Images ---------------------------------------------------------------------------------------------------------------


def _png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes], colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), *more, (b"IDAT", data), (b"IEND", b""))
    whole = (
        struct.pack(">I", len(own)) + kind + own + struct.pack(">I", zlib.crc32(kind + own)) for kind, own in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def _file(form: str, size: tuple[int, int], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("L", size).save(file, form, **options)
    return file.getvalue()


BOMBS: dict[str, tuple[bytes, str]] = {
    "png of more pixels than are allowed": (_png(50_000, 50_000, zlib.compress(bytes(100))), "image-too-large"),
    "png of the largest size there is": (_png(2**31 - 1, 2**31 - 1, b""), "image-too-large"),
    "png of no size": (_png(0, 0, b""), "image-unreadable"),
    "png whose text unpacks to much": (
        _png(1, 1, zlib.compress(bytes(4)), (b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))),
        "image-unreadable",
    ),
    "png whose profile unpacks to much": (
        _png(1, 1, zlib.compress(bytes(4)), (b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000)))),
        "",
    ),
    "png with more behind its pixels": (_png(1, 1, zlib.compress(bytes(100_000_000))), ""),
    "gif of more pixels than are allowed": (_file("GIF", (8000, 8000)), "image-too-large"),
    "gif that says less than its frame": (
        _file("GIF", (2, 2))[:6] + struct.pack("<HH", 60_000, 60_000) + _file("GIF", (2, 2))[10:],
        "image-too-large",
    ),
    "webp of more pixels than are allowed": (_file("WEBP", (8000, 8000), lossless=True), "image-too-large"),
    "tiff of more pixels than are allowed": (
        _file("TIFF", (20_000, 20_000), compression="tiff_lzw"),
        "image-too-large",
    ),
    "tiff that points to itself": (
        b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\x01\0\0\0\x01\0\0\0\x08\0\0\0",
        "image-unreadable",
    ),
    "bmp of more pixels than are allowed": (
        _file("BMP", (4, 4))[:18] + struct.pack("<ii", 2**20, 2**20) + _file("BMP", (4, 4))[26:],
        "image-too-large",
    ),
    "jpeg of more pixels than are allowed": (_file("JPEG", (8000, 8000)), "image-too-large"),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_no_image_unpacks_to_more_than_is_allowed(build: Build, name: str) -> None:
    house = await build(image_formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
    await house.put()
    data, slug = BOMBS[name]
    assert len(data) < 3 << 20
    answer = await soon(house.classify(data))
    if slug:
        problem(answer, slug)
    else:
        assert answer.status_code in {200, 422}


@pytest.mark.parametrize(
    "data",
    [
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file",
        b"%PDF-1.7\n",
        b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR.",
        b"push graphic-context\nfill 'url(https://x/)'\n",
        b"http://127.0.0.1:1/a.png",
        b"file:///etc/passwd",
    ],
    ids=["svg", "eps", "pdf", "pickle", "mvg", "url", "file"],
)
async def test_no_bytes_make_the_service_run_read_or_fetch_anything(house: House, data: bytes) -> None:
    answer = await house.classify(data)
    assert answer.status_code in {415, 422}
    assert "root:" not in answer.text


async def test_no_url_is_fetched_for_an_image(house: House) -> None:
    for field in ("url", "uri", "path", "href"):
        body = {"images": [{field: "http://127.0.0.1:1/a.png"}]}
        problem(await house.client.post("/classify", json=body), "invalid-request")
    body = {"images": [{"data": "http://127.0.0.1:1/a.png"}]}
    problem(await house.client.post("/classify", json=body), "image-unreadable")


def test_nothing_is_unpickled_on_any_path_that_takes_input() -> None:
    root = Path(__file__).parents[2]
    for file in (*(root / "service").rglob("*.py"), *(root / "core").rglob("*.py")):
        text = file.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib|shelve|marshal)\b", text, re.MULTILINE)
        for call in re.finditer(r"torch\.load\([^)]*\)|np\.load\([^)]*\)", text):
            assert "weights_only=True" in call[0] or "allow_pickle=False" in call[0], (file, call[0])


# Zips -----------------------------------------------------------------------------------------------------------------


def _lying_zip() -> bytes:
    """Return a zip whose directory says that its file is small."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("red/a.png", bytes(50_000_000))
    whole = bytearray(file.getvalue())
    at = whole.rindex(b"PK\x01\x02")
    whole[at + 24 : at + 28] = struct.pack("<I", 1000)
    return bytes(whole)


def _quine_like() -> bytes:
    inner = zipped({"red/1.png": bytes(10_000_000)}, compression=8)
    return zipped({f"red/{at}.zip": inner for at in range(5)}, compression=8)


def _overlapping(count: int) -> bytes:
    """Return a zip whose directory names one file again and again."""
    whole = zipped({"red/1.png": picture("red")})
    at, end = whole.rindex(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")
    entry = whole[at:end]
    tail = struct.pack("<HHII", count, count, count * len(entry), at) + b"\0\0"
    return whole[:at] + entry * count + whole[end : end + 8] + tail


@pytest.mark.parametrize(
    "name",
    [
        "../red/a.png",
        "/red/a.png",
        "red/../../a.png",
        "..\\red\\a.png",
        "C:\\red\\a.png",
        "red/..",
        "//red/a.png",
        "a.png",
    ],
)
async def test_no_path_of_a_zip_leads_out_of_it(house: House, name: str) -> None:
    before = await house.memory()
    problem(await house.upload_zip(zipped({name: picture("red")})), "invalid-request")
    assert await house.memory() == before


@pytest.mark.parametrize(
    ("body", "slugs"),
    [
        (zipped({"red/a.png": bytes(50_000_000)}, compression=8), {"limit-exceeded"}),
        (_lying_zip(), {"invalid-request", "image-unreadable", "image-too-large"}),
        (zipped({f"red/{at}.png": b"" for at in range(2001)}), {"too-many-images"}),
        (_overlapping(2000), {"", "invalid-request"}),
        (_quine_like(), {"limit-exceeded", "image-unreadable"}),
        (zipped({"red/a.png": picture("red")}, compression=zipfile.ZIP_BZIP2), {"invalid-request"}),
        (zipped({"red/a.png": picture("red")}, compression=zipfile.ZIP_LZMA), {"invalid-request"}),
        (zipped({"r\r\ned/a.png": picture("red")}), {"invalid-request", "unknown-class"}),
        (zipped({"nobody/a.png": picture("red")}), {"unknown-class"}),
        (b"PK\x05\x06" + bytes(18), {"invalid-request"}),
        (b"PK\x03\x04" + bytes(100), {"invalid-request"}),
    ],
    ids=["bomb", "lies", "many", "overlaps", "nested", "bzip2", "lzma", "line ends", "stranger", "empty", "broken"],
)
async def test_no_zip_unpacks_to_more_than_is_allowed(house: House, body: bytes, slugs: set[str]) -> None:
    answer = await soon(house.upload_zip(body))
    if answer.status_code < 300:
        assert "" in slugs or all(shot["error"] for shot in answer.json()["shots"]), answer.text[:300]
        return
    assert answer.json()["type"].rpartition("/")[2] in slugs, answer.text[:300]


# Limits by setting ----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], Callable[[House], Any], str]] = {
    "images a call": ({"max_images": 2}, lambda house: house.classify(*[picture()] * 3), "too-many-images"),
    "bytes an image": ({"max_image_bytes": 100}, lambda house: house.classify(picture()), "image-too-large"),
    "bytes a body": ({"max_body_bytes": 100}, lambda house: house.classify(picture()), "body-too-large"),
    "pixels an image": ({"max_image_pixels": 100}, lambda house: house.classify(picture()), "image-too-large"),
    "views": ({"max_views": 2}, lambda house: house.classify(picture(), views=3), "limit-exceeded"),
    "classes": ({"max_classes": 4}, lambda house: house.put("x", classes=list("abcde")), "limit-exceeded"),
    "prompts": (
        {"max_prompts": 2},
        lambda house: house.put("x", classes=[{"name": "a", "prompts": ["b", "c", "d"]}]),
        "limit-exceeded",
    ),
    "characters": ({"max_text_chars": 10}, lambda house: house.put("x", classes=["a" * 11]), ""),
    "shots": ({"max_shots": 1}, lambda house: house.upload("red", picture(), picture(seed=1)), ""),
    "slots": ({"max_slots": 5}, lambda house: house.put("x", slots=6), "limit-exceeded"),
    "tenants": ({"max_tenants": 1}, lambda house: house.put("x"), "limit-exceeded"),
    "formats": (
        {"image_formats": ("PNG",)},
        lambda house: house.classify(picture(form="JPEG")),
        "unsupported-media-type",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_every_limit_is_held_to_and_leaves_no_trace(build: Build, name: str) -> None:
    settings, call, slug = WRONG[name]
    house = await build(**settings)
    await house.put()
    before = await house.memory()
    answer = await soon(call(house))
    assert 400 <= answer.status_code < 500 or (name == "shots" and answer.json()["shots"][1]["error"]), answer.text
    if slug:
        problem(answer, slug)
    if name != "shots":
        assert await house.memory() == before


def test_the_limits_are_those_of_the_design() -> None:
    told = Settings(store="memory")
    assert (told.max_images, told.max_image_bytes, told.max_body_bytes) == (64, 16 << 20, 64 << 20)
    assert (told.max_image_pixels, told.image_formats) == (40_000_000, ("JPEG", "PNG", "WEBP"))
    assert (told.max_classes, told.max_prompts, told.max_text_chars) == (10_000, 128, 256)
    assert (told.max_shots, told.max_slots) == (1000, 256)
