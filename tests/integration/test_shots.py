"""Labelled shots: uploaded one by one or as a zip of folders, listed, deleted; all of a call or none."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import pytest

from tests.support import pictures
from tests.support.fakes import picture
from tests.support.house import Build, House, Json, problem, sound, zipped

RED, GREEN = picture("red", 1), picture("green", 2)


async def test_shots_make_the_static_branch_speak(house: House) -> None:
    (before,) = await house.predictions(picture("red", 7), learn=False)
    answer = await house.upload("red", RED, picture("red", 3))
    assert answer.status_code == 201
    told = answer.json()
    assert list(told) == ["shots", "memory"]
    assert [list(one) for one in told["shots"]] == [["id", "label", "error"]] * 2
    assert [(one["label"], one["error"]) for one in told["shots"]] == [("red", None)] * 2
    memory = await house.memory()
    assert memory["static"]["classes"] == [
        {"label": "red", "count": 2},
        {"label": "green", "count": 0},
        {"label": "blue", "count": 0},
    ]
    assert (told["memory"]["version"], told["memory"]["epoch"]) == (memory["version"], memory["epoch"])
    (after,) = await house.predictions(picture("red", 7), learn=False)
    assert before["readouts"]["static"] is None
    assert after["readouts"]["static"]["label"] == "red"
    assert after["readouts"]["text"] == pytest.approx(before["readouts"]["text"], abs=1e-6)
    assert after["learned"]["entropy"] == pytest.approx(before["learned"]["entropy"], abs=1e-6)


async def test_shots_leave_the_dynamic_slots_alone_with_the_paper_s_method(house: House) -> None:
    await house.put(method="dmn")
    await house.predictions(*[picture("red", seed) for seed in range(3)])
    banks, epoch = await house.banks(), (await house.memory())["epoch"]
    await house.upload("red", RED)
    assert await house.banks() == banks
    assert (await house.memory())["epoch"] == epoch


async def test_the_same_shot_twice_is_one_shot(house: House) -> None:
    first = (await house.upload("red", RED, RED)).json()["shots"]
    before = await house.memory()
    again = (await house.upload("red", RED)).json()["shots"]
    assert {one["id"] for one in first} == {one["id"] for one in again}
    assert await house.memory() == before
    assert len(await house.shots()) == 1


async def test_one_picture_may_be_a_shot_of_two_classes(house: House) -> None:
    ids = {(await house.upload(label, RED)).json()["shots"][0]["id"] for label in ("red", "blue")}
    assert len(ids) == 2
    assert {one["id"] for one in await house.shots()} == ids
    assert [one["label"] for one in await house.shots()] == ["red", "blue"]


async def test_a_bad_shot_gets_its_own_error_and_its_neighbours_are_stored(house: House) -> None:
    series, before = 'dmn_image_errors_total{reason="image-unreadable"}', await house.metrics()
    answer = await house.upload("red", RED, b"", pictures.huge_png(), picture("red", 5))
    assert answer.status_code == 201
    assert (await house.metrics())[series] == before.get(series, 0.0) + 1
    told = answer.json()["shots"]
    assert [one["id"] is None for one in told] == [False, True, True, False]
    sound(told[1]["error"], "image-unreadable")
    sound(told[2]["error"], "image-too-large")
    assert {one["id"] for one in await house.shots()} == {told[0]["id"], told[3]["id"]}


async def test_when_every_shot_is_bad_the_call_fails_and_nothing_is_stored(house: House) -> None:
    before = await house.memory()
    told = problem(await house.upload("red", pictures.animated("GIF"), b"x"), "unsupported-media-type")
    assert [one["index"] for one in told["errors"]] == [0, 1]
    assert await house.memory() == before


def _part(name: str, data: bytes, file: str | None = None) -> bytes:
    told = f'; filename="{file}"' if file else ""
    return b"--x\r\nContent-Disposition: form-data; name=" + f'"{name}"{told}\r\n\r\n'.encode() + data + b"\r\n"


IMAGE = _part("images", RED, "a.png")
BAD_FORMS: dict[str, tuple[bytes, str]] = {
    "no label": (IMAGE, "invalid-request"),
    "two labels": (_part("label", b"red") + _part("label", b"red") + IMAGE, "invalid-request"),
    "an empty label": (_part("label", b"") + IMAGE, "invalid-request"),
    "a blank label": (_part("label", b" \t ") + IMAGE, "invalid-request"),
    "a label as file": (_part("label", b"red", "label.txt") + IMAGE, "invalid-request"),
    "a control character": (_part("label", b"red\x01x") + IMAGE, "invalid-request"),
    "too long": (_part("label", b"r" * 257) + IMAGE, "invalid-request"),
    "far too long": (_part("label", b"r" * 2**21) + IMAGE, "invalid-request"),
    "unknown": (_part("label", b"purple") + IMAGE, "unknown-class"),
    "other case": (_part("label", b"RED") + IMAGE, "unknown-class"),
    "no images": (_part("label", b"red"), "invalid-request"),
    "an image without file name": (_part("label", b"red") + _part("images", RED), "invalid-request"),
    "65 images": (_part("label", b"red") + IMAGE * 65, "too-many-images"),
    "1100 images": (_part("label", b"red") + _part("images", b"x", "a") * 1100, "too-many-images"),
    "an empty image": (_part("label", b"red") + _part("images", b"", "a.png"), "image-unreadable"),
}


@pytest.mark.parametrize(("body", "slug"), BAD_FORMS.values(), ids=BAD_FORMS)
async def test_a_form_that_makes_no_sense_stores_nothing(house: House, body: bytes, slug: str) -> None:
    before = await house.memory()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(await house.client.post("/memory/static", content=body + b"--x--\r\n", headers=headers), slug)
    assert await house.memory() == before


@pytest.mark.parametrize("label", [b"\xff\xfe", b"caf\xe9", b"\xc3"])
async def test_a_label_that_is_no_utf_8_is_refused_and_never_guessed(house: House, label: bytes) -> None:
    await house.put(classes=["café", "ÿþ", "Ã", "red"])  # what a guess would make of them
    before = await house.memory()
    body = _part("label", label) + IMAGE + b"--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(await house.client.post("/memory/static", content=body, headers=headers), "invalid-request")
    assert await house.memory() == before


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", "utf-16", "utf-7", "latin-1", "no-such"])
async def test_no_charset_makes_another_label_of_a_label(house: House, charset: str) -> None:
    label = "blü+AOk-e"  # which is another text in each of them
    await house.put(classes=[label, "red"])
    body = _part("label", label.encode()) + IMAGE + b"--x--\r\n"
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    answer = await house.client.post("/memory/static", content=body, headers={"Content-Type": kind})
    if answer.status_code == 201:
        assert [one["label"] for one in answer.json()["shots"]] == [label]
    else:
        problem(answer, "invalid-request")


@pytest.mark.parametrize("kind", [None, "image/png", "application/json", "text/plain", "application/octet-stream"])
async def test_shots_of_another_content_type_are_refused(house: House, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    problem(await house.client.post("/memory/static", content=RED, headers=headers), "unsupported-media-type")


async def test_a_class_holds_no_more_shots_than_the_limit(build: Build) -> None:
    house = await build(max_shots=3)
    await house.put()
    assert (await house.upload("red", picture("red", 1), picture("red", 2))).status_code == 201
    before = await house.memory(), await house.shots()
    problem(await house.upload("red", picture("red", 3), picture("red", 4)), "limit-exceeded")
    assert (await house.memory(), await house.shots()) == before
    assert (await house.upload("red", picture("red", 1), picture("red", 3))).status_code == 201
    assert (await house.upload("green", GREEN)).status_code == 201


async def test_a_tenant_holds_no_more_bytes_than_the_limit(build: Build) -> None:
    house = await build(tenant_max_bytes=3 * 2 * 195)
    await house.put()
    await house.predictions(picture("red", 9))
    before = await house.memory()
    problem(await house.upload("red", *[picture("red", seed) for seed in range(3)]), "limit-exceeded")
    assert await house.memory() == before
    assert (await house.upload("red", picture("red", 1), picture("red", 2))).status_code == 201
    assert await house.outcomes(picture("red", 8)) == ["skipped"]
    assert (await house.memory())["bytes"] == 3 * 2 * 195


async def test_kept_images_count_against_the_limit(build: Build) -> None:
    house = await build(tenant_max_bytes=2 * 195 + len(RED))
    await house.put(retention="images")
    assert (await house.upload("red", RED)).status_code == 201
    assert (await house.memory())["bytes"] == 2 * 195 + len(RED)
    problem(await house.upload("red", picture("red", 2)), "limit-exceeded")


async def test_a_shot_is_deleted_by_its_id(house: House) -> None:
    first, second = (one["id"] for one in (await house.upload("red", RED, picture("red", 3))).json()["shots"])
    epoch = (await house.memory())["epoch"]
    answer = await house.client.delete(f"/memory/static/{first}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert [one["id"] for one in await house.shots()] == [second]
    assert (await house.memory())["epoch"] > epoch
    problem(await house.client.delete(f"/memory/static/{first}"), "unknown-shot")
    assert (await house.client.delete(f"/memory/static/{second}")).status_code == 204
    (one,) = await house.predictions(picture("red", 7))
    assert one["readouts"]["static"] is None


async def test_all_shots_of_a_label_are_deleted_at_once(house: House) -> None:
    await house.upload("red", RED, picture("red", 3))
    await house.upload("green", GREEN)
    assert (await house.client.delete("/memory/static", params={"label": " red "})).status_code == 204
    assert [one["label"] for one in await house.shots()] == ["green"]
    assert (await house.client.delete("/memory/static", params={"label": "red"})).status_code == 204


async def test_a_deletion_that_names_nothing_is_refused(house: House) -> None:
    await house.upload("red", RED)
    before = await house.memory()
    problem(await house.client.delete("/memory/static"), "invalid-request")
    problem(await house.client.delete("/memory/static", params={"label": ""}), "invalid-request")
    problem(await house.client.delete("/memory/static", params={"label": "purple"}), "unknown-class")
    problem(await house.client.delete("/memory/static/purple"), "unknown-shot")
    assert await house.memory() == before


async def test_shots_are_listed_class_after_class_page_by_page(house: House) -> None:
    for label in ("blue", "red"):
        await house.upload(label, *[picture(label, seed) for seed in range(3)])
    whole = await house.shots()
    assert [one["label"] for one in whole] == ["red"] * 3 + ["blue"] * 3
    found: list[Json] = []
    query: dict[str, Any] = {"limit": 4}
    while True:
        page = (await house.client.get("/memory/static", params=query)).json()
        found += page["items"]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert found == whole


# Zips of folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["application/zip", "application/x-zip-compressed", "multipart"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
async def test_a_zip_of_folders_is_labelled_by_its_folders(house: House, kind: str, compression: int) -> None:
    body = zipped(
        {
            "red/": b"",
            "red/1.png": RED,
            "red/2.png": picture("red", 3),
            "shots/green/a.png": GREEN,
            "__MACOSX/red/._1.png": b"fork",
            "red/.DS_Store": b"finder",
            "blue/Thumbs.db": b"thumbs",
        },
        compression,
    )
    if kind == "multipart":
        answer = await house.client.post("/memory/static", files={"images": ("shots.zip", body, "application/zip")})
    else:
        answer = await house.client.post("/memory/static", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 201, answer.text
    assert [one["label"] for one in answer.json()["shots"]] == ["red", "red", "green"]
    assert sorted(one["label"] for one in await house.shots()) == ["green", "red", "red"]


async def test_a_zip_may_hold_more_images_than_a_call_and_than_the_queue(build: Build) -> None:
    house = await build(max_images=4, queue_images=6, batch_images=4)
    await house.put()
    answer = await house.upload_zip(zipped({f"red/{seed}.png": picture("red", seed) for seed in range(15)}))
    assert answer.status_code == 201, answer.text
    assert len(await house.shots()) == 15


async def test_a_bad_image_in_a_zip_gets_its_own_error(house: House) -> None:
    answer = await house.upload_zip(zipped({"red/1.png": RED, "red/2.png": b"", "green/3.png": pictures.text()}))
    told = answer.json()["shots"]
    assert [one["error"] is None for one in told] == [True, False, False]
    assert len(await house.shots()) == 1


def _encrypted(body: bytes) -> bytes:
    """Return the zip with every entry marked as encrypted."""
    at = 0
    while (at := body.find(b"PK\x03\x04", at)) >= 0:
        body = body[: at + 6] + b"\x01" + body[at + 7 :]
        at += 4
    at = body.index(b"PK\x01\x02")
    return body[: at + 8] + b"\x01" + body[at + 9 :]


def _patched(body: bytes, offset: int, value: bytes) -> bytes:
    """Return the zip with bytes of its first directory entry changed."""
    at = body.index(b"PK\x01\x02") + offset
    return body[:at] + value + body[at + len(value) :]


def _far_away() -> bytes:
    """Return a zip whose only entry lies at an offset that no file can have."""
    body = zipped({"red/1.png": b"x"})
    at = body.index(b"PK\x01\x02")
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
    entry = bytearray(body[at : body.index(b"PK\x05\x06")])
    entry[30:32] = struct.pack("<H", len(extra))
    entry[42:46] = b"\xff" * 4
    end = bytearray(body[body.index(b"PK\x05\x06") :])
    end[12:16] = struct.pack("<I", len(entry) + len(extra))
    return body[:at] + bytes(entry) + extra + bytes(end)


def _broken_inside(compression: int, after: int = 0) -> bytes:
    """Return a zip of one compressed file that holds garbage, `after` bytes from its start."""
    body = zipped({"red/1.png": bytes(range(256)) * 8}, compression)
    at = body.index(b"red/1.png") + len("red/1.png") + after
    return body[:at] + b"\xff" * 12 + body[at + 12 :]


FINE_ZIP = zipped({"red/1.png": RED})
BAD_ZIPS: dict[str, tuple[bytes, str]] = {
    "not a zip": (RED, "invalid-request"),
    "nothing": (b"", "invalid-request"),
    "empty": (zipped({}), "invalid-request"),
    "only left-overs": (zipped({"__MACOSX/red/1.png": RED, "red/.DS_Store": b"x"}), "invalid-request"),
    "only folders": (zipped({"red/": b""}), "invalid-request"),
    "cut off": (FINE_ZIP[:-30], "invalid-request"),
    "cut in the middle": (FINE_ZIP[: len(FINE_ZIP) // 2], "invalid-request"),
    "wrong checksum": (_patched(FINE_ZIP, 16, b"\0\0\0\0"), "invalid-request"),
    "false size": (_patched(FINE_ZIP, 24, struct.pack("<I", 10)), "invalid-request"),
    "encrypted": (_encrypted(FINE_ZIP), "invalid-request"),
    "unknown method": (_patched(FINE_ZIP, 10, b"\x63\0"), "invalid-request"),
    "offset beyond all": (_far_away(), "invalid-request"),
    "broken deflate": (_broken_inside(zipfile.ZIP_DEFLATED), "invalid-request"),
    "broken bzip2": (_broken_inside(zipfile.ZIP_BZIP2), "invalid-request"),
    "broken lzma": (_broken_inside(zipfile.ZIP_LZMA), "invalid-request"),
    "broken lzma properties": (_broken_inside(zipfile.ZIP_LZMA, 4), "invalid-request"),
    "broken lzma data": (_broken_inside(zipfile.ZIP_LZMA, 9), "invalid-request"),
    "out of it further down": (zipped({"red/../../red/2.png": RED}), "invalid-request"),
    "unknown folder": (zipped({"red/1.png": RED, "purple/1.png": RED}), "unknown-class"),
    "folder of blanks": (zipped({"  /1.png": RED}), "invalid-request"),
    "control character": (zipped({"r\x01d/1.png": RED}), "invalid-request"),
    "every image bad": (zipped({"red/1.png": b"", "red/2.png": b""}), "image-unreadable"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("body", "slug"), BAD_ZIPS.values(), ids=BAD_ZIPS)
async def test_a_zip_that_makes_no_sense_stores_nothing(house: House, body: bytes, slug: str) -> None:
    before = await house.memory()
    problem(await house.upload_zip(body), slug)
    assert await house.memory() == before


async def test_a_zip_of_too_many_files_or_bytes_is_refused_before_it_is_unpacked(build: Build) -> None:
    house = await build(max_zip_images=5, max_zip_bytes=20_000)
    await house.put()
    before, seen = await house.memory(), await house.metrics()
    problem(await house.upload_zip(zipped({f"red/{i}.png": b"x" for i in range(6)})), "too-many-images")
    problem(await house.upload_zip(zipped({f"red/{i}.png": bytes(5001) for i in range(4)})), "limit-exceeded")
    decode = 'dmn_stage_duration_seconds_count{stage="decode"}'
    assert (await house.metrics())[decode] == seen[decode]
    assert await house.memory() == before


async def test_an_image_of_a_zip_is_held_to_the_limit_of_an_image(build: Build) -> None:
    house = await build(max_image_bytes=4 * len(RED))
    await house.put()
    body = zipped({"red/1.png": RED, "red/2.png": RED + bytes(4 * len(RED))})
    first, second = (await house.upload_zip(body)).json()["shots"]
    assert first["error"] is None
    sound(second["error"], "image-too-large")


async def test_a_zip_inside_a_zip_is_an_unreadable_image(house: House) -> None:
    problem(await house.upload_zip(zipped({"red/inner.zip": FINE_ZIP})), "image-unreadable")


async def test_the_same_file_name_twice_in_a_zip_is_read_twice(house: House) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("red/1.png", RED)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("red/1.png", picture("red", 3))
    assert len((await house.upload_zip(stream.getvalue())).json()["shots"]) == 2
    assert len(await house.shots()) == 2
