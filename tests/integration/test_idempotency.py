"""One key, one call: retries get the first answer back and teach nothing twice."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable

import httpx
import pytest

from tests.support.fakes import picture
from tests.support.house import PATIENCE_S, Build, GatedEncoder, House, problem, soon

KEY = {"Idempotency-Key": "k-1"}

Call = Callable[[House, dict[str, str]], Awaitable[httpx.Response]]

CALLS: dict[str, Call] = {
    "classify": lambda house, headers: house.classify(picture("red", 1), b"", headers=headers),
    "shots": lambda house, headers: house.upload("red", picture("red", 1), headers=headers),
    "reset": lambda house, headers: house.client.post(
        "/admin/memory/reset", json={"scope": "dynamic"}, headers=headers
    ),
    "classes": lambda house, headers: house.client.post(
        "/tenants/default/classes", json={"classes": ["white"]}, headers=headers
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_retry_gets_the_same_answer_and_changes_nothing(house: House, call: Call) -> None:
    first = await call(house, KEY)
    assert first.status_code in {200, 201}
    before = await house.memory(), await house.shots()
    again = await call(house, KEY)
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert (await house.memory(), await house.shots()) == before


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_calls_with_one_key_at_once_are_done_once(house: House, call: Call) -> None:
    answers = await asyncio.gather(*(call(house, KEY) for _ in range(4)))
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].status_code in {200, 201}


async def test_a_retry_after_the_memory_moved_on_still_gets_the_first_answer(house: House) -> None:
    first = await house.classify(picture("red", 1), headers=KEY)
    assert first.json()["predictions"][0]["learned"]["outcome"] == "filled"
    await house.predictions(picture("red", 2), picture("blue", 3))
    before = await house.memory()
    assert (await house.classify(picture("red", 1), headers=KEY)).content == first.content
    await house.reset("all")
    assert (await house.classify(picture("red", 1), headers=KEY)).content == first.content
    assert (await house.memory())["dynamic"]["classes"][0]["count"] == 0
    assert before["dynamic"]["classes"][0]["count"] == 2


async def test_the_same_call_in_another_body_is_the_same_call(house: House) -> None:
    image = picture("red", 1)
    first = await house.classify(image, headers=KEY)
    raw = await house.client.post("/classify", content=image, headers=KEY | {"Content-Type": "image/png"})
    in_json = {"images": [{"data": base64.b64encode(image).decode()}]}
    assert first.content == raw.content == (await house.client.post("/classify", json=in_json, headers=KEY)).content


async def test_a_key_used_for_another_call_is_a_conflict_that_does_nothing(house: House) -> None:
    one, other = picture("red", 1), picture("red", 2)
    assert (await house.classify(one, headers=KEY)).status_code == 200
    before = await house.memory(), await house.shots()
    for answer in (
        await house.classify(other, headers=KEY),
        await house.classify(one, one, headers=KEY),
        await house.classify(headers=KEY | {"Content-Type": "image/png"}),
        await house.classify(one, headers=KEY, learn=False),
        await house.classify(one, headers=KEY, top_k=1),
        await house.classify(one, headers=KEY, views=2),
        await house.classify(one, headers=KEY, explain=True),
        await house.upload("red", one, headers=KEY),
        await house.client.post("/admin/memory/reset", json={"scope": "all"}, headers=KEY),
        await house.client.post("/tenants/default/classes", json={"classes": ["white"]}, headers=KEY),
    ):
        problem(answer, "idempotency-conflict" if b"conflict" in answer.content else "image-unreadable")
    assert (await house.memory(), await house.shots()) == before


async def test_one_byte_at_the_border_of_two_images_makes_another_call(house: House) -> None:
    assert (await house.classify(picture("red", 1), b"ab", b"c", headers=KEY)).status_code == 200
    problem(await house.classify(picture("red", 1), b"a", b"bc", headers=KEY), "idempotency-conflict")


async def test_a_label_makes_another_call(house: House) -> None:
    assert (await house.upload("red", picture("red", 1), headers=KEY)).status_code == 201
    problem(await house.upload("green", picture("red", 1), headers=KEY), "idempotency-conflict")
    assert len(await house.shots()) == 1


@pytest.mark.parametrize("key", [b"", b"a" * 256, "é".encode(), "é".encode("latin-1"), b"a\tb", b"\x7f"])
async def test_a_key_of_no_sense_is_refused_with_nothing_done(house: House, key: bytes) -> None:
    before = await house.memory(), await house.shots()
    headers = [(b"Idempotency-Key", key), (b"Content-Type", b"image/png")]
    problem(await house.client.post("/classify", content=picture(), headers=headers), "invalid-request")
    answer = await house.client.post("/admin/memory/reset", json={"scope": "all"}, headers=headers[:1])
    problem(answer, "invalid-request")
    assert (await house.memory(), await house.shots()) == before


async def test_whoever_waits_for_the_first_call_of_a_key_waits_no_longer_than_its_deadline(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder)
    await house.put()
    encoder.shut()
    first = asyncio.create_task(house.classify(picture("red"), headers=KEY))
    await encoder.reached()
    try:
        answer = await soon(house.classify(picture("red"), headers=KEY | {"X-Deadline-Ms": "20"}), PATIENCE_S / 2)
    finally:
        encoder.gate.set()
        assert (await first).status_code == 200
    problem(answer, "deadline-exceeded")
