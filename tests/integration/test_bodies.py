"""Whatever is sent to `/classify` is answered, or refused by name with nothing half-written."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from tests.support import pictures
from tests.support.fakes import picture
from tests.support.house import Build, House, problem, sound

BASE64 = {"data": base64.b64encode(picture()).decode()}
FINE = {
    "jpeg": pictures.jpeg(),
    "webp": pictures.webp(),
    "cmyk": pictures.cmyk_jpeg(),
    "cmyk without a marker": pictures.plain_cmyk_jpeg(),
    "16 bits": pictures.grey16_png(),
    "rgba": pictures.rgba_png(),
    "grey and alpha": pictures.la_png(),
    "palette": pictures.palette_png(),
    "one bit": pictures.bilevel_png(),
    "one pixel": pictures.one_pixel(),
    "one pixel jpeg": pictures.one_pixel("JPEG"),
    "animated webp": pictures.animated("WEBP"),
    "turned": pictures.turned(6),
    "broken exif": pictures.broken_exif_jpeg(),
}
BAD = {
    "0 bytes": (b"", "image-unreadable"),
    "truncated jpeg": (pictures.truncated(pictures.jpeg(), 0.5), "image-unreadable"),
    "truncated png": (pictures.truncated(pictures.png(), 0.5), "image-unreadable"),
    "text renamed": (pictures.text(), "image-unreadable"),
    "13000 x 13000": (pictures.huge_png(), "image-too-large"),
    "20 MB": (pictures.heavy_png(), "image-too-large"),
    "animated gif": (pictures.animated("GIF"), "unsupported-media-type"),
    "false size": (pictures.claiming_png(4000, 4000), "image-unreadable"),
    "chunks": (pictures.chunked_png(70_000), "image-unreadable"),
}


@pytest.mark.parametrize("image", FINE.values(), ids=FINE)
async def test_an_odd_but_sound_picture_is_answered(house: House, image: bytes) -> None:
    (one,) = await house.predictions(image)
    assert one["label"] in {"red", "green", "blue"}
    assert one["learned"]["outcome"] == "filled"


@pytest.mark.parametrize(("image", "slug"), BAD.values(), ids=BAD)
async def test_a_bad_picture_fails_by_name_however_it_is_sent(house: House, image: bytes, slug: str) -> None:
    before = await house.memory()
    in_json = {"images": [{"data": base64.b64encode(image).decode()}]}
    for answer in (
        await house.classify(image),
        await house.client.post("/classify", content=image, headers={"Content-Type": "image/jpeg"}),
        await house.client.post("/classify", json=in_json),
    ):
        told = problem(answer, slug)
        (own,) = told["errors"]
        assert own["index"] == 0
        sound(own["problem"], slug)
        assert own["problem"]["detail"] == told["detail"]
    assert await house.memory() == before


def test_the_huge_picture_is_a_small_file() -> None:
    assert len(BAD["13000 x 13000"][0]) < 2**15


async def test_the_first_frame_of_a_gif_is_answered_where_gif_is_allowed(build: Build) -> None:
    house = await build(image_formats=("GIF",))
    await house.put()
    (one,) = await house.predictions(pictures.animated("GIF"))
    assert one["label"] == "red"


async def test_a_bad_image_gets_its_own_error_and_its_neighbours_their_answers(house: House) -> None:
    good = [picture("red", 1), picture("green", 2), picture("blue", 3)]
    alone = await house.predictions(*good, learn=False)
    sent = [good[0], b"", good[1], pictures.text(), good[2]]
    answer = await house.classify(*sent, learn=False)
    assert answer.status_code == 200
    told = answer.json()["predictions"]
    assert [one["label"] for one in told] == ["red", None, "green", None, "blue"]
    for i in (1, 3):
        sound(told[i]["error"], "image-unreadable")
        assert told[i]["error"]["request_id"] == answer.headers["x-request-id"]
        assert all(value is None for name, value in told[i].items() if name != "error")
    assert [told[i]["score"] for i in (0, 2, 4)] == pytest.approx([one["score"] for one in alone], abs=1e-5)
    assert all(told[i]["error"] is None for i in (0, 2, 4))


async def test_when_every_image_fails_the_call_fails_with_the_first_ones_problem(house: House) -> None:
    before = await house.memory()
    told = problem(await house.classify(pictures.animated("GIF"), b"", pictures.huge_png()), "unsupported-media-type")
    slugs = ("unsupported-media-type", "image-unreadable", "image-too-large")
    assert [one["index"] for one in told["errors"]] == [0, 1, 2]
    for one, slug in zip(told["errors"], slugs, strict=True):
        sound(one["problem"], slug)
    assert await house.memory() == before


async def test_bad_base64_is_the_fault_of_its_image_alone(house: House) -> None:
    answer = await house.client.post("/classify", json={"images": [{"data": "é$"}, BASE64, {"data": "YQ"}]})
    first, second, third = answer.json()["predictions"]
    sound(first["error"], "image-unreadable")
    assert second["label"] == "red"
    sound(third["error"], "image-unreadable")


@pytest.mark.parametrize("count", [65, 300, 1200, 3000])
@pytest.mark.parametrize("kind", ["multipart", "json"])
async def test_more_images_than_a_call_may_hold_are_refused_whole(house: House, count: int, kind: str) -> None:
    before, seen = await house.memory(), await house.metrics()
    if kind == "json":
        answer = await house.client.post("/classify", json={"images": [{"data": "YQ=="}] * count})
    else:
        answer = await house.classify(*[b"x"] * count)
    problem(answer, "too-many-images")
    decode = 'dmn_stage_duration_seconds_count{stage="decode"}'
    assert (await house.metrics())[decode] == seen[decode]
    assert await house.memory() == before


async def test_as_many_images_as_a_call_may_hold_are_answered(house: House) -> None:
    assert len(await house.predictions(*[picture("red", seed, size=(8, 8)) for seed in range(64)])) == 64


async def test_all_three_bodies_give_the_same_answer(house: House) -> None:
    image = picture("green", 5)
    raw = await house.client.post(
        "/classify?learn=false", content=image, headers={"Content-Type": "IMAGE/anything; a=b"}
    )
    encoded = {"images": [{"data": base64.b64encode(image).decode()}]}
    in_json = await house.client.post("/classify", params={"learn": False}, json=encoded)
    in_parts = await house.classify(image, learn=False)
    assert raw.json() == in_json.json() == in_parts.json()


BODIES: dict[str, tuple[str | None, bytes, str]] = {
    "nothing at all": (None, b"", "unsupported-media-type"),
    "bytes without a type": (None, picture(), "unsupported-media-type"),
    "text": ("text/plain", b"cat", "unsupported-media-type"),
    "a form": ("application/x-www-form-urlencoded", b"images=cat", "unsupported-media-type"),
    "bytes of any kind": ("application/octet-stream", picture(), "unsupported-media-type"),
    "a type of no sense": (";;;", picture(), "unsupported-media-type"),
    "empty json": ("application/json", b"", "invalid-request"),
    "broken json": ("application/json", b'{"images": [', "invalid-request"),
    "json that is no utf-8": ("application/json", b'{"images": [{"data": "\xff\xfe"}]}', "invalid-request"),
    "json with half a pair": ("application/json", b'{"images": [{"data": "\\ud800"}]}', "invalid-request"),
    "json that is too deep": ("application/json", b'{"images": ' + b"[" * 100_000, "invalid-request"),
    "json objects too deep": ("application/json", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "invalid-request"),
    "a json list": ("application/json", b"[]", "invalid-request"),
    "a json null": ("application/json", b"null", "invalid-request"),
    "json without images": ("application/json", b"{}", "invalid-request"),
    "json with no image": ("application/json", b'{"images": []}', "invalid-request"),
    "json with more": ("application/json", b'{"images": [{"data": "", "url": "http://x"}]}', "invalid-request"),
    "json with a number": ("application/json", b'{"images": [{"data": 1}]}', "invalid-request"),
    "multipart without a boundary": ("multipart/form-data", b"--x\r\n", "invalid-request"),
    "multipart of nothing": ("multipart/form-data; boundary=x", b"", "invalid-request"),
    "multipart of garbage": ("multipart/form-data; boundary=x", b"garbage" * 50, "invalid-request"),
    "a part without a file name": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\nabc\r\n--x--\r\n',
        "invalid-request",
    ),
    "a part without a name": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; filename="a"\r\n\r\nabc\r\n--x--\r\n',
        "invalid-request",
    ),
    "a part without a disposition": (
        "multipart/form-data; boundary=x",
        b"--x\r\n\r\nabc\r\n--x--\r\n",
        "invalid-request",
    ),
    "a part of another name": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n--x--\r\n',
        "invalid-request",
    ),
    "a field beyond reason": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\n' + b"a" * 2**21 + b"\r\n--x--\r\n",
        "invalid-request",
    ),
}


@pytest.mark.parametrize(("kind", "body", "slug"), BODIES.values(), ids=BODIES)
async def test_a_body_that_makes_no_sense_is_refused(house: House, kind: str | None, body: bytes, slug: str) -> None:
    before = await house.memory()
    headers = {} if kind is None else {"Content-Type": kind}
    problem(await house.client.post("/classify", content=body, headers=headers), slug)
    assert await house.memory() == before


@pytest.mark.parametrize("end", [b"", b"\r\n--x", b"\r\n--y--\r\n"])
async def test_a_multipart_body_that_stops_short_is_refused_whole(house: House, end: bytes) -> None:
    before = await house.memory()
    start = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (start + picture() + end, start + picture("red") + b"\r\n" + start + picture("blue") + end):
        problem(await house.client.post("/classify", content=body, headers=headers), "invalid-request")
    assert await house.memory() == before


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "utf-16", "rot13", "base64", "no-such", "utf-7"])
async def test_no_charset_of_a_multipart_body_is_a_fault_of_ours(house: House, charset: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="label"\r\n\r\n\xff.\xfe-\xe9\r\n--x--\r\n'
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    for path in ("/classify", "/memory/static"):
        problem(await house.client.post(path, content=body, headers={"Content-Type": kind}), "invalid-request")


BAD_QUERIES: list[dict[str, Any]] = [
    {"top_k": 0},
    {"top_k": -1},
    {"top_k": 10_001},
    {"top_k": "many"},
    {"top_k": "1" * 5000},
    {"top_k": 1.5},
    {"learn": "maybe"},
    {"explain": "2"},
    {"views": 0},
    {"views": "NaN"},
    {"tenant": "not a name"},
    {"tenant": ""},
]


@pytest.mark.parametrize("query", BAD_QUERIES, ids=str)
async def test_a_bad_query_fails_the_call_with_nothing_decoded(house: House, query: dict[str, Any]) -> None:
    before, seen = await house.memory(), await house.metrics()
    files = [("images", ("a.png", picture(), "image/png"))]
    problem(await house.client.post("/classify", params=query, files=files), "invalid-request")
    decode = 'dmn_stage_duration_seconds_count{stage="decode"}'
    assert (await house.metrics())[decode] == seen[decode]
    assert await house.memory() == before


async def test_more_views_than_allowed_are_a_limit_exceeded(house: House) -> None:
    problem(await house.classify(picture(), views=65), "limit-exceeded")


async def test_images_times_views_beyond_the_whole_queue_are_refused_for_good(build: Build) -> None:
    house = await build(queue_images=40, batch_images=8)
    await house.put()
    told = problem(await house.classify(picture(), picture(), views=21), "invalid-request")
    assert "retry_after" not in told
    assert len(await house.predictions(picture(), views=40)) == 1


async def test_an_unknown_tenant_is_told_so_with_nothing_decoded(house: House) -> None:
    seen = await house.metrics()
    problem(await house.classify(picture(), tenant="nobody"), "unknown-tenant")
    decode = 'dmn_stage_duration_seconds_count{stage="decode"}'
    assert (await house.metrics())[decode] == seen[decode]


async def test_a_tenant_without_classes_cannot_classify(build: Build) -> None:
    house = await build()
    problem(await house.classify(picture()), "no-classes")


async def test_header_and_query_name_the_same_tenant_or_are_refused(house: House) -> None:
    await house.put("other", classes=["white", "red"])
    files = [("images", ("a.png", picture("white"), "image/png"))]

    async def call(query: dict[str, str], headers: dict[str, str]) -> httpx.Response:
        return await house.client.post("/classify", params=query, files=files, headers=headers)

    by_query = await call({"tenant": "other", "learn": "false"}, {})
    by_header = await call({"learn": "false"}, {"X-Tenant": "other"})
    by_both = await call({"tenant": "other", "learn": "false"}, {"X-Tenant": "other"})
    assert by_query.json() == by_header.json() == by_both.json()
    assert by_query.json()["tenant"] == "other"
    assert by_query.json()["predictions"][0]["label"] == "white"
    problem(await call({"tenant": "other"}, {"X-Tenant": "default"}), "invalid-request")


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", ".a", "a" * 65, "a/b", "é".encode("latin-1").decode("latin-1")])
async def test_a_bad_tenant_name_in_the_header_is_refused(house: House, name: str) -> None:
    headers = [(b"X-Tenant", name.encode("latin-1")), (b"Content-Type", b"image/png")]
    problem(await house.client.post("/classify", content=picture(), headers=headers), "invalid-request")
    problem(await house.client.get("/memory", headers=headers[:1]), "invalid-request")


async def test_a_body_beyond_the_limit_is_refused_by_its_length(build: Build) -> None:
    house = await build(max_body_bytes=10_000)
    await house.put()
    before = await house.memory()
    for path in ("/classify", "/memory/static", "/admin/memory/reset", "/tenants/default/classes"):
        answer = await house.client.post(path, content=b"x" * 10_001, headers={"Content-Type": "application/json"})
        problem(answer, "body-too-large")
    assert await house.memory() == before


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/classify", "image/png"),
        ("/classify", "application/json"),
        ("/classify", "multipart/form-data; boundary=x"),
        ("/memory/static", "application/zip"),
        ("/memory/static", "multipart/form-data; boundary=x"),
        ("/admin/memory/reset", "application/json"),
        ("/tenants/default/classes", "application/json"),
    ],
)
async def test_a_body_beyond_the_limit_is_refused_as_it_comes(build: Build, path: str, kind: str) -> None:
    house = await build(max_body_bytes=10_000)
    await house.put()

    async def chunks() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(11):
            yield b"y" * 1000

    problem(await house.client.post(path, content=chunks(), headers={"Content-Type": kind}), "body-too-large")


async def test_a_json_body_survives_any_white_space_and_order(house: House) -> None:
    body = json.dumps({"images": [BASE64]}, indent=4).encode()
    headers = {"Content-Type": "application/json; charset=utf-8"}
    answer = await house.client.post("/classify", content=b"\n" + body, headers=headers)
    assert answer.json()["predictions"][0]["label"] == "red"
