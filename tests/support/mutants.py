"""Calls as no client makes them: mutants of images, bodies, headers, queries, paths, and of HTTP itself.

A mutant is made of its seed and number alone, so that one which finds something can be made again. None asks for a
deadline of a few milliseconds, for then 504 is what was asked for.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any
from urllib.parse import quote, urlencode

from PIL import Image

from service.problem_types import PROBLEMS
from tests.support.fakes import picture

TENANT = "mutants"
"""Whose memory the mutants are after; few are meant for another."""

CLASSES = ("red", "green", "blue")

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    """One call. `leaves` says that its caller hangs up as soon as it is sent, so that no answer is one too."""

    kind: str
    method: str = "POST"
    target: str
    headers: Headers = ()
    body: bytes = b""
    raw: bytes = b""
    leaves: bool = False

    def wire(self) -> bytes:
        """Return what goes over the wire: a whole request after which the connection ends, or whatever `raw` is."""
        if self.raw:
            return self.raw
        own = (
            (b"Host", b"test"),
            (b"Connection", b"close"),
            (b"Content-Length", b"%d" % len(self.body)),
            *self.headers,
        )
        head = b"".join(b"%b: %b\r\n" % pair for pair in own)
        return b"%b %b HTTP/1.1\r\n%b\r\n%b" % (self.method.encode(), self.target.encode(), head, self.body)


def mutant(seed: int, number: int, kinds: Sequence[str] = ()) -> Mutant:
    """Return one mutant; kinds, all of them if none is named, take turns."""
    among = tuple(kinds) or tuple(KINDS)
    kind = among[number % len(among)]
    return KINDS[kind](Random(f"{seed}/{kind}/{number}"))


def fault(status: int, content_type: str, body: bytes) -> str:
    """Return what is wrong with an answer in a few words; nothing where it is one, or a proper refusal."""
    if status >= 500 and status != 503:
        return f"answered with {status}"
    if b'"type":"/problems/internal"' in body:
        return "an image failed by a fault of the service"
    if status < 400:
        return ""
    if content_type != "application/problem+json":
        return f"refused with {status} as {content_type or 'nothing'}, not as a problem"
    told = json.loads(body)
    return "" if told["detail"] and told["status"] == status and _known(told) else f"refused with {status} as {told}"


def _known(told: Mapping[str, Any]) -> bool:
    """Return whether a problem is of a type that has a page, or says that it was no HTTP, of which nothing was read."""
    kind = PROBLEMS.get(told["type"].removeprefix("/problems/"))
    if kind is None:
        return told["type"] == "about:blank" and told["status"] in {400, 408, 431}
    return told["status"] == kind.status


# Bytes ----------------------------------------------------------------------------------------------------------------

SMALL = picture("red", 1, size=(6, 5))
_PIECES = (b"\r\n", b"\0", b"--x", b"--x--", b'"', b";", b"PK\1\2", b"\xff" * 8, b"%00", b"\xed\xa0\x80")


def mutated(data: bytes, draw: Random) -> bytes:
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
                out[at : at + length] = draw.choice(_PIECES)
            case _:
                piece = out[at : at + length]
                del out[at : at + length]
                to = draw.randrange(len(out) + 1)
                out[to:to] = piece
    return bytes(out)


# Images ---------------------------------------------------------------------------------------------------------------

_FORMS = ("JPEG", "PNG", "WEBP")
_HEADER = 64
_LARGE = 6000
_SIDES = (0, 1, 7, _LARGE, 16_383, 65_535, 2**31 - 1)
_LENGTHS = (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\1\0\0\0")
_BOMBS = 0.01
"""Share of images that unpack to as many pixels as are allowed, or more."""


@cache
def _image_files() -> list[tuple[str, bytes]]:
    return [(form, picture(colour, 1, form=form, size=(64, 48))) for form in _FORMS for colour in CLASSES]


@cache
def _bombs() -> list[bytes]:
    """Return small files of many pixels: nearly as many as are allowed, and far more."""
    return [_blank("L", _LARGE), _blank("RGB", 6200), _blank("1", 20_000)]


def _blank(mode: str, side: int) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "PNG")
    return file.getvalue()


def damaged(draw: Random) -> bytes:
    """Return an image file that something happened to, now and then nothing."""
    if draw.random() < _BOMBS:
        return draw.choice(_bombs())
    form, data = draw.choice(_image_files())
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data,
        lambda: data[: draw.randrange(len(data))],
        lambda: data + draw.choice((data, draw.randbytes(1000), bytes(100_000), _zipped(red=data))),
        lambda: _declared(form, data, draw.choice(_SIDES), draw.choice(_SIDES)),
        lambda: mutated(data, draw),
        lambda: _flipped(data, draw),
    )
    return draw.choice(ways)()


def _flipped(data: bytes, draw: Random) -> bytes:
    """Return the image with some bits flipped, bytes of its header replaced, or a length in it."""
    out, at = bytearray(data), draw.randrange(_HEADER)
    match draw.randrange(3):
        case 0:
            for _ in range(draw.randint(1, 20)):
                out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
        case 1:
            out[at] = draw.randrange(256)
        case _:
            out[at : at + 4] = draw.choice(_LENGTHS)
    return bytes(out)


def _declared(form: str, data: bytes, width: int, height: int) -> bytes:
    """Return the image with another size in its header, as far as its format can say it."""
    out = bytearray(data)
    if form == "PNG":
        out[16:24] = struct.pack(">II", width, height)
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    elif form == "JPEG":
        at = data.index(b"\xff\xc0")
        out[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    else:
        out[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    return bytes(out)


def _zipped(**images: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for label, data in images.items():
            archive.writestr(zipfile.ZipInfo(f"{label}/1.png"), data, zipfile.ZIP_DEFLATED)  # of no hour of today
    return file.getvalue()


# JSON -----------------------------------------------------------------------------------------------------------------

_LITERALS = {"@deep": "[" * 20_000 + "]" * 20_000, "@objects": '{"a":' * 5000 + "1" + "}" * 5000, "@huge": "9" * 5000}
"""What no value of Python stands for, by what is put in its place until it is text."""

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    0.5,
    1e308,
    10**30,
    math.nan,
    -math.inf,
    "",
    "\x00",
    "\U0001f408",
    "\ud800",
    "{}",
    [],
    {},
    ["red"],
    [[]],
    {"name": "red"},
    "NaN",
    "a" * 300,
    *_LITERALS,
)
_CONFIG: dict[str, Any] = {
    "classes": ["red", {"name": "green", "prompts": ["a green thing"]}, "blue"],
    "templates": ["a {}."],
    "slots": 5,
    "beta": 5.5,
    "weights": [1, 1, 1],
    "learn": True,
    "retention": "features",
}
_BODIES: tuple[tuple[str, str, Any], ...] = (
    ("PUT", f"/tenants/{TENANT}", _CONFIG),
    ("PUT", f"/tenants/{TENANT}", _CONFIG),
    ("POST", f"/tenants/{TENANT}/classes", {"classes": ["white", {"name": "new", "prompts": ["a thing"]}]}),
    ("POST", "/admin/memory/reset", {"scope": "all", "classes": ["red"]}),
    ("POST", "/admin/memory/migration", {"force": True}),
    ("POST", "/classify", {"images": [{"data": base64.b64encode(SMALL).decode()}] * 2}),
)


def changed(value: Any, draw: Random) -> Any:
    """Return the value with some of its parts replaced by odd ones."""
    if draw.random() < 0.2:
        return draw.choice(ODD)
    if isinstance(value, dict):
        out = {name: changed(own, draw) for name, own in value.items() if draw.random() < 0.95}
        return out | ({str(draw.choice(ODD))[:20]: draw.choice(ODD)} if draw.random() < 0.1 else {})
    if isinstance(value, list):
        return [changed(own, draw) for own in value for _ in range(draw.choice((0, 1, 1, 1, 2)))]
    return value


def _text(value: Any, draw: Random) -> bytes:
    """Return JSON, or nearly: with literals that Python has not, doubled keys, and bytes that are no text."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    for name, literal in _LITERALS.items():
        text = text.replace(f'"{name}"', literal)
    if draw.random() < 0.1:
        text = text.replace("{", f'{{"{draw.choice(("classes", "images", "scope", "slots"))}": 1, ', 1)
    data = text.encode(errors="surrogatepass")
    return mutated(data, draw) if draw.random() < 0.2 else data


# Kinds ----------------------------------------------------------------------------------------------------------------


def _headers(content_type: str | bytes, *more: tuple[bytes, bytes]) -> Headers:
    told = content_type.encode() if isinstance(content_type, str) else content_type
    return ((b"Content-Type", told.translate(None, b"\r\n\0")), (b"X-Tenant", TENANT.encode()), *more)


def _image(draw: Random) -> Mutant:
    told = draw.choice(("image/jpeg", "image/png", "image/webp", "image/x", "image/", "application/octet-stream"))
    query = draw.choice(("", "", "?views=3", "?explain=true", "?learn=false"))
    return Mutant(kind="image", target=f"/classify{query}", headers=_headers(told), body=damaged(draw))


def _form(draw: Random) -> Mutant:
    images = [damaged(draw) for _ in range(draw.choice((0, 1, 1, 2, 5)))]
    if draw.random() < 0.02:
        images = [SMALL] * 65  # one more than a call may hold
    parts = [b'Content-Disposition: form-data; name="label"\r\n\r\n' + draw.choice(("red", "none", "\x00")).encode()]
    file = b'Content-Disposition: form-data; name="images"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = (
        b"".join(b"--x\r\n" + part + b"\r\n" for part in (*parts, *(file + image for image in images))) + b"--x--\r\n"
    )
    told = b"multipart/form-data; boundary=x"
    return Mutant(
        kind="form",
        target=draw.choice(("/classify", "/memory/static")),
        headers=_headers(told if draw.random() < 0.8 else mutated(told, draw)),
        body=body if draw.random() < 0.5 else mutated(body, draw),
    )


def _zip(draw: Random) -> Mutant:
    body = _zipped(red=damaged(draw), blue=damaged(draw), **{draw.choice(("green", "..", "none", "\x01")): SMALL})
    body = body if draw.random() < 0.3 else mutated(body, draw)
    return Mutant(kind="zip", target="/memory/static", headers=_headers("application/zip"), body=body)


def _json(draw: Random) -> Mutant:
    method, target, told = draw.choice(_BODIES)
    value = told if draw.random() < 0.2 else changed(told, draw)
    headers = _headers(draw.choice(("application/json",) * 8 + ("text/json", "application/json; charset=utf-7")))
    return Mutant(kind="json", method=method, target=target, headers=headers, body=_text(value, draw))


_NAMES = (
    "X-Tenant",
    "X-Deadline-Ms",
    "Idempotency-Key",
    "X-Request-ID",
    "traceparent",
    "Content-Type",
    "Content-Encoding",
    "Accept",
    "Authorization",
    "Origin",
    "Sec-Fetch-Site",
    "Expect",
    "Range",
    "Cookie",
    "X-Forwarded-For",
)
_VALUES = (
    b"",
    b"default",
    b"60000",
    b"-1",
    b"nan",
    b"1e999",
    b"\xff\xfe",
    b"a" * 5000,
    b"a" * 70_000,
    b"image/png",
    b"text/plain;q=x",
    b"gzip",
    b"'--",
    b"%00",
    b"\t",
    b"00-" + b"f" * 32 + b"-" + b"0" * 16 + b"-01",
    b"Bearer \xe2\x82\xac",
    b"100-continue",
    b"cross-site",
)
_CALLS = (
    ("POST", "/classify"),
    ("GET", "/memory"),
    ("GET", "/memory/static"),
    ("DELETE", "/memory/static"),
    ("GET", "/memory/dynamic/red"),
    ("DELETE", "/memory/dynamic/red/x"),
    ("DELETE", "/memory/static/x"),
    ("GET", "/tenants"),
    ("POST", "/memory/static"),
    ("GET", "/admin/memory/export"),
    ("POST", "/admin/memory/snapshots"),
    ("GET", "/admin/memory/snapshots"),
    ("GET", "/jobs"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
)
_ASKED = ("top_k", "learn", "views", "explain", "tenant", "limit", "cursor", "label", "nothing")


def _call(kind: str, draw: Random, headers: Headers, query: str = "") -> Mutant:
    method, path = draw.choice(_CALLS)
    return Mutant(
        kind=kind,
        method=method,
        target=f"{path}?{query}" if query else path,
        headers=headers,
        body=SMALL if method == "POST" else b"",
    )


def _header(draw: Random) -> Mutant:
    told = [(draw.choice(_NAMES).encode(), draw.choice(_VALUES)) for _ in range(draw.randint(1, 4))]
    return _call("header", draw, tuple(told) + (_headers("image/png") if draw.random() < 0.5 else ()))


def _query(draw: Random) -> Mutant:
    values = (*(str(one) for one in ODD if not isinstance(one, str)), "1", "3", "red", "\x00", "a" * 3000, "\U0001f408")
    pairs = [(draw.choice(_ASKED), draw.choice(values)) for _ in range(draw.randint(1, 4))]
    query = (
        urlencode(pairs) if draw.random() < 0.8 else "&".join(draw.choices(("%", "%ff", "=", "a[]=1", "top_k"), k=3))
    )
    return _call("query", draw, _headers("image/png"), query)


def _path(draw: Random) -> Mutant:
    odd = (
        "..",
        ".",
        "%00",
        "%2e%2e%2f",
        "%ff",
        "%",
        "a" * 300,
        "",
        "red",
        "\x7f",
        quote("\U0001f408"),
        "{tenant}",
        ";a",
    )
    starts = ("/tenants", "/memory/dynamic", "/memory/static", "/jobs", "/admin/memory/snapshots", "/problems", "")
    target = "/".join((draw.choice(starts), *draw.choices(odd, k=draw.randint(0, 3)))) or "/"
    method = draw.choice(("GET", "GET", "DELETE", "POST", "PATCH", "OPTIONS", "TRACE"))
    return Mutant(kind="path", method=method, target=target, headers=_headers("application/json"))


def _tenant(draw: Random) -> Mutant:
    names = (
        b"",
        b"nobody",
        b"..",
        b"a/b",
        b"a b",
        b"a" * 300,
        b"{}",
        b"*",
        b"\xc3\xa9",
        b"%2e",
        b"\t",
        b"1;2",
        b"a\0b",
    )
    told = [(b"X-Tenant", draw.choice(names)) for _ in range(draw.choice((1, 1, 1, 2)))]
    query = draw.choice(("", "", "tenant=nobody", "tenant=%00", f"tenant={TENANT}"))
    return _call("tenant", draw, ((b"Content-Type", b"image/png"), *told), query)


_HEAD = b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nX-Tenant: %b\r\n" % TENANT.encode()


def _wire(draw: Random) -> Mutant:
    whole = draw.choice((_image, _form, _json, _header))(draw).wire()
    size = b"%x" % len(SMALL)
    raw = draw.choice((
        mutated(whole, draw),
        mutated(whole, draw),
        whole[: draw.randrange(1, len(whole))],
        whole.replace(b"\r\n", b"\n"),
        whole.replace(b"HTTP/1.1", draw.choice((b"HTTP/1.0", b"HTTP/9.9", b"", b"HTTP/1.1 x"))),
        whole + whole,
        draw.randbytes(draw.choice((1, 100, 3000))),
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
        _HEAD + b"Content-Length: %b\r\n\r\n" % draw.choice((b"-1", b"9" * 30, b"1", b"0x10")) + SMALL,
        _HEAD + b"Transfer-Encoding: chunked\r\n\r\n%b\r\n%b\r\n0\r\n\r\n" % (draw.choice((size, b"f" * 20)), SMALL),
        _HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n%b\r\n%b\r\n0\r\n\r\n" % (size, SMALL),
    ))  # fmt: skip
    return Mutant(kind="wire", target="", raw=raw, leaves=True)


KINDS: Mapping[str, Callable[[Random], Mutant]] = {
    "image": _image,
    "form": _form,
    "zip": _zip,
    "json": _json,
    "header": _header,
    "query": _query,
    "path": _path,
    "tenant": _tenant,
    "wire": _wire,
}
"""What makes the mutants of each kind."""
